"""The report as people see it: Chromium at three widths, in both themes and in print.

What is marked needs Chromium on PATH (Debian's `chromium`).
"""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from _chromium import CHROMIUM, Tab, browser
from test_report import cell, failure, result, student

from distillery import report

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on PATH: apt-get install chromium"),
]
WIDTHS = (390, 768, 1280)
SHEET = 688  # CSS pixels between the margins of A4 in portrait
METHODS = ("random", "median", "rded", "sre2l", "cda", "sre2lpp", "dwa", "delt", "gvbsm", "wmdd")
NETS = ("convnet3", "resnet18_modified", "resnet101", "mobilenet_v2", "efficientnet_b0")
LONG = "a_name_without_a_single_place_to_break_it_" * 4
# What stands beyond the right edge, outside what people can scroll.
CUT_OFF = """[...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest(".unseen, %s")).map(e => `${e.tagName}.${e.className}: ${e.textContent.trim().slice(0, 40)}`)"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """The browser of all tests here."""
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of each kind: an ordinary one, one with as much of everything as fits, failures alone, nothing."""
    folder = tmp_path_factory.mktemp("pages")
    made = [result(folder, cell(m, s, i), 0.5 + s / 9) for m in METHODS[:4] for s in range(3) for i in (1, 10)]
    (wide := folder / "wide").mkdir()
    nets = tuple(student() | {"net": net} for net in NETS)
    names = [f"class {i} of twenty" if i else LONG for i in range(20)]
    said = {"classes": names, "predicted": [[(3 * i) % 20 for i in range(20)] for _ in NETS]}
    crowd = [result(wide, cell(m, s, 10, nets), *([0.4] * len(NETS)), **said) for m in METHODS for s in (0, 1)]
    crowd += [result(wide, cell("delt", 0, 10, nets, factor=f, rounds=f), *([0.3] * 5), **said) for f in (1, 2)]
    lost = failure(wide, cell("rded", 7), f"StoreError: s3://{LONG}")
    found = {"ordinary": made, "crowded": [*crowd, lost], "failed": [lost], "empty": []}
    for name, results in found.items():
        report.build(LONG if name == "crowded" else name, results, folder / name, "v1", config=f"key: {LONG * 3}")
    return {name: folder / name / "report.html" for name in found}


@pytest.mark.parametrize("name", ["ordinary", "crowded", "failed", "empty"])
def test_nothing_is_cut_off_or_fetched(tab: Tab, pages: dict[str, Path], name: str) -> None:
    for width in WIDTHS:
        for dark in (False, True):
            tab.show(width, dark=dark)
            tab.open(pages[name])
            tab.run("document.querySelectorAll('details').forEach(each => each.open = true)")
            assert tab.run("document.documentElement.scrollWidth <= innerWidth"), width
            assert tab.run(CUT_OFF % ".scroll, pre") == [], width
            paper = tab.run("getComputedStyle(document.body).backgroundColor")
            assert paper == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
            requests = tab.seen("Network.requestWillBeSent")
            assert {said["request"]["url"].partition(":")[0] for said in requests} <= {"file", "data"}
            assert len([said for said in requests if said["request"]["url"].startswith("file:")]) == 1
            assert tab.seen("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []


@pytest.mark.parametrize("name", ["ordinary", "crowded", "failed", "empty"])
def test_print_loses_nothing_on_the_right(tab: Tab, pages: dict[str, Path], name: str) -> None:
    tab.show(SHEET, media="print")
    tab.open(pages[name])
    tab.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert tab.run(CUT_OFF % ".none") == [], "paper does not scroll"
    sheets = base64.b64decode(tab.ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])
    assert sheets.startswith(b"%PDF")


def test_warnings_are_a_click_away_and_images_grow(tab: Tab, pages: dict[str, Path]) -> None:
    tab.show(1280)
    tab.open(pages["ordinary"])
    tab.run("document.querySelector('a.flag').click()")
    assert tab.run("[document.activeElement.id, scrollY > 1000]") == ["warnings", True]
    width = "document.querySelector('.grids:not(.narrow) img').clientWidth"
    before = tab.run(width)
    tab.run("document.querySelector('.grids:not(.narrow) .zoom input').click()")
    assert tab.run(width) > 2 * before


@pytest.mark.parametrize("width", [768, 1280])
def test_a_leaderboard_needs_no_scrolling_but_on_a_phone(tab: Tab, pages: dict[str, Path], width: int) -> None:
    tab.show(width)
    tab.open(pages["ordinary"])
    assert tab.run("(each => each.scrollWidth <= each.clientWidth)(document.querySelector('.scroll:has(.board)'))")


def test_a_phone_keeps_the_methods_in_sight(tab: Tab, pages: dict[str, Path]) -> None:
    tab.show(390)
    tab.open(pages["ordinary"])
    tab.run("document.querySelectorAll('.scroll').forEach(each => each.scrollLeft = 1000)")
    lines = "[...document.querySelectorAll('.board th[scope=row], .costs th[scope=row], .heat th[scope=row]')]"
    assert tab.run(f"{lines}.filter(e => e.getBoundingClientRect().left < 0).length") == 0
    tab.run("document.querySelectorAll('.scroll').forEach(each => each.scrollLeft = 0)")
    gap = (
        "document.querySelector('.board .baseline + tr td:nth-of-type(4)').getBoundingClientRect().right <= innerWidth"
    )
    assert tab.run(gap), "the distance to random images needs no scrolling"
