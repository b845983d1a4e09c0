"""The installed wheel, by itself: run by `make test-wheel`, in an environment that has never seen the checkout."""

import importlib.util
import pkgutil
import re
import subprocess
import sysconfig
from importlib.metadata import files, version
from pathlib import Path

import furiosa_llm

SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


OF_EXTRAS = (
    "furiosa_llm.server.",
    "furiosa_llm.mlperf.",
    "furiosa_llm.example.smollm2.",
    "furiosa_llm.runtime.distributed.",
)
"""Whose modules need extras, which are not installed here, but for the command line's."""
COMMAND_LINES = ("furiosa_llm.mlperf.cli",)


def run(command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run an installed command."""
    program = Path(sysconfig.get_path("scripts")) / command
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def furiosa(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `furiosa-llm`."""
    return run("furiosa-llm", *arguments)


def test_every_module_imports_from_site_packages() -> None:
    modules = [module.name for module in pkgutil.walk_packages(furiosa_llm.__path__, "furiosa_llm.")]
    assert {"furiosa_llm.builder", "furiosa_llm.runtime", "furiosa_llm.cli.main", "furiosa_llm.server.app"} <= set(
        modules
    )
    for name in modules:
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.origin is not None, name
        assert Path(spec.origin).is_relative_to(SITE_PACKAGES), name
        if name in COMMAND_LINES or not name.startswith(OF_EXTRAS):
            importlib.import_module(name)


def test_one_top_level_package_is_installed() -> None:
    top_level = {path.parts[0] for path in files("furiosa-llm-onnx") or [] if path.suffix == ".py"}
    assert top_level == {"furiosa_llm"}


def test_types_are_published() -> None:
    assert (SITE_PACKAGES / "furiosa_llm" / "py.typed").is_file()


def test_the_servers_page_is_installed() -> None:
    page = SITE_PACKAGES / "furiosa_llm" / "server" / "page"
    linked = re.findall(r'(?:href|src)="page/([^"]+)"', (page / "index.html").read_text())
    assert {"main.js", "style.css", "icon.svg"} <= set(linked)
    assert [name for name in linked if not (page / name).is_file()] == []


def test_version_is_the_distributions() -> None:
    assert furiosa_llm.__version__ == version("furiosa-llm-onnx")


def test_help() -> None:
    shown = furiosa("--help")
    assert shown.returncode == 0, shown.stderr
    assert "build" in shown.stdout
    assert "generate" in shown.stdout


def test_serving_needs_its_extra() -> None:
    refused = furiosa("serve", "model.artifact")
    assert refused.returncode == 1
    assert "serve needs fastapi, " in refused.stderr
    assert "prometheus_client, pydantic, uvicorn, which is not installed" in refused.stderr
    assert "pip install 'furiosa-llm-onnx[serve]'" in refused.stderr


def test_mlperf_needs_its_extra_and_has_its_datasets() -> None:
    assert run("furiosa-mlperf", "--help").returncode == 0
    refused = run("furiosa-mlperf", "llama-3.1-offline", "model.artifact", "logs")
    assert refused.returncode == 1
    assert "pip install 'furiosa-llm-onnx[mlperf]'" in refused.stderr
    data = SITE_PACKAGES / "furiosa_llm" / "mlperf" / "data"
    assert {path.name for path in data.iterdir()} == {"decoder.jsonl", "encoder.jsonl"}


def test_plots_need_their_extra(tmp_path: Path) -> None:
    refused = furiosa("bench", "model.artifact", "--plot", tmp_path / "a.png")
    assert refused.returncode == 1
    assert "pip install 'furiosa-llm-onnx[plots]'" in refused.stderr


def test_build_then_generate(zoo: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "tiny.artifact"
    built = furiosa("build", "-tp", "4", zoo / "tiny-llama-genai-fp32" / "model.onnx", artifact)
    assert built.returncode == 0, built.stderr
    assert (artifact / "manifest.json").is_file()

    generated = furiosa("generate", artifact, "--prompt", "hello", "--max-tokens", "4")
    assert generated.returncode == 0, generated.stderr
