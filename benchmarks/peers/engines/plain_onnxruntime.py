"""Plain onnxruntime: a decode loop on the unsplit model, all inputs and outputs bound.

A cache that GroupQueryAttention writes in place is one buffer, bound as past and present; one that the graph appends to
goes from output to input without a copy. The graph gives the logits of all positions, also of a prompt's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.peers.protocol import Generation, Tokens, serve, timed_generation

_CACHE = "past_key_values."


class PlainOnnxruntime:
    """The decoder in a folder with a `config.json` beside it; its inputs are those that exporters give a decoder."""

    def __init__(self, folder: str, threads: int) -> None:
        self._folder = Path(folder)
        self._threads = threads
        config = json.loads((self._folder / "config.json").read_text())
        self._heads, self._width = config["num_key_value_heads"], config["head_dim"]
        graph = onnx.load(self._folder / "model.onnx", load_external_data=False).graph
        self._in_place = any(node.op_type == "GroupQueryAttention" for node in graph.node)

    @property
    def version(self) -> str:
        """See `Engine.version`."""
        return str(ort.__version__)

    def load(self) -> str:
        """See `Engine.load`."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        self._session = ort.InferenceSession(self._folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self._inputs = [one.name for one in self._session.get_inputs()]
        self._outputs = [one.name for one in self._session.get_outputs()]
        return f"{self._threads} intra-op threads"

    def generate(self, prompts: Tokens, count: int) -> Generation:
        """See `Engine.generate`."""
        sequences = _Sequences(self, batch=len(prompts), room=len(prompts[0]) + count)
        return timed_generation(prompts, count, sequences.step)

    def caches(self, batch: int, length: int) -> dict[str, ort.OrtValue]:
        """New caches of `length` positions, by input."""
        shape = (batch, self._heads, length, self._width)
        names = [name for name in self._inputs if name.startswith(_CACHE)]
        return {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=np.float32)) for name in names}


class _Sequences:
    """Equally long sequences in the model, and their caches."""

    def __init__(self, model: PlainOnnxruntime, *, batch: int, room: int) -> None:
        self._model = model
        self._caches = model.caches(batch, room if model._in_place else 0)
        self._length = 0

    def step(self, new: Tokens) -> Sequence[int]:
        """Appends `new`, and gives the likeliest token behind each sequence."""
        binding = self._model._session.io_binding()
        for name, array in self._told(np.array(new, dtype=np.int64)).items():
            binding.bind_cpu_input(name, array)
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
        for name in self._model._outputs:
            if name != "logits" and self._model._in_place:
                binding.bind_ortvalue_output(name, self._caches[name.replace("present.", _CACHE)])
            else:
                binding.bind_output(name)
        self._model._session.run_with_iobinding(binding)
        found = dict(zip(self._model._outputs, binding.get_outputs(), strict=True))
        if not self._model._in_place:
            self._caches = {name: found[name.replace(_CACHE, "present.")] for name in self._caches}
        tokens: list[int] = found["logits"].numpy()[:, -1].argmax(axis=-1).tolist()
        return tokens

    def _told(self, ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> dict[str, np.ndarray]:
        batch, count = ids.shape
        start, self._length = self._length, self._length + count
        told = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, self._length), dtype=np.int64),
            "position_ids": np.tile(np.arange(start, self._length, dtype=np.int64), (batch, 1)),
        }
        return {name: array for name, array in told.items() if name in self._model._inputs}


if __name__ == "__main__":
    serve(PlainOnnxruntime(sys.argv[1], int(sys.argv[2])))
