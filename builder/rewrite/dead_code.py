"""Remove what nothing reads. onnx-ir's own pass looks at every graph output again for each node that it removes, which
is quadratic in layers; this pass removes all nodes at once, and leaves the rest of the tidying to that pass.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes


def remove_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that no output depends on, and outputs of nodes that nothing reads.

    The nodes must be in topological order, and closed over what branches and bodies read.
    """
    graph = model.graph
    needed = set(graph.outputs)
    unused = []
    for node in reversed(graph):
        if needed.isdisjoint(node.outputs):
            unused.append(node)
        else:
            needed.update(value for value in node.inputs if value is not None)
    graph.remove(unused, safe=True)
    passes.RemoveUnusedNodesPass()(model)
