"""The page as it is served: types, headers, caching, and what needs no key. tests/browser/ looks at it."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

import furiosa_llm.server
from furiosa_llm.runtime.tokens.chat_template import ChatTemplate
from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import error_of, load, serving
from tests.support.artifacts import artifact_of

FOLDER = Path(furiosa_llm.server.__path__[0]) / "page"
FILES = sorted(path.name for path in FOLDER.iterdir() if path.name != "index.html")
TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}


def test_the_page_and_its_files_are_served(url: str) -> None:
    index = httpx.get(f"{url}/")
    assert index.status_code == 200
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    assert index.content == (FOLDER / "index.html").read_bytes()
    for name in FILES:
        answer = httpx.get(f"{url}/page/{name}")
        assert answer.content == (FOLDER / name).read_bytes(), name
        assert answer.headers["content-type"] == TYPES[Path(name).suffix], name


def test_the_page_preloads_every_module() -> None:
    index = (FOLDER / "index.html").read_text()
    preloaded = re.findall(r'rel="modulepreload" href="page/([a-z]+\.js)"', index)
    assert [*preloaded, "main.js"] == [name for name in FILES if name.endswith(".js") and name != "main.js"] + [
        "main.js"
    ]


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/style.css"])
def test_browsers_are_told_what_is_allowed(url: str, path: str) -> None:
    headers = httpx.get(f"{url}{path}").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["object-src"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/", "/page/main.js"])
def test_what_a_browser_has_is_not_sent_again(url: str, path: str) -> None:
    first = httpx.get(f"{url}{path}")
    assert first.headers["cache-control"] == "no-cache"
    etag = first.headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}'):
        again = httpx.get(f"{url}{path}", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        assert "content-security-policy" in again.headers
    assert httpx.get(f"{url}{path}", headers={"If-None-Match": '"other"'}).status_code == 200
    assert httpx.get(f"{url}/page/dom.js").headers["etag"] != etag


@pytest.mark.parametrize("path", ["/", "/page/main.js"])
def test_methods(url: str, path: str) -> None:
    head = httpx.head(f"{url}{path}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(httpx.get(f"{url}{path}").content))
    for method in ("POST", "PUT", "DELETE"):
        refused = httpx.request(method, f"{url}{path}")
        assert refused.status_code == 405
        error_of(refused)


@pytest.mark.parametrize("name", ["index.html", "missing.js", "..%2fapp.py", "%2e%2e/app.py"])
def test_nothing_else_is_served(url: str, name: str) -> None:
    refused = httpx.get(f"{url}/page/{name}")
    assert refused.status_code == 404
    error_of(refused)


def test_the_page_is_no_part_of_the_schema(url: str) -> None:
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert [path for path in paths if path == "/" or path.startswith("/page")] == []


def test_the_page_needs_no_key(artifact: Path) -> None:
    with serving(load(artifact), ServerSettings(api_keys=["secret"])) as url:
        assert httpx.get(f"{url}/").status_code == 200
        assert {httpx.get(f"{url}/page/{name}").status_code for name in FILES} == {200}
        assert httpx.get(f"{url}/page/config.json").json()["api_key_required"] is True
        for path in ("/page/missing.js", "/page/", "/v1/models", "/machine"):
            assert httpx.get(f"{url}{path}").status_code == 401, path


def box(url: str) -> str | None:
    found: str | None = httpx.get(f"{url}/page/config.json").json()["box"]
    return found


def test_the_page_learns_what_a_decoder_is_for(artifact: Path) -> None:
    with serving(load(artifact), ServerSettings()) as url:
        assert httpx.get(f"{url}/page/config.json").json() == {"api_key_required": False, "box": "chat"}
    for template, expected in ((None, "completion"), ("{{ messages }}", "chat")):
        model = load(artifact)
        assert model.tokenizer is not None
        model.tokenizer._template = ChatTemplate({}, None)
        with serving(model, ServerSettings(chat_template=template)) as url:
            assert box(url) == expected


def test_the_page_learns_what_an_encoder_is_for(encoder_artifact: Path) -> None:
    with serving(load(encoder_artifact), ServerSettings()) as url:
        assert box(url) == "embedding"
    with serving(load(artifact_of("tiny-bert-optimum")), ServerSettings()) as url:  # it has no tokenizer
        assert box(url) is None
