"""The page in a real browser (make test-browser): streams, colours, compares, stops, and treats all text as text.

Needs playwright and a Chromium; `PEARL_SCREENSHOTS` names a folder to put pictures into.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pearl_ray.serving.settings import KeyRing
from tests.serving_fakes import ANSWER, WAIT_S, FakeEngine, serving, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
]
WAIT_MS = 1000 * WAIT_S
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&amp;\n"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=WAIT_MS)
        yield browser
        browser.close()


def new_page(browser: Any, **options: Any) -> Any:
    """In a context of its own, patient."""
    context = browser.new_context(**options)
    context.set_default_timeout(WAIT_MS)
    return context.new_page()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose console must stay free of errors."""
    page = new_page(browser, viewport={"width": 1280, "height": 800}, color_scheme="light")
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.context.close()
    assert [error for error in errors if "401" not in error] == []


def ask(page: Any, url: str, prompt: str, tokens: int = 45) -> None:
    page.goto(url)
    page.wait_for_selector("#model option", state="attached")
    page.locator("#options summary").click()
    page.fill("#max", str(tokens))
    page.locator("#options summary").click()
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")


def is_done(page: Any) -> None:
    page.wait_for_selector("#send:not([disabled])")


def test_an_answer_streams_in_colours_with_figures_and_a_timeline(page: Any) -> None:
    engine = FakeEngine(delay_s=0.01, held=True)
    with serving(engine) as server:
        ask(page, server.url, "Hello <b>you</b>")
        page.wait_for_selector(".text span")
        assert page.locator("#stop").is_enabled()
        engine.held = False
        is_done(page)
        assert page.locator(".ask").inner_text() == "Hello <b>you</b>"
        assert page.locator(".text").inner_text().strip() == ANSWER.strip()
        for origin in ("prefill", "pre_verify", "post_verify", "residual"):
            assert page.locator(f".text span.{origin}").count() > 0
        colours = {page.locator(f".text span.{o}").first.evaluate("e => getComputedStyle(e).backgroundColor")
                   for o in ("prefill", "pre_verify", "post_verify", "residual")}  # fmt: skip
        assert len(colours) == 4
        figures = page.locator(".figures").inner_text()
        assert "tokens/s" in figures and "2.50" in figures and "seed" in figures
        assert page.locator(".rounds i").count() == 23 and page.locator(".rounds i.post_verify").count() > 0


def test_what_a_model_says_is_text_and_never_markup(page: Any) -> None:
    with serving(FakeEngine(text=HOSTILE)) as server:
        ask(page, server.url, HOSTILE, len(HOSTILE))
        is_done(page)
        assert page.title() == "pearl-ray" and page.locator("#log img, #log script").count() == 0
        assert page.locator(".text").inner_text().strip() == HOSTILE.strip()


def test_escape_stops_the_answer_and_the_server_hears_of_it(page: Any) -> None:
    engine = FakeEngine(held=True)
    with serving(engine) as server:
        ask(page, server.url, "Go on", 1000)
        page.wait_for_selector(".text span")
        page.keyboard.press("Escape")
        is_done(page)
        assert page.locator(".pane .error").inner_text() == "stopped"
        wait_until(lambda: len(engine.aborted) == 1)
        page.fill("#prompt", "And again")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".pane:nth-of-type(1) >> nth=1")
        page.click("#stop")
        is_done(page)


def test_one_deployment_answers_with_and_without_speculation_side_by_side(page: Any) -> None:
    engine = FakeEngine(delay_s=0.005)
    with serving(engine) as server:
        page.goto(server.url)
        page.wait_for_selector("#model option", state="attached")
        page.locator("#options summary").click()
        page.check("#ar")
        page.fill("#max", "45")
        page.fill("#prompt", "Hi")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".pane >> nth=1")
        is_done(page)
        assert [text.strip() for text in page.locator(".pane .text").all_inner_texts()] == [ANSWER.strip()] * 2
        assert "target alone" in page.locator(".pane h2").nth(1).inner_text()
    asked = {params.num_speculative_tokens: params for _, params in engine.submitted}  # either may come first
    assert len(engine.submitted) == 2 and asked.keys() == {None, 0}
    assert asked[None].seed == asked[0].seed is not None


def test_two_deployments_answer_side_by_side_with_one_seed(page: Any) -> None:
    one, two = FakeEngine(delay_s=0.005), FakeEngine(delay_s=0.005)
    with serving(one) as here, serving(two, cors_origins=(here.url,), keys=KeyRing.of(["sk-two"])) as there:
        page.goto(here.url)
        page.locator("#options summary").click()
        page.fill("#other", there.url)
        page.fill("#otherkey", "sk-two")
        page.fill("#max", "45")
        page.fill("#prompt", "Hi")
        page.press("#prompt", "Enter")
        is_done(page)
        assert [text.strip() for text in page.locator(".pane .text").all_inner_texts()] == [ANSWER.strip()] * 2
    assert one.submitted[0][1].seed == two.submitted[0][1].seed is not None


def test_a_server_with_keys_opens_by_password_and_asks_for_the_key(browser: Any) -> None:
    page = new_page(browser, http_credentials={"username": "me", "password": "sk-key"})
    with serving(FakeEngine(), keys=KeyRing.of(["sk-key"])) as server:
        page.goto(server.url)
        page.wait_for_selector("#notice:not([hidden])")
        assert "key" in page.locator("#notice").inner_text() and page.locator("#key").is_visible()
        page.fill("#key", "sk-key")
        page.press("#key", "Tab")
        page.wait_for_selector("#model option", state="attached")
        page.fill("#max", "9")
        page.fill("#prompt", "Hi")
        page.press("#prompt", "Enter")
        is_done(page)
        assert page.locator(".text").inner_text() == ANSWER[:9]
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone_and_a_desk_by_day_and_night(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    page = new_page(browser, viewport={"width": width, "height": 800}, color_scheme=scheme)
    with serving(FakeEngine(), served_model_names=("SmolLM2-135M-Instruct",)) as server:
        ask(page, server.url, "What does the fox do?", 180)
        is_done(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = "getComputedStyle(document.body).backgroundColor"
        before = page.evaluate(background)
        page.screenshot(path=Path(os.environ.get("PEARL_SCREENSHOTS", tmp_path)) / f"page-{width}-{scheme}.png")
        page.click("#theme")
        assert page.evaluate(background) != before
    page.context.close()
