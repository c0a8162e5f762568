"""A real browser for tests of pages: Debian's Chromium, driven by Playwright. Without one such tests are skipped, or fail where
FT_BROWSER_REQUIRED=1 (as in CI)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
PHONE = {"width": 375, "height": 740}
DESKTOP = {"width": 1200, "height": 900}

Open = Callable[..., Any]
"""open(file, viewport=..., color_scheme=...) -> a page of Playwright; what went wrong in it is in page.problems."""


def chromium() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found:
        return found
    reason = f"no browser: {', '.join(NAMES)} (Debian: apt-get install chromium)"
    if os.environ.get("FT_BROWSER_REQUIRED") == "1":
        pytest.fail(f"FT_BROWSER_REQUIRED=1, and there is {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    from playwright.sync_api import sync_playwright

    alone = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=alone)
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens files. At the end of the test no page may have failed, written to its console, or asked for anything."""
    pages: list[tuple[Any, list[str]]] = []

    def open_file(file: Path, viewport: dict[str, int] = DESKTOP, **options: Any) -> Any:
        page, problems = browser.new_page(viewport=viewport, **options), []
        page.set_default_timeout(30_000)  # a busy machine is slow
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: _note(problems, request.url, file))
        page.goto(file.resolve().as_uri())
        pages.append((page, problems))
        return page

    yield open_file
    for page, problems in pages:
        page.close()
        assert not problems


def _note(problems: list[str], url: str, file: Path) -> None:
    if url != file.resolve().as_uri():
        problems.append(f"asked for {url}")


def overflow(page: Any) -> int:
    """By how many pixels the page is wider than its window."""
    wider: int = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return wider


def background(page: Any) -> tuple[int, ...]:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return tuple(map(int, colour.removeprefix("rgb(").rstrip(")").split(", ")))


def contrast(page: Any, selector: str) -> float:
    """The contrast ratio (WCAG 2) of an element's text and the first background behind it that is not transparent."""
    found = page.eval_on_selector(
        selector,
        """element => {
          let behind = element;
          while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
          return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
        }""",
    )
    light, dark = sorted((_luminance(colour) for colour in found), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(", ")]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
