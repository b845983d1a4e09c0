"""Feed an `LLMEngine` while it runs: `python examples/llm_engine.py --model ARTIFACT --devices npu:0`."""

from __future__ import annotations

import argparse

from furiosa_llm import EngineArgs, LLMEngine, SamplingParams

PROMPTS = [
    ("A robot may not injure a human being", SamplingParams(temperature=0.0)),
    ("To be or not to be,", SamplingParams(temperature=0.8, top_k=5, seed=1)),
    ("It is only with the heart that", SamplingParams(n=1, best_of=5, temperature=0.8, top_p=0.95, seed=2)),
]


def main() -> None:
    """Adds a request before each step, and prints those that have ended."""
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser(description=__doc__))
    engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(parser.parse_args()))
    waiting = list(enumerate(PROMPTS))
    while waiting or engine.has_unfinished_requests():
        if waiting:
            number, (prompt, sampling_params) = waiting.pop(0)
            engine.add_request(str(number), prompt, sampling_params)
        for output in engine.step():
            if output.finished:
                print(f"request {output.request_id}: {output.outputs[0].text!r}")
    engine.shutdown()


if __name__ == "__main__":
    main()
