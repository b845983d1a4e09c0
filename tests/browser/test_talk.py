"""The box beside the machine, in a real browser: chats, completions, and texts to compare."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, Route, expect

from furiosa_llm import LLM, ArtifactBuilder, SamplingParams
from furiosa_llm.server.settings import ServerSettings
from tests.browser.conftest import Open, Watched, serving_page
from tests.server.conftest import NAME, load, metric, wait_for

pytestmark = pytest.mark.browser

Contexts = Callable[..., tuple[BrowserContext, Watched]]

ATTACK = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script><b>bold</b> &amp;"


def live(page: Page) -> None:
    expect(page.locator("#state")).to_have_text("live")


def ask(page: Page, text: str, *, tokens: int = 8) -> None:
    set_tokens(page, tokens)
    page.fill("#message", text)
    page.keyboard.press("Enter")


def set_tokens(page: Page, tokens: int) -> None:
    page.locator("#max-tokens").evaluate("(field, value) => { field.value = value; }", str(tokens))


def stream_of(*texts: str, end: str = "data: [DONE]\n\n") -> str:
    """A stream as the server sends it."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end


def answered(context: BrowserContext, body: str) -> list[Any]:
    """Answers chats with `body`; what was asked is in the list."""
    asked: list[Any] = []

    def answer(route: Route) -> None:
        asked.append(route.request.post_data_json)
        route.fulfill(body=body, content_type="text/event-stream; charset=utf-8")

    context.route("**/v1/chat/completions", answer)
    return asked


def unending(route: Route, **others: Any) -> None:
    """Lets the model say all the tokens that it may."""
    body: dict[str, Any] = json.loads(route.request.post_data or "")
    route.continue_(post_data=json.dumps({**body, "ignore_eos": True, **others}))


def test_a_chat_streams(url: str, open_page: Open) -> None:
    page = open_page(url)
    live(page)
    page.evaluate(
        """() => {
            window.lengths = new Set();
            const look = () => {
                const text = document.querySelector('.said.model .text');
                if (text) window.lengths.add(text.textContent.length);
            };
            new MutationObserver(look).observe(document.querySelector('#log'), {
                subtree: true, characterData: true, childList: true,
            });
        }"""
    )
    page.route("**/v1/chat/completions", unending)
    before = metric(url, "generation_tokens_total")
    ask(page, "hello", tokens=300)
    expect(page.locator(".note")).to_contain_text("tokens, first after")
    assert len(page.evaluate("[...window.lengths]")) > 5
    expect(page.locator(".said h3")).to_have_text(["You", NAME])
    expect(page.locator(".said.you .text")).to_have_text("hello")
    expect(page.locator("#log")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#message")).to_be_focused()
    count = metric(url, "generation_tokens_total") - before
    expect(page.locator(".note")).to_contain_text(f"{count:.0f} token")


STOPS = {
    "button": "document.querySelector('#stop').click()",
    "key": (
        "document.querySelector('#message').dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}))"
    ),
}


ENDLESS = 128
"""Completions: eight full batches, one after another."""


def endless(route: Route) -> None:
    """Asks for more than the model has to say, so that there is something to stop."""
    unending(route, n=ENDLESS)


@pytest.mark.parametrize("how", list(STOPS))
def test_stop_aborts_the_request(chat_artifact: Path, open_page: Open, how: str) -> None:
    with serving_page(load(chat_artifact)) as url:
        page = open_page(url)
        live(page)
        page.route("**/v1/chat/completions", endless)
        # In the page, because the model may be done before a message from here arrives.
        page.evaluate(
            f"""() => new MutationObserver(() => {{
                if (document.querySelector('.said.model .text')?.textContent) {STOPS[how]};
            }}).observe(document.querySelector('#log'), {{subtree: true, characterData: true, childList: true}})"""
        )
        ask(page, "hello", tokens=450)
        expect(page.locator(".note")).to_have_text("stopped")
        wait_for(lambda: metric(url, "request_cancelled_total") == 1)
        wait_for(lambda: metric(url, "num_requests_running") == 0)
        assert metric(url, "request_success_total") == metric(url, "request_failure_total") == 0
        assert metric(url, "generation_tokens_total") < ENDLESS * 450 / 2
        expect(page.locator("#message")).to_be_focused()
        expect(page.locator("#stop")).to_be_disabled()


def test_the_conversation_is_sent_with_its_settings(context_of: Contexts, url: str) -> None:
    context, _ = context_of()
    asked = answered(context, stream_of("Wa", "ter."))
    page = context.new_page()
    page.goto(url)
    live(page)
    page.click("summary")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.2")
    ask(page, "What is a fjord?", tokens=9)
    expect(page.locator(".said.model .text").last).to_have_text("Water.")
    expect(page.locator("#log")).to_have_attribute("aria-busy", "false")
    ask(page, "Why?", tokens=9)
    expect(page.locator(".said")).to_have_count(4)
    expect(page.locator("#log")).to_have_attribute("aria-busy", "false")
    assert asked[1] == {
        "model": NAME,
        "temperature": 0.2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is a fjord?"},
            {"role": "assistant", "content": "Water."},
            {"role": "user", "content": "Why?"},
        ],
    }
    page.click("#again")
    expect(page.locator(".said")).to_have_count(0)
    ask(page, "Again", tokens=9)
    expect(page.locator(".said")).to_have_count(2)
    assert [message["content"] for message in asked[2]["messages"]] == ["Be brief.", "Again"]


def test_what_the_model_says_is_no_html(context_of: Contexts, url: str) -> None:
    context, watched = context_of()
    answered(context, stream_of(*ATTACK))
    page = context.new_page()
    page.goto(url)
    live(page)
    ask(page, ATTACK)
    expect(page.locator(".said.model .text")).to_have_text(ATTACK)
    expect(page.locator(".said.you .text")).to_have_text(ATTACK)
    assert page.locator("#log :is(img, script, b)").count() == 0
    expect(page).not_to_have_title("taken")
    assert watched.complaints == []


def markdown(page: Page, text: str) -> str:
    """The HTML of the elements that a text becomes."""
    script = """async (text) => {
        const { markdown } = await import('/page/markdown.js');
        const root = document.createElement('div');
        root.append(markdown(text));
        return root.innerHTML;
    }"""
    return str(page.evaluate(script, text))


def test_markdown_is_shown_as_it_is_meant(url: str, open_page: Open) -> None:
    page = open_page(url)
    assert markdown(page, "# A *b*\none\ntwo\n\nthree") == (
        '<p class="heading">A <em>b</em></p><p>one\ntwo</p><p>three</p>'
    )
    assert markdown(page, "- a\n  - **b `c`**\n\n3. d") == (
        '<ul><li class="depth-0">a</li><li class="depth-1"><strong>b <code>c</code></strong></li></ul>'
        '<ol start="3"><li class="depth-0">d</li></ol>'
    )
    assert markdown(page, "```py\n*a*\n") == '<pre tabindex="0"><code>*a*\n</code></pre>'
    assert markdown(page, "|a|b|\n|-|-|\n|c|*d*|") == (
        '<div class="scrolled" tabindex="0"><table><tr><th>a</th><th>b</th></tr>'
        "<tr><td>c</td><td><em>d</em></td></tr></table></div>"
    )
    assert markdown(page, "> q") == "<blockquote>q</blockquote>"
    assert markdown(page, "2 * 3 * 4 and **open") == "<p>2 * 3 * 4 and **open</p>"


def test_markdown_gives_no_html_and_leads_to_the_web_alone(url: str, open_page: Open) -> None:
    page = open_page(url)
    escaped = ATTACK.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for text in (ATTACK, f"# {ATTACK}", f"- {ATTACK}", f"> {ATTACK}", f"```\n{ATTACK}\n```", f"**{ATTACK}**"):
        assert escaped in markdown(page, text)
    assert "<a" not in markdown(page, "[a](javascript:alert(1)) [b](data:text/html,x) [c](//x) [d](/metrics)")
    assert markdown(page, '[a](https://x.org/"onclick=1)') == (
        '<p><a href="https://x.org/&quot;onclick=1" rel="noreferrer noopener" target="_blank">a</a></p>'
    )


def test_markdown_takes_no_time_for_what_never_closes(url: str, open_page: Open) -> None:
    page = open_page(url)
    script = """async () => {
        const { markdown } = await import('/page/markdown.js');
        const began = performance.now();
        for (const one of ['[', '`', '**', '*a', '[a](https://', '|-', '> ', '- ', '#'])
            for (const end of ['', '\\n']) markdown((one + end).repeat(20000));
        return performance.now() - began;
    }"""
    assert page.evaluate(script) < 20_000  # milliseconds; without limits minutes


def test_nothing_inline_would_run(url: str, context_of: Contexts) -> None:
    context, watched = context_of()
    page = context.new_page()
    page.goto(url)
    live(page)
    page.locator("#log").evaluate("(log, text) => { log.innerHTML = text; }", ATTACK)
    page.locator("#log").evaluate(
        """async (log) => {
            const image = log.querySelector('img');
            if (!image.complete) await new Promise(done => image.addEventListener('error', done));
        }"""
    )
    expect(page).not_to_have_title("taken")
    assert any("Content Security Policy" in one for one in watched.complaints)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (stream_of("Half", end='data: {"error": {"message": "replica 0 failed"}}\n\n'), "replica 0 failed"),
        ("data: {nonsense\n\n", "JSON"),
    ],
)
def test_errors_are_shown(context_of: Contexts, url: str, body: str, message: str) -> None:
    context, _ = context_of()
    answered(context, body)
    page = context.new_page()
    page.goto(url)
    live(page)
    ask(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text(message)
    expect(page.locator("#message")).to_have_value("hello")
    expect(page.locator("#send")).to_be_enabled()


def test_what_the_server_refuses_is_shown(url: str, context_of: Contexts) -> None:
    context, watched = context_of()
    page = context.new_page()
    page.goto(url)
    live(page)
    ask(page, "x" * 5000, tokens=1)
    expect(page.get_by_role("alert")).to_contain_text("tokens")
    assert "status of 400" in watched.complaints[0]


def test_settings_out_of_range_are_not_sent(url: str, open_page: Open) -> None:
    page = open_page(url)
    live(page)
    ask(page, "hello", tokens=0)
    expect(page.locator("#max-tokens")).to_be_focused()
    expect(page.locator(".said")).to_have_count(0)


def test_the_box_works_with_the_keyboard_alone(url: str, open_page: Open) -> None:
    page = open_page(url)
    live(page)
    set_tokens(page, 2)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # past the machine
    for stop in ("summary", "#log", "#message"):
        page.keyboard.press("Tab")
        expect(page.locator(stop)).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Tab")
    expect(page.locator("#send")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".said.you .text")).to_have_text("one\ntwo")
    expect(page.locator(".note")).to_contain_text("token")
    expect(page.locator("#message")).to_be_focused()


def test_events_come_in_pieces_of_any_size(url: str, open_page: Open) -> None:
    page = open_page(url)
    script = """async (size) => {
        const { eventData } = await import('/page/events.js');
        const text = ': hi\\n\\ndata: "ä€😀"\\r\\n\\r\\ndata:1\\ndata: 2\\n\\ndata: [DONE]\\n\\ndata: 3\\n\\n';
        const bytes = new TextEncoder().encode(text);
        const stream = new ReadableStream({start(controller) {
            for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
            controller.close();
        }});
        const seen = [];
        for await (const data of eventData(stream)) seen.push(data);
        return seen;
    }"""
    for size in (1, 2, 3, 1000):
        assert page.evaluate(script, size) == ['"ä€😀"', "1\n2"]


def test_a_model_without_a_template_completes(zoo: Path, tmp_path: Path, open_page: Open) -> None:
    folder = tmp_path / NAME
    shutil.copytree(zoo / NAME, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    configuration = json.loads((folder / "tokenizer_config.json").read_text())
    configuration.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    ArtifactBuilder(folder / "model.onnx", tensor_parallel_size=4).build(tmp_path / "artifact")
    with LLM.load_artifact(tmp_path / "artifact") as llm:
        expected = llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=8)).outputs[0].text
    with serving_page(load(tmp_path / "artifact")) as url:
        page = open_page(url)
        live(page)
        expect(page.locator("#talk-title")).to_have_text("Completion")
        expect(page.locator("#system-field")).to_be_hidden()
        page.locator("#temperature").evaluate("field => { field.value = '0'; }")
        ask(page, "hello")
        expect(page.locator(".note")).to_contain_text("8 tokens")
        assert page.locator(".said.model .text").text_content() == "hello" + expected
        expect(page.locator(".said")).to_have_count(1)


def test_an_encoder_compares_texts(encoder_artifact: Path, open_page: Open) -> None:
    with serving_page(load(encoder_artifact)) as url:
        page = open_page(url)
        live(page)
        expect(page.locator("#talk-title")).to_have_text("Similarity")
        expect(page.locator("#chat")).to_be_hidden()
        page.fill("#text-a", "a fjord")
        page.fill("#text-b", "a fjord")
        page.click("#compare")
        expect(page.locator("#similarity .value")).to_have_text("1.000")
        page.fill("#text-b", "tax law")
        page.click("#compare")
        expect(page.locator("#similarity .value")).not_to_have_text("1.000")
        vectors = page.evaluate("""async () => {
            const { cosine } = await import('/page/embed.js');
            return [cosine([3, 4], [4, 3]), cosine([1, 0], [0, 2]), cosine([1, 2], [-1, -2]), cosine([0, 0], [1, 1])];
        }""")
        assert vectors == pytest.approx([0.96, 0, -1, 0])


def test_a_key_that_is_no_good_any_more_is_said(chat_artifact: Path, context_of: Contexts) -> None:
    context, _ = context_of()
    with serving_page(load(chat_artifact), ServerSettings(api_keys=["secret"])) as url:
        page = context.new_page()
        page.goto(url)
        page.fill("#access-key", "secret")
        page.keyboard.press("Enter")
        live(page)
        page.evaluate("sessionStorage.clear()")
        ask(page, "hello")
        expect(page.locator(".fault")).to_contain_text("API key is missing or wrong")
