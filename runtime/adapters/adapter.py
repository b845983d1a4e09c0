"""An adapter that is loaded, and how a request names one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.errors import AdapterError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Adapter:
    """The arrays of an adapter, by the inputs that they are given to.

    `key` is its own in the engine: one that is loaded again, perhaps from a file that has changed, has another, so that
    no KV that was computed with the one serves the other. 0 stands for no adapter.
    """

    key: int
    name: str
    arrays: Mapping[str, Array] = field(repr=False)


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """Which adapter a request runs with, under vLLM's names.

    `lora_name` is for people, `lora_int_id` tells adapters apart. `lora_path` is PEFT's folder, a .safetensors or an
    .onnx_adapter file whose tensors are named as the graph's inputs; empty for an adapter of the artifact's own, by its
    name. Raises AdapterError for fields that are none of these.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        for name, kind in (("lora_name", str), ("lora_int_id", int), ("lora_path", str)):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise AdapterError(f"{name}: found a {type(value).__name__}, expected {kind.__name__}")
        if not self.lora_name:
            raise AdapterError("lora_name is empty; give the adapter a name")
        if self.lora_int_id < 1:
            raise AdapterError(f"lora_int_id is {self.lora_int_id}, expected at least 1: 0 stands for no adapter")


def key_of(adapter: Adapter | None) -> int:
    """What KV that was computed with `adapter` is found by."""
    return 0 if adapter is None else adapter.key
