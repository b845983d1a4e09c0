"""Small SPMD programs, each with a mesh of one rank as its unsplit reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from furiosa_llm.runtime.artifact.layout import Cat, Leaf, Mesh, Prod, local_size
from furiosa_llm.runtime.artifact.manifest import StateMode
from tests.support.runtime.spmd import Spmd

Array = npt.NDArray[Any]


def mlp(mesh: Mesh, hidden: int = 8, inner: int = 24, seed: int = 0) -> Spmd:
    """`y = relu(x A) B`: A split by columns, B by rows, one AllReduce over the whole mesh."""
    rng = np.random.default_rng(seed)
    axes = tuple(range(len(mesh.shape))) if mesh.size > 1 else ()
    program = Spmd(mesh)
    program.input("x", ["batch", hidden])
    split = Leaf(inner, axes)
    local = -(-inner // mesh.parts(axes))
    program.weight("A", rng.standard_normal((hidden, inner), dtype=np.float32), hidden, split)
    program.weight("B", rng.standard_normal((inner, hidden), dtype=np.float32), split, hidden)
    program.node("MatMul", ["x", "A"], "h")
    program.node("Relu", ["h"], "r")
    program.declare("r", ["batch", local])
    program.node("MatMul", ["r", "B"], "partial")
    program.all_reduce("partial", "sum", axes, ["batch", hidden])
    program.node("Identity", ["sum"], "y")
    program.output("y", ["batch", hidden])
    return program


@dataclass(frozen=True)
class LlamaSize:
    """The sizes of a Llama-like decoder."""

    layers: int = 2
    hidden: int = 64
    heads: int = 8
    kv_heads: int = 8
    head: int = 16
    inner: int = 96
    vocab: int = 160
    max_length: int = 256
    packed: bool = True
    """Whether queries, keys and values are one product."""


def llama(mesh: Mesh, size: LlamaSize, mode: StateMode = "in_place", seed: int = 0) -> Spmd:
    """A decoder with packed QKV, rotary embedding, GQA, SwiGLU, and a head split over the vocabulary.

    Fewer key heads than ranks are split over all mesh axes but the last, whose ranks have the same ones.
    """
    return _Llama(mesh, size, mode, np.random.default_rng(seed)).build()


class _Llama:
    def __init__(self, mesh: Mesh, size: LlamaSize, mode: StateMode, rng: np.random.Generator) -> None:
        self.size = size
        self.mode = mode
        self.rng = rng
        self.axes = tuple(range(len(mesh.shape))) if mesh.size > 1 else ()
        self.parts = mesh.parts(self.axes)
        shared = size.kv_heads < self.parts and size.heads > size.kv_heads
        self.kv_axes = self.axes[:-1] if shared else self.axes
        self.program = Spmd(mesh, task="decoder", max_sequence_length=size.max_length)

    def matrix(self, name: str, rows: Any, columns: Any, shape: tuple[int, int]) -> str:
        array = self.rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[0]))
        return self.program.weight(name, array, rows, columns)

    def build(self) -> Spmd:
        p, s = self.program, self.size
        p.input("input_ids", ["batch", "sequence"], "token_ids", "INT64")
        p.input("attention_mask", ["batch", "total"], "attention_mask", "INT64")
        kv_layout = Leaf(s.kv_heads, self.kv_axes)
        for layer in range(s.layers):
            for kind in ("key", "value"):
                p.input(f"past.{layer}.{kind}", ["batch", kv_layout, "past", s.head], "state")
        self.rotary()
        p.weight("embed", self.rng.standard_normal((s.vocab, s.hidden), dtype=np.float32))
        p.node("Gather", ["embed", "input_ids"], "x0")
        self.lengths()
        residual, normed = "x0", self.norm("x0", None, "n0")[0]
        for layer in range(s.layers):
            attention = self.attention(layer, normed)
            normed, residual = self.norm(attention, residual, f"a{layer}")
            mlp_out = self.mlp(layer, normed)
            normed, residual = self.norm(mlp_out, residual, f"m{layer}")
        self.matrix("head", s.hidden, Leaf(s.vocab, self.axes), (s.hidden, s.vocab))
        p.node("MatMul", [normed, "head"], "logits_part")
        p.all_gather("logits_part", "logits", self.axes, 2, ["batch", "sequence", s.vocab // self.parts])
        p.output("logits", ["batch", "sequence", s.vocab], "logits")
        for layer in range(s.layers):
            for kind in ("key", "value"):
                p.output(f"present.{layer}.{kind}", ["batch", kv_layout, "past + sequence", s.head], "state")
                p.state(f"past.{layer}.{kind}", f"present.{layer}.{kind}", 2, self.mode)
        return p

    def rotary(self) -> None:
        angles = np.outer(np.arange(self.size.max_length), 1e4 ** -np.linspace(0, 1, self.size.head // 2))
        self.program.weight("cos", np.cos(angles).astype(np.float32))
        self.program.weight("sin", np.sin(angles).astype(np.float32))

    def lengths(self) -> None:
        p = self.program
        p.constant("one", np.array([1], dtype=np.int64))
        p.constant("length_axis", np.array(1, dtype=np.int64))
        p.node("ReduceSum", ["attention_mask", "one"], "mask_sum", keepdims=0)
        p.node("Sub", ["mask_sum", "one"], "last_index")
        p.node("Cast", ["last_index"], "seqlens", to=6)
        p.node("Shape", ["attention_mask"], "mask_shape")
        p.node("Gather", ["mask_shape", "length_axis"], "total_length", axis=0)
        p.node("Cast", ["total_length"], "total32", to=6)
        p.declare("seqlens", ["batch"], "INT32")
        p.declare("total32", [], "INT32")
        p.declare("x0", ["batch", "sequence", self.size.hidden])

    def norm(self, value: str, residual: str | None, name: str) -> tuple[str, str]:
        p = self.program
        p.weight(f"{name}.weight", 1 + self.rng.standard_normal(self.size.hidden, dtype=np.float32) / 5)
        if residual is None:
            p.node("SimplifiedLayerNormalization", [value, f"{name}.weight"], f"{name}.out", axis=-1, epsilon=1e-5)
            return f"{name}.out", value
        p.node(
            "SkipSimplifiedLayerNormalization",
            [residual, value, f"{name}.weight"],
            [f"{name}.out", "", "", f"{name}.sum"],
            domain="com.microsoft",
            epsilon=1e-5,
        )
        p.declare(f"{name}.sum", ["batch", "sequence", self.size.hidden])
        return f"{name}.out", f"{name}.sum"

    def attention(self, layer: int, value: str) -> str:
        p, s, name = self.program, self.size, f"layer{layer}.attention"
        kv = Prod((Leaf(s.kv_heads, self.kv_axes), Leaf(s.head)))
        heads = Prod((Leaf(s.heads, self.axes), Leaf(s.head)))
        if self.kv_axes != self.axes:
            group = Leaf(s.heads // s.kv_heads, self.axes[-1:])
            heads = Prod((Leaf(s.kv_heads, self.kv_axes), group, Leaf(s.head)))
        parts = {"q": (heads, s.heads * s.head), "k": (kv, s.kv_heads * s.head), "v": (kv, s.kv_heads * s.head)}
        if s.packed and self.kv_axes == self.axes:
            self.matrix(f"{name}.qkv", s.hidden, Cat((heads, kv, kv)), (s.hidden, sum(w for _, w in parts.values())))
        else:
            for part, (columns, width) in parts.items():
                self.matrix(f"{name}.{part}", s.hidden, columns, (s.hidden, width))
                if not s.packed:
                    p.node("MatMul", [value, f"{name}.{part}"], f"{name}.{part}.out")
            if s.packed:
                p.node("Concat", [f"{name}.{part}" for part in parts], f"{name}.qkv", axis=1)
        if s.packed:
            p.node("MatMul", [value, f"{name}.qkv"], f"{name}.packed")
        given = [f"{name}.packed", "", ""] if s.packed else [f"{name}.{part}.out" for part in parts]
        self.matrix(f"{name}.out", heads, s.hidden, (s.heads * s.head, s.hidden))
        past = [f"past.{layer}.{kind}" for kind in ("key", "value")]
        present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        p.node(
            "GroupQueryAttention",
            [*given, *past, "seqlens", "total32", "cos", "sin"],
            [f"{name}.heads", *present],
            domain="com.microsoft",
            num_heads=local_size(heads, p.mesh) // s.head,
            kv_num_heads=local_size(kv, p.mesh) // s.head,
            do_rotary=1,
        )
        p.node("MatMul", [f"{name}.heads", f"{name}.out"], f"{name}.partial")
        return p.all_reduce(f"{name}.partial", f"{name}.sum", self.axes, ["batch", "sequence", s.hidden])

    def mlp(self, layer: int, value: str) -> str:
        p, s, name = self.program, self.size, f"layer{layer}.mlp"
        inner = Leaf(s.inner, self.axes)
        for kind in ("gate", "up"):
            self.matrix(f"{name}.{kind}", s.hidden, inner, (s.hidden, s.inner))
            p.node("MatMul", [value, f"{name}.{kind}"], f"{name}.{kind}.out")
        self.matrix(f"{name}.down", inner, s.hidden, (s.inner, s.hidden))
        p.node("Sigmoid", [f"{name}.gate.out"], f"{name}.sigmoid")
        p.node("Mul", [f"{name}.gate.out", f"{name}.sigmoid"], f"{name}.silu")
        p.node("Mul", [f"{name}.silu", f"{name}.up.out"], f"{name}.product")
        p.node("MatMul", [f"{name}.product", f"{name}.down"], f"{name}.partial")
        return p.all_reduce(f"{name}.partial", f"{name}.sum", self.axes, ["batch", "sequence", s.hidden])
