"""The adapters of one model, from files, by the ids that requests name them by."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from pathlib import Path

import onnxruntime

from furiosa_llm.runtime.adapters.adapter import Adapter, LoRARequest
from furiosa_llm.runtime.artifact.adapters.files import AdapterFile, read_adapter
from furiosa_llm.runtime.artifact.adapters.fit import fit
from furiosa_llm.runtime.artifact.adapters.inputs import AdapterInputs
from furiosa_llm.runtime.artifact.adapters.stored import read_own
from furiosa_llm.runtime.artifact.errors import AdapterError
from furiosa_llm.runtime.execution.ort import ORT_ERRORS

ONNX_ADAPTER = ".onnx_adapter"


class AdapterRegistry:
    """Adapters for the `inputs` of `model`, which its artifact has files of (`own`) or requests have paths of.

    Any thread may use it. Requests keep what they run with: one that is removed is gone when the last of them ends.
    """

    def __init__(self, inputs: AdapterInputs, *, model: str, own: Mapping[str, Path]) -> None:
        self.inputs = inputs
        self.own = dict(own)
        self._model = model
        self._lock = threading.Lock()
        self._loading = threading.Lock()  # who asks for what is loaded does not wait for a file
        self._loaded: dict[int, tuple[LoRARequest, Adapter]] = {}
        self._keys = itertools.count(1)

    def add(self, request: LoRARequest) -> Adapter:
        """The adapter that `request` names, loaded if it is not; raises AdapterError if it is not one of the model's.

        An id that another name or path has is refused until that one is removed.
        """
        if not isinstance(request, LoRARequest):
            raise AdapterError(f"lora_request: found a {type(request).__name__}, expected a LoRARequest")
        found = self._find(request)
        if found is not None:
            return found
        with self._loading:
            adapter = self._find(request)
            if adapter is None:
                arrays = fit(self._read(request), self.inputs, model=self._model)
                adapter = Adapter(key=next(self._keys), name=request.lora_name, arrays=arrays)
                with self._lock:
                    self._loaded[request.lora_int_id] = (request, adapter)
        return adapter

    def remove(self, lora_int_id: int) -> bool:
        """Forgets an adapter; whether it was there. Requests that run with it end with it."""
        with self._lock:
            return self._loaded.pop(lora_int_id, None) is not None

    def ids(self) -> set[int]:
        """The ids of the adapters that are loaded."""
        with self._lock:
            return set(self._loaded)

    def _find(self, request: LoRARequest) -> Adapter | None:
        with self._lock:
            known, adapter = self._loaded.get(request.lora_int_id, (request, None))
        if known != request:
            raise AdapterError(
                f"lora_int_id {request.lora_int_id} belongs to {known.lora_name!r:.80} "
                f"({known.lora_path or 'of the artifact'}); remove that one, or give another id"
            )
        return adapter

    def _read(self, request: LoRARequest) -> AdapterFile:
        if request.lora_path:
            path = Path(request.lora_path)
            return _read_onnx_adapter(path) if path.suffix == ONNX_ADAPTER else read_adapter(path)
        if request.lora_name not in self.own:
            known = ", ".join(sorted(self.own)) or "none"
            raise AdapterError(
                f"lora_name {request.lora_name!r:.80} is no adapter of {self._model}, which has {known}; give its "
                f"lora_path"
            )
        return read_own(self.own[request.lora_name])


def _read_onnx_adapter(path: Path) -> AdapterFile:
    """The file that onnxruntime's own tools write."""
    try:
        found = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
        tensors = {name: value.numpy().copy() for name, value in found.items()}
    except ORT_ERRORS as error:
        raise AdapterError(f"adapter {path} cannot be read by onnxruntime: {error}; export it again") from error
    return AdapterFile(path=path, modules={}, tensors=tensors)
