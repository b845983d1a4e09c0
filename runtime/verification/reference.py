"""The unsplit model on plain onnxruntime, which an artifact is verified and measured against.

It is one session with as many threads as asked for, whose inputs and outputs are bound once. If the model can write a
state in place, past and present are bound to one buffer.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from furiosa_llm.runtime.artifact.adapters.graph import add_adapter_inputs
from furiosa_llm.runtime.artifact.compute import in_float32
from furiosa_llm.runtime.artifact.dimensions import shape_of
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.manifest import InputInfo, OutputInfo, State
from furiosa_llm.runtime.errors import ExecutionError, InputError, StepTimeoutError
from furiosa_llm.runtime.execution.decoder import Bound, DecoderInterface
from furiosa_llm.runtime.execution.memory import Block, array_nbytes
from furiosa_llm.runtime.execution.ort import (
    ORT_ERRORS,
    RawBinding,
    Session,
    SessionSettings,
    Tensor,
    let_allocate,
    limited,
    load_error,
    unwrap,
    wrap,
)
from furiosa_llm.runtime.program.interruption import Interruption
from furiosa_llm.runtime.program.limits import FOLDED_NBYTES, WorkLimits


class ReferenceModel:
    """The unsplit model in the file `path`, described by the `inputs`, `outputs` and `states` of its artifact.

    A state that the artifact keeps in place is appended to here if the model itself has no op that writes it in place.
    `fixed` are inputs that are constants here, and `lora_modules` have inputs for adapters. `threads` are onnxruntime's
    intra-op threads, and `limits` what a session may take; None: whatever there is. `accuracy_level`, if given,
    replaces the level of every MatMulNBits. With `compute` the model computes in float32, and `inputs` and `outputs`
    say so. Raises InputError if the file is not a model with these inputs and outputs, ExecutionError if onnxruntime
    cannot load it, or, as running does, StepTimeoutError if it takes longer than it may.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        inputs: Sequence[InputInfo],
        outputs: Sequence[OutputInfo],
        states: Sequence[State],
        threads: int = 1,
        accuracy_level: int | None = None,
        compute: str | None = None,
        fixed: Mapping[str, int] = MappingProxyType({}),
        lora_modules: Sequence[str] = (),
        limits: WorkLimits | None = None,
    ) -> None:
        self._path = Path(path)
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        model = _read_model(self._path)
        self._states = _own_states(model, states)
        _fix(model, fixed)
        _keep_whole(model)
        add_adapter_inputs(model, lora_modules)
        _check_names(self._path, "inputs", [v.name for v in model.graph.input], [i.name for i in inputs])
        _check_names(self._path, "outputs", [v.name for v in model.graph.output], [o.name for o in outputs])
        if accuracy_level is not None:
            set_accuracy_level(model, accuracy_level)
        if compute is not None:
            model = in_float32(model).model
        settings = SessionSettings(
            intra_op_threads=threads, exact=accuracy_level == 0, folded_nbytes=_largest_nbytes(model)
        )
        self._in_time = limits is not None
        try:
            self._session = Session(model, self._path.parent, limited(settings, limits))
        except ORT_ERRORS as error:
            raise load_error(str(self._path), error, model) from error

    @property
    def decoder_interface(self) -> DecoderInterface:
        """What `DecoderSession` needs to know of the model."""
        return DecoderInterface(
            inputs=self._inputs,
            outputs=self._outputs,
            states=self._states,
            state_shapes={info.name: info.shape for info in self._inputs if info.role == "state"},
            ranks=1,
        )

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The model's outputs by name, for `inputs` by name."""
        binding = self._session.binding()
        tensors = {info.name: wrap(np.asarray(inputs[info.name], order="C"), info.dtype) for info in self._inputs}
        for info in self._inputs:
            binding.bind_ortvalue_input(info.name, tensors[info.name].raw)
        for output in self._outputs:
            let_allocate(binding, output.name)
        self._run(binding)
        results = zip(self._outputs, binding.get_outputs(), strict=True)
        return {info.name: unwrap(raw, info.dtype).array.copy() for info, raw in results}

    def bind_steps(self, external: frozenset[str]) -> Bound:
        """The model bound to memory of its own, except for the outputs `external`."""
        return _BoundModel(self._session.binding(), self._run, self._inputs, self._outputs, external)

    def step(self, bound: Bound) -> None:
        """Runs `bound` once."""
        bound.run()

    def _run(self, binding: RawBinding) -> None:
        try:
            if self._in_time:
                self._session.run_in_time(binding)
            else:  # without the thread that watches it: this is what speed is compared with
                self._session.run_binding(binding, Interruption().options)
        except StepTimeoutError as error:
            raise StepTimeoutError(f"{self._path}: {error}") from None
        except ORT_ERRORS as error:
            raise ExecutionError(f"onnxruntime cannot run {self._path}: {error}") from error


def _fix(model: onnx.ModelProto, fixed: Mapping[str, int]) -> None:
    """Turns the inputs that a build has fixed into initializers of the model, too."""
    for value in [value for value in model.graph.input if value.name in fixed]:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        constant = np.full([1] * len(tensor.shape.dim), fixed[value.name], dtype=dtype)
        model.graph.initializer.append(onnx.numpy_helper.from_array(constant, value.name))
        model.graph.input.remove(value)


def _own_states(model: onnx.ModelProto, states: Sequence[State]) -> tuple[State, ...]:
    """The states as the model itself keeps them; a build may have put them in place."""
    in_place = {name for node in model.graph.node if node.op_type == "GroupQueryAttention" for name in node.input}
    kept = {s.input for s in states if s.mode != "in_place"} | in_place
    return tuple(s if s.input in kept else dataclasses.replace(s, mode="append") for s in states)


def _largest_nbytes(model: onnx.ModelProto) -> int:
    """What the largest weight takes in elements of 32 bits: one that is transposed is so once, not in every step."""
    return max([FOLDED_NBYTES, *(4 * int(math.prod(tensor.dims)) for tensor in model.graph.initializer)])


def _keep_whole(model: onnx.ModelProto) -> None:
    """Keeps every cache whole, as an artifact does: one that rolls over in a window takes no past of another length."""
    for node in model.graph.node:
        for attribute in [a for a in node.attribute if a.name == "sliding_window_cache"]:
            node.attribute.remove(attribute)


def set_accuracy_level(model: onnx.ModelProto, level: int) -> None:
    """Gives every MatMulNBits of `model` the accuracy level `level`; 4 rounds activations to 8 bits, 0 does not."""
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])


class _BoundModel:
    """One session's binding, with the methods of `BoundProgram` for one rank."""

    def __init__(
        self,
        binding: RawBinding,
        run: Callable[[RawBinding], None],
        inputs: Sequence[InputInfo],
        outputs: Sequence[OutputInfo],
        external: frozenset[str],
    ) -> None:
        self.interruption = Interruption()
        self._binding = binding
        self._run = run
        self._dtypes = {info.name: info.dtype for info in inputs} | {info.name: info.dtype for info in outputs}
        self._outputs = [info for info in outputs if info.name not in external]
        self._tensors: dict[str, Tensor] = {}

    def bind_shared(self, name: str, array: Array) -> None:
        self.bind_input(0, name, wrap(array, self._dtypes[name]))

    def bind_input(self, rank: int, name: str, tensor: Tensor) -> None:
        assert rank == 0
        self._tensors[name] = tensor
        self._binding.bind_ortvalue_input(name, tensor.raw)

    def bind_output(self, rank: int, name: str, tensor: Tensor) -> None:
        assert rank == 0
        self._tensors[name] = tensor
        self._binding.bind_ortvalue_output(name, tensor.raw)

    def array(self, rank: int, name: str) -> Array:
        assert rank == 0
        return self._tensors[name].array

    def resize(self, sizes: Mapping[str, int]) -> None:
        for info in self._outputs:
            shape = shape_of(info.shape, sizes)
            known = self._tensors.get(info.name)
            if known is None or known.array.shape != shape:
                block = Block(array_nbytes(info.dtype, shape))
                self.bind_output(0, info.name, wrap(block.array(info.dtype, shape), info.dtype))

    def run(self) -> None:
        self._run(self._binding)


def _read_model(path: Path) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}; give the model that the artifact was built from"
        ) from error
    except DecodeError as error:
        raise InputError(
            f"{path} is not an ONNX model: {error}; give the model that the artifact was built from"
        ) from error
    return model


def _check_names(path: Path, what: str, found: Sequence[str], expected: Sequence[str]) -> None:
    if sorted(found) != sorted(expected):
        raise InputError(
            f"{path} has the {what} {found!r:.200}, the artifact {expected!r:.200}; give the model that the artifact "
            f"was built from"
        )
