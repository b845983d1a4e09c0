"""The pictures in README.md and docs/: a plan, a topology, the server's page; `make pictures INTO=docs` takes them.

Other pictures of the page, for whoever releases it, lie in build/pictures in any case.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import httpx
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.text import Text

from benchmarks.artifacts import artifact

PLANNED = Path("fixtures/graphs/llama-3.1-8b-dynamo-op21-fp16")
DEVICES = ("--devices", "npu:0,npu:1,npu:2,npu:3", "-pp", "2", "-dp", "2")
PORT = 8765
COLUMNS = 100
SHOTS = Path("build/pictures").resolve()
WIDTHS = (360, 768, 1024, 1280, 1920)
_FURIOSA_LLM = Path(sys.executable).parent / "furiosa-llm"


def take_terminal(picture: Path, arguments: Sequence[str], folder: Path) -> None:
    """What the command prints in `folder`, as `picture`: vectors, and fonts that the reader has."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1"}
    done = subprocess.run(
        [_FURIOSA_LLM, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere)
        console.print(Text.from_ansi(done.stdout))
        drawn = console.export_svg(title=shlex.join(["furiosa-llm", *arguments]), unique_id=picture.stem)
    without_network = re.sub(r',\s*url\("https://[^;]*', "", drawn)
    picture.write_text(without_network, encoding="utf-8")


def take_page(picture: Path, folder: Path) -> None:
    """The page behind a question, as `picture`, and in all widths, light and dark, in `SHOTS`."""
    command: list[str | Path] = [_FURIOSA_LLM, "serve", folder, *DEVICES, "--port", str(PORT)]
    url = f"http://localhost:{PORT}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(url)
            with sync_playwright() as playwright:
                chromium = shutil.which("chromium")
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
                _shoot(browser, url, picture, 1440, "light")
                for width in WIDTHS:
                    _shoot(browser, url, SHOTS / f"page-{width}-light.png", width, "light")
                    _shoot(browser, url, SHOTS / f"page-{width}-dark.png", width, "dark")
                browser.close()
        finally:
            server.terminate()


def _shoot(browser: Browser, url: str, picture: Path, width: int, scheme: Literal["light", "dark"]) -> None:
    page = browser.new_page(viewport={"width": width, "height": 940}, color_scheme=scheme)
    page.goto(url)
    page.locator("#temperature").evaluate("field => { field.value = '0'; }")
    page.fill("#message", "What is the capital of France?")
    page.keyboard.press("Enter")
    page.get_by_text("The capital of France is Paris.").first.wait_for(timeout=60_000)
    page.screenshot(path=picture)
    page.close()


def _wait_for(url: str) -> None:
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        try:
            if httpx.get(f"{url}/health").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise TimeoutError(f"{url} does not answer")


def main() -> None:
    """The command line."""
    into = Path(sys.argv[1]).resolve() if sys.argv[1:] else SHOTS
    for folder in (into, SHOTS):
        folder.mkdir(parents=True, exist_ok=True)
    take_terminal(into / "plan.svg", ["plan", PLANNED.name], PLANNED.parent)
    built = artifact("genai-fp32", 8).folder
    take_terminal(into / "topology.svg", ["topology", built.name, *DEVICES], built.parent)
    take_page(into / "serving-page.png", built)


if __name__ == "__main__":
    main()
