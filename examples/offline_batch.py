"""Complete several prompts at once: `python examples/offline_batch.py ARTIFACT [DEVICES]`."""

from __future__ import annotations

import sys

from furiosa_llm import LLM, SamplingParams


def main(artifact: str, devices: str | None = None) -> None:
    """Prints each prompt with its completion."""
    prompts = ["Hello, my name is", "The capital of France is", "Once upon a time"]
    sampling_params = SamplingParams(min_tokens=10, top_p=0.3, top_k=100, seed=0)
    with LLM.load_artifact(artifact, devices=devices) as llm:
        for output in llm.generate(prompts, sampling_params):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
