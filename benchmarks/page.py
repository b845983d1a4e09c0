"""What the server's page takes to load in chromium, from a server on the same machine."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.artifacts import artifact
from benchmarks.bars import Bar

_ROUNDS = 5
_ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_SERVE = ("-pp", "2", "-dp", "2", "--port", "0", "--host", "127.0.0.1")
_RUNNING = re.compile(r"Uvicorn running on (http://\S+)")
_LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"


def bars() -> Iterator[Bar]:
    """Seconds until the page has loaded, and until it shows the machine, in a browser that has never seen it."""
    command = shutil.which("chromium")
    if command is None:
        raise FileNotFoundError("the page is measured in Debian's chromium: apt-get install -y chromium")
    loaded, shown, nbytes = [], [], 0.0
    with _server(artifact("int4", 8).folder) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=command, args=_ARGUMENTS)
        for _ in range(_ROUNDS):
            times = _visit(browser, url)
            loaded.append(times[0])
            shown.append(times[1])
            nbytes = times[2]
        browser.close()
    spread = f"{_ROUNDS} visits, {min(loaded):.2f} to {max(loaded):.2f} s; {nbytes / 1e3:.0f} kB"
    yield Bar(what="the page has loaded", figure=statistics.median(loaded), limit=1.0, unit=" s", beside=spread)
    spread = f"32 PEs, {min(shown):.2f} to {max(shown):.2f} s"
    yield Bar(what="the page shows the machine", figure=statistics.median(shown), limit=1.0, unit=" s", beside=spread)


def _visit(browser: Browser, url: str) -> tuple[float, float, float]:
    """Seconds to the end of loading and to the first figures, and the bytes of all files."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page: Page = context.new_page()
    page.goto(url)
    page.locator(".pe").first.wait_for()
    shown = page.evaluate("performance.now()")
    loaded = page.evaluate(_LOADED)
    nbytes = page.evaluate("performance.getEntries().reduce((sum, one) => sum + (one.transferSize ?? 0), 0)")
    context.close()
    return loaded / 1e3, shown / 1e3, nbytes


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    """The address of `furiosa-llm serve`, in a process of its own."""
    program = "import sys; from furiosa_llm.cli.main import main; main()"
    command = [sys.executable, "-c", program, "serve", str(folder), *_SERVE]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := _RUNNING.search(line):
                    yield found[1]
                    return
            raise RuntimeError(f"the server ended before it served: {''.join(lines[-5:])}")
        finally:
            process.terminate()
            process.stderr.close()
