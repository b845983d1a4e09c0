"""The longest sequence that tables by position allow: plain onnxruntime runs it, and fails with one position more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from furiosa_llm.builder.factors.longest import longest_sequence
from furiosa_llm.builder.options import BuildOptions
from furiosa_llm.builder.pipeline import analyse_model
from furiosa_llm.runtime.execution.ort import ORT_ERRORS
from tests.support.builder.exported import exported
from tests.support.builder.graphs import model
from tests.support.builder.stitching import session

_ROWS = 24
_WEIGHTS = {
    "emb": np.ones((32, 8), np.float32),
    "table": np.ones((_ROWS, 8), np.float32),
    "buckets": np.ones((8, 8), np.float32),
    "widen": np.ones((8, 8), np.float32),
    "heads": np.array([0, -1, 2, 4]),
    "one": np.array(1),
    "two": np.array(2),
    "none": np.array(0),
    "rows": np.array(_ROWS),
    "none1": np.array([0]),
    "last": np.array([-1]),
}
_INPUTS = "int64[batch, seq] input_ids, int64[batch, {}] {}, float[batch, 2, past, 4] past"
_MASK, _POSITIONS = ("total", "attention_mask"), ("seq", "position_ids")
_REST = """
    x = Gather(emb, input_ids) x1 = Add(x, t) k0 = MatMul(x1, widen) k1 = Reshape(k0, heads)
    k = Transpose<perm=[0,2,1,3]>(k1) present = Concat<axis=2>(past, k) logits = MatMul(x1, widen)
"""
ROWS = {
    "positions": (_POSITIONS, "t = Gather(table, position_ids)", _ROWS),
    "positions behind padding": (_POSITIONS, "p = Add(position_ids, two) t = Gather(table, p)", _ROWS - 2),
    "positions that may count from the end": (
        _POSITIONS,
        "c = Less(position_ids, none) q = Add(position_ids, rows) p = Where(c, q, position_ids) t = Gather(table, p)",
        _ROWS,
    ),
    "positions by a list of indices": (
        _POSITIONS,
        "p = Unsqueeze(position_ids, last) t = GatherND(table, p)",
        _ROWS,
    ),
    "what a mask counts": (
        _MASK,
        """seen = CumSum(attention_mask, one) p0 = Mul(seen, attention_mask) shape = Shape(input_ids)
        s = Gather(shape, one) b = Neg(s) start = Unsqueeze(b, none1) stop = Cast<to=7>(top)
        p = Slice(p0, start, stop, last) t = Gather(table, p)""",
        _ROWS - 1,
    ),
    "sizes": (
        _MASK,
        """a = Shape(past) c = Gather(a, two) d = Shape(input_ids) e = Gather(d, one) f = Add(c, e)
        p = Range(c, f, one) t = Gather(table, p)""",
        _ROWS,
    ),
    "a window of the table": (
        _MASK,
        """a = Shape(past) c0 = Gather(a, two) c = Unsqueeze(c0, none1) d = Shape(input_ids) e0 = Gather(d, one)
        e = Unsqueeze(e0, none1) f = Add(c, e) t = Slice(table, c, f, none1)""",
        _ROWS,
    ),
    "buckets": (_POSITIONS, "p = Min(position_ids, seven) t = Gather(buckets, p)", None),
    "remainders": (_POSITIONS, "p = Mod(position_ids, seven) t = Gather(buckets, p)", None),
    "one of two tables": (
        _POSITIONS,
        """m = ReduceMax<keepdims=0>(position_ids) c = Less(m, seven) a = Where(c, buckets, other)
        r = Mod(position_ids, seven) t = Gather(a, r)""",
        None,
    ),
}
_WEIGHTS |= {"seven": np.array(7), "top": np.array([2**31 - 1], np.int32), "other": np.zeros((8, 8), np.float32)}


@pytest.mark.parametrize("name", ROWS)
def test_a_table_by_position(name: str, tmp_path: Path) -> None:
    (size, third), nodes, limit = ROWS[name]
    words = set((nodes + _REST).replace("(", " ").replace(")", " ").replace(",", " ").split())
    weights = {name: array for name, array in _WEIGHTS.items() if name in words}
    outputs = "float[batch, seq, 8] logits, float[batch, 2, total, 4] present"
    proto = model(_INPUTS.format(size, third), outputs, nodes + _REST, weights, opset=20)
    onnx.save(proto, tmp_path / "model.onnx")
    analysed = analyse_model(tmp_path / "model.onnx", BuildOptions())
    assert longest_sequence(analysed.analysis, analysed.probes) == limit
    whole = session(proto)

    def run(length: int, new: int) -> None:
        feeds = {"input_ids": np.zeros((2, new), np.int64), "past": np.zeros((2, 2, length - new, 4), np.float32)}
        made = np.ones(length) if third == "attention_mask" else np.arange(length - new, length)
        whole.run(None, feeds | {third: np.broadcast_to(made.astype(np.int64), (2, len(made)))})

    for new in (1, 5):
        run(limit or 200, new)
    if limit is not None:
        with pytest.raises(ORT_ERRORS):
            run(limit + 1, 5)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("dake", 32),
        ("genai-lfm2", 128),
        ("genai-qwen35", 128),
        ("mobius-static-cache", 64),
        ("mobius-mamba", None),
        ("sha", None),
    ],
)
def test_exports(name: str, limit: int | None, tmp_path: Path) -> None:
    """Slices of a table, rotary tables of attention and of one with three rows, caches of a fixed size; none."""
    analysed = analyse_model(exported(name, tmp_path), BuildOptions())
    assert longest_sequence(analysed.analysis, analysed.probes) == limit
