"""This project: an artifact on its engine, requests given together."""

from __future__ import annotations

import sys
import time
from importlib.metadata import version

from benchmarks.peers.protocol import Generation, Tokens, serve
from furiosa_llm import LLM, SamplingParams
from furiosa_llm.runtime.llm_engine import raise_error
from furiosa_llm.runtime.tokens.sampling_params import RequestOutputKind


class Furiosa:
    """An artifact, loaded as an engine does, but for the prefix cache: no prompt is to be taken from a round before."""

    def __init__(self, folder: str, threads: int) -> None:
        self._folder = folder
        self._threads = threads
        self._requests = 0

    @property
    def version(self) -> str:
        """See `Engine.version`."""
        return version("furiosa-llm-onnx")

    def load(self) -> str:
        """See `Engine.load`."""
        self._llm = LLM.load_artifact(self._folder, threads=self._threads, enable_prefix_caching=False)
        return f"{self._threads} threads"

    def generate(self, prompts: Tokens, count: int) -> Generation:
        """See `Engine.generate`."""
        params = SamplingParams(
            temperature=0.0, ignore_eos=True, max_tokens=count, output_kind=RequestOutputKind.DELTA, detokenize=False
        )
        engine = self._llm.engine
        tokens: dict[str, list[int]] = {}
        started = time.perf_counter()
        for prompt in prompts:
            self._requests += 1
            tokens[str(self._requests)] = []
            engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, params)
        first = None
        while engine.has_unfinished_requests():
            for output in engine.step():
                raise_error(output)
                tokens[output.request_id].extend(output.outputs[0].token_ids)
            if first is None and all(tokens.values()):
                first = time.perf_counter()
        assert first is not None
        return Generation(
            tokens=list(tokens.values()), first_seconds=first - started, seconds=time.perf_counter() - started
        )


if __name__ == "__main__":
    serve(Furiosa(sys.argv[1], int(sys.argv[2])))
