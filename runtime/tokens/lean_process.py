"""Processes for work on foreign text, which may never end, fill the memory, or end the process that it runs in."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

_HEAVY = ("furiosa_llm", "furiosa_llm.runtime")
"""Packages that import onnxruntime and much else: a module in them is imported without them, in a tenth of the time."""

_ENVIRONMENT = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
"""One thread each: threads take address space, which is what is limited."""


def lean_process(module: str, **options: Any) -> subprocess.Popen[bytes]:
    """A process of its own that runs `main` of `module`, and imports nothing but what that module does.

    `options` are those of `subprocess.Popen`.
    """
    paths = {name: list(sys.modules[name].__path__) for name in _HEAVY}
    code = (
        f"import sys, types\nsys.path[:] = {sys.path!r}\n"
        f"for name, path in {paths!r}.items():\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = path\n"
        f"from {module} import main\nmain()"
    )
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", code], env={**os.environ, **_ENVIRONMENT}, **options)


def limit_memory(nbytes: int) -> None:
    """Lets this process take `nbytes` more than it has; what exceeds that fails, or ends it without a core file."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
