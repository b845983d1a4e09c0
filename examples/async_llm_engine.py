"""Run requests of several tasks at once: `python examples/async_llm_engine.py --model ARTIFACT`."""

from __future__ import annotations

import argparse
import asyncio

from furiosa_llm import AsyncEngineArgs, AsyncLLMEngine, SamplingParams


async def complete(engine: AsyncLLMEngine, request_id: str, prompt: str) -> str:
    """The completion of `prompt`."""
    text = ""
    async for output in engine.generate(prompt, SamplingParams(temperature=0.0, max_tokens=8), request_id):
        text = output.outputs[0].text
    return f"{prompt!r} -> {text!r}"


async def main() -> None:
    """Prints the completions in the order of the prompts."""
    parser = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser(description=__doc__))
    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs.from_cli_args(parser.parse_args()))
    prompts = ["The sun is", "Two and two make", "Once upon a time"]
    for line in await asyncio.gather(*(complete(engine, str(n), prompt) for n, prompt in enumerate(prompts))):
        print(line)
    engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
