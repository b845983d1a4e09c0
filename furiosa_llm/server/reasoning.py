"""Parts what a model thinks from what it answers, while it is still writing."""

from __future__ import annotations

from collections.abc import Collection

from furiosa_llm.runtime.errors import InputError
from furiosa_llm.runtime.tokens.structured_outputs import StructuredOutputsParams, literal_pattern
from furiosa_llm.server.call_formats import REASONING_FORMATS, ReasoningFormat
from furiosa_llm.server.tools import overlap


def reasoning_format(name: str | None) -> ReasoningFormat | None:
    """The format of that name, None for none; raises InputError for an unknown one."""
    if name is not None and name not in REASONING_FORMATS:
        raise InputError(f"reasoning_parser={name!r:.80} is unknown; give one of {', '.join(REASONING_FORMATS)}")
    return None if name is None else REASONING_FORMATS[name]


def _begins(form: ReasoningFormat, prompt: str) -> tuple[bool, bool]:
    """Whether an answer to `prompt` has thought already, or begins inside of a thought.

    Templates that switch thinking off write an empty thought, and others begin one.
    """
    opened, closed = prompt.rfind(form.opens), prompt.rfind(form.closes)
    ended = closed > opened and not prompt[closed + len(form.closes) :].strip()
    return ended, not ended and (form.starts_inside or (opened > closed and prompt.rstrip().endswith(form.opens)))


def behind_thoughts(
    answer: StructuredOutputsParams, form: ReasoningFormat, prompt: str, tags: Collection[str]
) -> StructuredOutputsParams:
    """The constraint of what is said, for all that the model writes: first it may think, or has to go on with that.

    `tags` are the tokens of the form `<...>` that the model has, which are no text to a grammar.
    """
    ended, inside = _begins(form, prompt)
    if ended:
        return answer
    begin = f"/{literal_pattern(form.opens)}/"
    begin = f"({form.opens} | {begin})" if form.opens in tags else begin
    end = f"(spelled | TEXT {form.closes})" if form.closes in tags else "spelled"
    thought = f"{begin}? {end}" if inside else f"({begin} {end})?"
    spelled = f"spelled[lazy]: /(.|\\n)*{literal_pattern(form.closes)}/"
    return answer.behind(f"start: {thought} BLANKS @answer\n{spelled}\nTEXT: /(.|\\n)*/\nBLANKS: /[ \\n]{{0,4}}/\n")


class ReasoningFinder:
    """Takes one answer to `prompt` in pieces, and gives what is thought and what is said of each."""

    def __init__(self, form: ReasoningFormat, prompt: str) -> None:
        self._form = form
        self._begun, self._inside = _begins(form, prompt)
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """What of `text` is thought, and what is said; what may begin a mark is held back."""
        self._held += text
        if not self._begun:
            start = self._held.lstrip()
            if len(start) < len(self._form.opens) and self._form.opens.startswith(start):
                return "", ""
            self._begun = True
            if start.startswith(self._form.opens):
                self._inside, self._held = True, start[len(self._form.opens) :]
        if not self._inside:
            said, self._held = self._held, ""
            return "", said
        thought, seen, after = self._held.partition(self._form.closes)
        if seen:
            self._inside, self._held = False, ""
            return thought, after.lstrip("\n")
        end = len(self._held) - overlap(self._held, self._form.closes)
        thought, self._held = self._held[:end], self._held[end:]
        return thought, ""

    def flush(self) -> tuple[str, str]:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return (held, "") if self._inside else ("", held)
