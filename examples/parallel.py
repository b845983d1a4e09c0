"""Run two replicas of two pipeline stages each: `python examples/parallel.py ARTIFACT`, of tensor parallel size 4."""

from __future__ import annotations

import sys

from furiosa_llm import LLM, SamplingParams

PROMPTS = ["The sun is", "The sea is", "Once upon a time", "Two and two make"]


def main(artifact: str) -> None:
    """Prints the PEs of each stage, then the completions, which are the same for every parallelism."""
    with LLM.load_artifact(
        artifact, devices="npu:0,npu:1", pipeline_parallel_size=2, data_parallel_size=2, max_batch_size=4
    ) as llm:
        assert llm.topology is not None
        for number, stages in enumerate(llm.topology.replicas):
            print(f"replica {number}:", " -> ".join(f"{pes[0]} to {pes[-1]}" for pes in stages))
        for output in llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=8)):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
