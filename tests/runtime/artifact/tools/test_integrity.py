"""The digests of weights, tensor by tensor and original by original, on artifacts of any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from furiosa_llm.runtime.artifact.errors import ArtifactError, FuriosaLLMError
from furiosa_llm.runtime.artifact.layout import Leaf, Mesh, Prod
from furiosa_llm.runtime.artifact.manifest import Part
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from furiosa_llm.runtime.artifact.tools.integrity import Limit, check_originals, check_padding, check_weights
from furiosa_llm.runtime.artifact.tools.record import Check
from tests.support.runtime.shards import Original, Shards, write
from tests.support.tampering import alter_tensor, flip_bit, reseal

MESH = Mesh((2, 2))


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """Two originals: one in three layouts, of which one is in parts, and one of 4-bit elements with padding."""
    packed, small = Original.random("w", "FLOAT", (6, 8), ["w"]), Original.random("s", "INT4", (5, 4), seed=1)
    heads = (Leaf(6), Prod((Leaf(4, (0, 1)), Leaf(2))))
    stored = {
        "w": Shards("w", heads),
        "w/rows": Shards("w", (Leaf(6, (1,)), Leaf(8, (0,)))),
        "w/0": Shards("w", (Leaf(6), Leaf(6, (0,))), Part(dim=1, start=0, stop=6)),
        "w/1": Shards("w", (Leaf(6), Leaf(2)), Part(dim=1, start=6, stop=8)),
        "s": Shards("s", (Leaf(5, (0, 1)), Leaf(4))),
    }
    return write(tmp_path / "artifact", MESH, [packed, small], stored)


def unlimited() -> None:
    """No limit of time."""


class TimeIsUpError(FuriosaLLMError):
    pass


def limit_of(pieces: int) -> Limit:
    left = iter(range(pieces))

    def limit() -> None:
        if next(left, None) is None:
            raise TimeIsUpError("time is up")

    return limit


@pytest.mark.parametrize(("check", "pieces"), [(check_weights, 6), (check_originals, 4), (check_padding, 5)])
def test_a_limit_ends_it_before_any_piece(
    check: Callable[[Artifact, Limit], Check], pieces: int, artifact: Artifact
) -> None:
    for allowed in range(pieces):
        with pytest.raises(TimeIsUpError):
            check(artifact, limit_of(allowed))
    assert check(artifact, unlimited).passed


def test_a_limit_does_not_hide_what_was_found_before(artifact: Artifact) -> None:
    first = min(artifact.offsets, key=lambda name: artifact.offsets[name])
    alter_tensor(artifact.folder, first, flip_bit)
    with pytest.raises(TimeIsUpError):
        check_weights(artifact, limit_of(1))
    fault, end = check_weights(artifact, limit_of(3)).faults
    assert fault.startswith(f"weights-00001.safetensors: stored tensor {first!r}: found sha256 ")
    assert end == "time is up"


def test_a_sound_one_passes(artifact: Artifact) -> None:
    weights, originals, padding = (
        check(artifact, unlimited) for check in (check_weights, check_originals, check_padding)
    )
    assert (weights.checked, weights.faults) == (1 + 5, ())
    assert (originals.checked, originals.faults) == (2 + 2, ())
    assert (padding.checked, padding.faults) == (5, ())


@pytest.mark.parametrize("name", ["w", "w/rows", "w/0", "w/1", "s"])
def test_one_bit_of_one_tensor(name: str, artifact: Artifact) -> None:
    alter_tensor(artifact.folder, name, flip_bit)
    tensor, file = check_weights(artifact, unlimited).faults
    assert tensor.startswith(f"weights-00001.safetensors: stored tensor {name!r}: found sha256 ")
    assert file.startswith("weights-00001.safetensors: found sha256 ")
    reseal(artifact.folder)
    artifact = open_artifact(artifact.folder, full=True)
    assert check_weights(artifact, unlimited).faults == ()
    (fault,) = check_originals(artifact, unlimited).faults
    what = {"w": "'w'", "s": "'s'", "w/rows": "'w' as 'w/rows' store it"}.get(name, "'w' as 'w/0, w/1' store it")
    assert fault.startswith(f"original {what}: found sha256 ")


def test_padding(artifact: Artifact) -> None:
    """5 rows over 4 ranks: two each, and the last rank has none."""
    alter_tensor(artifact.folder, "s", lambda data: data.__setitem__(len(data) - 1, 0x10))
    reseal(artifact.folder)
    artifact = open_artifact(artifact.folder, full=True)
    assert check_originals(artifact, unlimited).faults == ()
    assert check_padding(artifact, unlimited).faults == ("stored tensor 's' has padding that is not zero",)


def test_a_byte_that_belongs_to_no_tensor_is_in_the_file_s_digest(artifact: Artifact) -> None:
    path = artifact.folder / "weights-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[20] ^= 1  # of the header
    path.write_bytes(data)
    (fault,) = check_weights(artifact, unlimited).faults
    assert fault.startswith("weights-00001.safetensors: found sha256 ")


def test_a_file_that_shrinks(artifact: Artifact) -> None:
    path = artifact.folder / "weights-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match=r"weights-00001\.safetensors was cut short while it was read; copy the"):
        check_weights(artifact, unlimited)
