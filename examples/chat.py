"""Answer a conversation with the model's chat template: `python examples/chat.py ARTIFACT`."""

from __future__ import annotations

import sys

from furiosa_llm import LLM, SamplingParams

CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hello! How can I help you today?"},
    {"role": "user", "content": "Name three colours."},
]


def main(artifact: str) -> None:
    """Prints the answer to one conversation, then to two at once."""
    sampling_params = SamplingParams(temperature=0.5, max_tokens=32, seed=0)
    with LLM.load_artifact(artifact) as llm:
        for messages in (CONVERSATION, [CONVERSATION, CONVERSATION[:2]]):
            for output in llm.chat(messages, sampling_params):
                print(repr(output.outputs[0].text))


if __name__ == "__main__":
    main(*sys.argv[1:])
