"""The dashboard in a real browser in front of a live gateway; those are skipped where no Chromium is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, NONE_HERE, Browser
from gateway_processes import Process, call, chat, engine, fake, running, state
from gateway_processes import gateway as gateway_process

from kvist.gateway.dashboard import page

CHAT = "/v1/chat/completions"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=NONE_HERE)

# The least contrast ratio (WCAG) of any text that is shown, with that text.
CONTRAST = """(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.9) return colour;
    }
    return [255, 255, 255];
  };
  let worst = [99, ""];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
    if (!own || !node.getClientRects().length || node.closest("script, style")) continue;
    const style = getComputedStyle(node);
    const a = light(rgb(node.closest("svg") ? style.fill : style.color)), b = light(behind(node));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, node.textContent.slice(0, 40)];
  }
  return worst;
})()"""
# The longest words that a decision's row may show.
LONGEST = """document.querySelectorAll("#recent details").forEach(row => {
  row.querySelector(".when").textContent = "59 min ago";
  row.querySelector(".status").textContent = "cancelled";
})"""
# Texts that stick out of the window or of a box that hides what does not fit.
CUT_OFF = """[...document.querySelectorAll("main *, header *")].filter(node => {
  const box = node.getBoundingClientRect();
  const clipped = getComputedStyle(node).overflow !== "visible" && node.scrollWidth > node.clientWidth + 1;
  return box.width && (box.right > innerWidth + 1 || box.left < -1 || (clipped && !node.closest("svg")));
}).map(node => node.outerHTML.slice(0, 120))"""


def test_the_page_needs_nothing_from_outside() -> None:
    html = page().decode()
    assert "/* app.js */" not in html and "class Chart" in html and "prefers-color-scheme" in html
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)[^"']*|@import|url\(|import\s""", html)
    assert not outside
    addresses = set(re.findall(r"https?://[\w.]+", html))
    assert addresses <= {"http://host", "http://www.w3.org"}, "an example and the name of SVG"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def gateway() -> Iterator[Process]:
    """In front of two embedded engines and a worker that fails, after some requests."""
    with running([engine(), engine(), fake("error")], "--health-check-interval=0.5") as process:
        for i in range(24):
            text = f"<b>group {i % 3}</b> " * 200
            assert call(process.url, CHAT, chat(text + str(i), stream=i % 2 == 0))[0] == 200
        yield process


def opened(browser: Browser, url: str) -> None:
    browser.requested.clear()
    browser.errors.clear()
    browser.open(f"{url}/dashboard")
    browser.wait("document.readyState === 'complete' && document.getElementById('state') !== null")


@needs_browser
def test_it_shows_load_hits_latency_error_and_why(browser: Browser, gateway: Process) -> None:
    browser.show(1280, 900)
    opened(browser, gateway.url)
    browser.wait("document.getElementById('state').textContent === 'live'")
    browser.wait("document.querySelectorAll('#latency path.line').length === 3")
    shown = {
        name: browser.run(f"document.getElementById('{name}').innerText")
        for name in ("policy", "ready", "rate-note", "hits-now", "ttft-now", "p50-now", "error-now")
    }
    assert shown["policy"] == "lbgr"
    assert shown["ready"] in ("2 of 3 ready", "3 of 3 ready"), "the failing worker's breaker may be open"
    data = state(gateway.url)
    ended = sum(row["requests"] for row in data["workers"])
    assert shown["rate-note"] == f"{ended} ended in all" and ended >= 24, (
        "retried ones count where they ended"
    )
    hits = [value for value in data["series"]["hit_rate"] if value is not None]
    assert float(re.findall(r"[\d.]+", shown["hits-now"])[0]) <= 100 * max(hits) + 0.1
    for name in ("ttft-now", "p50-now", "error-now"):
        assert re.match(r"[\d.]+\s*(ms|s)$", shown[name]), shown
    rows = browser.run("[...document.querySelectorAll('#workers tr')].map(row => row.innerText)")
    assert len(rows) == 3
    for row, worker in zip(rows, data["workers"], strict=True):
        assert worker["id"].removeprefix("http://") in row and f"{worker['requests']:,}" in row
    browser.wait("document.querySelectorAll('#hits path.line, #error path.line').length === 2")
    assert browser.run("document.querySelectorAll('#flight path.line').length") == 3
    axis = browser.run("[...document.querySelectorAll('#hits text')].map(node => node.textContent)")
    assert {"0 %", "50 %", "100 %", "now"} <= set(axis)
    assert not browser.run("document.getElementById('main').innerHTML.match(/NaN|undefined|Infinity/)")

    browser.run("document.querySelector('#recent details').open = true")
    why = browser.run("document.querySelector('#recent details[open] .explain').innerText")
    assert "smallest predicted time to first token" in why and re.search(r"of [23] workers", why)
    latest = data["recent"][-1]
    assert latest["worker"].removeprefix("http://") in why
    bars = browser.run(
        "[...document.querySelectorAll('#recent details[open] .scores .bar')]"
        ".map(bar => parseFloat(bar.style.width))"
    )
    assert bars == sorted(bars) and bars[-1] == 100 and len(bars) == len(latest["scores"])
    browser.wait("document.getElementById('held').innerText === 'held while one is open'")
    outside = [url for url in browser.requested if not url.startswith((gateway.url, "data:"))]
    assert not outside and not browser.errors
    assert any(url.endswith("/dashboard/data") for url in browser.requested)


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 800, 1280])
def test_it_is_readable(browser: Browser, gateway: Process, width: int, dark: bool, tmp_path: Path) -> None:
    browser.show(width, 844, dark=dark, phone=width < 500)
    opened(browser, gateway.url)
    browser.wait("document.querySelectorAll('#latency path.line').length === 3")
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("document.querySelector('#recent details').open = true")
    browser.run(LONGEST)  # held while one is open
    assert browser.run(CUT_OFF) == []
    ratio, words = browser.run(CONTRAST)
    assert ratio >= 4.5, f"{words!r} has a contrast of {ratio:.1f}"
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


@needs_browser
def test_empty_it_says_what_to_do(browser: Browser) -> None:
    process = gateway_process([])
    try:
        browser.show(1280, 900)
        opened(browser, process.url)
        browser.wait("document.getElementById('state').textContent === 'live'")
        body = browser.run("document.body.innerText")
        assert "No worker yet" in body and "No request yet" in body and "No request has ended yet" in body
        assert not browser.errors
    finally:
        process.stop()


@needs_browser
def test_with_keys_it_asks_for_one(browser: Browser) -> None:
    with running([fake()], "--api-key=secret") as gateway:
        status, _, headers = call(gateway.url, "/dashboard")
        assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
        assert call(gateway.url, "/dashboard/data")[0] == 401, "the page is open, what it shows is not"
        opened(browser, gateway.url)
        browser.wait("!document.getElementById('login').hidden")
        assert browser.run("document.getElementById('main').hidden")
        for given, then in (("wrong", "wrong key"), ("secret", "live")):
            browser.run(f"document.getElementById('key').value = {json.dumps(given)}")
            browser.run("document.querySelector('#login button').click()")
            browser.wait(f"document.getElementById('state').textContent === {json.dumps(then)}")
        browser.wait("!document.getElementById('main').hidden && document.getElementById('login').hidden")
