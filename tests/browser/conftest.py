"""A chromium, its pages, and servers for them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

from furiosa_llm.server.model import ServedModel
from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import NAME, load, serving
from tests.support.artifacts import artifact_of

CHROMIUM = "chromium"
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DESKTOP, PHONE = (1440, 900), (360, 740)
PATIENCE = 60_000
"""Milliseconds; machines may be busy."""

expect.set_options(timeout=PATIENCE)

Open = Callable[..., Page]


def serving_page(model: ServedModel, settings: ServerSettings | None = None) -> contextlib.AbstractContextManager[str]:
    """A server with the page, and what the page asks for."""
    return serving(model, settings or ServerSettings())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Not for the session: as long as playwright runs, nothing else on this thread may run an event loop.
    found = shutil.which(CHROMIUM)
    if found is None:
        pytest.fail("the page's tests drive Debian's chromium, which is not installed: apt-get install -y chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield launched
        launched.close()


class Watched:
    """What went wrong on the pages of a context, and whom they asked."""

    def __init__(self, context: BrowserContext) -> None:
        self.complaints: list[str] = []
        self.asked: list[str] = []
        context.on("console", self._on_console)
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        context.on("request", self._on_request)

    def _on_console(self, message: ConsoleMessage) -> None:
        self.complaints.append(f"{message.type}: {message.text}")

    def _on_request(self, request: Request) -> None:
        self.asked.append(request.url)


@pytest.fixture
def context_of(browser: Browser) -> Iterator[Callable[..., tuple[BrowserContext, Watched]]]:
    """Makes contexts of a size and a colour scheme, which are closed when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(size: tuple[int, int] = DESKTOP, **options: Any) -> tuple[BrowserContext, Watched]:
            context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
            stack.callback(context.close)
            context.set_default_timeout(PATIENCE)
            return context, Watched(context)

        yield make


@pytest.fixture
def open_page(context_of: Callable[..., tuple[BrowserContext, Watched]]) -> Iterator[Open]:
    """Opens a page; nothing that it does may put anything on the console, nor ask another server."""
    watched: list[tuple[str, Watched]] = []

    def make(url: str, size: tuple[int, int] = DESKTOP, **options: Any) -> Page:
        context, watch = context_of(size, **options)
        watched.append((url, watch))
        page = context.new_page()
        page.goto(url)
        return page

    yield make
    for url, watch in watched:
        assert watch.complaints == []
        assert [one for one in watch.asked if not one.startswith(f"{url}/")] == []


@pytest.fixture(scope="session")
def chat_artifact() -> Path:
    """A decoder with a chat template. It speaks at random."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    return artifact_of(NAME, beside={"chat_template.jinja": template})


@pytest.fixture(scope="session")
def url(chat_artifact: Path) -> Iterator[str]:
    """Four groups of PEs: two replicas of two stages."""
    with serving_page(load(chat_artifact, pipeline_parallel_size=2, data_parallel_size=2)) as base:
        yield base
