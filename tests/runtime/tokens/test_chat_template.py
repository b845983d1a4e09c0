"""Chat templates: what transformers renders is rendered, byte for byte, or refused by both."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest

from furiosa_llm.runtime.errors import InputError, TokenizerError
from furiosa_llm.runtime.tokens.chat import for_template
from furiosa_llm.runtime.tokens.chat_template import ChatTemplate
from tests.support.runtime.chat_templates import CONFIG, CONVERSATIONS, NAMED, TEMPLATES

USER: dict[str, Any] = {"role": "user", "content": "q"}


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A tokenizer of transformers', with the same special tokens; it imports no torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports warns of what it imports
        import tokenizers
        from transformers import PreTrainedTokenizerFast

        model = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(model), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TEMPLATES, "named"])
def test_as_transformers_renders_it(name: str, theirs: Any) -> None:
    templates = NAMED if name == "named" else TEMPLATES[name]
    theirs.chat_template = templates
    ours = ChatTemplate(CONFIG, templates)
    rendered = 0
    for conversation, (messages, options) in CONVERSATIONS.items():
        given = {"add_generation_prompt": False, **options}
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, **given)
        except Exception:  # noqa: BLE001 - it has none of its own
            with contextlib.suppress(TokenizerError, InputError):  # some of what it refuses is no fault here
                ours.render(messages, **given)
            continue
        assert ours.render(messages, **given) == expected, conversation
        rendered += 1
    assert rendered >= 1


def test_parts_are_joined_for_a_template_that_takes_none() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    shown = {
        name: ChatTemplate(CONFIG, TEMPLATES[name]).render(messages, add_generation_prompt=False, join_parts=True)
        for name in ("chatml", "concatenated", "parts")
    }
    assert shown == {
        "chatml": "<|im_start|>user\na\nb<|im_end|>\n",
        "concatenated": "<s>user: a\nb</s>",
        "parts": "ab",
    }


def test_prefilled_parts_are_joined_before_they_are_marked() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True, "join_parts": True}
    messages = [USER, {"role": "assistant", "content": parts}]
    assert ChatTemplate(CONFIG, TEMPLATES["chatml"]).render(messages, **options).endswith("assistant\na\nb ")


@pytest.mark.parametrize("content", ["|", "<", "end", "```json\n", "The answer is ", "", "CONTINUES"])
def test_a_prefill_is_the_end_of_the_prompt(content: str) -> None:
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    messages = [USER, {"role": "assistant", "content": content}]
    prompt = ChatTemplate(CONFIG, TEMPLATES["chatml"]).render(messages, **options)
    assert prompt == f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{content}"


def test_a_prefill_that_the_template_leaves_out() -> None:
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(InputError, match="does not repeat the final message"):
        ChatTemplate(CONFIG, "{{ messages[0].content }}").render(
            [USER, {"role": "assistant", "content": "x"}], **options
        )
    with pytest.raises(InputError, match="has no text to continue"):
        ChatTemplate(CONFIG, TEMPLATES["chatml"]).render([{"role": "assistant"}], **options)


def test_named_templates() -> None:
    named = ChatTemplate(CONFIG, {"tool_use": "TOOLS", "other": "OTHER"})
    assert named.render([USER], [{}]) == "TOOLS"
    assert named.render([USER], chat_template="other") == "OTHER"
    assert named.render([USER], chat_template="{{ bos_token }}") == "<s>"
    with pytest.raises(TokenizerError, match="the chat templates other, tool_use, and no default"):
        named.render([USER])


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"city": "Seoul"}', {"city": "Seoul"}),
        ("", {}),
        ("no JSON", "no JSON"),
        ({"a": 1}, {"a": 1}),
        ("[" * 10**5,) * 2,
    ],
)
def test_arguments_of_calls_are_objects_for_templates(arguments: Any, shown: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    [message] = for_template([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["tool_calls"] == [{**call, "function": {"name": "f", "arguments": shown}}]
    assert call["function"] == {"name": "f", "arguments": arguments}
