"""The report page in a real headless browser: Chromium, driven by playwright (extra `browser`).

Skipped where playwright or a Chromium is missing. FASTKV_TEST_BROWSER names another executable.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkv.report.data import Report
from fastkv.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

QUIET = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
EVIL = "</script><script>window.x=1</script><img src=x onerror=window.x=2><!-- &lt; \u202edcba\u2066 \x07 \u2028\u200b"

# A colour as the browser computed it -> luminance of WCAG; then the contrast of a token's ink and ground.
CONTRAST = """(token) => {
  const luminance = (colour) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = getComputedStyle(token);
  const clear = style.backgroundColor === 'rgba(0, 0, 0, 0)';
  const ground = clear ? getComputedStyle(document.documentElement).backgroundColor : style.backgroundColor;
  const [low, high] = [luminance(style.color), luminance(ground)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""


def executable() -> str | None:
    return os.environ.get("FASTKV_TEST_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as run:
        as_root = hasattr(os, "geteuid") and os.geteuid() == 0  # for root Chromium has no sandbox
        args = [*QUIET, *(["--no-sandbox"] if as_root else [])]
        try:
            started = run.chromium.launch(executable_path=executable(), args=args)
        except playwright.Error as error:
            pytest.skip(f"no Chromium that starts (playwright install chromium): {str(error).splitlines()[0]}")
        yield started
        started.close()


class Opened:
    """A page that notes what it asks for and complains of."""

    def __init__(self, browser: Any, path: Path, report: Report, **context: Any) -> None:
        write_report(path, report)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.report = report
        self.page = browser.new_context(**context).new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.context.close()

    def level(self, token: int) -> int | None:
        """The shade of a token, 1 to 8, or None."""
        names = self.page.locator("#text .t").nth(token).get_attribute("class").split()
        return next((int(name[1:]) for name in names if name[0] == "k" and name != "k0"), None)

    def until(self, condition: str) -> None:
        """Wait for a JavaScript expression to hold. playwright's own wait needs `eval`, which the page forbids."""
        for _ in range(200):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        pytest.fail(f"never came true: {condition}")

    def move_to(self, name: str, value: str) -> None:
        event = "input" if name == "#layer" else "change"
        self.page.locator(name).evaluate(
            "(e, [value, event]) => { e.value = value; e.dispatchEvent(new Event(event)); }", [value, event]
        )


def a_report(texts: list[str], **changes: Any) -> Report:
    """4 layers x 4 heads. Token i is kept in (i % 17) caches, the first ones in order; odd tokens stop at layer 1."""
    n = len(texts)
    reach = torch.ones(4, n, dtype=torch.bool)
    reach[2:, 1::2] = False
    caches = torch.arange(16)[:, None] < torch.arange(n) % 17
    values: dict[str, Any] = {
        "policy": "fastkv",
        "texts": texts,
        "kinds": "".join("t" if text else "p" for text in texts),
        "ids": [7 * i for i in range(n)],
        "names": {},
        "reach": reach,
        "kept": caches.unflatten(0, (4, 4)) & reach[:, None],
        "answer": "the answer\nis here",
        "finish_reason": "stop",
        "echoes": [],
        "figures": [("policy", "fastkv"), ("decode", "7 tokens")],
    }
    return Report(**values | changes)


def words(n: int) -> list[str]:
    return [f" word{i}" for i in range(n)]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Opened]:
    with Opened(browser, tmp_path / "page.html", a_report(words(200))) as page:
        yield page


def test_the_page_shows_every_token_and_asks_for_nothing(opened: Opened) -> None:
    assert opened.page.locator("#text .t").count() == 200
    assert opened.page.locator("#text").evaluate("e => e.textContent") == "".join(words(200))
    assert opened.page.locator("#answer").inner_text() == "the answer↵\nis here"
    assert opened.page.locator("#figures").inner_text().split("\n") == ["policy", "fastkv", "decode", "7 tokens"]
    assert "fastkv" in opened.page.title()
    assert opened.complaints == []
    assert len(opened.requests) == 1  # the file itself


def test_the_shade_of_a_token_follows_the_caches_that_keep_it(opened: Opened) -> None:
    counts = opened.report.kept.sum((0, 1)).tolist()
    levels = {counts[i]: opened.level(i) for i in range(51)}
    assert levels.pop(0) is None
    in_order = [levels[count] for count in sorted(levels)]
    assert in_order == sorted(in_order)  # type: ignore[type-var]
    assert (in_order[0], in_order[-1]) == (2, 8)
    assert [opened.level(i) for i in range(51)] == [levels.get(counts[i]) for i in range(51)]


def test_slider_and_head_choose_the_caches_that_shade(opened: Opened) -> None:
    for layer in range(4):
        opened.move_to("#layer", str(layer))
        for i in range(34):
            assert (opened.level(i) is not None) == bool(opened.report.kept[layer, :, i].any())
        opened.move_to("#head", "2")
        for i in range(34):
            assert opened.level(i) == (8 if opened.report.kept[layer, 2, i] else None)
        unseen = opened.page.locator("#text .u").count()
        assert unseen == int((~opened.report.reach[layer] & ~opened.report.kept[layer, 2]).sum())
        opened.move_to("#head", "-1")
    opened.page.locator("#layer").focus()
    opened.page.keyboard.press("ArrowLeft")
    assert opened.page.locator("#layer-name").inner_text() == "layer 2"
    opened.page.keyboard.press("Home")
    assert opened.page.locator("#layer-name").inner_text() == "all layers"


def test_survivors_of_the_cut_are_marked(opened: Opened) -> None:
    assert opened.page.locator("#text .s").evaluate_all("all => all.map(e => e.textContent)") == words(200)[::2]
    assert "layer 1 (TSP)" in opened.page.locator("#legend").inner_text()
    assert "Propagated after layer 1: 100 tokens (50.0 %)." in opened.page.locator("#headline").inner_text()


def test_the_attention_mass_of_each_layer_is_a_bar(browser: Any, tmp_path: Path) -> None:
    report = a_report(words(200), attention=(1.0, 0.25, None, 0.5))
    with Opened(browser, tmp_path / "page.html", report) as opened:
        bars = opened.page.locator("#shares")
        strip = opened.page.locator("#overview canvas").bounding_box()
        assert bars.bounding_box()["height"] == pytest.approx(strip["height"], abs=1)
        assert bars.bounding_box()["x"] >= strip["x"] + strip["width"]
        said = "layer 0: 100.0 %, layer 1: 25.0 %, layer 2: not measured, layer 3: 50.0 %"
        assert bars.get_attribute("aria-label") == f"Attention mass kept. {said}"
        filled = bars.evaluate(
            """(e) => {
              const {width, height} = e;
              const {data} = e.getContext('2d').getImageData(0, 0, width, height);
              const colour = (row, x) => data.slice(4 * (row * width + x), 4 * (row * width + x) + 3).join();
              const columns = [...Array(width).keys()];
              const same = (row) => columns.filter((x) => colour(row, x) === colour(row, 0)).length / width;
              return [...Array(height).keys()].map(same);
            }"""
        )
        assert filled == [1, 0.25, 1, 0.5]  # of a row that was not measured all is ground
        opened.move_to("#layer", "1")
        assert "It keeps 25.0 % of its attention mass." in opened.page.locator("#view").inner_text()
        opened.move_to("#layer", "2")
        assert "attention mass" not in opened.page.locator("#view").inner_text()
        assert opened.complaints == []


def test_without_a_measure_there_are_no_bars(opened: Opened) -> None:
    assert not opened.page.locator("#shares").is_visible()
    assert "attention mass" not in opened.page.locator("#legend").inner_text()


def test_pointing_at_a_token_shows_its_caches(opened: Opened) -> None:
    panel = opened.page.locator("#token")
    opened.page.locator("#text .t").nth(23).hover()
    for text in (
        "␣word23",
        "position 23 ",
        "id 161",
        "kept in 6 of 16 ",
        "stopped at layer 1",
        "layer 0 (all heads), layer 1 (heads 0, 1)",
    ):
        assert text in panel.inner_text()
    opened.page.locator("#headline").hover()
    assert "word23" not in panel.inner_text()
    opened.page.locator("#text .t").nth(16).click()
    opened.page.locator("#headline").hover()
    assert "kept in 16 of 16 " in panel.inner_text()
    opened.page.locator("#text").focus()
    opened.page.keyboard.press("ArrowRight")
    assert "␣word17" in panel.inner_text()
    assert opened.page.locator(".sel").evaluate_all("all => all.map(e => e.textContent)") == [" word17"]
    opened.page.keyboard.press("Escape")
    assert opened.page.locator(".sel").count() == 0


def test_a_place_of_the_answer_is_marked_and_can_be_reached(browser: Any, tmp_path: Path) -> None:
    report = a_report(words(3000), echoes=[(2003, 2006)])
    with Opened(browser, tmp_path / "page.html", report) as opened:
        marked = opened.page.locator("#text .e")
        opened.page.locator("#found button").click()
        opened.until("document.querySelectorAll('#text .e').length >= 3")  # a busy machine draws them one by one
        assert marked.evaluate_all("all => all.map(e => e.textContent)") == words(3000)[2003:2006]
        opened.page.wait_for_timeout(300)  # chunks that are seen for the first time have found their heights
        assert 200 < marked.first.bounding_box()["y"] < opened.page.viewport_size["height"] - 200
        assert "Kept whole in 8 of 16 caches" in opened.page.locator("#found").inner_text()
        assert "␣word2003" in opened.page.locator("#token").inner_text()


def test_the_strip_leads_to_a_place(browser: Any, tmp_path: Path) -> None:
    with Opened(browser, tmp_path / "page.html", a_report(words(3000))) as opened:
        strip = opened.page.locator("#overview canvas")
        strip.click(position={"x": strip.bounding_box()["width"] * 0.75, "y": 5})
        opened.until("Math.abs(document.getElementById('overview').ariaValueNow - 2250) < 300")
        assert opened.page.locator("#text .t").nth(2250).bounding_box()["y"] > 0


def test_a_malicious_prompt_does_nothing(browser: Any, tmp_path: Path) -> None:
    report = a_report([EVIL, "", "日", EVIL], answer=EVIL, figures=[(EVIL, EVIL)], policy=EVIL, echoes=[(0, 1)])
    with Opened(browser, tmp_path / "page.html", report) as opened:
        opened.page.locator("#text .t").nth(0).hover(position={"x": 4, "y": 4})
        assert opened.page.evaluate("window.x") is None
        assert opened.page.locator("img").count() == 0
        assert opened.page.locator("script").count() == 2
        shown = opened.page.locator("body").evaluate("e => { e.querySelector('#data').remove(); return e.innerText; }")
        assert "</script><script>window.x=1</script>" in shown
        assert not set("\u202e\u2066\x07\u2028\u200b") & set(shown)
        assert "U+202E" in shown
        assert opened.page.locator("#text .p").count() == 1
        assert opened.complaints == []
        assert len(opened.requests) == 1


def test_even_markup_that_got_in_could_not_act(opened: Opened) -> None:
    """The policy of the page is a second wall: a script, an event handler and a picture that are put there by force."""
    refused: list[str] = []
    opened.page.on("requestfailed", lambda request: refused.append(request.failure))
    opened.page.evaluate(
        """() => {
          const script = document.createElement('script');
          script.textContent = 'window.x = 1';
          document.body.append(script);
          document.body.insertAdjacentHTML('beforeend', '<img src="http://127.0.0.1:9/x.png" onerror="window.x = 2">');
        }"""
    )
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.x") is None
    assert refused == ["csp"]
    assert len(opened.complaints) >= 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_can_be_read_in_both_themes(browser: Any, tmp_path: Path, scheme: str) -> None:
    report = a_report(words(40))
    with Opened(browser, tmp_path / "page.html", report, color_scheme=scheme) as opened:
        ground = opened.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
        seen = set()
        for layer in ("-1", "0", "3"):
            opened.move_to("#layer", layer)
            told = f"all => all.map(e => [e.className, ({CONTRAST})(e)])"
            tokens = opened.page.locator("#text .t").evaluate_all(told)[:36]
            assert len(tokens) == 36
            entries = opened.page.locator(".quiet, #legend .t, #figures dt, #view").evaluate_all(told)
            assert len(entries) > 10
            assert all(contrast >= 4.5 for _, contrast in tokens + entries), tokens + entries
            seen |= {names for names, _ in tokens}
        assert len({name for names in seen for name in names.split() if name[0] == "k"}) >= 7
        opened.page.locator("#theme").click()
        opened.page.locator("#theme").click()
        assert (
            opened.page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != "rgb(255, 255, 255)"
        )


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_sticks_out_at_any_width(browser: Any, tmp_path: Path, width: int) -> None:
    report = a_report(
        [*words(300), " " + "long" * 100, "\n", "\ttab"], answer="long" * 200, attention=(1.0, 0.2, 0.3, None)
    )
    with Opened(browser, tmp_path / "page.html", report, viewport={"width": width, "height": 800}) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        opened.page.locator("#text .t").nth(1).click()  # in the first line, so in one piece
        assert "kept in 1 of 16" in opened.page.locator("#token").inner_text()
        token, panel = opened.page.locator(".sel").bounding_box(), opened.page.locator("#token").bounding_box()
        assert panel["width"] <= width
        assert token["y"] + token["height"] <= panel["y"] or token["x"] + token["width"] <= panel["x"]
        opened.page.locator("#text .t").nth(300).scroll_into_view_if_needed()
        edges = "all => Math.max(...all.map(e => e.getBoundingClientRect().right))"
        assert opened.page.locator("#text .t, #answer").evaluate_all(edges) <= width


def test_choosing_moves_nothing(opened: Opened) -> None:
    """No jump of the text under the pointer, whatever is chosen."""
    at, panel = opened.page.locator("#text .t").nth(30), opened.page.locator("#token")
    before = at.bounding_box(), panel.bounding_box()
    for layer in ("3", "0", "-1"):
        opened.move_to("#layer", layer)
        at.hover()
        assert (at.bounding_box(), panel.bounding_box()) == before
    at.click()
    assert (at.bounding_box(), panel.bounding_box()) == before


def test_a_page_of_32k_tokens_works(browser: Any, tmp_path: Path, record_property: Any) -> None:
    report = a_report(words(32_768))
    with Opened(browser, tmp_path / "page.html", report) as opened:
        record_property("ready_ms", opened.page.evaluate("performance.now()"))
        assert opened.page.locator("#text .t").count() == 32_768
        opened.page.locator("#overview").focus()
        opened.page.keyboard.press("End")
        last = opened.page.locator("#text .t").last
        assert last.bounding_box()["y"] < opened.page.viewport_size["height"]
        opened.until("document.querySelector('.chunk:last-child .s')")
        opened.move_to("#layer", "0")
        assert opened.level(32_767) == 8  # 32,767 % 17 = 8 caches: all of layer 0
        assert opened.complaints == []
