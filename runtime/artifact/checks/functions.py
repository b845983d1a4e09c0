"""How many nodes the functions of a model stand for: each may call others several times, and these others in turn."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import ModelProto, NodeProto

from furiosa_llm.runtime.artifact.checks.model import refuse
from furiosa_llm.runtime.artifact.graphs import all_nodes

MAX_INLINED_NODES = 100_000
"""As many as a build takes."""

_Key = tuple[str, str, str]


def check_functions(model: ModelProto, document: str) -> None:
    """Raises ArtifactError for functions that call themselves, are operators, or stand for too many nodes."""
    if not model.functions:
        return
    calls: dict[_Key, list[_Key]] = {}
    nodes: dict[_Key, int] = {}
    for function in model.functions:
        key = (_domain(function.domain), function.name, function.overload)
        what = f"function {function.name!r:.80} of the domain {function.domain!r:.80}"
        if key in nodes:
            refuse(document, f"found the {what} twice", "it once")
        if onnx.defs.has(key[1], key[0]):
            refuse(document, f"the {what} is an operator", "another name, so that it is clear which is meant")
        inner = list(all_nodes(function.node))
        nodes[key], calls[key] = len(inner), [_key(node) for node in inner]
    sizes = _sizes(calls, nodes, document)
    total = sum(sizes.get(_key(node), 0) for node in all_nodes(model.graph.node))
    if total > MAX_INLINED_NODES:
        refuse(document, f"functions stand for {total} nodes", f"at most {MAX_INLINED_NODES}")


def _sizes(calls: dict[_Key, list[_Key]], nodes: dict[_Key, int], document: str) -> dict[_Key, int]:
    """How many nodes each function stands for."""
    sizes: dict[_Key, int] = {}
    for root in calls:
        path: dict[_Key, Iterator[_Key]] = {}
        key: _Key | None = root if root not in sizes else None
        while key is not None:
            rest = path.setdefault(key, iter(calls[key]))
            callee = next((one for one in rest if one in calls and one not in sizes), None)
            if callee is None:
                sizes[key] = nodes[key] + sum(sizes.get(one, 0) for one in calls[key])
                del path[key]
                key = next(reversed(path), None)
            elif callee in path:
                refuse(document, f"function {callee[1]!r:.80} calls itself", "functions that come to an end")
            else:
                key = callee
    return sizes


def _key(node: NodeProto) -> _Key:
    return _domain(node.domain), node.op_type, node.overload


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
