"""The environments of the exporters, with all that they need: `python -m benchmarks.exporters.install`."""

from __future__ import annotations

import sys
from pathlib import Path
from venv import create

from benchmarks.peers.install import install, requirements

ENVIRONMENTS = Path("build/exporters")
_HERE = Path(__file__).parent
_FILES = {"current": _HERE / "requirements.txt", "optimum": _HERE / "requirements-optimum.txt"}


def main() -> None:
    """Makes the environments, and installs what is not there yet; fails if something does not install."""
    for name, file in _FILES.items():
        python = python_of(name)
        if not python.exists():
            create(ENVIRONMENTS / name, with_pip=True)
        for requirement in requirements(file.read_text()):
            print(f"{name}: {requirement}", flush=True)
            reason = install(python, requirement, constraints=file)
            if reason is not None:
                sys.exit(f"FAILED: {requirement} does not install: {reason}")


def python_of(environment: str) -> Path:
    """The interpreter of an environment."""
    return ENVIRONMENTS.resolve() / environment / "bin" / "python"


if __name__ == "__main__":
    main()
