"""vLLM built for CPUs: its engine in this process, requests given together."""

from __future__ import annotations

import itertools
import sys

import vllm
from vllm import LLM, SamplingParams

from benchmarks.peers.protocol import Generation, Tokens, serve, timed_requests

_LENGTH = 1280
_SEQUENCES = 16


class VllmCpu:
    """A folder in Hugging Face's format, in float32, without its prefix cache: rounds repeat prompts."""

    def __init__(self, folder: str, threads: int) -> None:
        self._folder = folder
        self._threads = threads
        self._ids = map(str, itertools.count())

    @property
    def version(self) -> str:
        """See `Engine.version`."""
        return str(vllm.__version__)

    def load(self) -> str:
        """See `Engine.load`."""
        self._llm = LLM(
            self._folder,
            dtype="float32",
            max_model_len=_LENGTH,
            max_num_seqs=_SEQUENCES,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            enforce_eager=True,
        )
        return f"{self._threads} threads, eager: torch.compile takes minutes"

    def generate(self, prompts: Tokens, count: int) -> Generation:
        """See `Engine.generate`."""
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=count, detokenize=False)
        return timed_requests(self._llm.llm_engine, prompts, params, self._ids, _collect)


def _collect(output: vllm.RequestOutput, tokens: list[int]) -> None:
    """Each output has all tokens so far."""
    tokens[:] = output.outputs[0].token_ids


if __name__ == "__main__":
    serve(VllmCpu(sys.argv[1], int(sys.argv[2])))
