"""`POST /tokenize` and `POST /detokenize`: what the model's tokenizer makes of a text, and of tokens."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends

from furiosa_llm.runtime.requests.prompts import check_token_ids
from furiosa_llm.server.body_route import BodyRoute
from furiosa_llm.server.chat_service import prompt_of
from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.requests import DetokenizeRequest, TokenizeRequest
from furiosa_llm.server.responses import DetokenizeResponse, TokenizeResponse, TokenizerInfoResponse
from furiosa_llm.server.state import State, require_json

router = APIRouter(route_class=BodyRoute)


@router.post("/tokenize", dependencies=[Depends(require_json)])
async def tokenize(body: TokenizeRequest, state: State) -> TokenizeResponse:
    """The tokens of a text, or of a conversation as the chat template writes it."""
    if body.model is not None:
        state.check_model(body.model)
    if (body.prompt is None) == (not body.messages):
        raise ApiError(400, "give either prompt or messages")
    text = await prompt_of(body, state, with_tools=True) if body.prompt is None else body.prompt
    # A template writes the special tokens that it wants.
    special = body.prompt is not None if body.add_special_tokens is None else body.add_special_tokens
    tokens = await state.encode(text, add_special_tokens=special)
    strings = None
    if body.return_token_strs:
        strings = await asyncio.to_thread(lambda: [state.tokenizer.id_to_token(token) for token in tokens])
    return TokenizeResponse(
        tokens=tokens,
        count=len(tokens),
        max_model_len=state.model.max_length,
        token_strs=strings,
    )


@router.get("/tokenizer_info")
async def tokenizer_info(state: State) -> TokenizerInfoResponse:
    """The special tokens of the model's tokenizer and its chat template, for clients that make prompts themselves."""
    special = state.tokenizer.special_tokens
    return TokenizerInfoResponse(
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
        pad_token=special.get("pad_token"),
        unk_token=special.get("unk_token"),
        chat_template=state.settings.chat_template or state.tokenizer.chat_template,
    )


@router.post("/detokenize", dependencies=[Depends(require_json)])
async def detokenize(body: DetokenizeRequest, state: State) -> DetokenizeResponse:
    """The text of tokens, special ones among them."""
    if body.model is not None:
        state.check_model(body.model)
    tokens = check_token_ids(body.tokens, state.tokenizer.vocab_size)
    text = await asyncio.to_thread(state.tokenizer.decode, tokens, skip_special_tokens=False)
    return DetokenizeResponse(prompt=text)
