"""How models write calls of tools: one entry for each format, and what is needed to read it while it is written."""

from __future__ import annotations

import re
from dataclasses import dataclass

from furiosa_llm.server.tool_grammar import CallSyntax, ParameterSyntax

_NAME = r'"(?P<quoted>(?:[^"\\]|\\.)*)"'
_OBJECT = re.compile(rf'\s*\{{\s*"name"\s*:\s*{_NAME}\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)')
"""The beginning of `{"name": ..., "arguments": {...}}`."""
_END = re.compile(r"[^{}\[\]]*\}")
"""Its end, behind the arguments: an id may come before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """How arguments are written that are not JSON: one after the other, each between tags."""

    one: re.Pattern[str]
    """A whole argument: `key` and `value`."""
    end: re.Pattern[str]
    """What comes behind the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """Calls in blocks, with text around them. A block is `opens`, calls, and one of `closes`, or the answer's end."""

    opens: tuple[str, ...]
    """What a block begins with."""
    bare: str = ""
    """What an answer begins with that is one block without a tag; empty if there is none."""
    closes: tuple[str, ...] = ()
    """What it ends with."""
    begin: re.Pattern[str] = _OBJECT
    """What stands before the arguments, with the function's `name`, or `quoted` as in JSON."""
    end: re.Pattern[str] = _END
    """What stands behind arguments that are JSON."""
    between: re.Pattern[str] = re.compile(r"[\s,;\[\]]*")
    """What may stand around calls in a block."""
    parameters: Parameters | None = None
    """How the arguments are written; None for JSON."""
    is_python: bool = False
    """Whether a block is a list of Python's calls: `[f(x=1), g()]`."""
    syntax: CallSyntax | None = None
    """How calls are written that are forced; None if that cannot be said as a grammar."""


def _list_syntax(trigger: str) -> CallSyntax:
    return CallSyntax(
        trigger=trigger,
        opens="[",
        before_name='{"name": ',
        before_arguments=', "arguments": ',
        end="}",
        between=", ",
        closes="]",
    )


_HERMES = CallFormat(
    opens=("<tool_call>",),
    closes=("</tool_call>",),
    syntax=CallSyntax(
        trigger="<tool_call>",
        before_name='\n{"name": ',
        before_arguments=', "arguments": ',
        end="}\n</tool_call>",
        between="\n",
    ),
)
_LLAMA3_JSON = CallFormat(
    opens=("<|python_tag|>",),
    bare="{",
    syntax=CallSyntax(
        trigger="",
        before_name='{"name": ',
        before_arguments=', "parameters": ',
        end="}",
        between="; ",
        text=r"[ \n\r\t]*([^{< \n\r\t]|<[^|])(.|\n)*",  # no call, and no tag before one
    ),
)

CALL_FORMATS = {
    "hermes": _HERMES,
    "llama3_json": _LLAMA3_JSON,
    "pythonic": CallFormat(opens=("<|python_tag|>",), bare="[", is_python=True),
    "mistral": CallFormat(
        opens=("[TOOL_CALLS]",),
        begin=re.compile(
            rf"{_OBJECT.pattern}|\s*(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{{)",
        ),
        end=re.compile(rf"(?:{_END.pattern})?"),
        syntax=_list_syntax("[TOOL_CALLS]"),
    ),
    "granite": CallFormat(opens=("<|tool_call|>", "<tool_call>"), syntax=_list_syntax("<tool_call>")),
    "phi4": CallFormat(
        opens=("<|tool_call|>", "functools"), closes=("<|/tool_call|>",), syntax=_list_syntax("functools")
    ),
    "qwen3_coder": CallFormat(
        opens=("<tool_call>",),
        closes=("</tool_call>",),
        begin=re.compile(r"\s*<function=(?P<name>[^>\n]+)>\s*"),
        parameters=Parameters(
            one=re.compile(r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>\s*", re.DOTALL),
            end=re.compile(r"</function>"),
        ),
        syntax=CallSyntax(
            trigger="<tool_call>",
            before_name="\n<function=",
            before_arguments=">\n",
            end="</function>\n</tool_call>",
            between="\n",
            parameters=ParameterSyntax(before_key="<parameter=", before_value=">\n", ends="\n</parameter>", after="\n"),
            quotes=False,
        ),
    ),
    "glm45": CallFormat(
        opens=("<tool_call>",),
        closes=("</tool_call>",),
        begin=re.compile(r"\s*(?P<name>[^\s<]+)\s*(?=<arg_key>|</tool_call>)"),
        parameters=Parameters(
            one=re.compile(
                r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>\s*",
                re.DOTALL,
            ),
            end=re.compile(r"(?=</tool_call>)"),
        ),
        syntax=CallSyntax(
            trigger="<tool_call>",
            before_name="",
            before_arguments="\n",
            end="</tool_call>",
            between="\n",
            parameters=ParameterSyntax(
                before_key="<arg_key>", before_value="</arg_key>\n<arg_value>", ends="</arg_value>", after="\n"
            ),
            quotes=False,
        ),
    ),
    "minimax_m2": CallFormat(
        opens=("<minimax:tool_call>",),
        closes=("</minimax:tool_call>",),
        begin=re.compile(r'\s*<invoke name="?(?P<name>[^">\n]+)"?>\s*'),
        parameters=Parameters(
            one=re.compile(
                r'<parameter name="?(?P<key>[^">\n]+)"?>\n?(?P<value>.*?)\n?</parameter>\s*',
                re.DOTALL,
            ),
            end=re.compile(r"</invoke>"),
        ),
        syntax=CallSyntax(
            trigger="<minimax:tool_call>",
            before_name='\n<invoke name="',
            before_arguments='">\n',
            end="</invoke>",
            closes="\n</minimax:tool_call>",
            parameters=ParameterSyntax(
                before_key='<parameter name="', before_value='">', ends="</parameter>", after="\n"
            ),
            quotes=False,
        ),
    ),
    "kimi_k2": CallFormat(
        opens=("<|tool_calls_section_begin|>",),
        closes=("<|tool_calls_section_end|>",),
        begin=re.compile(
            r"\s*<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[^\s:<]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*(?=\{)"
        ),
        end=re.compile(r"\s*<\|tool_call_end\|>"),
        syntax=CallSyntax(
            trigger="<|tool_calls_section_begin|>",
            before_name="<|tool_call_begin|>functions.",
            before_arguments=":0<|tool_call_argument_begin|>",
            end="<|tool_call_end|>",
            closes="<|tool_calls_section_end|>",
            quotes=False,
        ),
    ),
    "deepseek_v3": CallFormat(
        opens=("<｜tool▁calls▁begin｜>",),
        closes=("<｜tool▁calls▁end｜>",),
        begin=re.compile(r"\s*<｜tool▁call▁begin｜>function<｜tool▁sep｜>(?P<name>[^\n<]+)\n```json\n\s*(?=\{)"),
        end=re.compile(r"\s*```<｜tool▁call▁end｜>"),
        syntax=CallSyntax(
            trigger="<｜tool▁calls▁begin｜>",
            before_name="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            before_arguments="\n```json\n",
            end="\n```<｜tool▁call▁end｜>",
            closes="<｜tool▁calls▁end｜>",
            between="\n",
            quotes=False,
        ),
    ),
    "deepseek_v31": CallFormat(
        opens=("<｜tool▁calls▁begin｜>",),
        closes=("<｜tool▁calls▁end｜>",),
        begin=re.compile(r"\s*<｜tool▁call▁begin｜>(?P<name>[^\n<]+)<｜tool▁sep｜>\s*(?=\{)"),
        end=re.compile(r"\s*<｜tool▁call▁end｜>"),
        syntax=CallSyntax(
            trigger="<｜tool▁calls▁begin｜>",
            before_name="<｜tool▁call▁begin｜>",
            before_arguments="<｜tool▁sep｜>",
            end="<｜tool▁call▁end｜>",
            closes="<｜tool▁calls▁end｜>",
            quotes=False,
        ),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFormat:
    """How a model marks what it thinks before it answers."""

    opens: str
    closes: str
    starts_inside: bool = False
    """Whether answers begin within it: the template opens it, or nothing does."""


_THINK = ReasoningFormat(opens="<think>", closes="</think>")
REASONING_FORMATS = {
    "qwen3": _THINK,
    "glm45": _THINK,
    "deepseek_r1": ReasoningFormat(opens="<think>", closes="</think>", starts_inside=True),
    "minimax_m2": ReasoningFormat(opens="<think>", closes="</think>", starts_inside=True),
    "kimi_k2": ReasoningFormat(opens="◁think▷", closes="◁/think▷"),
    "mistral": ReasoningFormat(opens="[THINK]", closes="[/THINK]"),
    "granite": ReasoningFormat(opens="Here is my thought process:", closes="Here is my response:"),
}
