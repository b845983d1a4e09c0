"""Install what can be installed of the peers: `python -m benchmarks.peers.install` notes what fails."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from venv import create

from benchmarks.peers.contenders import ENVIRONMENTS

_HERE = Path(__file__).parent
REQUIREMENTS = {"venv": _HERE / "requirements.txt", "vllm": _HERE / "requirements-vllm.txt"}
"""Environment -> the file that says what it holds."""
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
"""Environment -> what is removed again: the index has these for CUDA alone, and transformers imports them if it can."""
_FAILURES = "failures.json"
_LAST_WORDS = 300


def main() -> None:
    """Makes the environments, and installs each requirement that is not there yet; prints what failed."""
    failures = {}
    for name, file in REQUIREMENTS.items():
        folder = ENVIRONMENTS.resolve() / name
        if not (folder / "bin" / "python").exists():
            create(folder, with_pip=True)
        for requirement in requirements(file.read_text()):
            print(f"{name}: {requirement}", flush=True)
            reason = install(folder / "bin" / "python", requirement, constraints=file)
            if reason is not None:
                failures[requirement] = reason
                print(f"  does not install: {reason}", flush=True)
        if name in UNWANTED:
            _uninstall(folder / "bin" / "python", UNWANTED[name])
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    (ENVIRONMENTS / _FAILURES).write_text(json.dumps(failures, indent=1) + "\n")


def requirements(text: str) -> list[str]:
    """The lines of a requirements file, without comments."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def install(python: Path, requirement: str, *, constraints: Path) -> str | None:
    """Installs it into the environment of `python`; the other lines of the file bind what it pulls in.

    Returns what pip said last if it failed.
    """
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    result = subprocess.run(
        [*command, "--constraint", str(constraints), requirement], capture_output=True, text=True, check=False
    )
    if result.returncode == 0:
        return None
    lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")] or result.stderr.splitlines()
    return " ".join(lines).removeprefix("ERROR: ")[-_LAST_WORDS:] or f"pip ended with exit code {result.returncode}"


def _uninstall(python: Path, packages: Sequence[str]) -> None:
    command = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "--disable-pip-version-check", *packages]
    subprocess.run(command, check=True)


def failures() -> dict[str, str]:
    """What did not install when it was last tried: requirement -> pip's words."""
    noted = ENVIRONMENTS / _FAILURES
    found: dict[str, str] = json.loads(noted.read_text()) if noted.exists() else {}
    return found


if __name__ == "__main__":
    main()
