"""The few calls of onnxruntime that execution needs, with types: sessions, bindings, and tensors over numpy memory.

The raw classes that `InferenceSession.io_binding()` wraps are used, because the wrapper's bookkeeping costs three times
the call itself. They keep no reference to the numpy memory.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from furiosa_llm.runtime.artifact.compute import narrow_types
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.graphs import COLLECTIVE_DOMAIN, all_nodes
from furiosa_llm.runtime.errors import ExecutionError, KernelError, StepTimeoutError
from furiosa_llm.runtime.program.fatal_kernels import guard_kernels
from furiosa_llm.runtime.program.interruption import Interruption, ended_after
from furiosa_llm.runtime.program.limits import FOLDED_NBYTES, LONGEST_LOAD_SECONDS, LONGEST_STEP_SECONDS, WorkLimits

ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(_state.EPFail, _state.EngineError, _state.Fail, _state.InvalidArgument, _state.InvalidGraph),
    *(_state.InvalidProtobuf, _state.ModelRequiresCompilation, _state.NoModel, _state.NoSuchFile, _state.NotFound),
    *(_state.NotImplemented, _state.RuntimeException, MemoryError),
)
"""What onnxruntime raises: its exceptions have no common base of their own."""

_CPU = _state.OrtDevice(_state.OrtDevice.cpu(), _state.OrtDevice.default_memory(), 0)
_SILENT = 4
_AS_REQUESTED = 1
_NO_KERNEL = re.compile(
    r"implementation for (?P<op>\w+)\(\d+\) node with name '(?P<node>[^']*)'"
    r"|Type '(?:[^']*)' of input parameter \(.*\) of operator \((?P<typed>\w+)\) in node \((?P<typed_node>.*)\) is inv"
)


class RawTensor(Protocol):
    """onnxruntime's own handle of a tensor."""

    def numpy(self) -> Array:
        """The tensor's memory as an array, without a copy; raises RuntimeError for types that numpy has not."""
        ...

    def data_ptr(self) -> int:
        """The address of the tensor's memory."""
        ...

    def shape(self) -> list[int]:
        """The tensor's shape."""
        ...

    def element_type(self) -> int:
        """The tensor's type, as `TensorProto.DataType` numbers them."""
        ...


class RawBinding(Protocol):
    """onnxruntime's own binding of a session's inputs and outputs."""

    def bind_ortvalue_input(self, name: str, value: RawTensor) -> None:
        """Binds an input."""
        ...

    def bind_ortvalue_output(self, name: str, value: RawTensor) -> None:
        """Binds an output to memory of the caller."""
        ...

    def bind_output(self, name: str, device: object) -> None:
        """Binds an output to memory that onnxruntime allocates in the next run."""
        ...

    def get_outputs(self) -> list[RawTensor]:
        """The outputs of the last run, in the order in which they were bound first."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """How sessions are made: `intra_op_threads` of each, and whether weights are packed for speed.

    Threads of a session wait for each other asleep, or within a run awake for `spin_us` microseconds first.
    `prepack` copies each MatMul weight into the kernel's own order when the session is made; without it weights stay
    mapped from their file, shared between sessions and processes, and decoding is slower. `exact` keeps onnxruntime
    from rounding activations to 8 bits where it fuses DequantizeLinear and MatMul. With `dequantise` weights are
    dequantised as they are loaded, and not fused. Without `optimize` every node is run as it is written.
    A session that is not made within `load_seconds` is given up, a constant that would be longer than `folded_nbytes`
    is computed in each run, and `Session.run` ends after `run_seconds`. With `arena` it allocates from that of
    `limit_memory`.
    """

    intra_op_threads: int = 1
    spin_us: int = 0
    prepack: bool = True
    exact: bool = False
    dequantise: bool = False
    optimize: bool = True
    load_seconds: float = LONGEST_LOAD_SECONDS
    folded_nbytes: int = FOLDED_NBYTES
    run_seconds: float = LONGEST_STEP_SECONDS
    arena: bool = False


def limit_memory(nbytes: int) -> None:
    """Has the sessions that are made from now on with `arena` allocate at most so much, all of them together.

    What they pack of weights does not count. Sessions that there are keep the arena that they have.
    """
    memory = _state.OrtMemoryInfo("Cpu", _state.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, _state.OrtMemType.DEFAULT)
    config = onnxruntime.OrtArenaCfg({"max_mem": nbytes, "arena_extend_strategy": _AS_REQUESTED})
    onnxruntime.create_and_register_allocator(memory, config)


def limited(settings: SessionSettings, limits: WorkLimits | None) -> SessionSettings:
    """`settings` of a session that is made next, within `limits`, which count for its memory from now on."""
    if limits is None:
        return settings
    limit_memory(limits.step_nbytes)
    return replace(settings, load_seconds=limits.load_seconds, run_seconds=limits.step_seconds, arena=True)


class Session:
    """One onnxruntime session and what it takes to run it without Python overhead."""

    __slots__ = ("_run_seconds", "_session", "run_binding")

    def __init__(self, model: ModelProto, weights_folder: os.PathLike[str], settings: SessionSettings) -> None:
        """Loads `model`, whose external data lies in `weights_folder`, guarded; raises one of ORT_ERRORS.

        It raises StepTimeoutError if that takes longer than `settings` let it.
        """
        guard_kernels(model)
        self._run_seconds = settings.run_seconds
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.intra_op_threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = _SILENT
        if not settings.optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # One pattern is kept for each input shape ever seen, and a growing context gives a new shape every step.
        options.enable_mem_pattern = False
        entries = {
            "session.intra_op.allow_spinning": "1" if settings.spin_us else "0",
            "session.intra_op.spin_duration_us": str(settings.spin_us),
            "session.force_spinning_stop": "1",
            "session.inter_op.allow_spinning": "0",
            "session.model_external_initializers_file_folder_path": os.fspath(weights_folder),
            "session.disable_prepacking": "0" if settings.prepack else "1",
            "session.use_env_allocators": "1" if settings.arena else "0",
            "optimization.constant_folding_max_output_size_in_bytes": str(settings.folded_nbytes),
        }
        if settings.exact:
            entries["session.qdq_matmulnbits_accuracy_level"] = "0"
        if settings.dequantise:
            entries["session.disable_quant_qdq"] = "1"
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        try:
            with ended_after(settings.load_seconds, lambda: options.set_load_cancellation_flag(True)):
                self._session = onnxruntime.InferenceSession(
                    model.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
        except _state.ModelLoadCanceled:
            raise StepTimeoutError(
                f"onnxruntime was not done with making a session ready within {settings.load_seconds:g} s: it computes "
                f"constants for longer than a model of this size needs"
            ) from None
        self.run_binding: Callable[[RawBinding, onnxruntime.RunOptions], None] = self._session._sess.run_with_iobinding

    def binding(self) -> RawBinding:
        """A new binding with nothing bound."""
        binding: RawBinding = _state.SessionIOBinding(self._session._sess)
        return binding

    def run(self, inputs: Mapping[str, RawTensor], outputs: Sequence[str]) -> dict[str, RawTensor]:
        """Runs once on `inputs`, and has onnxruntime allocate the `outputs`; for whoever runs it seldom.

        Raises StepTimeoutError if it takes longer than the settings let it.
        """
        binding = self.binding()
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(name, tensor)
        for name in outputs:
            let_allocate(binding, name)
        self.run_in_time(binding)
        return dict(zip(outputs, binding.get_outputs(), strict=True))

    def run_in_time(self, binding: RawBinding) -> None:
        """Runs once; raises StepTimeoutError if it takes longer than the settings let it, or one of ORT_ERRORS."""
        interruption, seconds = Interruption(), self._run_seconds
        late = StepTimeoutError(
            f"a run was not done within {seconds:g} s; give a greater step_timeout if the model is that slow"
        )
        try:
            with interruption.after(seconds, late):
                self.run_binding(binding, interruption.options)
        except ORT_ERRORS:
            interruption.check()
            raise


def load_error(what: str, error: Exception, model: ModelProto) -> ExecutionError:
    """What to raise for `what`, `model` or a part of it, that onnxruntime refuses to load by `error`, of ORT_ERRORS."""
    foreign = _foreign_node(model)
    if foreign is not None:
        return KernelError(
            f"onnxruntime has no operator {foreign.op_type!r:.80} of the domain {foreign.domain or 'ai.onnx'!r:.80} "
            f"(node {foreign.name!r:.80}), which {what} needs; build it again from a model of operators that it has"
        )
    narrow = narrow_types(model)
    found = _NO_KERNEL.search(str(error))
    if found is None:
        return ExecutionError(f"onnxruntime cannot load {what}: {error}")
    op, node = found["op"] or found["typed"], found["node"] or found["typed_node"] or ""
    line = f"onnxruntime has no CPU kernel here for {op} (node {node!r:.80}) in {what}"
    if not narrow:
        return KernelError(f"{line}; export the model in types that it has kernels for")
    return KernelError(
        f"{line}, whose types are {', '.join(narrow)}; compute it in float32: --compute float32, compute='float32'"
    )


def _foreign_node(model: ModelProto) -> NodeProto | None:
    """The first node, at any depth, of an operator that onnxruntime does not know."""
    known = {(schema.domain, schema.name) for schema in _state.get_all_operator_schema()}
    known |= {(function.domain, function.name) for function in model.functions}
    for node in all_nodes(model.graph.node):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if domain != COLLECTIVE_DOMAIN and (domain, node.op_type) not in known:
            return node
    return None


class Tensor(NamedTuple):
    """An array and onnxruntime's handle of the same memory; whoever binds the handle keeps the array."""

    array: Array
    raw: RawTensor


def wrap(array: Array, dtype: str) -> Tensor:
    """A tensor of ONNX type `dtype` over the memory of the C-contiguous `array`."""
    if array.dtype.isbuiltin != 1:
        code = TensorProto.DataType.Value(dtype)
        same_size = array.view(np.dtype(f"u{array.dtype.itemsize}"))
        return Tensor(array, _state.OrtValue.ortvalue_from_numpy_with_onnx_type(same_size, code))
    return Tensor(array, _state.OrtValue.ortvalue_from_numpy(array, _CPU))


def unwrap(raw: RawTensor, dtype: str) -> Tensor:
    """The tensor of ONNX type `dtype` that onnxruntime has allocated, its array over the same memory."""
    kind = np.dtype(DTYPES[dtype].numpy)
    if kind.isbuiltin == 1:
        return Tensor(raw.numpy(), raw)
    shape = raw.shape()
    memory = (ctypes.c_uint8 * (math.prod(shape) * kind.itemsize)).from_address(raw.data_ptr())
    return Tensor(np.ctypeslib.as_array(memory).view(kind).reshape(shape), raw)


def let_allocate(binding: RawBinding, name: str) -> None:
    """Has onnxruntime allocate the output `name` of the next run."""
    binding.bind_output(name, _CPU)
