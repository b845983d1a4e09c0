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


def furiosa(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command."""
    command = Path(sysconfig.get_path("scripts")) / "furiosa-llm"
    return subprocess.run([command, *arguments], capture_output=True, text=True, check=False)


def test_every_module_imports_from_site_packages() -> None:
    modules = [module.name for module in pkgutil.walk_packages(furiosa_llm.__path__, "furiosa_llm.")]
    assert {"furiosa_llm.builder", "furiosa_llm.runtime", "furiosa_llm.cli.main", "furiosa_llm.server.app"} <= set(
        modules
    )
    for name in modules:
        # The server's modules need the extra `serve`, which is not installed here.
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.origin is not None, name
        assert Path(spec.origin).is_relative_to(SITE_PACKAGES), name
        if not name.startswith("furiosa_llm.server."):
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
    assert "serve needs fastapi, prometheus_client, uvicorn" in refused.stderr
    assert "pip install 'furiosa-llm-onnx[serve]'" in refused.stderr


def test_build_then_generate(zoo: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "tiny.artifact"
    built = furiosa("build", "-tp", "4", zoo / "tiny-llama-genai-fp32" / "model.onnx", artifact)
    assert built.returncode == 0, built.stderr
    assert (artifact / "manifest.json").is_file()

    generated = furiosa("generate", artifact, "--prompt", "hello", "--max-tokens", "4")
    assert generated.returncode == 0, generated.stderr
