"""`furiosa-llm check-sharding`: exit codes, the table, JSON, and files that are no models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from tests.cli.conftest import Cli


@pytest.fixture
def file(tmp_path: Path) -> Callable[[int, int], Path]:
    """A model whose product is split by `shards` over `num_devices` devices."""

    def write(shards: int, num_devices: int) -> Path:
        proto = onnx.parser.parse_model(
            '<ir_version: 11, opset_import: ["": 21]> g (float[4, 8] x, float[8, 12] w) => (float[4, 12] y)'
            "{ [product] y = MatMul(x, w) }"
        )
        proto.configuration.add(name="mine", num_devices=num_devices)
        entry = proto.graph.node[0].device_configurations.add(configuration_id="mine")
        spec = entry.sharding_spec.add(tensor_name="w", device=range(shards))
        spec.sharded_dim.add(axis=1).simple_sharding.add(num_shards=shards)
        onnx.save(proto, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return write


def test_a_sound_model(cli: Cli, file: Callable[[int, int], Path]) -> None:
    result = cli("check-sharding", file(4, 4))
    assert result.code == 0
    assert result.out == 'configurations: "mine" (4 devices); 1 of 1 nodes annotated\nerrors: 0, warnings: 0\n'


def test_errors_are_shown_with_node_tensor_and_remedy(cli: Cli, file: Callable[[int, int], Path]) -> None:
    result = cli("check-sharding", file(5, 5))
    assert result.code == 1
    row = next(line for line in result.out.splitlines() if "error" in line)
    assert 'MatMul "product"' in row
    assert "12 on axis 1 is not divisible by num_shards 5" in row
    assert "leave the axis whole, or pad it to 15" in " ".join(result.out.split())
    assert result.out.endswith("errors: 1, warnings: 0\n")


def test_json_lists_every_finding(cli: Cli, file: Callable[[int, int], Path]) -> None:
    result = cli("check-sharding", "--json", file(4, 2))
    assert result.code == 1
    found = json.loads(result.out)
    assert found["annotated"] is True
    assert found["configurations"] == [{"name": "mine", "num_devices": 2}]
    assert (found["errors"], found["warnings"], found["annotated_nodes"]) == (2, 0, 1)
    assert [finding["what"].split(":")[0] for finding in found["findings"]] == [
        "device 2 is out of range",
        "device 3 is out of range",
    ]
    assert all(finding["remedy"] == "use device numbers from 0 to 1" for finding in found["findings"])


def test_long_tables_are_cut(cli: Cli, file: Callable[[int, int], Path]) -> None:
    path = file(4, 4)
    proto = onnx.load(path)
    proto.graph.node[0].device_configurations[0].sharding_spec[0].device[:] = range(100, 160)
    onnx.save(proto, path)
    assert "... and 11 more; --json lists them all." in cli("check-sharding", path).out


def test_a_model_without_annotations_is_told_what_to_do(cli: Cli, zoo: Path) -> None:
    result = cli("check-sharding", zoo / "tiny-bert-optimum" / "model.onnx")
    assert result.code == 0
    assert "no multi-device annotations" in result.out
    assert "--emit-onnx" in result.out


@pytest.mark.parametrize(("content", "message"), [(b"not a model", "is not an ONNX model"), (None, "does not exist")])
def test_what_is_no_model_is_refused(cli: Cli, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    result = cli("check-sharding", path)
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert message in " ".join(result.err.split())
