"""Compare texts by their vectors, with an encoder's artifact: `python examples/embeddings.py ARTIFACT`."""

from __future__ import annotations

import sys

import numpy as np

from furiosa_llm import LLM

TEXTS = ["A cat sits on the mat.", "A kitten is lying on a rug.", "The invoice is due on Friday."]


def main(artifact: str) -> None:
    """Prints how similar each text is to the first: the cosine, as vectors have the length 1."""
    with LLM.load_artifact(artifact) as llm:
        vectors = np.array([output.outputs.embedding for output in llm.embed(TEXTS)])
    for text, cosine in zip(TEXTS, vectors @ vectors[0], strict=True):
        print(f"{cosine:6.3f}  {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
