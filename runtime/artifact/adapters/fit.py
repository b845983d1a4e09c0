"""An adapter's file as arrays for the inputs of a graph: each of its factors where it belongs, in the graph's form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from furiosa_llm.runtime.artifact.adapters.files import AdapterFile, Factors
from furiosa_llm.runtime.artifact.adapters.inputs import AdapterInputs
from furiosa_llm.runtime.artifact.adapters.names import Half, Module, half_of, same_module
from furiosa_llm.runtime.artifact.adapters.packed import found_as, pack, packed_in, unpack
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.errors import AdapterError, ArtifactError
from furiosa_llm.runtime.artifact.manifest import InputInfo

_SHOWN = 6
_FLOAT_KINDS = "fV"
"""numpy's letters for floating-point numbers; "V" is bfloat16's."""


def fit(file: AdapterFile, inputs: AdapterInputs, *, model: str) -> dict[str, Array]:
    """The adapter in `file` as an array for each of `inputs`; `model` names the model in errors.

    What the adapter leaves out stays as it is without an adapter. Raises AdapterError if it is not of this model.
    """
    found = placed(file, inputs, model=model)
    sizes = inputs.sizes(found)
    return {info.name: found.get(info.name, inputs.without(info, sizes)) for info in inputs.infos}


def placed(file: AdapterFile, inputs: AdapterInputs, *, model: str) -> dict[str, Array]:
    """Those of `fit`'s arrays that the adapter gives itself; raises what `fit` does."""
    where = f"adapter {file.path}"
    if not inputs.infos:
        raise AdapterError(
            f"{where}: {model} takes no adapters, its graph has no inputs for them; build it with `furiosa-llm build "
            f"--lora NAME={file.path}`, which adds them, or merge the adapter into the weights before"
        )
    found = _by_name(file, inputs, where) if file.tensors else _by_module(file, inputs, where)
    try:
        inputs.sizes(found)
    except ArtifactError as error:
        raise AdapterError(f"{where} is of another base model than {model}: {error}") from error
    for name, array in found.items():
        if not np.isfinite(array.astype(np.float64)).all():
            raise AdapterError(f"{where}: {name!r:.120} as {array.dtype} is not finite; give it in range")
    return found


def _by_name(file: AdapterFile, inputs: AdapterInputs, where: str) -> dict[str, Array]:
    infos = {info.name: info for info in inputs.infos}
    unknown = [name for name in file.tensors if name not in infos]
    if unknown:
        raise AdapterError(f"{where}: tensor {unknown[0]!r:.120} is no input for adapters; these are {_some(infos)}")
    for name, array in file.tensors.items():
        if array.dtype.kind not in _FLOAT_KINDS:
            raise AdapterError(f"{where}: tensor {name!r:.120} is {array.dtype}, expected floating-point numbers")
    for first, second in _partners(inputs):
        given = [one for one in (first, second) if one.name in file.tensors]
        if len(given) == 1:
            absent = second if given[0] is first else first
            raise AdapterError(f"{where} has {given[0].name!r:.120} without {absent.name!r:.120}; give both, or none")
    return {name: _typed(array, infos[name]) for name, array in file.tensors.items()}


def _partners(inputs: AdapterInputs) -> Iterator[tuple[InputInfo, InputInfo]]:
    halves = _halves(inputs.infos)
    yield from ((pair["A"], pair["B"]) for pair in halves.values() if len(pair) == 2)


def _halves(infos: Sequence[InputInfo]) -> dict[Module, dict[Half, InputInfo]]:
    found: dict[Module, dict[Half, InputInfo]] = {}
    for info in infos:
        named = half_of(info.name)
        if named is not None:
            found.setdefault(named[0], {})[named[1]] = info
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """The two inputs of a module."""

    module: Module
    a: InputInfo
    b: InputInfo

    @property
    def flipped(self) -> bool:
        """Whether they are [rank, in] and [out, rank], as trainers have them, and not as they are multiplied."""
        return self.a.shape[1] != self.b.shape[0] and self.a.shape[0] == self.b.shape[1]

    @property
    def features_out(self) -> int:
        """How many features the module gives."""
        features = self._shapes()[1][1]
        assert isinstance(features, int)  # it adds to a product with a stored weight
        return features

    def placed(self, factors: Factors, rank: int, where: str) -> dict[str, Array]:
        """The factors as arrays for the inputs, with as many ranks as these have, or else `rank`."""
        a, b = self._shapes()
        shown, declared = ".".join(self.module), a[1] if isinstance(a[1], int) else rank
        for what, size, wanted in (("in", factors.a.shape[0], a[0]), ("out", factors.b.shape[1], b[1])):
            if size != wanted:
                raise AdapterError(
                    f"{where} is of another base model: {shown!r:.120} has {size} features {what}, the model {wanted}"
                )
        if factors.rank > declared:
            raise AdapterError(
                f"{where}: {shown!r:.120} has rank {factors.rank}, the graph takes at most {declared}; train it with a "
                f"lower one, or export the graph with a greater or a dynamic one"
            )
        missing = declared - factors.rank
        padded = np.pad(factors.a, ((0, 0), (0, missing))), np.pad(factors.b, ((0, missing), (0, 0)))
        if self.flipped:
            padded = padded[0].T, padded[1].T
        return {info.name: _typed(array, info) for info, array in zip((self.a, self.b), padded, strict=True)}

    def _shapes(self) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
        return (self.a.shape[::-1], self.b.shape[::-1]) if self.flipped else (self.a.shape, self.b.shape)


def _by_module(file: AdapterFile, inputs: AdapterInputs, where: str) -> dict[str, Array]:
    places = {
        module: _Place(module=module, a=pair["A"], b=pair["B"])
        for module, pair in _halves(inputs.infos).items()
        if len(pair) == 2 and all(len(one.shape) == 2 for one in pair.values())
    }
    if not places:
        raise AdapterError(
            f"{where} is of modules, and the inputs for adapters are not named by them: {_some(inputs.base)}; give a "
            f".safetensors file whose tensors are named as these"
        )
    modules = _as_placed(file.modules, places, where)
    rank = max(factors.rank for factors in modules.values())
    found: dict[str, Array] = {}
    for module, factors in modules.items():
        found |= places[module].placed(factors, rank, where)
    return found


def _as_placed(modules: Mapping[Module, Factors], places: Mapping[Module, _Place], where: str) -> dict[Module, Factors]:
    """The factors by the modules of `places`, some of which may be packed where the adapter has several, or apart."""
    found: dict[Module, Factors] = {}
    packed: dict[Module, dict[Module, Factors]] = {}
    for module, factors in modules.items():
        matches = found_as(module, lambda name: same_module(name, places))
        if not matches:
            raise AdapterError(
                f"{where} adds to {'.'.join(module)!r:.120}, for which the model takes no adapter; it does for "
                f"{_some('.'.join(one) for one in places)}. Build it with this adapter, or train one without the module"
            )
        if module in matches:
            found[matches[module]] = factors
        elif matches.keys() == set(packed_in(module)):
            place = next(iter(matches.values()))
            packed.setdefault(place, {})[(*place[:-1], module[-1])] = factors
        else:
            sizes = [places[place].features_out for place in matches.values()]
            parts = unpack(factors, list(matches), sizes, f"{where}: {'.'.join(module)!r:.120}")
            found |= {matches[part]: own for part, own in parts.items()}
    for place in found.keys() & packed.keys():
        shown = " and ".join(part[-1] for part in packed[place])
        raise AdapterError(f"{where} adds to {'.'.join(place)!r:.120} and to {shown} in it; train it with one of them")
    return found | {place: pack(place, given, places[place].features_out, where) for place, given in packed.items()}


def _typed(array: Array, info: InputInfo) -> Array:
    with np.errstate(over="ignore"):  # what is not finite is refused
        return np.ascontiguousarray(array, dtype=DTYPES[info.dtype].numpy)


def _some(names: Mapping[str, object] | Iterator[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")
