"""This project: an artifact on its engine, requests given together."""

from __future__ import annotations

import itertools
import sys
from importlib.metadata import version

from benchmarks.peers.protocol import Generation, Tokens, serve, timed_requests
from furiosa_llm import LLM, RequestOutput, SamplingParams
from furiosa_llm.runtime.requests.outputs import raise_error
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind


class Furiosa:
    """An artifact, loaded as an engine does, but for the prefix cache: no prompt is to be taken from a round before."""

    def __init__(self, folder: str, threads: int, spin_us: int) -> None:
        self._folder = folder
        self._threads = threads
        self._spin_us = spin_us
        self._ids = map(str, itertools.count())

    @property
    def version(self) -> str:
        """See `Engine.version`."""
        return version("furiosa-llm-onnx")

    def load(self) -> str:
        """See `Engine.load`."""
        self._llm = LLM.load_artifact(
            self._folder, threads=self._threads, enable_prefix_caching=False, spin_us=self._spin_us
        )
        return f"{self._threads} threads"

    def generate(self, prompts: Tokens, count: int) -> Generation:
        """See `Engine.generate`."""
        params = SamplingParams(
            temperature=0.0, ignore_eos=True, max_tokens=count, output_kind=RequestOutputKind.DELTA, detokenize=False
        )
        return timed_requests(self._llm.engine, prompts, params, self._ids, _collect)


def _collect(output: RequestOutput, tokens: list[int]) -> None:
    raise_error(output)
    tokens.extend(output.outputs[0].token_ids)


if __name__ == "__main__":
    serve(Furiosa(sys.argv[1], *map(int, sys.argv[2:])))
