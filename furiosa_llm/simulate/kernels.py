"""How fast this machine's products are, by the type of their weights and their rows: in sessions like the engine's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, numpy_helper

from furiosa_llm.runtime.artifact.progress import tell
from furiosa_llm.runtime.execution.ort import Session, SessionSettings, wrap
from furiosa_llm.simulate.device import Rates

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_WIDTH = 1024
_SETS = (64e6, 512e6)
"""Bytes of weights of all cores together: what caches hold, and what they do not."""
_SETTLED = 32
"""From so many rows on the weights' way from memory is not what takes the time."""
_BLOCK = 32
_SECONDS = 0.25
"""How long each number of rows is tried at least."""
_RUNS = 3
NBYTES = {"float32": 4.0, "int8": 1 + 4 / _BLOCK, "int4": 0.5 + 4 / _BLOCK}
"""Of a weight with its share of a scale."""


def product_rates(
    kind: str, cores: int, *, source: str, clock: Callable[[], float] = time.perf_counter
) -> tuple[Rates, ...]:
    """The rates with every core at work, of few and of many weights; each core has its own, as ranks do."""
    found: list[Rates] = []
    for size in _SETS:
        rows = [one for one in _ROWS if not found or one <= _SETTLED]
        tell(f"measuring products of {kind}")
        matrices = max(1, round(size / cores / NBYTES[kind] / _WIDTH**2))
        flops = 2.0 * cores * matrices * _WIDTH**2
        model = _model(kind, matrices)
        sessions = [Session(model, Path.cwd(), SessionSettings()) for _ in range(cores)]
        values = [one * flops / _at_once(sessions, one, clock) for one in rows]
        values += found[0].values[len(rows) :] if found else ()
        found.append(
            Rates(
                nbytes_of_weight=NBYTES[kind],
                nbytes_read=size,
                rows=tuple(map(float, _ROWS)),
                values=tuple(values),
                source=source,
                mark="measured",
            )
        )
    return tuple(found)


def _at_once(sessions: list[Session], rows: int, clock: Callable[[], float]) -> float:
    """The seconds of a run, the median of all threads' runs."""
    found: list[float] = []
    start = threading.Barrier(len(sessions))

    def runs(session: Session) -> None:
        given = wrap(np.ones((rows, _WIDTH), np.float32), "FLOAT")
        session.run({"x": given.raw}, ["y"])
        start.wait()
        begin = time.perf_counter()
        while time.perf_counter() - begin < _SECONDS or len(found) < _RUNS * len(sessions):
            before = clock()
            session.run({"x": given.raw}, ["y"])
            found.append(clock() - before)

    threads = [threading.Thread(target=runs, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return float(np.median(found))


def _model(kind: str, matrices: int) -> ModelProto:
    """One product after the other. No two have equal weights, which onnxruntime would keep once."""
    nodes, weights = [], []
    for number in range(matrices):
        names = [f"x{number}" if number else "x"]
        for suffix, values in _weights(kind, number).items():
            names.append(f"{suffix}{number}")
            weights.append(numpy_helper.from_array(values, names[-1]))
        output = f"x{number + 1}" if number + 1 < matrices else "y"
        if kind == "float32":
            nodes.append(helper.make_node("MatMul", names, [output]))
        else:
            sizes: dict[str, Any] = {"K": _WIDTH, "N": _WIDTH, "block_size": _BLOCK, "accuracy_level": 4}
            sizes["bits"] = int(kind[3:])
            nodes.append(helper.make_node("MatMulNBits", names, [output], domain="com.microsoft", **sizes))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", _WIDTH]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "products", [x], [y], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _weights(kind: str, number: int) -> dict[str, npt.NDArray[np.float32] | npt.NDArray[np.uint8]]:
    values = np.random.default_rng(number)
    if kind == "float32":
        return {"w": values.standard_normal((_WIDTH, _WIDTH), np.float32) / np.float32(_WIDTH**0.5)}
    packed = values.integers(0, 256, (_WIDTH, _WIDTH // _BLOCK, _BLOCK * int(kind[3:]) // 8), np.uint8)
    steps = 0.3 if kind == "int4" else 0.014  # so that values keep their size
    return {"q": packed, "s": np.full(_WIDTH * (_WIDTH // _BLOCK), steps / _WIDTH**0.5, np.float32)}
