"""What every test may use."""

import shutil
from pathlib import Path

import pytest

from furiosa_llm import ArtifactBuilder

ROOT = Path(__file__).resolve().parent.parent

# tests/wheel tests an installed wheel, from outside the checkout: `make test-wheel`.
collect_ignore = ["wheel"]


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of small exported models, one folder each."""
    return ROOT / "fixtures" / "zoo"


@pytest.fixture(scope="session")
def graphs() -> Path:
    """The folder of full-size graphs without weights, one folder each."""
    return ROOT / "fixtures" / "graphs"


@pytest.fixture(scope="session")
def encoder_artifact(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT with a tokenizer of another model, which knows as many tokens."""
    folder = tmp_path_factory.mktemp("encoder") / "model"
    shutil.copytree(zoo / "tiny-bert-optimum", folder)
    shutil.copy(zoo / "tiny-llama-optimum" / "tokenizer.json", folder)
    ArtifactBuilder(folder / "model.onnx", tensor_parallel_size=4).build(folder.parent / "artifact")
    return folder.parent / "artifact"
