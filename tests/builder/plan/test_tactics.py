"""A tactics file: what it pins, what the plan makes of it, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from furiosa_llm.builder import ArtifactBuilder, PlanError, Tactics, plan_model, read_tactics
from furiosa_llm.builder.plan.explain import Explained
from tests.support.builder.stacks import stack

LLAMA = "tiny-llama-optimum"


def write(folder: Path, text: str) -> Path:
    path = folder / "tactics.toml"
    path.write_text(text, encoding="utf-8")
    return path


def explained(model: Path, tactics: Tactics, tp: int = 4) -> tuple[Explained, ...]:
    found = plan_model(model, tensor_parallel_sizes=(tp,), tactics=tactics)
    return found.plans[0].choices


def by_role(choices: tuple[Explained, ...], role: str) -> list[tuple[int, int]]:
    """(parts, how many layers) of every group with this role."""
    return sorted((c.parts, c.count) for c in choices if c.role == role)


def test_choices_are_kept_and_named(zoo: Path, tmp_path: Path) -> None:
    text = """
        [[tactic]]
        role = "attention heads"
        place = "shard"
        [[tactic]]
        role = "vocabulary"
        place = "replicate"
        [[tactic]]
        role = "ffn"
        layers = [-1]
        place = "replicate"
    """
    choices = explained(zoo / LLAMA / "model.onnx", read_tactics(write(tmp_path, text)))
    assert by_role(choices, "vocabulary") == [(1, 1)]
    assert by_role(choices, "feed-forward") == [(1, 1), (4, 1)]
    assert by_role(choices, "key/value heads") == [(2, 2)]
    origins = {c.role: c.pinned_by for c in choices if c.pinned_by is not None}
    assert origins["vocabulary"] == "tactic 2 of tactics.toml"
    assert origins["key/value heads"] == "tactic 1 of tactics.toml"
    assert all("tactics.toml says so" in c.why for c in choices if c.pinned_by is not None)


def test_weights_and_nodes_by_name(zoo: Path, tmp_path: Path) -> None:
    text = """
        [[tactic]]
        weight = "model.embed_tokens.*"
        dim = 0
        place = 2
        [[tactic]]
        node = "/lm_head/*"
        place = "replicate"
    """
    choices = explained(zoo / LLAMA / "model.onnx", read_tactics(write(tmp_path, text)))
    assert by_role(choices, "vocabulary") == [(2, 1)]
    assert by_role(choices, "output") == [(1, 1)]


def test_one_layer_of_many_is_planned_on_the_whole_graph(tmp_path: Path) -> None:
    """Layer 4 of nine: a reduced graph has no layer of its own for it."""
    onnx.save(stack(9), tmp_path / "model.onnx")
    text = '[[tactic]]\nrole = "feed-forward"\nlayers = [4]\nplace = "replicate"'
    choices = explained(tmp_path / "model.onnx", read_tactics(write(tmp_path, text)))
    assert by_role(choices, "feed-forward") == [(1, 1), (4, 8)]


@pytest.mark.slow
def test_an_artifact_keeps_them_and_says_so(zoo: Path, tmp_path: Path) -> None:
    tactics = read_tactics(write(tmp_path, '[[tactic]]\nrole = "vocabulary"\nplace = "replicate"'))
    model = zoo / LLAMA / "model.onnx"
    free = ArtifactBuilder(model, tensor_parallel_size=4).build(tmp_path / "free")
    pinned = ArtifactBuilder(model, tensor_parallel_size=4, tactics=tactics).build(tmp_path / "pinned")
    assert pinned.replicated_nbytes >= free.replicated_nbytes + 1024 * 64 * 4
    assert '"tactic 1 of tactics.toml"' in (tmp_path / "pinned" / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[tactic]", "is not TOML"),
        ("x = 1", r"must hold \[\[tactic\]\] tables and nothing else, found x"),
        ("tactic = 1", "must hold"),
        ('[[tactic]]\nplace = "shard"', "one of role, weight and node, and place; found none of them"),
        ('[[tactic]]\nrole = "ffn"\nnode = "x"\nplace = "shard"', r"found \['role', 'node'\] of them"),
        ('[[tactic]]\nrole = "ffn"\nplace = "shard"\ncolour = 1', r"unknown keys \['colour'\]"),
        ('[[tactic]]\nrole = 1\nplace = "shard"', "one of role, weight and node"),
        ('[[tactic]]\nrole = "ffn"\nplace = "somewhere"', "place = 'somewhere', expected"),
        ('[[tactic]]\nrole = "ffn"\nplace = true', "place = True, expected"),
        ('[[tactic]]\nrole = "ffn"\nplace = 0', "place = 0, expected"),
        ('[[tactic]]\nrole = "ffn"', "place = None, expected"),
        ('[[tactic]]\nrole = "ffn"\nlayers = 1\nplace = 1', "layers = 1, expected a list"),
        ('[[tactic]]\nnode = "x"\nlayers = [1]\nplace = 1', "layers, which go with role only"),
        ('[[tactic]]\nrole = "ffn"\ndim = 1\nplace = 1', "dim = 1, expected a dimension's number, beside weight"),
        ('[[tactic]]\nweight = "x"\ndim = "a"\nplace = 1', "dim = 'a', expected a dimension's number"),
    ],
)
def test_files_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        read_tactics(write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        read_tactics(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[[tactic]]\nrole = "wings"\nplace = "shard"',
            r'"wings", which nothing has; this model has "feed-forward"',
        ),
        ('[[tactic]]\nrole = "ffn"\nlayers = [7]\nplace = "shard"', 'role "ffn", which nothing has'),
        ('[[tactic]]\nweight = "lm_head"\nplace = 1', 'weight "lm_head", which matches nothing .* names such as'),
        ('[[tactic]]\nnode = "/lm_tail/*"\nplace = 1', 'node "/lm_tail/\\*", which matches nothing'),
        ('[[tactic]]\nweight = "model.embed*"\nplace = "shard"', "2 dimensions that can be split; say which one"),
        ('[[tactic]]\nrole = "ffn"\nplace = 3', "into 3 parts, which cannot be: 4 ranks allow"),
        ('[[tactic]]\nrole = "key/value heads"\nplace = 4', "2 over 4 needs padding to 4"),
        (
            '[[tactic]]\nrole = "ffn"\nplace = "shard"\n[[tactic]]\nrole = "feed-forward"\nplace = "replicate"',
            "tactic 1 .* says shard for a dimension of 176, tactic 2 .* says replicate for the same one",
        ),
        (
            '[[tactic]]\nrole = "hidden"\nplace = 4\n[[tactic]]\nrole = "vocabulary"\nplace = 4',
            "which cannot be: .* split twice",
        ),
    ],
)
def test_choices_that_cannot_be(text: str, message: str, zoo: Path, tmp_path: Path) -> None:
    tactics = read_tactics(write(tmp_path, text))
    with pytest.raises(PlanError, match=message):
        plan_model(zoo / LLAMA / "model.onnx", tensor_parallel_sizes=(4,), tactics=tactics)
