"""The pages in a browser: talking, stopping, asking again, what is kept, and text that attacks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .conftest import Running
from .http import completion, post

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed here")
expect = sync_api.expect
# What an answer may hold, and must stay text.
ATTACK = (
    "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script>\n\n"
    "# <b>head</b>\n\n- <i>item</i> and `<u>code</u>` **<s>bold</s>**\n\n"
    "```html\n<script>document.title='owned'</script>\n```\n[x](javascript:alert(1))"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, server: Running) -> Iterator[Callable[..., Any]]:
    """opened(path) -> a page of a new browser; it must have complained of nothing."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def open_page(path: str = "/", context: Any = None, **options: Any) -> Any:
        if context is None:
            context = browser.new_context(**options)
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console", lambda m: complaints.append(m.text) if "Content Security" in m.text else None
        )
        page.on(
            "request",
            lambda r: complaints.append(r.url) if not r.url.startswith(server.url) else None,
        )
        page.goto(server.url + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def say(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def limit(page: Any, tokens: int) -> None:
    """Set the longest answer in the drawer, by keyboard alone."""
    page.keyboard.press("Alt+s")
    page.get_by_label("Longest answer").fill(str(tokens))
    page.keyboard.press("Escape")


def shot(page: Any, name: str) -> None:
    """A picture to look at, where ENGINEROOM_SCREENSHOTS names a folder."""
    if folder := os.environ.get("ENGINEROOM_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def test_an_answer_streams_and_has_its_figures(opened: Callable[..., Any]) -> None:
    page = opened()
    limit(page, 30)
    say(page, "hello")
    answer = page.locator(".assistant")
    expect(answer.locator(".under")).to_contain_text("30 tokens")
    expect(answer.locator(".under")).to_contain_text("tokens/s")
    assert answer.locator(".said").inner_text().count("é") == 30
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_stop_ends_the_request_too(opened: Callable[..., Any], server: Running) -> None:
    page = opened()
    say(page, "without an end")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    server.wait_until(lambda: server.service.num_live == 1)
    page.keyboard.press("Escape")
    expect(page.locator(".under")).to_contain_text("stopped")
    server.wait_until(lambda: server.service.num_live == 0)


def test_regenerating_replaces_the_last_answer(opened: Callable[..., Any]) -> None:
    page = opened()
    limit(page, 6)
    say(page, "first")
    expect(page.locator(".under")).to_contain_text("6 tokens")
    say(page, "second")
    expect(page.locator(".under").nth(1)).to_contain_text("6 tokens")
    limit(page, 9)
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".under").nth(1)).to_contain_text("9 tokens")
    assert page.locator(".assistant").count() == 2


def test_conversations_are_kept_in_the_browser(opened: Callable[..., Any]) -> None:
    page = opened()
    limit(page, 5)
    say(page, "about ships")
    expect(page.locator(".under")).to_contain_text("5 tokens")
    page.keyboard.press("Alt+n")
    expect(page.locator(".turn")).to_have_count(0)
    say(page, "about trains")
    expect(page.locator(".under")).to_contain_text("5 tokens")
    text = page.locator(".assistant .said").inner_text()

    again = opened(context=page.context)
    expect(again.locator("#list li")).to_have_count(2)
    assert again.locator(".assistant .said").inner_text() == text
    again.get_by_role("button", name="about ships", exact=True).click()
    expect(again.locator(".user .said")).to_have_text("about ships")
    again.get_by_role("button", name="Delete about ships").click(force=True)
    expect(again.locator("#list li")).to_have_count(1)
    assert opened(context=page.context).locator("#list li").count() == 1


def test_the_drawer_s_settings_are_sent_and_kept(opened: Callable[..., Any]) -> None:
    page = opened()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Longest answer").fill("4")
    page.get_by_role("button", name="Close").click()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "hello")
    body = asked.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"]) == (0.3, 4) and "top_p" not in body
    again = opened(context=page.context)
    assert again.get_by_label("Temperature").input_value() == "0.3"


def test_a_refusal_is_shown(opened: Callable[..., Any]) -> None:
    page = opened()
    say(page, "hostile")
    expect(page.locator(".error")).to_contain_text("refuses hostile messages")


def test_text_never_becomes_markup(opened: Callable[..., Any]) -> None:
    """Of an answer, and of a question and a title kept from before."""
    page = opened()
    stream = "".join(
        f'data: {{"choices": [{{"delta": {{"content": {part}}}}}]}}\n\n'
        for part in (json.dumps(ATTACK[i : i + 7]) for i in range(0, len(ATTACK), 7))
    )
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            body=stream + "data: [DONE]\n\n", content_type="text/event-stream"
        ),
    )
    say(page, ATTACK)
    said = page.locator(".assistant .said")
    expect(said.locator("pre code")).to_contain_text("<script>")
    for tag in ("img", "script", "b", "i", "u", "s", "a", "iframe"):
        assert page.locator(f"main {tag}, #list {tag}").count() == 0, tag
    expect(said.locator("h3")).to_have_text("<b>head</b>")
    expect(said.locator("li code")).to_have_text("<u>code</u>")
    expect(said.locator("li strong")).to_have_text("<s>bold</s>")
    assert page.locator(".user .said").inner_text().startswith("<img src=x")
    assert opened(context=page.context).title() == page.title() == "engineroom"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_chat_in_both_colours(opened: Callable[..., Any], scheme: str) -> None:
    page = opened(color_scheme=scheme)
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(back.removeprefix("rgb(").split(",")[0]) < 80) == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_dashboard_shows_the_load(
    opened: Callable[..., Any], server: Running, scheme: str
) -> None:
    post(server, "/v1/completions", completion(max_tokens=20))
    page = opened("/dashboard", color_scheme=scheme)
    expect(page.locator("#status")).to_have_text("running")
    expect(page.locator("#model")).to_have_text("fake")
    expect(page.locator("#ttft td").first).to_have_text("250")
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Go on")).to_be_visible()
    shot(page, f"dashboard-fake-{scheme}")
