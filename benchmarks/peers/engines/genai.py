"""onnxruntime-genai: its own loop on a model in its shape."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import numpy as np
import onnxruntime_genai as og

from benchmarks.peers.protocol import Generation, Tokens, serve, timed_generation


class Genai:
    """The model in a folder with a `genai_config.json`, which shares one buffer between past and present."""

    def __init__(self, folder: str, threads: int) -> None:
        self._folder = folder
        self._threads = threads

    @property
    def version(self) -> str:
        """See `Engine.version`."""
        return str(og.__version__)

    def load(self) -> str:
        """See `Engine.load`."""
        config = og.Config(self._folder)
        options = {"intra_op_num_threads": self._threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        return f"{self._threads} intra-op threads"

    def generate(self, prompts: Tokens, count: int) -> Generation:
        """See `Engine.generate`; the least length of a sequence keeps it from ending early."""
        length = len(prompts[0]) + count
        params = og.GeneratorParams(self._model)
        params.set_search_options(batch_size=len(prompts), max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(self._model, params)

        def step(new: Tokens) -> Sequence[int]:
            if not generator.token_count():
                generator.append_tokens(np.array(new, dtype=np.int32))
            generator.generate_next_token()
            tokens: Sequence[int] = generator.get_next_tokens()
            return tokens

        return timed_generation(prompts, count, step)


if __name__ == "__main__":
    serve(Genai(sys.argv[1], int(sys.argv[2])))
