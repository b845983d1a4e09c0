"""Programs beside what source.onnx lowers to: what is foreign, missing or otherwise is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from furiosa_llm import ArtifactBuilder
from furiosa_llm.builder import reshard
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.source_checks import check_given, check_lowering
from tests.support.artifacts import artifact_of
from tests.support.runtime.mutations import MUTATIONS
from tests.support.runtime.program_edits import Program
from tests.support.tampering import edit_manifest, reseal
from tests.support.tiers import MECHANISMS, tiered

LLAMA = "tiny-llama-genai-fp32"
ZOO = sorted(path.name for path in (Path(__file__).parents[1] / "fixtures" / "zoo").iterdir() if path.is_dir())
T5 = "tiny-t5-optimum"
PARTS = [f"{T5}/{part}.onnx" for part in ("encoder_model", "decoder_model", "decoder_with_past_model")]
ROWS = [*dict.fromkeys([*MECHANISMS, *((name, 4) for name in (*PARTS, *ZOO) if name != T5)])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of an artifact."""
    return Path(shutil.copytree(artifact_of(LLAMA), tmp_path / "artifact"))


def faults(folder: Path) -> tuple[str, ...]:
    return check_lowering(open_artifact(folder)).faults


@pytest.mark.parametrize(("name", "size"), tiered(ROWS, MECHANISMS))
def test_an_honest_artifact_is_what_its_source_lowers_to(name: str, size: int) -> None:
    check = check_lowering(open_artifact(artifact_of(name, size)))
    assert check.faults == ()
    assert check.checked > 50


def test_options_are_kept(zoo: Path, tmp_path: Path) -> None:
    model = zoo / LLAMA / "model.onnx"
    ArtifactBuilder(model, max_seq_len_to_capture=100, max_padding=1.0).build(tmp_path / "a")
    assert faults(tmp_path / "a") == ()
    reshard(tmp_path / "a", tmp_path / "b", tensor_parallel_size=8)
    assert faults(tmp_path / "b") == ()
    ArtifactBuilder(zoo / "tiny-llama-optimum" / "model.onnx", fuse_attention=False).build(tmp_path / "c")
    assert faults(tmp_path / "c") == ()


NEG = 'Neg "{}" comes from no node of source.onnx, and the lowering adds none like it'


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("sign of the logits", (NEG.format("logits"), "value_info 'made/1' is in no lowering of source.onnx")),
        ("a node that nobody reads", (NEG.format("made/1"),)),
        (
            "a window over 200 tokens",
            (
                'GroupQueryAttention "/model/layers.0/attn/GroupQueryAttention" has local_window_size = '
                "local_window_size = 200, expected local_window_size = -1",
            ),
        ),
        (
            "two weights of a layer exchanged",
            (
                "Sigmoid \"/model/layers.0/mlp/act_fn/Sigmoid\" reads '/model/layers.0/mlp/up_proj/MatMul/output_0', "
                "expected '/model/layers.0/mlp/gate_proj/MatMul/output_0'",
                "Mul \"/model/layers.0/mlp/act_fn/Mul\" reads '/model/layers.0/mlp/up_proj/MatMul/output_0', expected",
                'Mul "/model/layers.0/mlp/Mul" reads',
            ),
        ),
        (
            "presents of key and value exchanged",
            (
                "output 'present.0.key' is the value 'present.0.value' of the lowered source.onnx",
                "output 'present.0.value' is the value 'present.0.key' of the lowered source.onnx",
            ),
        ),
        (
            "a weight altered in its last bit",
            (
                "initializer 'model.layers.0.input_layernorm.weight' has other contents than in the lowering of "
                "source.onnx",
            ),
        ),
        (
            "states exchanged in the manifest",
            (
                "manifest.json $.states[0].output is present.0.value, expected present.0.key",
                "manifest.json $.states[2].output is present.0.key, expected present.0.value",
            ),
        ),
    ],
)
def test_what_is_otherwise_is_named(kind: str, named: tuple[str, ...], folder: Path) -> None:
    program = Program(folder)
    MUTATIONS[kind].apply(program)
    program.save()
    found = faults(folder)
    assert len(found) == len(named)
    assert [one.startswith(start) for one, start in zip(found, named, strict=True)] == [True] * len(named), found


def test_a_node_left_out_is_named(folder: Path) -> None:
    program = Program(folder)
    node = program.find("Sigmoid")
    for reader in program.nodes:
        reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]
    program.replace([one for one in program.nodes if one.output != node.output])
    program.save()
    found = faults(folder)
    assert any(one == f'Sigmoid "{node.name}" of the lowered source.onnx is not there' for one in found)
    assert any(one.startswith('Mul "/model/layers.0/mlp/act_fn/Mul" reads') for one in found)


def test_names_and_graphs_within_nodes_make_no_difference(folder: Path) -> None:
    """Values that are called otherwise are traced all the same; what a graph within a node reads is traced, too."""
    program = Program(folder)
    name = program.find("Sigmoid").output[0]
    for node in program.nodes:
        node.input[:] = ["other" if one == name else one for one in node.input]
        node.output[:] = ["other" if one == name else one for one in node.output]
    program.save()
    assert not any("comes from" in one or "reads" in one or "is not there" in one for one in faults(folder))


def test_an_order_of_its_own_is_a_fault(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact_of("tiny-llama-optimum"), tmp_path / "artifact"))
    program = Program(copy)
    MUTATIONS["two independent nodes in another order"].apply(program)
    program.save()
    assert faults(copy) == ("the nodes are in another order than in the lowering of source.onnx",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(plan={}), "source.onnx cannot be lowered again: manifest.json $.plan"),
        (
            lambda m: m["provenance"].update(options={}),
            "source.onnx cannot be lowered again: manifest.json $.provenance",
        ),
        (
            lambda m: m["model"].update(max_sequence_length=7),
            "manifest.json $.model.max_sequence_length is 7, expected",
        ),
    ],
)
def test_a_manifest_of_its_own(
    change: Callable[[dict[str, dict[str, object]]], None], message: str, folder: Path
) -> None:
    edit_manifest(folder, change)
    (fault,) = faults(folder)
    assert fault.startswith(message)
    assert str(folder) not in fault


def test_a_made_tensor_is_compared(folder: Path) -> None:
    program = Program(folder)
    MUTATIONS["a rank's own constant altered"].apply(program)
    name = next(tensor["name"] for tensor in program.manifest["tensors"] if tensor["origin"] is None)
    place = [tensor["name"] for tensor in json.loads((folder / "manifest.json").read_bytes())["tensors"]].index(name)
    (fault,) = faults(folder)
    assert fault.startswith(f"manifest.json $.tensors[{place}].sha256 is ")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda plan: plan.update(padding_nbytes=1), "padding_nbytes is 1, expected 0"),
        (lambda plan: plan["price"].update(nbytes=1.0), "price.nbytes is 1.0, expected 402960.0"),
        (lambda plan: plan["choices"][0].update(parts=2), "choices"),
        (lambda plan: plan.update(notes=["nothing is replicated"]), "notes is ['nothing is replicated'], expected []"),
        (lambda plan: plan["attention"].update(fused=9), "attention.fused is 9, expected 0"),
        (lambda plan: plan.update(certified=True), " is {"),
    ],
)
def test_what_is_claimed_of_the_plan(folder: Path, change: Callable[[Any], None], named: str) -> None:
    edit_manifest(folder, lambda manifest: change(manifest["plan"]))
    found = faults(folder)
    assert found
    assert found[0].startswith("manifest.json $.plan")
    assert named in found[0]


def test_a_source_that_is_no_valid_graph(folder: Path) -> None:
    source = onnx.load_model(folder / "source.onnx", load_external_data=False)
    del source.graph.node[3].input[:]
    (folder / "source.onnx").write_bytes(source.SerializeToString())
    reseal(folder)
    (fault,) = faults(folder)
    assert fault.startswith("source.onnx cannot be lowered again: ")


def test_source_and_program_altered_alike_are_not_the_model_given(folder: Path, zoo: Path) -> None:
    """Who negates both has made another sound artifact, but not of this model."""
    model = zoo / LLAMA / "model.onnx"
    assert check_given(open_artifact(folder), model).faults == ()
    for name in ("program.onnx", "source.onnx"):
        graph = onnx.load_model(folder / name, load_external_data=False)
        next(node for node in graph.graph.node if node.op_type == "Sigmoid").op_type = "Tanh"
        (folder / name).write_bytes(graph.SerializeToString())
    reseal(folder)
    assert faults(folder) == ()
    (fault,) = check_given(open_artifact(folder), model).faults
    assert fault == (
        '1 nodes of source.onnx are not the model\'s; the first is Tanh "/model/layers.0/mlp/act_fn/Sigmoid", in the '
        'model Sigmoid "/model/layers.0/mlp/act_fn/Sigmoid"'
    )


def edit_json(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    content = json.loads((folder / name).read_bytes())
    change(content)
    (folder / name).write_text(json.dumps(content))


def exchange_tokens(folder: Path) -> None:
    """Every answer is another text."""

    def exchange(tokenizer: Any) -> None:
        vocab = tokenizer["model"]["vocab"]
        first, second = list(vocab)[5:7]
        vocab[first], vocab[second] = vocab[second], vocab[first]

    edit_json(folder, "tokenizer.json", exchange)


def shorten(folder: Path) -> None:
    """Of what the model could take, the engine refuses most."""
    edit_json(folder, "genai_config.json", lambda config: config["model"].update(context_length=32))
    edit_manifest(folder, lambda manifest: manifest["model"].update(max_sequence_length=32))


def end_never(folder: Path) -> None:
    """No answer ends by itself."""
    edit_json(folder, "genai_config.json", lambda config: config["model"].update(eos_token_id=[3]))
    edit_manifest(folder, lambda manifest: manifest["model"].update(eos_token_ids=[3]))


def lose_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    edit_manifest(
        folder, lambda m: m.update(files=[entry for entry in m["files"] if entry["path"] != "chat_template.jinja"])
    )


def bring_a_configuration(folder: Path) -> None:
    """One that the model lacks, and that is asked before those that it has."""
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    entry = {"path": "generation_config.json", "nbytes": 0, "sha256": "0" * 64}
    edit_manifest(folder, lambda m: m.update(files=sorted([*m["files"], entry], key=lambda one: str(one["path"]))))
    edit_manifest(folder, lambda manifest: manifest["model"].update(eos_token_ids=[3]))


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (exchange_tokens, "tokenizer.json is not the one beside the model"),
        (shorten, "genai_config.json is not the one beside the model"),
        (end_never, "genai_config.json is not the one beside the model"),
        (lose_template, "chat_template.jinja is not there, and one is beside the model"),
        (bring_a_configuration, "generation_config.json is in the artifact, and there is none beside the model"),
    ],
)
def test_files_that_say_how_the_model_is_asked(
    folder: Path, harm: Callable[[Path], None], named: str, zoo: Path
) -> None:
    """Program and weights are the model's, and the artifact agrees with itself: only the model's folder tells."""
    harm(folder)
    reseal(folder)
    assert faults(folder) == ()
    assert check_given(open_artifact(folder), zoo / LLAMA / "model.onnx").faults == (named,)


def test_an_interface_that_is_not_the_models(folder: Path, zoo: Path) -> None:
    """One that takes a sequence at a time, with the same nodes and weights."""
    source = onnx.load_model(folder / "source.onnx", load_external_data=False)
    for value in (*source.graph.input, *source.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    (folder / "source.onnx").write_bytes(source.SerializeToString())
    reseal(folder)
    assert check_given(open_artifact(folder), zoo / LLAMA / "model.onnx").faults == (
        "the graph of source.onnx has another input than the model's",
        "the graph of source.onnx has another output than the model's",
    )


def test_another_release_is_named_and_faults_are_not_endless(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["provenance"].update(tool="furiosa-llm-onnx 9"))
    assert faults(folder) == ()
    program = Program(folder)
    for name in [node.output[0] for node in program.nodes]:
        program.replace([*program.nodes, program.node("Identity", [name])])
    program.save()
    found = faults(folder)
    assert found[0].startswith("made by 'furiosa-llm-onnx 9', not by furiosa-llm-onnx ")
    assert len(found) == 51
    assert found[-1].startswith("and ")
