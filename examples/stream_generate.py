"""Print a completion while it is generated: `python examples/stream_generate.py ARTIFACT`."""

from __future__ import annotations

import asyncio
import sys

from furiosa_llm import LLM, SamplingParams


async def main(artifact: str) -> None:
    """Prints the pieces of text as they come."""
    with LLM.load_artifact(artifact) as llm:
        async for piece in llm.stream_generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=24)):
            print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
