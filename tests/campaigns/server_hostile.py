"""Single requests that take all they can: `python -m tests.campaigns.server_hostile`.

Each kind is sent once to the real command, within the limit of bodies, while `/health` is asked again and again. Ends
with status 1 if an answer of `/health` took more than BAR, or a request was answered with a status of 500 and more.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from tests.campaigns.server_campaign import given_or_built
from tests.support.server.process import started

BAR = 0.1
"""Seconds that `/health` may take."""
_NBYTES = 16 * 2**20 - 4096
_PAUSE = 0.005
_PATIENCE = 120.0
_THOUGHT_AND_SAID = ['{"type":"thinking","thinking":"x"}', '{"type":"text","text":"x"}']

TEMPLATE = """
{%- set many = 10 ** (mode | length + 5) %}
{%- if mode == "loops" %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{%- elif mode == "range" %}{% for i in range(many) %}{% endfor %}
{%- elif mode == "text" %}{{ "x" * many }}
{%- elif mode == "power" %}{{ many ** many }}
{%- elif mode == "list" %}{{ ([0] * many) | length }}
{%- elif mode == "macro" %}{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}
{%- elif mode == "output" %}{% for i in range(99999) %}{{ "x" * 10**6 }}{% endfor %}
{%- elif mode == "zero" %}{{ many / 0 }}
{%- elif mode == "format" %}{{ "%0999999999d" % many }}
{%- endif %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: """
"""A chat template that a client can lead astray, as templates of models can by their own mistakes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What came of one request.

    status: its own; 0 if it was not answered.
    seconds: until then.
    health: the longest that `/health` took meanwhile.
    """

    status: int
    seconds: float
    health: float
    said: str


Request = tuple[str, str]
"""The path and the body of one; MODEL in it stands for the model's name."""


def _chat(**fields: str) -> Request:
    """A chat with these fields, each of them JSON."""
    given = {"model": '"MODEL"', "max_tokens": "1", "messages": '[{"role":"user","content":"hi"}]', **fields}
    return "/v1/chat/completions", _object(given)


def _completion(prompt: str) -> Request:
    return "/v1/completions", _object({"model": '"MODEL"', "max_tokens": "1", "prompt": prompt})


def _object(fields: Mapping[str, str]) -> str:
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


def _many(item: str, nbytes: int) -> str:
    """A list of as many `item`s as fit."""
    return "[" + ",".join([item] * (nbytes // (len(item) + 1))) + "]"


def _names(value: str, nbytes: int) -> str:
    """An object of as many names as fit."""
    return _object({str(number): value for number in range(nbytes // (len(value) + 11))})


def _deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def _said(content: str) -> str:
    return '[{"role":"user","content":' + content + "}]"


def _tool(parameters: str) -> str:
    return '{"type":"function","function":{"name":"f","parameters":' + parameters + "}}"


def _format(schema: str) -> str:
    return '{"type":"json_schema","json_schema":{"name":"s","schema":' + schema + "}}"


def _of_mode(mode: str) -> Request:
    return _chat(chat_template_kwargs=json.dumps({"mode": mode}))


def _schema(schema: object) -> Request:
    return _chat(response_format=_format(json.dumps(schema)))


def _guided(**grammar: object) -> Request:
    return _chat(structured_outputs=json.dumps(grammar))


def _response(**fields: str) -> Request:
    return "/v1/responses", _object({"model": '"MODEL"', "max_output_tokens": "1", "input": '"hi"', **fields})


def _anthropic(**fields: str) -> Request:
    return "/v1/messages", _object({"model": '"MODEL"', "max_tokens": "1", "messages": _said('"hi"'), **fields})


def _doubling(word: str) -> dict[str, object]:
    """A schema that stands for 2^40 of them."""
    links = {f"d{i}": {word: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    return {"$defs": {**links, "d40": {"type": "string"}}, "$ref": "#/$defs/d0"}


_CIRCLE = {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}
_TERMINALS = "start: " + " | ".join(f"T{i}" for i in range(5000))
_TERMINALS += "".join(f"\nT{i}: /[a-z]{{1,{i + 1}}}/" for i in range(5000))
"""A grammar of 5,000 terminals that overlap."""


def _of_schemas_and_protocols(nbytes: int) -> Mapping[str, Callable[[], Request]]:
    """Grammars that are larger than they look, and the other protocols."""
    user = '{"role":"user","content":"x"}'
    call = '{"id":"a","type":"function","function":{"name":"f","arguments":' + json.dumps("[" * 100_000) + "}}"
    return {
        "a schema in a circle": lambda: _schema(_CIRCLE),
        "a schema of itself": lambda: _schema({"$ref": "#"}),
        "allOf of 2^40": lambda: _schema(_doubling("allOf")),
        "anyOf of 2^40": lambda: _schema(_doubling("anyOf")),
        "a remote schema": lambda: _schema({"$ref": "http://127.0.0.1:1/x"}),
        "a long pattern": lambda: _schema({"type": "string", "pattern": "(a|b|c)*" * 300, "minLength": 1000}),
        "minLength": lambda: _schema({"type": "string", "minLength": 10**9}),
        "minItems": lambda: _schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
        "multipleOf": lambda: _schema({"type": "integer", "multipleOf": 10**9 + 7}),
        "a long constant": lambda: _schema({"const": "x" * 2_000_000}),
        "300 of oneOf": lambda: _schema({"oneOf": [{"required": [str(i)], "type": "object"} for i in range(300)]}),
        "an ambiguous grammar": lambda: _guided(grammar='start: a a a a a a\na: ("x" | "xx")* | a a'),
        "a repeated grammar": lambda: _guided(grammar='start: ("a"~1..100000)~1..100000'),
        "many terminals": lambda: _guided(grammar=_TERMINALS),
        "a regex that looks far": lambda: _guided(regex=r"(.*a){40}.{25}"),
        "a regex of letters": lambda: _guided(regex=r"[\p{L}\p{N}]{1,1000}" * 50),
        "prefixes": lambda: _guided(choice=["a" * i for i in range(1, 1000)]),
        "100,000 stops": lambda: _chat(stop=json.dumps(["x" * 100] * 100_000)),
        "allowed_token_ids": lambda: _chat(allowed_token_ids=_many("1", nbytes)),
        "a long exponent": lambda: _chat(temperature="1e999"),
        "a long seed": lambda: _chat(seed="9" * 4000),
        "half a pair": lambda: _chat(messages=_said('"\\ud800"')),
        "deep arguments": lambda: _chat(messages='[{"role":"assistant","tool_calls":[' + call + "]}," + user + "]"),
        "responses: items": lambda: _response(input=_many(user, nbytes)),
        "responses: tools": lambda: _response(tools=_many('{"type":"function","name":"f"}', nbytes)),
        "responses: metadata": lambda: _response(metadata=_names('"x"', nbytes)),
        "responses: deep": lambda: _response(input=_deep(950)),
        "messages of Anthropic": lambda: _anthropic(messages=_many(user, nbytes)),
        "blocks of Anthropic": lambda: _anthropic(system=_many('{"type":"text","text":"x"}', nbytes)),
        "tools of Anthropic": lambda: _anthropic(tools=_many('{"name":"f","input_schema":{}}', nbytes)),
        "a deep tool of Anthropic": lambda: _anthropic(tools='[{"name":"f","input_schema":' + _deep(950) + "}]"),
        "stops of Anthropic": lambda: _anthropic(stop_sequences=_many('"x"', nbytes)),
        "to score": lambda: ("/v1/score", '{"model":"MODEL","text_1":"a","text_2":' + _many('"x"', nbytes) + "}"),
        "to rerank": lambda: ("/v1/rerank", '{"model":"MODEL","query":"a","documents":' + _many('"x"', nbytes) + "}"),
    }


_MODES = ("loops", "range", "text", "power", "list", "macro", "output", "zero", "format")


def kinds(nbytes: int) -> Mapping[str, Callable[[], Request]]:
    """What makes each kind, those that are large of `nbytes`."""
    word = json.dumps("the cat sat on the mat. " * (nbytes // 24))
    fill = json.dumps("x" * nbytes)
    wide = json.dumps({"properties": {str(number): {} for number in range(60_000)}})
    long_enum = json.dumps({"enum": ["x" * 20 + str(number) for number in range(100_000)]})
    nested_regex = json.dumps({"regex": "((a{1,500}){1,500}){1,500}b"})
    long_grammar = json.dumps({"grammar": "start: " + "a " * 100_000})
    return {
        "nothing": lambda: _chat(),
        "messages": lambda: _chat(messages=_many('{"role":"user","content":"x"}', nbytes)),
        "most messages": lambda: _chat(messages="[" + ",".join(['{"role":"user","content":"x"}'] * 4096) + "]"),
        "malformed messages": lambda: _chat(messages=_many('{"role":1}', nbytes)),
        "parts": lambda: _chat(messages=_said(_many('{"type":"text","text":"x"}', nbytes))),
        "most parts": lambda: _chat(messages=_said("[" + ",".join(['{"type":"text","text":"x"}'] * 4095) + "]")),
        "most thoughts": lambda: _chat(messages=_said("[" + ",".join(_THOUGHT_AND_SAID * 2047) + "]")),
        "malformed parts": lambda: _chat(messages=_said("[" + ",".join(['{"type":"x"}'] * 4095) + "]")),
        "tool calls": lambda: _chat(messages='[{"role":"assistant","tool_calls":' + _many("{}", nbytes) + "}]"),
        "a long message": lambda: _chat(messages=_said(word)),
        "a long role": lambda: _chat(messages='[{"role":' + fill + ',"content":"x"}]'),
        "tools": lambda: _chat(tools=_many(_tool("{}"), nbytes), tool_choice='"none"'),
        "deep tools": lambda: _chat(tools=f"[{_tool(_deep(950))}]", tool_choice='"required"'),
        "tools at the limit": lambda: _chat(tools=f"[{_tool(_deep(90))}]", tool_choice='"required"'),
        "a wide tool": lambda: _chat(tools=f"[{_tool(wide)}]", tool_choice='"required"'),
        "logit_bias": lambda: _chat(logit_bias=_names("1", nbytes)),
        "stop": lambda: _chat(stop=_many('"x"', nbytes)),
        "bad_words": lambda: _chat(bad_words=_many('"x"', 2**18)),
        "unknown fields": lambda: ("/v1/chat/completions", _names("1", nbytes)),
        "template variables": lambda: _chat(chat_template_kwargs='{"a":' + _many('"x"', nbytes) + "}"),
        "metadata": lambda: _chat(metadata=_names('"x"', nbytes)),
        "a long schema": lambda: _chat(response_format=_format(long_enum)),
        "a deep schema": lambda: _chat(response_format=_format(_deep(950))),
        "a regular expression": lambda: _chat(structured_outputs=nested_regex),
        "a grammar": lambda: _chat(structured_outputs=long_grammar),
        "choices": lambda: _chat(structured_outputs='{"choice":' + _many('"x"', 2**18) + "}"),
        **{f"template: {mode}": partial(_of_mode, mode) for mode in _MODES},
        "token ids": lambda: _completion(_many("1", nbytes)),
        "long token ids": lambda: _completion(_many("123456789", nbytes)),
        "most token ids": lambda: _completion("[" + ",".join(["1"] * 300_000) + "]"),
        "floats as token ids": lambda: _completion("[" + ",".join(["1.0"] * 65_000) + "]"),
        "prompts": lambda: _completion(_many('"x"', nbytes)),
        "most prompts": lambda: _completion(_many('"x"', 2**19)),
        "mixed prompts": lambda: _completion("[1," + _many('"x"', 2**19)[1:]),
        "prompts of token ids": lambda: _completion(_many("[1]", nbytes)),
        "a long prompt": lambda: _completion(word),
        "one long word": lambda: _completion(fill),
        "escapes": lambda: _completion('"' + "\\u0001" * (nbytes // 6) + '"'),
        "deep lists": lambda: _completion("[" * (nbytes // 2) + "]" * (nbytes // 2)),
        "empty lists": lambda: _completion(_many("[]", nbytes)),
        "a long number": lambda: _completion("9" * nbytes),
        "no JSON": lambda: _completion("[" + "x" * nbytes),
        "not UTF-8": lambda: _completion('"' + "\udcff" * nbytes + '"'),
        "to tokenize": lambda: ("/tokenize", '{"return_token_strs":true,"prompt":' + word + "}"),
        "most to tokenize": lambda: ("/tokenize", '{"return_token_strs":true,"prompt":"' + "a b " * 2**16 + '"}'),
        "to detokenize": lambda: ("/detokenize", '{"tokens":[' + ",".join(["300"] * 300_000) + "]}"),
        **_of_schemas_and_protocols(nbytes),
        "to embed": lambda: ("/v1/embeddings", '{"model":"MODEL","input":' + _many('"x"', nbytes) + "}"),
    }


class Watch:
    """Asks `/health` all the while, and keeps the longest answer."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.ready = asyncio.Event()
        self.longest = 0.0

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=_PATIENCE) as client:
            await client.get("/health")  # connects
            self.ready.set()
            while True:
                began = time.perf_counter()
                (await client.get("/health")).raise_for_status()
                self.longest = max(self.longest, time.perf_counter() - began)
                await asyncio.sleep(_PAUSE)


def sent(url: str, model: str, path: str, body: str) -> Finding:
    """What becomes of one request."""

    async def both(content: str) -> Finding:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _CLIENT, url, path, content), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        await process.stdout.readline()
        watch = Watch(url)
        watching = asyncio.create_task(watch.run())
        await watch.ready.wait()
        began = time.perf_counter()
        answer, _ = await process.communicate(b"go\n")
        seconds = time.perf_counter() - began
        await asyncio.sleep(4 * _PAUSE)
        if watching.done():
            watching.result()
        watching.cancel()
        status, _, said = answer.decode(errors="replace").partition(" ")
        return Finding(status=int(status), seconds=seconds, health=watch.longest, said=said.strip())

    with tempfile.NamedTemporaryFile() as file:
        file.write(body.replace("MODEL", model, 1).encode("utf-8", "surrogateescape"))
        file.flush()
        return asyncio.run(both(file.name))


_CLIENT = """
import http.client, pathlib, sys, urllib.parse
body = pathlib.Path(sys.argv[3]).read_bytes()
print("ready", flush=True)
input()
connection = http.client.HTTPConnection(urllib.parse.urlsplit(sys.argv[1]).netloc, timeout=120)
connection.request("POST", sys.argv[2], body, {"Content-Type": "application/json"})
answer = connection.getresponse()
print(answer.status, answer.read(300).decode(errors="replace"))
"""
"""The request comes from another process, which has it from a file: what starts it or passes on 16 MiB would be late
with `/health`."""


def problem(found: Finding) -> str | None:
    """What is wrong with it."""
    if found.status >= 500:
        return f"the status {found.status}: {found.said}"
    return f"/health took {found.health * 1000:.0f} ms" if found.health > BAR else None


def campaign(artifact: Path, *, nbytes: int, only: str = "") -> dict[str, Finding]:
    """What each kind has come to, against one server of `artifact`."""
    gc.disable()  # a collection here would count as the server's
    model = json.loads((artifact / "manifest.json").read_text())["model"]["name"]
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template.jinja"
        template.write_text(TEMPLATE)
        with started(artifact, "--chat-template", template, "--disable-log-stats", "--text-timeout", "3") as server:
            return {name: sent(server.url, model, *make()) for name, make in kinds(nbytes).items() if only in name}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Single requests that take all they can, beside /health.")
    parser.add_argument("--nbytes", type=int, default=_NBYTES, help="of large bodies")
    parser.add_argument("--only", default="", help="the kinds with this in their name")
    parser.add_argument("--artifact", type=Path, default=None, help="by default a small one is made")
    arguments = parser.parse_args()
    with given_or_built(arguments.artifact) as artifact:
        found = campaign(artifact, nbytes=arguments.nbytes, only=arguments.only)
    if not found:
        parser.error(f"--only {arguments.only}: no kind has that in its name")
    for name, one in found.items():
        wrong = problem(one)
        shown = f"{name:22} {one.status:4} {one.seconds:6.2f} s  /health {one.health * 1000:4.0f} ms  {one.said:.100}"
        sys.stdout.write(shown + (f"  <- {wrong[:100]}\n" if wrong else "\n"))
    bad = sum(problem(one) is not None for one in found.values())
    sys.stdout.write(f"{len(found)} kinds, {bad} problems\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
