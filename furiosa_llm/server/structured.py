"""What a request demands of its answers' form: formats, grammars, and calls of tools, as constraints of the engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from furiosa_llm.runtime.errors import SamplingParamsError
from furiosa_llm.runtime.tokens.json_schema import eased
from furiosa_llm.runtime.tokens.structured_outputs import StructuredOutputsParams
from furiosa_llm.server.errors import REQUEST_ID, ApiError
from furiosa_llm.server.forms import ResponseFormat
from furiosa_llm.server.notes import DROPPED, note, on_one_line
from furiosa_llm.server.requests import ChatCompletionRequest, CompletionRequest, Tool
from furiosa_llm.server.tool_grammar import CallableFunction, CallGrammar, CallWriting

logger = logging.getLogger(__name__)

_SCHEMA = "response_format.json_schema.schema"


async def structured_outputs(body: ChatCompletionRequest | CompletionRequest) -> StructuredOutputsParams | None:
    """The constraint of a request without tools; None if there is none. Raises an ApiError for what is no grammar."""
    schema = None if body.response_format is None else body.response_format.wanted_schema()
    given = body.wanted_form
    if given is not None:
        if schema is not None:
            raise ApiError(400, f"{body.form_field} and response_format exclude each other; leave one out")
        return await _compiled(body.form_field, **given.model_dump(by_alias=True))
    if schema is None or body.response_format is None:
        return None
    return await _compiled(
        "response_format", _SCHEMA, json=await _kept_to(schema, body.response_format.strict, _SCHEMA)
    )


async def _kept_to(schema: dict[str, Any], strict: bool, shown: str) -> dict[str, Any]:
    """What of a schema is enforced: all of it if that is demanded, else what can be; the rest is said in a header."""
    if strict:
        return schema
    try:
        found, dropped = await asyncio.to_thread(eased, schema)
    except (ValueError, RecursionError):  # what cannot be read at all is refused as it is compiled
        return schema
    for what in dropped:
        logger.info("request %s: %s: not enforced: %s", REQUEST_ID.get(), shown, on_one_line(what))
        note(DROPPED, f"{shown}: {what}")
    return found


async def forced(tools: Sequence[Tool], chosen: str | None, writing: CallWriting) -> StructuredOutputsParams | None:
    """The constraint of answers that have to be calls: one of the function `chosen`, or of any.

    None if they cannot be written so.
    """
    named = [(index, tool) for index, tool in enumerate(tools) if chosen in (None, tool.function.name)]
    if chosen is not None:
        named = named[:1]
        writing = replace(writing, several=False)
    functions = await _functions(named, strict_only=False)
    if not writing.syntax.can_write(functions):
        return None
    return await _compiled("tools", grammar=CallGrammar(functions, writing).forced())


async def optional(
    tools: Sequence[Tool], response_format: ResponseFormat | None, writing: CallWriting
) -> StructuredOutputsParams | None:
    """The constraint of answers that may be calls; None if neither a tool nor a format asks for one."""
    schema = None if response_format is None else response_format.wanted_schema()
    if schema is not None and response_format is not None:
        if not writing.syntax.trigger:
            raise _either_or()
        schema = await _kept_to(schema, response_format.strict, _SCHEMA)
        await _compiled("response_format", _SCHEMA, json=schema)
        functions = await _functions(list(enumerate(tools)), strict_only=False)
        if not writing.syntax.can_write(functions):
            raise _either_or()
        return await _compiled("tools", grammar=CallGrammar(functions, writing).or_json(schema))
    if not any(tool.function.strict for tool in tools):
        return None
    functions = await _functions(list(enumerate(tools)), strict_only=True)
    if not writing.syntax.can_write(functions):
        check_unconstrained(tools, response_format)
        return None
    return await _compiled("tools", grammar=CallGrammar(functions, writing).or_text())


def check_unconstrained(tools: Sequence[Tool], response_format: ResponseFormat | None) -> None:
    """Refuses formats beside calls whose own form is no grammar, and says that strict tools are not kept to."""
    if response_format is not None and response_format.wanted_schema() is not None:
        raise _either_or()
    if any(tool.function.strict for tool in tools):
        note(DROPPED, "tools: strict: calls in the model's format cannot be constrained")


def _either_or() -> ApiError:
    return ApiError(
        400,
        "response_format and tools exclude each other on this server, by the way its model writes calls; leave one "
        "out, or force a call by tool_choice",
        param="response_format",
    )


async def _functions(tools: Sequence[tuple[int, Tool]], *, strict_only: bool) -> list[CallableFunction]:
    """The functions of `tools`, each with its place in the request.

    With `strict_only`, the others may be called with any arguments.
    """
    found = []
    for index, tool in tools:
        function = tool.function
        schema: dict[str, Any] = {"type": "object"}
        if function.strict or not strict_only:
            schema = function.parameters_schema
            param = f"tools.{index}.function.parameters"
            if schema["type"] != "object":
                message = f"{param}: found type {schema['type']!r:.80}, but arguments are an object"
                raise ApiError(400, message, param=param)
            schema = await _kept_to(schema, function.strict is True, param)
            await _compiled(param, param, json=schema)
        found.append(CallableFunction(name=function.name, parameters=schema))
    return found


async def _compiled(param: str, shown: str | None = None, **given: Any) -> StructuredOutputsParams:
    """The constraint, made on another thread: a large schema takes a second, in which others' tokens go out."""
    try:
        return await asyncio.to_thread(StructuredOutputsParams, **given)
    except SamplingParamsError as error:
        message = str(error)
        if shown is not None:
            message = message.replace("structured_outputs.json", shown)
        elif param.startswith("guided_"):
            message = message.replace("structured_outputs.", "guided_").replace("structured_outputs:", "guided fields:")
        raise ApiError(400, message, param=param) from error
