"""What the sections of a manifest say about each other: references, roles and states."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from furiosa_llm.runtime.artifact.json_reader import Field
from furiosa_llm.runtime.artifact.manifest import (
    PROGRAM_NAME,
    SINGLE_ROLES,
    SOURCE_NAME,
    InputInfo,
    Manifest,
    OutputInfo,
    State,
)


def check_references(section: Mapping[str, Field], manifest: Manifest) -> None:
    """Raises ArtifactError for the first name that refers to nothing and the first role or state that cannot be."""
    _check_files(section, manifest)
    _check_roles(section, manifest)
    _check_states(section, manifest)
    _check_blocks(section, manifest)


def _check_files(section: Mapping[str, Field], manifest: Manifest) -> None:
    paths = {entry.path for entry in manifest.files}
    for name in (PROGRAM_NAME, SOURCE_NAME):
        if name not in paths:
            section["files"].fail(f"{name} among the files", f"{len(paths)} files without it")
    for index, tensor in enumerate(manifest.tensors):
        if tensor.file not in paths or not tensor.file.endswith(".safetensors"):
            section["tensors"].child(index, "file").fail("a .safetensors file of $.files")


def _check_roles(section: Mapping[str, Field], manifest: Manifest) -> None:
    values: tuple[tuple[str, tuple[InputInfo, ...] | tuple[OutputInfo, ...]], ...] = (
        ("inputs", manifest.inputs),
        ("outputs", manifest.outputs),
    )
    for key, entries in values:
        roles = [entry.role for entry in entries]
        for role in SINGLE_ROLES:
            if roles.count(role) > 1:  # type: ignore[arg-type]
                section[key].fail(f"at most one with the role {role!r}", f"{roles.count(role)} of them")  # type: ignore[arg-type]
    if manifest.model.task == "decoder":
        if not any(entry.role == "token_ids" for entry in manifest.inputs):
            section["inputs"].fail("one with the role 'token_ids', because the task is 'decoder'", "none")
        if not any(entry.role == "logits" for entry in manifest.outputs):
            section["outputs"].fail("one with the role 'logits', because the task is 'decoder'", "none")
        if not manifest.states:
            section["states"].fail("at least one state, because the task is 'decoder'", "none")


def _check_states(section: Mapping[str, Field], manifest: Manifest) -> None:
    inputs = {entry.name: entry for entry in manifest.inputs if entry.role == "state"}
    outputs = {entry.name: entry for entry in manifest.outputs if entry.role == "state"}
    for index, state in enumerate(manifest.states):
        field = section["states"].child(index)
        if state.input not in inputs:
            field.child("input").fail("an entry of $.inputs with the role 'state'")
        if state.output not in outputs:
            field.child("output").fail("an entry of $.outputs with the role 'state'")
        _check_pair(field, state, inputs[state.input], outputs[state.output])


def _check_pair(field: Field, state: State, before: InputInfo, after: OutputInfo) -> None:
    if (state.sequence_dim is None) != (state.mode == "replace"):
        field.child("sequence_dim").fail("null for the mode 'replace', and a dimension for the others")
    if state.sequence_dim is not None and not state.sequence_dim < len(before.shape):
        field.child("sequence_dim").fail(f"a dimension below {len(before.shape)}")
    if state.batch_dim is not None and (
        not state.batch_dim < len(before.shape) or not isinstance(before.shape[state.batch_dim], int)
    ):
        field.child("batch_dim").fail("a dimension whose size is fixed")
    others = [index for index in range(len(before.shape)) if index != state.sequence_dim]
    same = len(before.shape) == len(after.shape) and before.dtype == after.dtype
    if not same or any(before.layout[i] != after.layout[i] or before.shape[i] != after.shape[i] for i in others):
        field.fail(
            "an input and an output that differ in their sequence dimension only",
            f"{before.dtype} {list(before.shape)} and {after.dtype} {list(after.shape)}",
        )
    if state.sequence_dim is not None and before.layout[state.sequence_dim] is not None:
        field.child("sequence_dim").fail("a dynamic dimension")


def _check_blocks(section: Mapping[str, Field], manifest: Manifest) -> None:
    starts = [block.first_node for block in manifest.blocks]
    if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        section["blocks"].fail("blocks whose first nodes ascend", f"first nodes {starts!r:.80}")
