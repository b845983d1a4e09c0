"""llama.cpp through llama-cpp-python's bindings of its C functions: the package's own class runs one sequence alone."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

from benchmarks.peers.protocol import Generation, Tokens, serve, timed_generation

_TYPES = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
"""Ends of file names -> what the quantiser makes."""
_CACHES = {"float32": llama_cpp.GGML_TYPE_F32, "float16": llama_cpp.GGML_TYPE_F16}
_CONTEXT = 1280
"""Positions for all sequences: 16 of 80, or one of 640."""
_BATCH = 512
_SEQUENCES = 16


class LlamaCpp:
    """A GGUF file. `quantised`, if given, is made of it first with llama.cpp's own quantiser, and run instead."""

    def __init__(self, file: str, threads: int, cache: str, quantised: str | None = None) -> None:
        self._file = file if quantised is None else quantised
        self._threads = threads
        self._cache = cache
        llama_cpp.llama_backend_init()
        if quantised is not None and not Path(quantised).exists():
            _quantise(file, quantised, threads)

    @property
    def version(self) -> str:
        """See `Engine.version`."""
        return str(llama_cpp.__version__)

    def load(self) -> str:
        """See `Engine.load`."""
        self._model = llama_cpp.llama_model_load_from_file(self._file.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {self._file}; its reason is in this log")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = _CONTEXT, _BATCH, _BATCH
        params.n_seq_max = _SEQUENCES
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = _CACHES[self._cache]
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        return f"{self._threads} threads, cache in {self._cache}"

    def generate(self, prompts: Tokens, count: int) -> Generation:
        """See `Engine.generate`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        length = 0

        def step(new: Tokens) -> Sequence[int]:
            nonlocal length
            start, length = length, length + len(new[0])
            return self._step(new, start)

        return timed_generation(prompts, count, step)

    def _step(self, new: Tokens, start: int) -> list[int]:
        """Appends `new` behind `start` tokens of each sequence, in one batch; logits are asked for the last alone."""
        batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        places = []
        for sequence, tokens in enumerate(new):
            for offset, token in enumerate(tokens):
                index = batch.n_tokens
                batch.token[index] = token
                batch.pos[index] = start + offset
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = offset == len(tokens) - 1
                batch.n_tokens += 1
            places.append(batch.n_tokens - 1)
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {batch.n_tokens} tokens")
        found = [self._likeliest(place) for place in places]
        llama_cpp.llama_batch_free(batch)
        return found

    def _likeliest(self, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, place)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())


def _quantise(file: str, quantised: str, threads: int) -> None:
    """Writes `quantised`, whose name ends with its type, such as model.q4_0.gguf."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _TYPES[Path(quantised).stem.rpartition(".")[2]]
    params.nthread = threads
    status = llama_cpp.llama_model_quantize(file.encode(), f"{quantised}.partial".encode(), ctypes.byref(params))
    if status:
        raise ValueError(f"llama.cpp's quantiser returned {status} for {file}")
    Path(f"{quantised}.partial").rename(quantised)


if __name__ == "__main__":
    serve(LlamaCpp(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
