"""What is installed is what is in the tree, and the folders know of each other only what they may."""

import ast
import itertools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points, packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import furiosa_llm
from tests.support.tiers import tiered

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]


def imports(folder: str) -> Iterator[tuple[str, str]]:
    """Each absolute import under a folder: the file, and the dotted name down to the imported attribute."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), path)):
            if isinstance(node, ast.Import):
                yield from ((str(path.relative_to(ROOT)), alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((str(path.relative_to(ROOT)), f"{node.module}.{alias.name}") for alias in node.names)


def within(name: str, *packages: str) -> bool:
    """Whether a dotted name is one of the packages or below one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def names_of(requirements: list[str]) -> set[str]:
    """The distributions that are required."""
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def test_every_package_of_the_tree_is_listed() -> None:
    in_tree = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(in_tree)


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("folder", "may_import"),
    [
        ("runtime", ["furiosa_llm.runtime"]),
        ("builder", ["furiosa_llm.builder", "furiosa_llm.runtime.artifact", "furiosa_llm.runtime.placement"]),
    ],
)
def test_folders_import_only_what_they_may(folder: str, may_import: list[str]) -> None:
    ours = ("furiosa_llm", "builder", "runtime", "fixtures", "benchmarks", "tests")
    ours_in_use = [(path, name) for path, name in imports(folder) if within(name, *ours)]
    assert [(path, name) for path, name in ours_in_use if not within(name, *may_import)] == []


def test_every_third_party_import_is_a_declared_dependency() -> None:
    declared = names_of(PYPROJECT["project"]["dependencies"])
    extras = {
        place: names_of(PYPROJECT["project"]["optional-dependencies"][extra])
        for place, extra in (
            ("/server/", "serve"),
            ("/bench/plots.py", "plots"),
            ("/mlperf/", "mlperf"),
            ("/signing.py", "sign"),
            ("/example/", "example"),
            ("/distributed/", "ray"),
        )
    }
    extras["/server/"].add("starlette")  # FastAPI's own
    distributions = packages_distributions()
    undeclared = {
        (path, name)
        for folder in FOLDERS.values()
        for path, name in imports(folder)
        if (top := name.partition(".")[0]) not in sys.stdlib_module_names
        and top not in FOLDERS
        and not declared.union(*(names for place, names in extras.items() if place in path))
        & {canonicalize_name(distribution) for distribution in distributions.get(top, [])}
    }
    assert undeclared == set()


def test_every_declared_dependency_is_imported() -> None:
    """By a product file; those of an extra, too."""
    distributions = packages_distributions()
    used = {
        canonicalize_name(distribution)
        for folder in FOLDERS.values()
        for _, name in imports(folder)
        for distribution in distributions.get(name.partition(".")[0], [])
    }
    extras = PYPROJECT["project"]["optional-dependencies"]
    product = [
        *(extras[name] for name in ("serve", "plots", "mlperf", "sign", "ray")),
        PYPROJECT["project"]["dependencies"],
    ]
    assert set().union(*map(names_of, product)) - used == set()


def test_every_file_that_is_no_module_is_package_data() -> None:
    listed = {
        path
        for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items()
        for folder in ([FOLDERS["furiosa_llm"]] if package == "*" else [package.replace(".", "/")])
        for pattern in patterns
        for path in (ROOT / folder).glob(pattern)
    }
    found = {
        path for path in (ROOT / "furiosa_llm").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert listed == found


@pytest.mark.parametrize(
    ("folder", "first"),
    tiered(
        itertools.product(["builder", "runtime"], ["folder", "package"]),
        [("builder", "folder"), ("runtime", "package")],
    ),
)
def test_the_folders_name_gives_the_packages_own_objects(folder: str, first: str) -> None:
    names = [folder, f"furiosa_llm.{folder}"]
    program = f"""
import importlib
one, other = map(importlib.import_module, {names if first == "folder" else names[::-1]})
assert one.__all__ and all(getattr(one, name) is getattr(other, name) for name in one.__all__), one.__all__
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_command_exists() -> None:
    [script] = entry_points(group="console_scripts", name="furiosa-llm")
    assert script.value == PYPROJECT["project"]["scripts"]["furiosa-llm"]
    assert callable(script.load())


def test_the_version_has_one_source() -> None:
    assert furiosa_llm.__version__ == version("furiosa-llm-onnx") == PYPROJECT["project"]["version"]


def test_types_are_published() -> None:
    assert [folder for folder in FOLDERS.values() if not (ROOT / folder / "py.typed").exists()] == []
