"""Tests of the HTML page of results, as a file and in a browser."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.browser import Browser
from utils.errors import UserError
from utils.results.page import PageHead, check_page_is_ours, relative_url, settings_rows, write_page

HEAD = PageHead("Faces in photos", "2 images", lowest_score=0.5, threshold=0.5, settings=[("detector", "x")])
HOSTILE_NAME = '<img src=x onerror="alert(1)">.jpg'
BOX = [10, 10, 20, 30]


def entry(name: str, *scores: float, **more: Any) -> dict[str, Any]:
    """Return an image of 64 x 48 pixels; each face is two pixels larger than the one before."""
    faces = [{"box": [8, 8, 16 + 2 * i, 18 + 2 * i], "score": score} for i, score in enumerate(scores)]
    image = {"width": 64, "height": 48, "thumbnail": "thumbnail.png", "source": "thumbnail.png"}
    return {"name": name, **image, "faces": faces, **more}


def data_of(page: Path) -> Any:
    """Return the JSON data of a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cv2.imwrite(str(tmp_path / "thumbnail.png"), np.full((48, 64, 3), 90, np.uint8))
    return tmp_path


@pytest.fixture
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        opened.emulate(1280, 800)
        yield opened


# ------------------------------------------------------------------------------------------------ the file


def test_page_contains_the_images_and_no_external_resources(folder: Path) -> None:
    page = write_page(folder, HEAD, [entry("a.jpg", 0.9), {"name": "b.jpg", "skipped": "empty file"}], 2)
    text = page.read_text("utf-8")
    assert data_of(page) == [entry("a.jpg", 0.9), {"name": "b.jpg", "skipped": "empty file"}]
    assert "http:" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in text
    assert '<th scope="row">detector</th><td>x</td>' in text


def test_page_without_images(folder: Path) -> None:
    assert data_of(write_page(folder, HEAD, [], 0)) == []


@pytest.mark.parametrize(
    "name", [HOSTILE_NAME, "</script><script>alert(1)</script>.jpg", "\u2028.jpg", "\udcff.jpg", "&amp;"]
)
def test_names_are_escaped_everywhere(name: str, folder: Path) -> None:
    head = PageHead(name, name, 0.5, 0.5, settings=[(name, name)])
    page = write_page(folder, head, [entry(name, 0.9), {"name": name, "skipped": name}], 2)
    assert [value["name"] for value in data_of(page)] == [name, name]
    text = page.read_text("utf-8")
    assert "<img src=x" not in text
    assert text.count("<script") == text.count("</script") == 2


def test_urls_are_relative_and_quoted() -> None:
    assert relative_url("50% #1?/a b.jpg") == "./50%25%20%231%3F/a%20b.jpg"
    assert relative_url("javascript:alert(1).jpg") == "./javascript%3Aalert%281%29.jpg"
    assert relative_url("../ü\udcff.jpg") == "../%C3%BC%FF.jpg"


def test_many_images_are_split_into_several_pages(folder: Path) -> None:
    write_page(folder, HEAD, ({"name": f"{number}.jpg", "skipped": "x"} for number in range(20_001)), 20_001)
    files = [folder / name for name in ("index.html", "index_2.html", "index_3.html")]
    assert [len(data_of(file)) for file in files] == [10_000, 10_000, 1]
    assert 'href="index_3.html"' in files[0].read_text()
    write_page(folder, HEAD, [entry("a.jpg")], 1)
    assert sorted(path.name for path in folder.glob("index*")) == ["index.html"]


def test_page_of_the_user_is_not_overwritten(folder: Path) -> None:
    check_page_is_ours(folder)
    write_page(folder, HEAD, [], 0)
    check_page_is_ours(folder)
    page = folder / "index.html"
    ours = page.read_text()
    for mine in ("<p>my holidays</p>", ours.replace("<body>", "<body><p>my remarks</p>")):
        page.write_text(mine)
        with pytest.raises(UserError, match="is not a page of results, or was edited since; move it"):
            check_page_is_ours(folder)
        with pytest.raises(UserError, match="is kept"):
            write_page(folder, HEAD, [], 0)
        assert page.read_text() == mine
    page.unlink()
    page.mkdir()
    with pytest.raises(UserError, match="is not a page of results, or was edited since; move it"):
        check_page_is_ours(folder)


def test_further_page_of_the_user_is_kept(folder: Path) -> None:
    write_page(folder, HEAD, [], 0)
    (folder / "index_2.html").write_text((folder / "index.html").read_text() + "<!-- mine -->")
    (folder / ".records/written.json").unlink()
    write_page(folder, HEAD, ({"name": f"{number}.jpg", "skipped": "x"} for number in range(10_001)), 10_001)
    (folder / "index_2.html").write_text((folder / "index_2.html").read_text() + "<!-- mine -->")
    write_page(folder, HEAD, [], 0)
    assert (folder / "index_2.html").read_text().endswith("<!-- mine -->")


def test_page_of_an_earlier_version_is_replaced(folder: Path) -> None:
    page = write_page(folder, HEAD, [], 0)
    (folder / ".records/written.json").unlink()
    check_page_is_ours(folder)
    write_page(folder, HEAD, [entry("a.jpg")], 1)
    assert data_of(page) == [entry("a.jpg")]


def test_settings_are_flattened() -> None:
    assert settings_rows({"a": {"b": 1, "c": None}, "d": "x", "e": [1, 2]}) == [
        ("a.b", "1"),
        ("d", "x"),
        ("e", "[1, 2]"),
    ]


# --------------------------------------------------------------------------------------------- the browser


def boxes(browser: Browser) -> int:
    shown: int = browser.evaluate("document.querySelectorAll('#grid rect').length")
    return shown


def names(browser: Browser) -> list[str]:
    shown: list[str] = browser.evaluate("[...document.querySelectorAll('.card b')].map(node => node.textContent)")
    return shown


def change(browser: Browser, identifier: str, value: object) -> None:
    browser.evaluate(
        f"(node => {{ node.value = {json.dumps(value)}; node.dispatchEvent(new Event('input')); }})"
        f"(document.getElementById('{identifier}'))"
    )
    browser.settle()


def test_threshold_sorting_and_search(browser: Browser, folder: Path) -> None:
    entries = [entry("a.jpg", 0.9, 0.6), entry("b.jpg"), entry("c.jpg", 0.95, 0.8, 0.55)]
    browser.open(write_page(folder, HEAD, [*entries, {"name": "d.jpg", "skipped": "empty file"}], 4))
    assert (boxes(browser), names(browser)) == (5, ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    change(browser, "sort", "faces")
    assert names(browser)[:2] == ["c.jpg", "a.jpg"]
    change(browser, "sort", "lowest")
    assert names(browser)[:2] == ["c.jpg", "a.jpg"]
    change(browser, "threshold", 0.7)
    assert boxes(browser) == 3
    assert names(browser)[:2] == ["c.jpg", "a.jpg"]  # 0.8 and 0.9 remain
    change(browser, "sort", "skipped")
    assert names(browser)[0] == "d.jpg"
    change(browser, "search", "B.J")
    assert names(browser) == ["b.jpg"]
    assert (
        browser.evaluate("document.getElementById('count').textContent") == "Images 1 to 1 of 1; in all of them 0 faces"
    )
    assert browser.problems() == []


def test_viewer_can_be_used_by_keyboard(browser: Browser, folder: Path) -> None:
    mask = {"box": BOX, "score": 0.9, "landmarks": [[12, 14]] * 5, "files": {"mask": "thumbnail.png"}}
    entries = [entry("a.jpg", faces=[mask]), entry("b.jpg", source="gone.jpg"), {"name": "c.jpg", "skipped": "empty"}]
    browser.open(write_page(folder, HEAD, entries, 3))
    title = "document.getElementById('viewer-name').textContent"
    browser.evaluate("document.querySelector('.card').focus()")
    browser.press("Enter")
    assert browser.evaluate(title) == "a.jpg (1 face, 64x48)"
    assert browser.evaluate("document.querySelectorAll('.crop canvas, .crop img').length") == 2
    assert browser.evaluate("document.querySelector('.crop').textContent") == "1: 0.90010x20 px"
    browser.press("ArrowRight")
    assert browser.evaluate(title) == "b.jpg (0 faces, 64x48)"
    # The source is missing, so the thumbnail is shown.
    assert browser.evaluate("document.querySelector('#viewer-stage img').src").endswith("thumbnail.png")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.evaluate("document.querySelector('#viewer-stage').textContent") == "empty"
    browser.press("Escape")
    assert browser.evaluate("document.getElementById('viewer').open") is False


def test_name_that_is_markup_is_text(browser: Browser, folder: Path) -> None:
    browser.open(
        write_page(
            folder,
            PageHead(HOSTILE_NAME, HOSTILE_NAME, 0, 0),
            [entry(HOSTILE_NAME, 0.9), {"name": HOSTILE_NAME, "skipped": HOSTILE_NAME}],
            2,
        )
    )
    assert names(browser) == [HOSTILE_NAME, HOSTILE_NAME]
    browser.evaluate("document.querySelector('.card').click()")
    assert browser.evaluate("document.querySelector('#viewer-name').textContent").startswith(HOSTILE_NAME)
    assert browser.problems() == []


def test_kinds_of_faces_can_be_hidden(browser: Browser, folder: Path) -> None:
    kinds = {"hit": "hits", "missed": "missed"}
    faces = [{"box": BOX, "score": 0.9, "kind": "hit"}, {"box": BOX, "kind": "missed"}]
    browser.open(write_page(folder, PageHead("t", "s", 0, 0.5, kinds=kinds), [entry("a.jpg", faces=faces)], 1))
    assert boxes(browser) == 2
    change(browser, "threshold", 0.95)
    assert boxes(browser) == 1  # a missed face has no score
    browser.evaluate("document.querySelector('input[value=missed]').click()")
    assert boxes(browser) == 0


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, True)])
def test_nothing_is_wider_than_the_window(browser: Browser, folder: Path, width: int, dark: bool) -> None:
    browser.emulate(width, 844, dark=dark)
    long_name = "a_long_name_without_any_space_" * 6
    browser.open(write_page(folder, PageHead(long_name, long_name, 0, 0), [entry(long_name, 0.9)] * 3, 3))
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    red = int(browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))
    assert (red < 60) == dark
    browser.evaluate("document.querySelector('.card').click()")
    browser.settle()
    assert browser.evaluate("document.getElementById('viewer').scrollWidth") <= width


@pytest.mark.parametrize("count", [1_000, 10_000])
def test_page_of_many_images_is_responsive(browser: Browser, folder: Path, count: int) -> None:
    """Only one page of cards is drawn at a time, so the time of an update does not depend on the others."""
    page = write_page(
        folder, HEAD, (entry(f"{number}.jpg", *[0.5 + number / 25_000] * 12) for number in range(count)), count
    )
    start = time.perf_counter()
    browser.open(page)
    assert time.perf_counter() - start < 10
    assert len(names(browser)) == 60
    browser.evaluate("document.querySelector('#pager button:last-child').click()")
    assert names(browser)[-1] == f"{count - 1}.jpg"
    change(browser, "sort", "lowest")
    milliseconds = browser.evaluate(
        "(() => { const start = performance.now(); refresh(); return performance.now() - start; })()"
    )
    assert milliseconds < 1000
