"""What is known of an op stands in its entry in builder/rules/: no other file has a table of op types.

Passes in builder/rewrite/ match patterns of the graph by op, which says nothing about the ops.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import onnx
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from tests.test_packaging import ROOT

OP_TYPES = {schema.name for schema in (*onnx.defs.get_all_schemas_with_history(), *ort.get_all_operator_schema())}
EXCEPT = ("builder/rules/", "builder/rewrite/")
_ALONE = "the runtime imports nothing of the builder, and an artifact does not say it of its ops"
_FORM = "the form of what the builder itself writes; anything else is refused"
_PATTERN = "a pattern of the graph: what is done with an input or a state says its role, and nothing of the ops"
REASONS = {
    "builder/proof/movers.py: Movers.__init__": "the proof's own methods: it shares with the builder only the rules",
    "builder/plan/annotations/correspondence.py: Correspondence._learn_alias": "what rewriting removes: its two names",
    "builder/proof/ranks.py: ELEMENTWISE": _FORM,
    "builder/proof/ranks.py: _SHAPED": _FORM,
    "builder/proof/ranks.py: restored": _FORM,
    "builder/shapes/control_flow.py: ControlFlow.infer": "the interpreter's own methods",
    **dict.fromkeys(
        (
            *(
                f"builder/factors/longest.py: {where}"
                for where in ("_ROTARY_PORTS", "_Positions._computed", "_Positions._limits")
            ),
            *(f"builder/factors/scores.py: {where}" for where in ("_BEHIND", "_PRODUCTS", "_tables")),
            "builder/factors/states.py: _computed_from",
            *(f"builder/shapes/flow.py: {where}" for where in ("_PARTS", "_WRITES")),
            "builder/shapes/growth.py: _moved",
            *(f"builder/shapes/roles.py: _{kind}_PORTS" for kind in ("ANGLE", "LENGTH", "MASK", "WRITE")),
            *(f"builder/shapes/roles.py: _{kind}_FORMS" for kind in ("ANGLE", "WEIGHT")),
            *(f"builder/shapes/roles.py: {where}" for where in ("_ARITHMETIC", "_MOVES", "_MOVE_FIRST", "_PRODUCTS")),
            *(f"builder/shapes/roles.py: {where}" for where in ("_is_end", "_turns")),
        ),
        _PATTERN,
    ),
    "runtime/encoder.py: _MIXES_ROWS": _ALONE,
    "runtime/placement/block_reads.py: _EXPERTS": _ALONE,
    **dict.fromkeys(
        (f"runtime/artifact/adapters/graph.py: {where}" for where in ("_PACKED", "_PLAIN", "_weight")),
        "the form that a product must have to be given an adapter: the runtime gives it to the reference, too",
    ),
    **dict.fromkeys(
        (
            *(f"runtime/artifact/adapters/inputs.py: {where}" for where in ("_LEAVE_BE", "_STAY_ZERO", "_ZERO_BY_ONE")),
            "runtime/program/idle_ranks.py: _ZERO_BY_ONE",
        ),
        "what becomes of zeros, where the builder's rules are not at hand",
    ),
    "runtime/placement/block_reads.py: _LOOKED_UP": _ALONE,
    **dict.fromkeys(
        (f"runtime/program/stack_rules.py: {where}" for where in ("_APPROXIMATE", "_EXACT", "_RULES")),
        "which of onnxruntime's kernels keep every bit on stacks: no fact about an op, and the builder does not stack",
    ),
    **dict.fromkeys(
        (
            f"runtime/program/fatal_kernels.py: {where}"
            for where in ("_FATAL", "_UNCOUNTED", "_WITH_GRAPHS", "_counted", "_steps")
        ),
        "which of onnxruntime's kernels end the process: no fact about an op, and the builder does not run them",
    ),
    "runtime/program/serving_graph.py: _ELEMENTWISE": "the form that the end of a graph must have to be cut",
    "runtime/program/serving_graph.py: _PRODUCTS": "the form that the end of a graph must have to be cut",
}
"""`file: where` -> why a table of ops stands there."""


def named(node: ast.AST) -> Iterator[str]:
    """The op types among the elements of a collection, keys and values of a dict, cases of a match, sides of `or`."""
    match node:
        case ast.Constant(value=str(name)) if name in OP_TYPES:
            yield name
        case ast.Dict() | ast.Set() | ast.List() | ast.Tuple() | ast.Starred() | ast.BoolOp() | ast.Compare():
            for child in ast.iter_child_nodes(node):
                yield from named(child)
        case ast.Match(cases=cases):
            for case in cases:
                for child in ast.walk(case.pattern):
                    yield from named(child)


def tables(source: str) -> dict[str, set[str]]:
    """Where two op types or more stand in one collection, match statement or condition: their names, by place."""
    found: dict[str, set[str]] = {}
    if len(OP_TYPES.intersection(re.findall(r"[\"'](\w+)[\"']", source))) < 2:
        return found

    def visit(node: ast.AST, where: str) -> None:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                where = f"{where}.{name}".lstrip(".")
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                where = f"{where}.{name}".lstrip(".")
        names = set(named(node))
        if len(names) > 1:
            found.setdefault(where, set()).update(names)
        for child in ast.iter_child_nodes(node):
            visit(child, where)

    visit(ast.parse(source), "")
    return found


def test_no_table_of_ops_stands_outside_of_the_rules() -> None:
    files = [path for folder in ("builder", "runtime", "furiosa_llm") for path in (ROOT / folder).rglob("*.py")]
    found = {
        f"{name}: {where}"
        for path in files
        if not (name := str(path.relative_to(ROOT))).startswith(EXCEPT)
        for where in tables(path.read_text())
    }
    assert found == REASONS.keys(), "put what is known of an op into its entry in builder/rules/"


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ('_TABLE = {"Add": 1, "Mul": 2}', "_TABLE"),
        ('_TABLE = {("", "Add"): 1, ("com.microsoft", "FastGelu"): 2}', "_TABLE"),
        ('_TABLE = frozenset(("Add", "Mul"))', "_TABLE"),
        ('def f(node):\n    return node.op_type in ("Add", "Mul")', "f"),
        ('def f(node):\n    return node.op_type == "Add" or node.op_type == "Mul"', "f"),
        (
            'class C:\n    def f(self):\n        match self.x:\n            case "Add" | "Mul":\n                pass',
            "C.f",
        ),
    ],
)
def test_a_new_table_is_found(source: str, where: str) -> None:
    assert tables(source).keys() == {where}


@pytest.mark.parametrize(
    "source",
    ['_KIND = "Add"', '_NAMES = ("Add", "nothing")', 'x = one("Add", [one("Mul", [a, b]), c])', '"""Add or Mul."""'],
)
def test_what_names_one_op_or_none_is_no_table(source: str) -> None:
    assert tables(source) == {}
