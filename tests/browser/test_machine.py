"""The machine as the page shows it, in a real browser."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, Page, Route, expect

from furiosa_llm.server.settings import ServerSettings
from tests.browser.conftest import PHONE, Open, Watched, serving_page
from tests.browser.snapshots import PREDICTION, snapshot
from tests.server.conftest import load

pytestmark = pytest.mark.browser

Contexts = Callable[..., tuple[BrowserContext, Watched]]


def module(page: Page, name: str, expression: str) -> Any:
    """The value of an expression of a module's exports, which is called `m`."""
    return page.evaluate(f"async () => {{ const m = await import('/page/{name}.js'); return {expression}; }}")


def told(context: BrowserContext, *snapshots: dict[str, Any]) -> None:
    """Lets the page see these snapshots one after another, and the last one from then on."""
    left = itertools.chain(snapshots, itertools.repeat(snapshots[-1]))
    context.route("**/machine", lambda route: route.fulfill(json=next(left)))


def live(page: Page) -> None:
    expect(page.locator("#state")).to_have_text("live")


CUT = """() => [...document.querySelectorAll('main *')].filter((one) => {
    const scrolls = ['auto', 'scroll'].includes(getComputedStyle(one).overflowX);
    const unseen = one.closest('.unseen, svg, [hidden], textarea, input') !== null;
    return !scrolls && !unseen && one.clientWidth > 0 && one.scrollWidth > one.clientWidth + 1;
}).map((one) => one.className + ': ' + one.textContent)"""
"""What has no room for all of its text."""


def test_the_machine_is_shown(url: str, open_page: Open) -> None:
    page = open_page(url)
    live(page)
    assert page.locator(".card").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))") == [
        *("npu:0", "npu:1", "npu:2", "npu:3")[: page.locator(".card").count()]
    ]
    shown = page.locator(".pe .what").all_inner_texts()
    used = [text for text in shown if text != "unused"]
    assert sorted(used) == sorted(f"R{r} S{s} r{k}" for r in range(2) for s in range(2) for k in range(4))
    assert len(shown) % 8 == 0
    expect(page.locator(".replica h4")).to_have_text(["Replica 0", "Replica 1"])
    expect(page.locator(".lamp")).to_have_text(["ready", "ready"])
    expect(page.locator(".stage .chip")).to_have_text(["R0 S0", "R0 S1", "R1 S0", "R1 S1"])
    expect(page.locator("#sizes")).to_contain_text("tp 4 · pp 2 · dp 2 · npu:0")
    expect(page).to_have_title("tiny-llama-optimum – furiosa-llm")


@pytest.mark.parametrize(
    ("width", "scheme"),
    [(PHONE[0], "light"), (PHONE[0], "dark"), (768, "light"), (1024, "dark"), (1280, "light"), (1920, "dark")],
)
def test_everybody_can_use_it(context_of: Contexts, url: str, width: int, scheme: str) -> None:
    context, _ = context_of((width, 900), color_scheme=scheme)
    told(context, snapshot(), snapshot(1, cards=5, prediction=PREDICTION))
    page = context.new_page()
    page.goto(url)
    page.locator(".pe").nth(3).click()
    expect(page.locator("#prediction-load")).to_be_visible()
    page.locator("summary").click()
    page.fill("#message", "x")
    page.fill("#max-tokens", "2")
    page.click("#send")
    expect(page.locator(".note")).to_contain_text("token")
    expect(page.locator(".pe.unused")).to_have_count(8)
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(CUT) == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(","))) < 3 * 128) == (scheme == "dark")


def test_rates_are_those_of_the_counters(context_of: Contexts, url: str) -> None:
    context, _ = context_of()
    told(context, snapshot(), snapshot(1), snapshot(4))
    page = context.new_page()
    page.goto(url)
    expect(page.locator(".figure .value")).to_have_text(["10", "100", "6", "2", "25\u00a0%", "1,234"])
    expect(page.locator(".figure .beside").nth(0)).to_have_text("peak 10 in 3 min")
    expect(page.locator(".figure .beside").nth(4)).to_have_text("16\u00a0GB of 64\u00a0GB")
    expect(page.locator(".figure .beside").nth(5)).to_have_text("1,200 done, 30 stopped, 4 failed")
    stage = page.locator(".stage").nth(3)
    expect(stage.locator(".title")).to_have_text("R1 S1blocks 15–295 batches/s")
    expect(stage.locator(".share")).to_have_text(["25\u00a0%", "13\u00a0%"])
    expect(stage.locator(".traffic dt")).to_have_text(["AllReduce"])
    expect(stage.locator(".traffic dd")).to_have_text(["1\u00a0MB/s", "20×/s"])
    expect(page.locator(".replica .head").nth(0)).to_contain_text("3 running, 1 waiting")
    expect(page.locator(".replica > .meter .share").nth(0)).to_have_text("1,500 of 2,000")


def test_what_was_predicted_is_beside_what_was_measured(context_of: Contexts, url: str) -> None:
    context, watched = context_of()
    hostile = {**PREDICTION, "device": "<img src=x onerror=alert(1)>.toml"}
    told(
        context,
        snapshot(prediction=hostile),
        snapshot(1, prediction={"device": "here.toml", "recent": None}),
        snapshot(2),
    )
    page = context.new_page()
    page.clock.install()
    page.goto(url)
    panel = page.locator("#prediction")
    expect(panel.locator("tbody tr")).to_have_text(
        ["First token, ms8090+13\u00a0%", "Each further token, ms20––", "Tokens per second2,000500−75\u00a0%"]
    )
    expect(panel.locator("#prediction-device")).to_have_text("by <img src=x onerror=alert(1)>.toml")
    expect(panel.locator("#prediction-load")).to_have_text(
        "1 request of the last minute, 3.9 at once; 128 tokens in, 32 out"
    )
    page.clock.run_for(1000)
    expect(panel.locator("#prediction-load")).to_have_text("No request ended in the last minute.")
    expect(panel.locator("table")).to_be_hidden()
    page.clock.run_for(1000)
    expect(panel).to_be_hidden()
    assert watched.complaints == []


def test_memory_is_drawn_to_scale(context_of: Contexts, url: str) -> None:
    context, _ = context_of()
    told(context, snapshot())
    page = context.new_page()
    page.goto(url)
    live(page)
    bar = page.locator(".pe .bar").first
    whole = bar.evaluate("bar => bar.clientWidth")
    shares = bar.locator("span").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    assert [width / whole for width in shares] == pytest.approx([1 / 6, 1 / 12, 1 / 4, 1 / 2], abs=0.02)


def test_a_pe_is_chosen_with_the_keyboard(context_of: Contexts, url: str) -> None:
    context, _ = context_of()
    told(context, snapshot(cards=5))
    page = context.new_page()
    page.goto(url)
    live(page)
    page.locator(".pe").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    words = (
        "npu:1 PE 1: replica 0, stage 1, rank 1; weights 1\u00a0GB, KV 500\u00a0MB used of 2\u00a0GB, "
        "free 3\u00a0GB of 6\u00a0GB"
    )
    expect(page.locator("#readout")).to_have_text(words)
    expect(page.locator("[aria-selected=true]")).to_have_attribute("aria-label", words)
    expect(page.locator(".pe.together")).to_have_count(8)
    expect(page.locator('.pe[tabindex="0"]')).to_have_count(1)
    page.keyboard.press("End")
    expect(page.locator("#readout")).to_have_text("npu:4 PE 7: not used")
    page.keyboard.press("ArrowRight")  # there is nothing
    expect(page.locator("#readout")).to_have_text("npu:4 PE 7: not used")


def test_replicas_that_fail_are_said_so(context_of: Contexts, url: str) -> None:
    context, _ = context_of()
    usage = {"running": 0, "waiting": 0, "used_pages": 0, "num_pages": 0}
    states = [{"alive": False, "ready": False}, {"alive": True, "ready": False}]
    told(context, {**snapshot(), "replicas": [{"replica": n, **state, **usage} for n, state in enumerate(states)]})
    page = context.new_page()
    page.goto(url)
    expect(page.locator(".lamp")).to_have_text(["dead", "starting"])
    expect(page.locator(".figure .beside").nth(2)).to_have_text("0 of 2 replicas ready")
    expect(page.locator(".replica > .meter").nth(0)).to_be_hidden()


def test_a_server_that_goes_and_comes_back(context_of: Contexts, url: str) -> None:
    context, watched = context_of()
    page = context.new_page()
    page.goto(url)
    live(page)
    gone = [True]

    def refuse(route: Route) -> None:
        if gone[0]:
            route.abort("connectionrefused")
        else:
            route.continue_()

    context.route("**/machine", refuse)
    expect(page.locator("#state")).to_have_text("the server does not answer; next try in 1 s")
    expect(page.locator("#state")).to_have_text("the server does not answer; next try in 2 s")
    before = len(watched.asked)
    page.click("#talk-title")  # the rest of the page goes on
    gone[0] = False
    live(page)
    assert len(watched.asked) == before + 1
    assert all("ERR_CONNECTION_REFUSED" in one for one in watched.complaints)


def test_a_hidden_page_asks_nothing(context_of: Contexts, url: str) -> None:
    context, watched = context_of()
    page = context.new_page()
    page.clock.install()
    page.goto(url)
    live(page)
    page.evaluate(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true}) && "
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    page.clock.run_for(2000)  # an answer that was on its way may have come
    page.wait_for_load_state("networkidle")
    before = len(watched.asked)
    page.clock.run_for(20_000)
    assert len(watched.asked) == before
    page.evaluate("delete document.hidden && document.dispatchEvent(new Event('visibilitychange'))")
    with page.expect_request("**/machine"):
        page.clock.run_for(1000)


def test_a_key_is_asked_for(chat_artifact: Path, open_page: Open) -> None:
    with serving_page(load(chat_artifact), ServerSettings(api_keys=["secret"])) as url:
        page = open_page(url)
        expect(page.locator("#state")).to_have_text("API key needed")
        expect(page.locator("#access-key")).to_be_focused()
        page.keyboard.type("secret")
        page.keyboard.press("Enter")
        live(page)
        expect(page.locator("#access")).to_be_hidden()
        page.fill("#message", "x")
        page.click("#send")
        expect(page.locator(".note")).to_contain_text("token")
        page.reload()
        live(page)
        assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]


def test_a_wrong_key_is_asked_for_again(chat_artifact: Path, context_of: Contexts) -> None:
    context, watched = context_of()
    with serving_page(load(chat_artifact), ServerSettings(api_keys=["secret"])) as url:
        page = context.new_page()
        page.goto(url)
        page.fill("#access-key", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#access-why")).to_have_text("The server does not know this key. Give another one.")
        assert Axe().run(page).violations_count == 0
        assert page.evaluate("sessionStorage.length") == 0
        page.fill("#access-key", "secret")
        page.keyboard.press("Enter")
        live(page)
    assert "status of 401" in watched.complaints[0]


def test_the_first_stop_of_the_keyboard_leads_past_the_machine(url: str, open_page: Open) -> None:
    page = open_page(url)
    live(page)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    expect(page.locator(".skip")).to_be_in_viewport()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.locator("summary")).to_be_focused()


def test_formats(url: str, open_page: Open) -> None:
    page = open_page(url)
    numbers = [0, 999, 999.4, 1000, 1234, 99_960, 135_200_000, 999_600_000, 2.05e9, 48e9, 1e18]
    shown = module(page, "format", f"{numbers}.map(m.bytes)")
    expected = ["0 B", "999 B", "999 B", "1 kB", "1.23 kB", "100 kB", "135 MB", "1 GB", "2.05 GB", "48 GB", "1000 PB"]
    assert [text.replace("\u00a0", " ") for text in shown] == expected
    assert module(page, "format", "[0, 0.04, 0.44, 9.96, 12.34, 99.96, 1250.4].map(m.rate)") == [
        *("0", "0", "0.4", "10", "12.3", "100", "1,250"),
    ]
    shares = module(page, "format", "[0, 0.001, 0.005, 0.374, 1].map(m.percent)")
    assert [text.replace("\u00a0", " ") for text in shares] == ["0 %", "<1 %", "1 %", "37 %", "100 %"]
    spans = module(page, "format", "[0, 0.042, 1.5, 42, 60, 3599.6, 3661, 90_000].map(m.duration)")
    expected = ["0 s", "0.04 s", "1.5 s", "42 s", "1 min", "1 h", "1 h 1 min", "1 d 1 h"]
    assert [text.replace("\u00a0", " ") for text in spans] == expected
    assert module(page, "poll", "[0, 1, 2, 3, 4, 5, 6].map(m.pause)") == [1000, 1000, 2000, 4000, 8000, 15000, 15000]


def test_rates_of_a_server_that_began_anew(url: str, open_page: Open) -> None:
    page = open_page(url)
    old, new, later = snapshot(100), snapshot(2, time=1e9 + 103), snapshot(3, time=1e9 + 104)
    script = """async ([old, new_, later]) => {
        const { between, Recent } = await import('/page/rates.js');
        const recent = new Recent(5);
        recent.push(old);
        const of = one => [one.last?.generation, one.smooth?.generation];
        const seen = [recent.push(new_), recent.push(later)];
        return [between(old, new_), between(later, later), ...seen.map(of)];
    }"""
    assert page.evaluate(script, [old, new, later]) == [None, None, [None, None], [10, 10]]


def test_rates_are_over_the_last_seconds(url: str, open_page: Open) -> None:
    page = open_page(url)
    tokens = [0, 0, 50, 100, 100, 100]
    made = [snapshot(at, tokens={"prompt": 0, "generation": count}) for at, count in enumerate(tokens)]
    script = """async (made) => {
        const { Recent, History } = await import('/page/rates.js');
        const recent = new Recent(3);
        const history = new History(3);
        for (const one of made) history.push(one.time, one.tokens.generation);
        history.push(1e9 + 4, 7);
        const rates = made.map(one => recent.push(one)).map(one => [one.last?.generation, one.smooth?.generation]);
        return [rates, history.points.map(point => point.value), history.peak];
    }"""
    rates, values, peak = page.evaluate(script, made)
    assert rates == [
        [None, None],
        [0, 0],
        [50, 25],
        [50, pytest.approx(100 / 3)],
        [0, pytest.approx(100 / 3)],
        [0, pytest.approx(50 / 3)],
    ]
    assert (values, peak) == ([50, 100, 7], 100)


def test_the_line_of_the_last_minutes(url: str, open_page: Open) -> None:
    page = open_page(url)
    points = [{"time": 0, "value": 0}, {"time": 90, "value": 20}, {"time": 180, "value": 10}]
    assert module(page, "sparkline", f"m.corners({points}, 180, 20)") == "0.0,39.0 120.0,1.0 240.0,20.0"
    assert module(page, "sparkline", f"m.corners({points[:1]}, 180, 0)") == "240.0,39.0"
