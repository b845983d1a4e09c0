"""Adapters from files, as arrays for a graph's inputs; and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from furiosa_llm.runtime.artifact.adapters.files import read_adapter
from furiosa_llm.runtime.artifact.adapters.fit import fit
from furiosa_llm.runtime.artifact.adapters.inputs import AdapterInputs
from furiosa_llm.runtime.artifact.adapters.names import half_of, module_of, same_module
from furiosa_llm.runtime.artifact.adapters.stored import file_name, to_safetensors
from furiosa_llm.runtime.artifact.dtypes import DTYPES, Array
from furiosa_llm.runtime.artifact.errors import AdapterError
from furiosa_llm.runtime.artifact.manifest import InputInfo
from tests.support.adapters import PREFIX, deltas, saved, written

SIZES = {"layers.0.self_attn.q_proj": (6, 4), "layers.1.self_attn.q_proj": (6, 4)}


def inputs(rank: int | str = 4, *, dtype: str = "FLOAT", flipped: bool = False) -> AdapterInputs:
    shapes = {"A": (6, rank), "B": (rank, 4)}
    infos = tuple(
        InputInfo(
            name=f"layers.{layer}.q_proj.lora_{half}",
            dtype=dtype,
            shape=shape[::-1] if flipped else shape,
            layout=(None, None),
            role="other",
        )
        for layer in (0, 1)
        for half, shape in shapes.items()
    )
    kind = np.dtype(DTYPES[dtype].numpy)
    base = {info.name: np.zeros([dim if isinstance(dim, int) else 1 for dim in info.shape], kind) for info in infos}
    return AdapterInputs(infos=infos, base=base)


def fitted(path: Path, taken: AdapterInputs) -> dict[str, Array]:
    return fit(read_adapter(path), taken, model="model")


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 8 / 2),
        ({"use_rslora": True}, 8 / 2**0.5),
        ({"alpha_pattern": {"0.self_attn.q_proj": 3}}, 3 / 2),
        ({"alpha_pattern": {"1.self_attn.q_proj": 3}}, 8 / 2),
        ({"rank_pattern": {r"layers\..*": 2}}, 8 / 2),
    ],
)
def test_the_scale(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    saved(tmp_path, SIZES, rank=2, **config)
    found = fitted(tmp_path, inputs())
    product = found["layers.0.q_proj.lora_A"] @ found["layers.0.q_proj.lora_B"]
    assert np.allclose(product, deltas(tmp_path, scale)["layers.0.self_attn.q_proj"], rtol=1e-5)


@pytest.mark.parametrize("rank", [2, 4, "rank"])
@pytest.mark.parametrize("flipped", [False, True])
def test_the_form_is_the_graphs(rank: int | str, flipped: bool, tmp_path: Path) -> None:
    """Of its rank, with zeros behind a lower one; and as [rank, in] and [out, rank] where the graph has it so."""
    saved(tmp_path, SIZES, rank=2)
    found = fitted(tmp_path, inputs(rank, flipped=flipped))
    a, b = found["layers.1.q_proj.lora_A"], found["layers.1.q_proj.lora_B"]
    size = 2 if rank == "rank" else rank
    assert a.shape == ((size, 6) if flipped else (6, size))
    product = (b @ a).T if flipped else a @ b
    assert np.allclose(product, deltas(tmp_path, 4)["layers.1.self_attn.q_proj"], rtol=1e-5)


def test_modules_that_are_left_out_add_nothing(tmp_path: Path) -> None:
    saved(tmp_path, {"layers.1.self_attn.q_proj": (6, 4)}, rank=3)
    found = fitted(tmp_path, inputs("rank"))
    assert found["layers.0.q_proj.lora_A"].shape == (6, 3)
    assert not found["layers.0.q_proj.lora_B"].any()
    assert found["layers.1.q_proj.lora_B"].any()


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16"])
def test_types_are_the_graphs(dtype: str, tmp_path: Path) -> None:
    kind = np.dtype(DTYPES[dtype].numpy)
    tensors = {f"layers.{n}.q_proj.lora_{h}": np.full(s, 0.25, ml_dtypes.bfloat16)
               for n in (0, 1) for h, s in (("A", (6, 4)), ("B", (4, 4)))}  # fmt: skip
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(to_safetensors(tensors))
    found = fitted(path, inputs(dtype=dtype))
    assert {array.dtype for array in found.values()} == {kind}
    assert all((array.astype(np.float32) == 0.25).all() for array in found.values())


def _with(**config: Any) -> Callable[[Path], object]:
    return lambda folder: saved(folder, SIZES, **config)


def _tensor(name: str, array: Array) -> Callable[[Path], object]:
    return lambda folder: written(folder, {f"{PREFIX}{name}": array}, r=4, lora_alpha=8)


def _without(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        saved(folder, SIZES)
        (folder / name).unlink()

    return change


def _damaged(name: str, data: bytes) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        saved(folder, SIZES)
        (folder / name).write_bytes(data)

    return change


def _stretched(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        saved(folder, SIZES)
        os.truncate(folder / name, 2**40)

    return change


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_with(rank=5), r"has rank 5, the graph takes at most 4"),
        (_with(rank_pattern={"q_proj": 3}), r"lora_A \[4, 6\] and lora_B \[4, 4\], expected \[3, in\] and \[out, 3\]"),
        (_with(use_dora=True), r"use_dora in adapter_config.json is True, expected none"),
        (_with(bias="all"), r"bias in adapter_config.json is 'all'"),
        (_with(modules_to_save=["lm_head"]), r"modules_to_save"),
        (_with(alpha=-1), r"lora_alpha in adapter_config.json is -1, expected a number above 0"),
        (_with(alpha_pattern={"(": 1}), r"alpha_pattern in adapter_config.json: "),
        (_with(alpha_pattern={"(a+)+": 1}), r"alpha_pattern in adapter_config.json: has '\(a\+\)\+', expected names"),
        (_with(alpha_pattern={"[z-a]": 1}), r"alpha_pattern in adapter_config.json: bad character range"),
        (_with(rank_pattern={f"q{i}": 1 for i in range(5000)}), r"rank_pattern in .*, expected at most 4096 numbers"),
        (_with(rank_pattern={f"q+{i}": 1 for i in range(65)}), r"has more than 64 keys that are not plain names"),
        (_stretched("adapter_config.json"), r"adapter_config.json is 1099511627776 bytes long, .* most 16777216"),
        (_stretched("adapter_model.safetensors"), r"safetensors is 1099511627776 bytes long, .* most 8589934592"),
        (_with(alpha_pattern=3), r"alpha_pattern in adapter_config.json is 3, expected numbers by module"),
        (_with(peft_type="IA3"), r"peft_type in adapter_config.json is 'IA3', expected LORA"),
        (lambda f: saved(f, {"layers.0.self_attn.q_proj": (7, 4)}), r"another base model: .* has 7 features in, "),
        (lambda f: saved(f, {"layers.0.self_attn.q_proj": (6, 5)}), r"has 5 features out, the model 4"),
        (lambda f: saved(f, {"layers.2.self_attn.q_proj": (6, 4)}), r"adds to 'model.layers.2.self_attn.q_proj', "),
        (lambda f: saved(f, {"layers.0.mlp.up_proj": (6, 4)}), r"it does for layers.0.q_proj, layers.1.q_proj"),
        (_tensor("layers.0.self_attn.q_proj.lora_A.weight", np.ones((4, 6), np.float32)), r"has no lora_B"),
        (_tensor("embed_tokens.lora_embedding_A", np.ones((4, 6), np.float32)), r"is no lora_A or lora_B"),
        (_tensor("layers.0.q_proj.lora_A.weight", np.ones((4, 6), np.int32)), r"is I32, expected one of"),
        (_tensor("layers.0.q_proj.lora_A.weight", np.ones((4, 6, 1, 1), np.float32)), r"of two dimensions"),
        (_without("adapter_config.json"), r"has no adapter_config.json, but adapter_model.safetensors"),
        (_without("adapter_model.safetensors"), r"has no adapter_model.safetensors, but adapter_config.json"),
        (_damaged("adapter_config.json", b"{"), r"is not whole UTF-8 JSON.*; save or copy it again"),
        (_damaged("adapter_model.safetensors", b"\0" * 20), r"safetensors header of 0 bytes.*; save or copy it again"),
        (_damaged("adapter_model.safetensors", to_safetensors({})), r"has no tensors"),
    ],
)  # fmt: skip
def test_what_is_refused(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    make(folder)
    with pytest.raises(AdapterError, match=message) as caught:
        fitted(folder, inputs())
    assert "rebuild the artifact" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.0.q_proj.lora_C": np.ones((6, 4), np.float32)}, r"'layers.0.q_proj.lora_C' is no input for adapters"),
        ({"layers.0.q_proj.lora_A": np.ones((6, 4), np.float32)}, r"without 'layers.0.q_proj.lora_B'; give both"),
        (
            {f"layers.0.q_proj.lora_{half}": np.ones((6, 4), np.float32) for half in "AB"},
            r"another base model than model: input 'layers.0.q_proj.lora_B', dimension 0",
        ),
        (
            {"layers.0.q_proj.lora_A": np.full((6, 4), np.inf, np.float32),
             "layers.0.q_proj.lora_B": np.ones((4, 4), np.float32)},
            r"is not finite",
        ),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_graphs(tensors: dict[str, Array], message: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(to_safetensors(tensors))
    with pytest.raises(AdapterError, match=message):
        fitted(path, inputs())


@pytest.mark.parametrize(("name", "message"), [("none", "is not there"), ("file.bin", "is neither a folder nor")])
def test_paths_that_are_none(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / name)


def test_a_model_without_inputs_for_adapters(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"takes no adapters.*furiosa-llm build --lora"):
        fit(read_adapter(saved(tmp_path, SIZES)), AdapterInputs(), model="model")


def test_inputs_that_are_not_named_after_modules(tmp_path: Path) -> None:
    info = InputInfo(name="x4", dtype="FLOAT", shape=(6, 4), layout=(None, None), role="other")
    with pytest.raises(AdapterError, match=r"are not named by them: x4; give a .safetensors file"):
        fitted(saved(tmp_path, SIZES), AdapterInputs(infos=(info,), base={"x4": np.zeros((6, 4), np.float32)}))


def test_names() -> None:
    assert half_of("base.layers.0.q_proj.lora_A.default.weight") == (("base", "layers", "0", "q_proj"), "A")
    assert half_of("layers.0.q_proj.weight") is None
    assert module_of("/model/layers.0/attn/o_proj/MatMul_Q4") == ("model", "layers", "0", "attn", "o_proj")
    assert module_of("model.layers.0.attn.o_proj.MatMul.weight_DQ_Q4") == ("model", "layers", "0", "attn", "o_proj")
    others = [module_of(f"/h.{n}/{where}/c_proj/Gemm") for n in (0, 1) for where in ("attn", "mlp")]
    assert same_module(("transformer", "h", "1", "mlp", "c_proj"), others) == ("h", "1", "mlp", "c_proj")
    assert same_module(("h", "2", "mlp", "c_proj"), others) is None
    with pytest.raises(AdapterError, match=r"may be h.1.attn.c_proj or h.1.mlp.c_proj"):
        same_module(("1", "c_proj"), others)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "x" * 65])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(AdapterError, match="expected at most 64 letters"):
        file_name(name)


def test_a_file_is_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(to_safetensors({"b": np.arange(3, dtype=np.float16), "a": np.ones((2, 1), np.float32)}))
    found = read_adapter(path).tensors
    assert found["b"].tolist() == [0, 1, 2]
    assert found["a"].shape == (2, 1)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert json.loads(path.read_bytes()[8 : 8 + length])["a"]["data_offsets"] == [0, 8]
