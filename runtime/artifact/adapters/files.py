"""Read adapters: PEFT's folder, or a safetensors file whose tensors are named as the inputs of the graph."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from furiosa_llm.runtime.artifact.adapters.names import Half, Module, half_of
from furiosa_llm.runtime.artifact.adapters.patterns import NamePattern
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.errors import AdapterError, ArtifactError
from furiosa_llm.runtime.artifact.files import open_regular, size_of
from furiosa_llm.runtime.artifact.json_reader import REBUILD, parse_json
from furiosa_llm.runtime.artifact.safetensors_header import parse_header

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_NBYTES = 2**24
MAX_WEIGHTS_NBYTES = 2**33
"""Of an adapter, all of which is read: one of rank 256 for all products of Llama 3 70B has 6.6e9 in 16 bits."""
_MAX_PATTERNS = 4096
_MAX_EXPRESSIONS = 64
_PREFIX = "base_model.model."
_FLOATS = {DTYPES[name].safetensors: DTYPES[name].numpy for name in ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")}
_MUST_BE_OFF = ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices")
"""Settings of PEFT's that an adapter of two factors for each module cannot express."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """What an adapter adds to a module: `a` [in, rank] times `b` [rank, out], already scaled."""

    a: Array
    b: Array

    @property
    def rank(self) -> int:
        """How many columns `a` has, and `b` rows."""
        return int(self.a.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter as its file holds it: `modules` of a trainer's, or `tensors` by the names of a graph's inputs."""

    path: Path
    modules: Mapping[Module, Factors]
    tensors: Mapping[str, Array]


def read_adapter(path: Path) -> AdapterFile:
    """The adapter at `path`: a folder that PEFT saved, or a safetensors file; raises AdapterError for anything else."""
    if path.is_dir():
        return AdapterFile(path=path, modules=_read_peft(path), tensors={})
    if path.suffix != ".safetensors":
        found = "is not there" if not path.exists() else "is neither a folder nor a .safetensors file"
        raise AdapterError(
            f"adapter {path} {found}; give a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or a .safetensors file "
            f"whose tensors are named as the inputs"
        )
    return AdapterFile(path=path, modules={}, tensors=read_tensors(path))


def read_tensors(path: Path) -> dict[str, Array]:
    """The tensors of a safetensors file, which are floating-point numbers; raises AdapterError for anything else."""
    try:
        with open_regular(path.resolve()) as stream:
            _check_nbytes(path, size_of(stream), MAX_WEIGHTS_NBYTES)
            arrays = parse_header(stream, path.name)
            found = {}
            for name, stored in arrays.items():
                if stored.dtype not in _FLOATS:
                    raise AdapterError(
                        f"adapter {path}: tensor {name!r:.120} is {stored.dtype}, expected one of {sorted(_FLOATS)}"
                    )
                stream.seek(stored.offset)
                data = np.frombuffer(stream.read(stored.nbytes), dtype=_FLOATS[stored.dtype])
                if data.size != math.prod(stored.shape):
                    raise AdapterError(
                        f"adapter {path}: tensor {name!r:.120} has {data.size} elements, expected those of "
                        f"{list(stored.shape)}; save it again"
                    )
                found[name] = data.reshape(stored.shape)
    except ArtifactError as error:
        raise _unreadable(path, error) from error
    if not found:
        raise AdapterError(f"adapter {path} has no tensors; save it again")
    return found


def _check_nbytes(path: Path, nbytes: int, most: int) -> None:
    """A server reads what clients name, and a disk may say a size for nothing."""
    if nbytes > most:
        raise AdapterError(
            f"adapter {path} is {nbytes} bytes long, expected at most {most}; give the file of an adapter"
        )


def _read_peft(folder: Path) -> dict[Module, Factors]:
    weights = folder / WEIGHTS_NAME
    for needed in (folder / CONFIG_NAME, weights):
        if not needed.exists():
            found = ", ".join(sorted(one.name for one in folder.iterdir())[:8]) or "nothing"
            raise AdapterError(
                f"adapter {folder} has no {needed.name}, but {found}; save it by PEFT's save_pretrained, or give a "
                f".safetensors file whose tensors are named as the inputs"
            )
    scaling = _Scaling(folder / CONFIG_NAME)
    halves: dict[Module, dict[Half, Array]] = {}
    for name, array in read_tensors(weights).items():
        found_half = half_of(name.removeprefix(_PREFIX))
        if found_half is None or array.ndim != 2:
            raise AdapterError(
                f"adapter {folder}: tensor {name!r:.120} {list(array.shape)} is no lora_A or lora_B of two dimensions; "
                f"only matrix products take adapters here, so train one without it"
            )
        module, half = found_half
        halves.setdefault(module, {})[half] = array
    return {module: scaling.factors(module, found) for module, found in halves.items()}


class _Scaling:
    """What adapter_config.json says of ranks and scales."""

    def __init__(self, path: Path) -> None:
        self._folder = path.parent
        try:
            with open_regular(path.resolve()) as stream:
                _check_nbytes(path, size_of(stream), MAX_CONFIG_NBYTES)
                self._config = parse_json(stream.read(), path.name).mapping()
        except ArtifactError as error:
            raise _unreadable(self._folder, error) from error
        if self._config.get("peft_type") != "LORA":
            self._refuse("peft_type", "LORA")
        for name in _MUST_BE_OFF:
            if self._config.get(name):
                self._refuse(name, "none: it is more than two factors for each product")
        if self._config.get("bias", "none") != "none":
            self._refuse("bias", "none: it is more than two factors for each product")
        self._rank, self._alpha = (self._checked(name, self._config.get(name)) for name in ("r", "lora_alpha"))
        self._ranks, self._alphas = (self._pattern(f"{name}_pattern") for name in ("rank", "alpha"))

    def factors(self, module: Module, halves: Mapping[Half, Array]) -> Factors:
        """The factors of a module, of the two tensors that PEFT keeps of it."""
        shown = ".".join(module)
        missing = [half for half in ("A", "B") if half not in halves]
        if missing:
            raise AdapterError(f"adapter {self._folder}: {shown!r:.120} has no lora_{missing[0]}; save it again")
        a, b = halves["A"], halves["B"]
        rank = int(_matching(self._ranks, shown, self._rank))
        if a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterError(
                f"adapter {self._folder}: {shown!r:.120} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, "
                f"expected [{rank}, in] and [out, {rank}], as {CONFIG_NAME} says"
            )
        scale = _matching(self._alphas, shown, self._alpha) / (
            math.sqrt(rank) if self._config.get("use_rslora") else rank
        )
        wide = np.float64 if b.dtype == np.float64 else np.float32
        scaled: Array = np.multiply(b.T, scale, dtype=wide)
        return Factors(a=np.ascontiguousarray(a.T), b=np.ascontiguousarray(scaled))

    def _checked(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise AdapterError(
                f"adapter {self._folder}: {name} in {CONFIG_NAME} is {value!r:.80}, expected a number above 0"
            )
        return float(value)

    def _pattern(self, name: str) -> list[tuple[NamePattern, float]]:
        """Numbers by module: the keys are the ends of names, as regular expressions."""
        value = self._config.get(name) or {}
        if not isinstance(value, dict):
            self._refuse(name, "numbers by module")
        if len(value) > _MAX_PATTERNS:
            self._refuse(name, f"at most {_MAX_PATTERNS} numbers")
        try:
            found = [(NamePattern(key), self._checked(name, one)) for key, one in value.items()]
            if sum(not pattern.is_plain for pattern, _ in found) > _MAX_EXPRESSIONS:
                raise ValueError(f"has more than {_MAX_EXPRESSIONS} keys that are not plain names")
            return found
        except (re.error, ValueError) as error:
            raise AdapterError(f"adapter {self._folder}: {name} in {CONFIG_NAME}: {error}") from error

    def _refuse(self, name: str, expected: str) -> NoReturn:
        raise AdapterError(
            f"adapter {self._folder}: {name} in {CONFIG_NAME} is {self._config.get(name)!r:.80}, expected {expected}; "
            f"merge it into the weights and build the model with these"
        )


def _matching(patterns: Sequence[tuple[NamePattern, float]], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.matches(module)), default)


def _unreadable(path: Path, error: ArtifactError) -> AdapterError:
    return AdapterError(f"adapter {path}: {str(error).removesuffix(f'; {REBUILD}')}; save or copy it again")
