"""The page in a real browser: silent console, no request, all plots seen, sorted by mouse and keyboard, any width."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, open_browser, why_no_browser
from report_cases import many_kinds

from edgecomp import api
from edgecomp.report.page.values import Page

pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install -e '.[dev]' brings it")
pytest.importorskip("jinja2", reason="jinja2 is not installed; pip install -e '.[dev]' brings it")
pytestmark = pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser() or "there is one")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    folder = tmp_path_factory.mktemp("page")
    outcome = api.report([many_kinds(folder / "results")], html=folder / "page.html")
    return folder / "page.html", outcome.page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture
def page(browser: Browser, made: tuple[Path, Page]) -> Browser:
    browser.resize(1280, 900)
    browser.prefer("light")
    browser.requests()
    browser.open(made[0])
    return browser


def test_says_nothing_on_the_console_and_asks_for_nothing(page: Browser, made: tuple[Path, Page]) -> None:
    assert page.run("return document.readyState") == "complete"
    assert page.logs("browser") == []
    # a browser that was slow to begin still loads its own first tab, from itself
    asked = [url for url in page.requests() if not url.startswith(("data:", "chrome://"))]
    assert asked == [made[0].resolve().as_uri()]


def test_policy_stops_what_is_not_of_the_page(page: Browser) -> None:
    page.run(
        "const s = document.createElement('script'); s.textContent = 'window.entered = 1'; document.body.append(s);"
        "const i = new Image(); i.src = 'http://elsewhere.invalid/x.png'; document.body.append(i);"
    )
    assert page.run("return window.entered === undefined")
    said = " ".join(entry["message"] for entry in page.logs("browser"))
    assert "Content Security Policy" in said
    assert "script-src" in said
    assert "elsewhere.invalid" in said


def test_every_plot_is_there_and_has_a_size(page: Browser, made: tuple[Path, Page]) -> None:
    sizes = page.run(
        "return Array.from(document.querySelectorAll('figure svg[role=img]')).map(s => {"
        " const b = s.getBoundingClientRect(), inner = s.querySelectorAll('path').length;"
        " return [s.closest('figure').id, b.width, b.height, inner, document.getElementById("
        "   s.getAttribute('aria-labelledby').split(' ')[0]).textContent]})"
    )
    assert [size[0] for size in sizes] == [plot.slug for plot in made[1].plots]
    assert [size[4] for size in sizes] == [plot.title for plot in made[1].plots]
    for name, width, height, paths, _ in sizes:
        assert width > 300, name
        assert height > 100, name
        assert paths > 3, name


def test_sorts_by_click(page: Browser) -> None:
    first = "document.querySelector('main table')"
    place = page.run(f"return Array.from({first}.tHead.rows[0].cells).findIndex(c => c.textContent.startsWith('p50'))")
    column = f"Array.from({first}.tBodies[0].rows).map(r => Number(r.cells[{place}].dataset.v))"
    click = f"{first}.tHead.rows[0].cells[{place}].querySelector('button').click()"
    before = page.run(f"return {column}")
    page.run(click)
    rising = page.run(f"return {column}")
    assert rising == sorted(before)
    assert before != rising, "the case must have something to sort"
    page.run(click)
    assert page.run(f"return {column}") == sorted(before, reverse=True)
    states = f"return Array.from({first}.tHead.rows[0].cells).map(c => c.getAttribute('aria-sort'))"
    assert page.run(states)[place] == "descending"
    assert set(page.run(states)) == {"none", "descending"}


def test_sorts_by_keyboard_with_a_focus_that_is_seen(page: Browser) -> None:
    for _ in range(60):
        page.press("Tab")
        if page.run("return document.activeElement.closest('th') !== null"):
            break
    assert page.run("return document.activeElement.tagName") == "BUTTON"
    outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.press("Enter")
    assert page.run("return document.activeElement.closest('th').getAttribute('aria-sort')") == "ascending"
    page.press(" ")
    assert page.run("return document.activeElement.closest('th').getAttribute('aria-sort')") == "descending"


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_no_sideways_scrolling_of_the_page(page: Browser, width: int) -> None:
    page.resize(width, 740)
    assert page.run("return [innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [width, True]
    wide = page.run(
        "return Array.from(document.querySelectorAll('.wide')).filter(w => w.scrollWidth > w.clientWidth + 1)"
        ".every(w => w.tabIndex === 0 && getComputedStyle(w).overflowX === 'auto')"
    )
    assert wide


def test_both_schemes(page: Browser) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        seen[scheme] = page.run(
            "return [getComputedStyle(document.documentElement).backgroundColor,"
            " getComputedStyle(document.body).color, getComputedStyle(document.querySelector('svg text')).fill]"
        )
    assert seen["light"][0] == "rgb(255, 255, 255)"
    assert all(one != other for one, other in zip(seen["light"], seen["dark"], strict=True))


def test_no_font_is_too_small_on_a_phone(page: Browser) -> None:
    page.resize(360, 740)
    smallest = page.run(
        "return Math.min(...Array.from(document.querySelectorAll('svg text')).map(t => {"
        " const svg = t.closest('svg'); return parseFloat(getComputedStyle(t).fontSize)"
        " * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width}))"
    )
    assert smallest >= 6.5


def test_prints_all_sections_on_white(page: Browser, made: tuple[Path, Page]) -> None:
    page.prefer("dark")
    page.command(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert page.run("return getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    hidden = page.run(
        "return Array.from(document.querySelectorAll('h2,h3,figure,table')).filter(e => e.offsetParent === null).length"
    )
    assert hidden == 0
    printed = page.pdf()
    page.command("Emulation.setEmulatedMedia", media="")
    assert printed.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", printed)) or sum(
        len(re.findall(rb"/Type\s*/Page\b", _inflated(part)))
        for part in re.findall(rb"stream\r?\n(.*?)endstream", printed, re.DOTALL)
    )
    assert pages >= 2


def _inflated(part: bytes) -> bytes:
    try:
        return zlib.decompress(part)
    except zlib.error:
        return b""


def test_headings_are_in_order_and_every_region_has_a_name(page: Browser) -> None:
    levels = page.run("return Array.from(document.querySelectorAll('h1,h2,h3,h4')).map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    unnamed = page.run(
        "return document.querySelectorAll('[role=region]:not([aria-label]), nav:not([aria-label])').length"
    )
    assert unnamed == 0
    twice = page.run(
        "const ids = Array.from(document.querySelectorAll('[id]')).map(e => e.id);"
        "return ids.filter((id, at) => ids.indexOf(id) !== at)"
    )
    assert twice == []
