"""Odd exports: a decoder whose interface or graph is written differently, and means the same.

An `Export` is a model together with the statement of how to translate inputs and outputs from the original's to its
own. Rewrites (tests/support/export_rewrites/) change it step by step, each with its part of that statement, so that the
rewritten model's outputs are compared exactly with the original's.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

from tests.support.builder.exported import EXPORTS, exported
from tests.support.builder.parity import Case
from tests.support.builder.stitching import session

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
Dims = tuple[int | str, ...]
"""What each dimension of an input or output is: a size, or batch, sequence, past or total."""
Translation = Callable[[Arrays, Case], None]
"""Changes arrays by name in place, for a step of one case."""

ZOO = EXPORTS.parent / "zoo"
STEPS = (Case("prefill", 2, 9, 0), Case("decode", 2, 1, 9), Case("chunk", 3, 5, 7))
_VOCABULARY = 100
"""Token ids are below this; each base's vocabulary is larger."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """A decoder to rewrite."""

    name: str
    positions: Dims = ("batch", "sequence")
    vector: int = 8
    """The size of a head's vector, where the model gives it a symbol."""
    weight: int = 1
    """How often it is chosen, relative to others."""

    def load(self) -> onnx.ModelProto:
        """The model with all its weights."""
        if "/" in self.name:
            return onnx.load(ZOO / self.name)
        with tempfile.TemporaryDirectory() as folder:
            return onnx.load(exported(self.name, Path(folder)))


BASES = (
    Base(name="tiny-llama-genai-fp32/model.onnx", vector=16, weight=6),
    Base(name="bsnh", weight=8),
    Base(name="gpt2_past", weight=8),
    Base(name="tiny-llama-optimum/model.onnx", weight=1),
    Base(name="tiny-gpt2-optimum/model.onnx", weight=1),
    Base(name="mobius-llama", weight=2),
    Base(name="tiny-mixtral-dynamo-tf5/model.onnx"),
    Base(name="tiny-gptoss-genai-fp32-fullkv/model.onnx", vector=16),
    Base(name="genai-qwen35", positions=(3, "batch", "sequence")),
)
"""GroupQueryAttention, plain ops, GPT-2's Attention, Optimum's exports, ONNX's Attention, mixtures, a hybrid."""


@dataclasses.dataclass(kw_only=True)
class Cache:
    """A state of the model."""

    past: ir.Value
    present: ir.Value

    @property
    def values(self) -> tuple[ir.Value, ir.Value]:
        """Input and output."""
        return self.past, self.present


class Export:
    """A decoder that is being rewritten."""

    def __init__(self, proto: onnx.ModelProto, base: Base) -> None:
        self.model = ir.from_proto(proto)
        self.graph = self.model.graph
        self.applied: list[str] = []
        self.fixed: dict[str, int] = {}
        self.cheaper = False
        """Whether a rewrite makes the model cost less, so that its price may be below the original's."""
        self.dearer = False
        """Whether a rewrite makes the model cost more: it is priced for one sequence, and takes more."""
        self.steps = True
        """Whether the caches grow, or are written into, from step to step."""
        self.one_by_one = any(node.op_type == "GroupQueryAttention" for node in self.graph)
        """Whether several positions after a past are taken of one sequence only."""
        self.sizes: dict[str, int] = {}
        """Sizes of dimensions that are fixed."""
        self.finish: list[Callable[[onnx.ModelProto], None]] = []
        """Changes of the finished file, after all rewrites."""
        self.dims: dict[str, Dims] = {}
        self.tolerance = 1e-4
        self._feeds: list[Translation] = []
        self._outputs: list[Translation] = []
        self._numbers = itertools.count()
        inputs = {str(value.name): value for value in self.graph.inputs}
        self.tokens: ir.Value | None = inputs["input_ids"]
        self.mask = inputs.get("attention_mask")
        self.positions = inputs.get("position_ids")
        outputs = [value for value in self.graph.outputs if str(value.name).startswith("present")]
        outputs.sort(key=lambda value: (re.findall(r"\d+", str(value.name)), str(value.name)))
        self.caches = [Cache(past=inputs[_past_of(str(v.name), inputs)], present=v) for v in outputs]
        self.logits = next(value for value in self.graph.outputs if value.name == "logits")
        for value in (self.tokens, self.logits):
            self.dims[str(value.name)] = ("batch", "sequence", *_static(value)[2:])
        if self.mask is not None:
            self.dims[str(self.mask.name)] = ("batch", "total")
        if self.positions is not None:
            self.dims[str(self.positions.name)] = base.positions
        for cache in self.caches:
            self.dims[str(cache.past.name)] = _cache_dims(cache, "past", base.vector)
            self.dims[str(cache.present.name)] = _cache_dims(cache, "total", base.vector)

    # -- what rewrites use -----------------------------------------------------------------------------------------

    def translate(self, feeds: Translation | None = None, outputs: Translation | None = None) -> None:
        """Add to the statement how inputs and outputs differ from the original's."""
        if feeds is not None:
            self._feeds.append(feeds)
        if outputs is not None:
            self._outputs.append(outputs)

    def fresh(self, stem: str) -> str:
        """A name that no value has."""
        return f"{stem}_rewritten_{next(self._numbers)}"

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", outputs: int = 1, **attrs: Any
    ) -> Any:
        """The output of a new node, or its outputs."""
        node = ir.node(op_type, inputs, attrs, domain=domain, num_outputs=outputs, name=self.fresh(op_type))
        for value in node.outputs:
            value.name = self.fresh(op_type.lower())
        self.graph.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def constant(self, array: Any, dtype: Any = np.int64) -> ir.Value:
        """A new initializer."""
        tensor = ir.tensor(np.asarray(array, dtype=dtype), name=self.fresh("constant"))
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def add_input(
        self, name: str, dims: Dims, dtype: ir.DataType, shape: Iterable[int | str | None] | None = None
    ) -> ir.Value:
        """A new graph input; its symbols are `shape`, by default its dimensions' names."""
        value = ir.Value(name=name, shape=ir.Shape(list(dims if shape is None else shape)), type=ir.TensorType(dtype))
        self.graph.inputs.append(value)
        self.dims[name] = dims
        return value

    def replace_input(self, old: ir.Value, new: ir.Value | None, inner: ir.Value) -> None:
        """Let readers of the input `old` read `inner`; `new` takes its place among the inputs, if it is one."""
        place = self.graph.inputs.index(old)
        old.replace_all_uses_with(inner)
        if new is not None:
            self.graph.inputs.remove(new)
            self.graph.inputs[place] = new
        else:
            self.graph.inputs.remove(old)
        if new is None or new.name != old.name:
            self.dims.pop(str(old.name))

    def replace_output(
        self, old: ir.Value, new: ir.Value, dims: Dims, shape: Iterable[int | str | None] | None = None
    ) -> None:
        """Let the graph give `new` in the place of `old`, under its name."""
        name = str(old.name)
        self.graph.outputs[self.graph.outputs.index(old)] = new
        old.name = self.fresh("inner")
        new.name = name
        new.shape = ir.Shape(list(dims if shape is None else shape))
        new.type = ir.TensorType(dtype_of(old if new.type is None else new))
        self.dims[name] = dims

    def opset(self, version: int) -> bool:
        """Whether the model's opset is `version` or later."""
        return self.graph.opset_imports[""] >= version

    # -- what comes out --------------------------------------------------------------------------------------------

    def proto(self) -> onnx.ModelProto:
        """The rewritten model."""
        self.graph.sort()
        proto = ir.to_proto(self.model)
        del proto.graph.value_info[:]
        for change in self.finish:
            change(proto)
        return proto

    def cases(self) -> Iterator[Case]:
        """The steps that the rewritten model takes."""
        for step in STEPS:
            sizes = {**step.sizes, **self.sizes}
            case = Case(step.name, sizes["batch"], sizes["sequence"], sizes["past"])
            alone = self.one_by_one and case.past and case.sequence > 1
            yield case.with_batch(1) if alone else case

    def feeds(self, original: Mapping[str, Array], case: Case) -> Arrays:
        """The rewritten model's inputs for the original's."""
        arrays = dict(original)
        for translation in self._feeds:
            translation(arrays, case)
        return arrays

    def expected(self, original: Mapping[str, Array], outputs: Mapping[str, Array], case: Case) -> Arrays:
        """The rewritten model's outputs for the original's inputs and outputs."""
        arrays = {**original, **outputs}
        for translation in self._outputs:
            translation(arrays, case)
        return {str(value.name): arrays[str(value.name)] for value in self.graph.outputs}


class Original:
    """The decoder that is rewritten, with its numbers from plain onnxruntime."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.proto = base.load()
        self._session: ort.InferenceSession | None = None
        self._results: dict[tuple[Case, int], tuple[Arrays, Arrays]] = {}

    def export(self) -> Export:
        """A copy to rewrite."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        return Export(proto, self.base)

    def step(self, case: Case, seed: int = 0) -> tuple[Arrays, Arrays]:
        """Inputs for a case, and the outputs for them."""
        if (case, seed) not in self._results:
            feeds = self.feeds(case, seed)
            self._results[case, seed] = feeds, self.run(feeds)
        return self._results[case, seed]

    def run(self, feeds: Mapping[str, Array]) -> Arrays:
        """The outputs of the original for its inputs."""
        if self._session is None:
            self._session = session(self.proto)
        names = [value.name for value in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The tokens that follow a prompt, each the likeliest, from the original itself."""
        export, found, new, past = self.export(), list[int](), list(prompt), 0
        states = {
            str(c.past.name): np.zeros(self._shape(export, c.past, Case("", 1, 0, 0)), c.past.dtype.numpy())
            for c in export.caches
            if c.past.dtype
        }
        while len(found) < count:
            case = Case("step", 1, len(new), past)
            feeds = self.feeds(case, 0) | states
            feeds["input_ids"] = np.array([new], dtype=feeds["input_ids"].dtype)
            outputs = self.run(feeds)
            states = {str(c.past.name): outputs[str(c.present.name)] for c in export.caches}
            past += len(new)
            new = [int(outputs["logits"][0, -1].argmax())]
            found += new
        return found

    @staticmethod
    def _shape(export: Export, value: ir.Value, case: Case) -> list[int]:
        return [case.sizes[d] if isinstance(d, str) else d for d in export.dims[str(value.name)]]

    def feeds(self, case: Case, seed: int) -> Arrays:
        """Random inputs for a case; caches hold numbers that float16 has."""
        random = np.random.default_rng(seed)
        export = self.export()
        feeds: Arrays = {}
        for value in export.graph.inputs:
            shape = self._shape(export, value, case)
            if value is export.tokens:
                array: Array = random.integers(0, _VOCABULARY, shape)
            elif value is export.mask:
                array = np.ones(shape)
            elif value is export.positions:
                array = np.broadcast_to(np.arange(case.past, case.past + case.sequence), shape)
            else:
                array = random.standard_normal(shape).astype(np.float16)
            assert value.dtype is not None
            feeds[str(value.name)] = np.ascontiguousarray(array.astype(value.dtype.numpy()))
        return feeds


def _past_of(present: str, inputs: Mapping[str, object]) -> str:
    tail = present.removeprefix("present")
    return next(name for name in (f"past_key_values{tail}", f"past{tail}") if name in inputs)


def _static(value: ir.Value) -> Dims:
    assert value.shape is not None
    return tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)


def _cache_dims(cache: Cache, length: str, vector: int) -> Dims:
    """The dimensions of a state: the first symbol is the batch, the second the positions."""
    names = iter(("batch", length, vector))
    return tuple(dim if isinstance(dim, int) else next(names) for dim in _static(cache.past))


def shape_of(value: ir.Value) -> list[int | str | None]:
    """The sizes and symbols of an input or output."""
    assert value.shape is not None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def dtype_of(value: ir.Value) -> ir.DataType:
    """The type of an input or output."""
    assert value.dtype is not None
    return value.dtype
