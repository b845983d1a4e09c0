"""Which tools a chat offers and which it demands, how their calls are found, and what that makes of the answers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from furiosa_llm.runtime.tokens.structured_outputs import StructuredOutputsParams
from furiosa_llm.server.call_formats import CALL_FORMATS, CallFormat
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.requests import AllowedToolChoice, ChatCompletionRequest, NamedToolChoice
from furiosa_llm.server.structured import check_unconstrained, forced, optional, structured_outputs
from furiosa_llm.server.tool_grammar import CallWriting
from furiosa_llm.server.tools import ToolFinder

_SPARE = CALL_FORMATS["hermes"]
"""In which any call can be written."""


class Tools:
    """The tools of a request; raises an ApiError if it makes no sense, or needs a `form` of calls that is missing.

    `tags` are the tokens of the form `<...>` that the model has.

    shown: whether the chat template sees the tools, and calls are looked for.
    chosen: the function that has to be called; None if none is named.
    only_one: whether an answer has one call at most.
    """

    def __init__(self, body: ChatCompletionRequest, form: CallFormat | None, tags: Collection[str]) -> None:
        choice = body.tool_choice
        self._body = body
        self._tools = body.tools or []
        if isinstance(choice, AllowedToolChoice):
            allowed = {tool.function.name for tool in choice.allowed_tools.tools}
            self._tools = [tool for tool in self._tools if tool.function.name in allowed]
            choice = choice.allowed_tools.mode
        if not self._tools and choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice is only allowed when tools are given", param="tool_choice")
        self._forced = choice == "required" or isinstance(choice, NamedToolChoice)
        self._names = [tool.function.name for tool in self._tools]
        self.chosen = choice.function.name if isinstance(choice, NamedToolChoice) else None
        self.shown = bool(self._tools) and choice != "none"
        self.only_one = body.parallel_tool_calls is False
        if self.chosen is not None and self.chosen not in self._names:
            raise ApiError(
                400, f"tool_choice names {self.chosen!r:.80}, which is not among the tools", param="tool_choice"
            )
        if self.shown and form is None and not self._forced:
            raise ApiError(
                400,
                "tools need a server that was started with --enable-auto-tool-choice and --tool-call-parser; or give "
                "tool_choice 'none', 'required' or a function",
                param="tools",
            )
        self._tags = tags
        # A call that is forced may be written in any way that can be read again.
        can_be_forced = form is not None and form.syntax is not None
        self._form = form if form is not None and (can_be_forced or not self._forced) else _SPARE

    def finder(self, *, streams: bool) -> ToolFinder | None:
        """For one answer, which comes in pieces or as a whole; None if there is nothing to look for."""
        if not self.shown:
            return None
        functions = {tool.function.name: tool.function.parameters or {} for tool in self._tools}
        return ToolFinder(self._form, functions, streams=streams)

    @property
    def form_field(self) -> str:
        """The field of the request that says what the answers have to look like, if one does."""
        if not self.shown:
            return self._body.form_field
        return "tool_choice" if self._forced else "tools"

    async def constraint(self) -> StructuredOutputsParams | None:
        """What the answers have to look like; None for any text. Raises an ApiError for a schema that is invalid."""
        body = self._body
        if not self.shown:
            return await structured_outputs(body)
        if body.wanted_form is not None:
            raise ApiError(
                400,
                f"{body.form_field} and tools exclude each other; leave one out, or give tool_choice 'none'",
                param=body.form_field,
            )
        if self._form.syntax is None:
            check_unconstrained(self._tools, body.response_format)
            return None
        writing = CallWriting(syntax=self._form.syntax, tags=self._tags, several=not self.only_one)
        if self._forced:
            found = await forced(self._tools, self.chosen, writing)
            if found is None and _SPARE.syntax is not None:
                self._form = _SPARE
                found = await forced(self._tools, self.chosen, replace(writing, syntax=_SPARE.syntax))
            return found
        return await optional(self._tools, body.response_format, writing)
