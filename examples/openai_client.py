"""Ask a server with OpenAI's client: `python examples/openai_client.py http://localhost:8000/v1 "What is a fjord?"`."""

from __future__ import annotations

import sys

import openai


def main(base_url: str, question: str) -> None:
    """Prints the answer as it comes. A server that is still loading is asked again, for a minute."""
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=10)
    [model] = client.models.list()
    stream = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_completion_tokens=16,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
