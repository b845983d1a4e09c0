"""Hostile sources: a source.onnx whose initializers are not what the manifest says."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from tests.support.runtime.hostile import SOURCE, Hostile, model_kind
from tests.support.runtime.hostile_models import Change, external, function_with_external_data, inline_of, node


def _original(model: ModelProto, *, stored: bool) -> TensorProto:
    location = TensorProto.EXTERNAL if stored else TensorProto.DEFAULT
    found: TensorProto = next(tensor for tensor in model.graph.initializer if tensor.data_location == location)
    return found


def _source_place(key: str, value: str) -> Change:
    def change(model: ModelProto) -> None:
        for entry in _original(model, stored=True).external_data:
            if entry.key == key:
                entry.value = value

    return change


def _made_external(model: ModelProto) -> None:
    tensor = _original(model, stored=False)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def _made_inline(model: ModelProto) -> None:
    tensor = _original(model, stored=True)
    tensor.CopyFrom(numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))


def _sparse_source(model: ModelProto) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(external())


_SOURCE: list[tuple[str, Change, str]] = [
    ("an initializer missing", lambda m: m.graph.initializer.pop(), "found no initializer '.*', expected one, because"),
    (
        "an initializer added",
        inline_of(data_type=1, dims=[0]),
        "found the initializer 'added', expected only initializers of",
    ),
    (
        "an initializer twice",
        lambda m: m.graph.initializer.append(m.graph.initializer[0]),
        "found the initializer '.*' twice",
    ),
    (
        "an initializer of another shape",
        lambda m: m.graph.initializer[0].dims.append(1),
        r"is FLOAT \[1024, 64, 1\], expected FLOAT \[1024, 64\]",
    ),
    (
        "an initializer of another type",
        lambda m: setattr(m.graph.initializer[0], "data_type", 10),
        "is FLOAT16 .*, expected FLOAT",
    ),
    (
        "a stored one elsewhere",
        _source_place("location", "/etc/passwd"),
        "lies at .*/etc/passwd.*, expected .*artifact",
    ),
    (
        "a stored one with data beside",
        lambda m: setattr(_original(m, stored=True), "raw_data", b"x"),
        "has data of its own, expected none",
    ),
    ("a stored one with its data", _made_inline, "lies at its own data, expected"),
    ("an inline one elsewhere", _made_external, "has external data, expected inline data"),
    (
        "an inline one cut short",
        lambda m: setattr(_original(m, stored=False), "raw_data", b"1234"),
        "has 4 bytes, expected 256 for FLOAT",
    ),
    (
        "external data in an attribute",
        node(value=external()),
        "has an attribute with external data, expected inline data",
    ),
    (
        "external data in a function",
        function_with_external_data,
        "has an attribute with external data, expected inline data",
    ),
    ("external data that is sparse", _sparse_source, "sparse initializer 't' has external data, expected inline data"),
    ("no graph", lambda m: m.ClearField("graph"), "found no initializer"),
]

KINDS: list[Hostile] = [
    model_kind("int4", SOURCE, name, change, rf"source\.onnx: .*{message}") for name, change, message in _SOURCE
]
