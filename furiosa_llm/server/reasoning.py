"""Parts what a model thinks from what it answers, while it is still writing."""

from __future__ import annotations

from furiosa_llm.runtime.errors import InputError
from furiosa_llm.server.call_formats import REASONING_FORMATS, ReasoningFormat
from furiosa_llm.server.tools import overlap


def reasoning_format(name: str | None) -> ReasoningFormat | None:
    """The format of that name, None for none; raises InputError for an unknown one."""
    if name is not None and name not in REASONING_FORMATS:
        raise InputError(f"reasoning_parser={name!r:.80} is unknown; give one of {', '.join(REASONING_FORMATS)}")
    return None if name is None else REASONING_FORMATS[name]


class ReasoningFinder:
    """Takes one answer to `prompt` in pieces, and gives what is thought and what is said of each."""

    def __init__(self, form: ReasoningFormat, prompt: str) -> None:
        self._form = form
        opened, closed = prompt.rfind(form.opens), prompt.rfind(form.closes)
        # Templates that switch thinking off write an empty thought, and others begin one.
        ended = closed > opened and not prompt[closed + len(form.closes) :].strip()
        self._inside = not ended and (form.starts_inside or (opened > closed and prompt.rstrip().endswith(form.opens)))
        self._begun = ended
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
