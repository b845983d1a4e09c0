"""What every test may use."""

import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from fixtures.processor import kernels
from furiosa_llm.builder import BuildReport
from furiosa_llm.runtime.artifact.reader import Artifact, open_artifact
from tests.support.artifacts import ZOO, artifact_of, built_model

Built = Callable[[str, int], tuple[BuildReport, Artifact]]

# No test fails because a machine is slow or busy.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
settings.load_profile("any machine")

# Graphs are a great many objects without a cycle: looking for one as often as Python does takes a tenth of the time.
gc.set_threshold(50_000, 20, 50)

# tests/wheel tests an installed wheel, from outside the checkout: `make test-wheel`.
collect_ignore = ["wheel"]


def pytest_report_header() -> str:
    return f"kernels: {kernels()}"


def pytest_configure() -> None:
    refuse_other_kernels()


def refuse_other_kernels() -> None:
    """Ends a run under qemu that is none: a process that an emulated one starts is not emulated."""
    expected = os.environ.get("EXPECTED_KERNELS")
    if expected not in (None, kernels()):
        raise pytest.UsageError(
            f"onnxruntime chooses {kernels()} here, and EXPECTED_KERNELS says {expected}: run `make test-kernels`, "
            "which starts one process of pytest under qemu, without workers"
        )


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder of small exported models, one folder each."""
    return ZOO


@pytest.fixture(scope="session")
def graphs() -> Path:
    """The folder of full-size graphs without weights, one folder each."""
    return ZOO.parent / "graphs"


@pytest.fixture(scope="session")
def encoder_artifact(zoo: Path) -> Path:
    """BERT with a tokenizer of another model, which knows as many tokens; not to be changed."""
    tokenizer = (zoo / "tiny-llama-optimum" / "tokenizer.json").read_text(encoding="utf-8")
    return artifact_of("tiny-bert-optimum", beside={"tokenizer.json": tokenizer})


@pytest.fixture(scope="session")
def built() -> Built:
    """The report and the artifact of a model (its path in the zoo) at a tensor parallel size; not to be changed."""

    @functools.cache
    def build(model: str, tensor_parallel_size: int) -> tuple[BuildReport, Artifact]:
        found = built_model(model, tensor_parallel_size)
        return found.report, open_artifact(found.folder, full=True)

    return build
