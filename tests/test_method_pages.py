"""Every method has a page: it runs as shown, and says what the method's file says.

What is generated on a page is compared with its source by `benchmarks/tables.py --check`, in test_results.py.
"""

import re
from pathlib import Path

import pytest

from benchmarks import tables
from distillery import experiment
from distillery.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "methods"

every_method = pytest.mark.parametrize("name", METHODS)


def shown(text: str) -> list[str]:
    """The YAML blocks of a page."""
    return re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def items(text: str, heading: str) -> list[int]:
    """The numbers of a numbered list below a heading."""
    _, _, rest = text.partition(f"\n## {heading}\n")
    return [int(number) for number in re.findall(r"^(\d+)\. ", rest.partition("\n## ")[0], re.MULTILINE)]


def test_every_method_has_a_page_and_every_page_a_method() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} - {"README"} == set(METHODS)


@every_method
def test_the_experiment_on_a_page_can_be_run(name: str) -> None:
    (text,) = shown((PAGES / f"{name}.md").read_text())
    cells = experiment.check(text)
    assert {name, "random"} <= {cell.method for cell in cells}
    assert {cell.name for cell in cells} == {f"digits_{name}"}


def test_the_experiment_in_the_readme_can_be_run() -> None:
    (text,) = (text for text in shown((ROOT / "README.md").read_text()) if text.startswith("name: "))
    cells = experiment.check(text)
    assert {cell.teachers for cell in cells if cell.method == "random"} == {
        cell.teachers for cell in cells if cell.method != "random"
    }, "a method stands without its baseline"
    assert max(cell.shards for cell in cells) > 1


@every_method
def test_a_page_names_the_code_and_every_difference_from_it(name: str) -> None:
    said, page = METHODS[name].__doc__ or "", (PAGES / f"{name}.md").read_text()
    code = re.search(r"^Code: ([^\s,.]+)", said, re.MULTILINE)
    assert code, f"the file of {name} names no code"
    assert f"\n- Code: {code.group(1)}" in page
    differences = said.partition("\nDiffers:")[2].partition("\nTarget:")[0]
    numbers = [int(number) for number in re.findall(r"\((\d+)\)\s", differences)]
    assert items(page, "What differs from the official code") == numbers


@every_method
def test_the_comparison_finds_what_it_repeats_from_a_page(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text()
    assert all(page.count(f"\n- {label}: ") == 1 for label in tables.BY_HAND)


def test_a_generated_part_stands_once() -> None:
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert tables.replaced(page, "x", "new") == page.replace("old", "new")
    for wrong in ("a", page + page, page.replace("/x", "/y")):
        with pytest.raises(ValueError, match="'x' is there"):
            tables.replaced(wrong, "x", "new")


def test_results_with_changed_options_stand_apart_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"dataset": "cifar10", "teacher": "convnet3", "teacher_acc": "85", "ipc": "10", "student": "convnet3"}
    row |= {"recipe": "fair-soft", "acc_best": "50", "source": "there"}
    found = [
        row | {"method": "rded", "options": '{"mipc": 300}', "acc_last": "40"},
        row | {"method": "rded", "options": '{"mipc": 20}', "acc_last": "30"},
        row | {"method": "random", "options": "{}", "acc_last": "20"},
    ]
    monkeypatch.setattr(tables, "rows", lambda: found)
    lines = tables.measured("rded").splitlines()[2:]
    assert [line.split(" | ")[5:10] for line in lines] == [
        ["-", "40.0", "50.0", "20.0", "1"],
        ["mipc 20", "30.0", "50.0", "20.0", "1"],
    ]
    assert "rded (mipc 20)" in tables.results("")
    assert tables.measured("sre2l") == "Not measured yet."
