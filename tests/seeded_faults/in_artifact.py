"""Faults of the artifact's format: layouts, windows, digests, and the checks of what cannot be trusted."""

from __future__ import annotations

from tests.seeded_faults.fault import Fault

_HOSTILE = "tests/runtime/artifact/test_hostile.py"

FAULTS = (
    Fault(
        name="a product counts local indices",
        file="runtime/artifact/layout.py",
        old="outer * size + inner).reshape(-1)",
        new="outer * part.size + inner).reshape(-1)",
        effect="ranks hold other rows than the plan says where heads are split inside a dimension",
        hints=("tests/runtime/artifact/test_layout.py", "tests/builder/test_zoo.py"),
    ),
    Fault(
        name="the last axis is most significant",
        file="runtime/artifact/layout.py",
        old="        for axis in axes:\n            position =",
        new="        for axis in reversed(axes):\n            position =",
        effect="meshes of several axes exchange their shards",
        hints=("tests/runtime/artifact/test_layout.py",),
    ),
    Fault(
        name="padding beyond a prefix is data",
        file="runtime/artifact/layout.py",
        old="np.arange(dim.size, dtype=np.int64)\n        return np.where(indices < dim.size, indices, -1)",
        new="np.arange(dim.size, dtype=np.int64)\n        return indices",
        effect="the short last block of a quantised weight reads past its end",
        hints=("tests/runtime/artifact/test_layout.py",),
    ),
    Fault(
        name="a window for each rank",
        file="runtime/artifact/reader.py",
        old="shard = self.manifest.mesh.position(rank, tensor.shard_axes)",
        new="shard = rank",
        effect="tensors that several ranks share are read past their end",
        hints=("tests/runtime/artifact/test_reader.py::test_windows_of_a_shard_that_several_ranks_have",),
    ),
    Fault(
        name="small weights are not hashed",
        file="runtime/artifact/reader.py",
        old="if _is_weights(entry)) < FULL_BELOW_NBYTES",
        new="if _is_weights(entry)) > FULL_BELOW_NBYTES",
        effect="a flipped bit in a small model's weights is not noticed when it is loaded",
        hints=("tests/runtime/artifact/test_reader.py::test_small_weights_are_always_compared_with_their_digests",),
    ),
    Fault(
        name="padding of one rank only",
        file="runtime/artifact/tools/originals.py",
        old="        for rank in _ranks(tensor, mesh)\n    )",
        new="        for rank in _ranks(tensor, mesh)[:1]\n    )",
        effect="`verify --full` passes an artifact whose padding is not zero",
        hints=("tests/runtime/artifact/tools/test_originals.py::test_every_bit_of_padding_is_looked_at",),
    ),
    Fault(
        name="a second layout in parts is not checked",
        file="runtime/artifact/tools/integrity.py",
        old="    yield from ((origin, tuple(names)) for origin, names in parts.items())\n",
        new="",
        effect="`verify --full` passes an artifact of which one layout has other weights",
        hints=("tests/runtime/artifact/tools/test_integrity.py::test_a_sound_one_passes",),
    ),
    Fault(
        name="true is an integer",
        file="runtime/artifact/json_reader.py",
        old="if not isinstance(value, int) or isinstance(value, bool) or not minimum",
        new="if not isinstance(value, int) or not minimum",
        effect="a manifest with `true` for a size is taken, and fails somewhere else",
        hints=(
            "tests/runtime/artifact/test_hostile.py::test_it_is_refused[llama manifest: model.eos_token_ids = [true]]",
        ),
    ),
    Fault(
        name="the last of two equal keys counts",
        file="runtime/artifact/json_reader.py",
        old="if len(members) != len(pairs):",
        new="if len(members) > len(pairs):",
        effect="two readers of one manifest may see two different models",
        hints=("tests/runtime/artifact/test_hostile.py::test_it_is_refused[header: a name twice]",),
    ),
    Fault(
        name="a file above the folder",
        file="runtime/artifact/parse.py",
        old="any(separator in path for separator in",
        new="all(separator in path for separator in",
        effect="an artifact from elsewhere has this machine's files read",
        hints=('tests/runtime/artifact/test_hostile.py::test_it_is_refused[llama manifest: files.0.path = "../x"]',),
    ),
    Fault(
        name="links are followed",
        file="runtime/artifact/files.py",
        old="flags | os.O_NOFOLLOW | os.O_NONBLOCK",
        new="flags | os.O_NONBLOCK",
        effect="a file that is exchanged for a link while it is opened leads out of the folder",
        hints=("tests/runtime/artifact/test_reader.py::test_a_file_that_becomes_a_link_is_not_followed",),
    ),
    Fault(
        name="bytes behind the last tensor",
        file="runtime/artifact/safetensors_header.py",
        old="    if position != file_nbytes:",
        new="    if position > file_nbytes:",
        effect="a weights file with something appended is taken",
        hints=("tests/runtime/artifact/test_hostile.py::test_it_is_refused[bytes behind the last tensor]",),
    ),
    Fault(
        name="states may change their layout",
        file="runtime/artifact/checks/parse.py",
        old="any(before.layout[i] != after.layout[i] or before.shape[i] != after.shape[i] for i in others)",
        new="any(before.shape[i] != after.shape[i] for i in others)",
        effect="a decoder that hands its cache to other ranks is run, and computes nonsense",
        hints=("tests/runtime/artifact/test_hostile.py::test_it_is_refused[llama manifest: outputs.1.layout.1 = 8]",),
    ),
    Fault(
        name="collectives of other axes",
        file="runtime/artifact/checks/program.py",
        old="if (node.op_type, attributes) != (collective.kind, wanted):",
        new="if node.op_type != collective.kind:",
        effect="a program that sums over other ranks than the manifest says is run",
        hints=("tests/runtime/artifact/test_hostile.py::test_it_is_refused[mlp manifest: collectives.0.axes = [0]]",),
    ),
)
