"""The site: its pages are built from what is there, quote what the program says, and run as shown."""

import ast
import functools
import importlib.util
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_methods as contract
import yaml
from click.testing import CliRunner
from typer.testing import CliRunner as TyperRunner

from benchmarks import new_page, reference, tables
from distillery import __main__ as command_line
from distillery import config, experiment
from distillery.methods import METHODS
from pipelines import __main__ as kubeflow

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GUIDE = DOCS / "guides" / "add_a_method.md"
SOURCES = ("distillery", "components", "pipelines")
QUOTE = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)  # first column of troubleshooting.md


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def template(node: ast.expr) -> str | None:
    """A string as the source writes it, with a NUL for what is filled in; None for other expressions."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [template(side) for side in (node.left, node.right)]
        return None if sides == [None, None] else "".join("\0" if side is None else side for side in sides)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def templates(source: str) -> list[str]:
    """Every string of a file."""
    found = (template(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.expr))
    return [text for text in found if text]


@functools.cache
def messages() -> str:
    """Every string of the product, one below the other."""
    files = [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]
    return "\x01".join(text for path in files for text in templates(path.read_text()))


def is_said(quote: str, said: str) -> bool:
    """Whether some message contains the quote; `...` and what an f-string fills in stand for anything."""
    pieces = [re.escape(piece) for piece in re.split(r" ?\.\.\. ?", quote) if piece]
    return re.search("[^\x01]*?".join(pieces), said) is not None


@pytest.mark.parametrize("quote", QUOTE.findall((DOCS / "troubleshooting.md").read_text()))
def test_every_quoted_message_is_still_said(quote: str) -> None:
    assert is_said(quote, messages())


def test_a_message_that_nobody_says_is_noticed() -> None:
    said = "\x01".join(templates('raise E(f"net {x} is not " f"known{y}; known are {z}")\nA = "other"'))
    assert is_said("net ... is not known", said)
    assert is_said("is not known...; known are", said)
    assert is_said("lacks ... and more", "\x01".join(templates('f"lacks {a}" + (b if c else "") + " and more"')))
    assert not is_said("net ... is unknown", said)
    assert not is_said("net ... other", said), "pieces of two messages are none"


@pytest.mark.parametrize("page", ["tutorial.md", "experiment.md", "guides/research.md", "guides/add_a_method.md"])
def test_experiments_on_pages_can_be_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "average", worked_example(monkeypatch))
    shown = blocks(DOCS / page, "yaml")
    assert shown
    for text in shown:
        assert experiment.check(text)


def commands(page: Path) -> list[list[str]]:
    """The lines of a page's shell blocks, without comments, as words."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", ["tutorial.md", "guides/research.md", "guides/platform.md", "guides/add_a_method.md"])
def test_commands_on_pages_exist_with_their_options(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets |= set(re.findall(r"^((?:[a-z]+ )+[a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert commands(DOCS / page)
    for first, *rest in commands(DOCS / page):
        if first == "make":
            assert rest[0] in targets, rest
        elif first == ".venv/bin/distillery":
            told = TyperRunner().invoke(command_line.app, [rest[0], "--help"])
            assert told.exit_code == 0, f"distillery {rest[0]}: {told.output}"
            assert all(word in told.output for word in rest if word.startswith("--"))
        elif first == ".venv/bin/python" and rest[:2] == ["-m", "pipelines"]:
            told = CliRunner().invoke(kubeflow.app, [rest[2], "--help"])
            assert told.exit_code == 0, f"pipelines {rest[2]}: {told.output}"
            assert all(word in told.output for word in rest[3:] if word.startswith("-"))
        elif first == ".venv/bin/python":
            name = rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0]
            assert (ROOT / name).is_file(), rest
        else:
            pytest.fail(f"{page} shows {first}, which this test does not know")


def worked_example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The method that the guide writes, as a module of the package."""
    code = next(block for block in blocks(GUIDE, "python") if "def synthesize" in block)
    name = "distillery.methods.average"
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, "docs/guides/add_a_method.md", "exec"), module.__dict__)  # noqa: S102 - our own page
    return module


CONTRACT = [test for name, test in vars(contract).items() if name.startswith("test_") and callable(test)]
CONTRACT = [test for test in CONTRACT if "name" in inspect.signature(test).parameters]
CONTRACT.remove(contract.test_a_teacher_for_other_data_is_refused)  # the guide's method runs no teacher


@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__)
def test_the_guides_method_holds_to_the_contract(test: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = worked_example(monkeypatch)
    assert not module.NEEDS.teacher, "one part of the contract is left out above"
    monkeypatch.setitem(METHODS, "average", module)
    wanted = inspect.signature(test).parameters
    for kind in contract.KINDS if "kind" in wanted else [""]:
        given: dict[str, Any] = {"name": "average", "kind": kind, "monkeypatch": monkeypatch}
        test(**{key: given[key] for key in wanted})


def test_the_guides_own_test_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    module = worked_example(monkeypatch)
    code = next(block for block in blocks(GUIDE, "python") if "def test_" in block)
    space: dict[str, Any] = {}
    exec(compile(code, "docs/guides/add_a_method.md", "exec"), space)  # noqa: S102 - our own page
    (check,) = (value for name, value in space.items() if name.startswith("test_"))
    check()
    space["average"] = module
    monkeypatch.setattr(module, "generator", lambda *_: contract.torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError):
        check()


def test_a_skeleton_holds_everything_that_pages_must_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "average", worked_example(monkeypatch))
    page = new_page.skeleton("average")
    assert "\n- Code: none" in page
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == re.findall(
        r"^## (.*)$", (DOCS / "methods" / "rded.md").read_text(), re.MULTILINE
    )
    for part in ("picture", "options", "recipes", "cost", "measured"):
        assert tables.replaced(page, part, "x") != page
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert {cell.method for cell in experiment.check(text)} == {"average", "random"}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_page_has_every_part(name: str) -> None:
    page = (DOCS / "methods" / f"{name}.md").read_text()
    parts = ["What it does", "Run it", "Options", "Cost", "What differs from the official code", "Published"]
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == [*parts, "Measured here"]
    picture = DOCS / "methods" / "images" / f"{name}.png"
    assert picture.stat().st_size < 100_000
    assert f"](images/{name}.png)" in page
    assert "TODO" not in page


def test_every_key_of_an_experiment_has_a_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in reference.MODELS.values():
        assert set(reference.meanings(model)) >= set(model.model_fields)
    source = inspect.getsource(config.LabelConfig)
    monkeypatch.setattr(reference.inspect, "getsource", lambda _: source.partition("  # stored only")[0])
    with pytest.raises(ValueError, match=r"LabelConfig: no comment behind \['top_k'\]"):
        reference.meanings(config.LabelConfig)


def test_every_page_is_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        """Settings with Python names in them."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)  # noqa: S506 - a SafeLoader
    named = re.findall(r"[\w/-]+\.md", str(settings["nav"]))
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(p for p in there if not p.startswith("results/2") and p not in named) == []
    assert len(named) == len(set(named))


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.relative_to(DOCS).as_posix())
def test_what_stands_inside_a_list_is_indented_for_the_forge_and_the_site(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    wrong = re.findall(r"^ {1,3}(?:```|[-*+] |\d+\. ).*$", text, re.MULTILINE)
    assert not wrong, f"mkdocs wants four spaces: {wrong}"


PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere_on_the_forge_too(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    wrong = [link for link in links if ":" not in link and not (page.parent / link).exists()]
    assert not wrong, wrong


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the recover loop" in (tmp_path / "api" / "methods.html").read_text().lower()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("[x](nowhere.md)", "nowhere.md"),
        ("[x](#nothing)", "nothing"),
        ("<img src='https://example.org/a.png'>", "fetches https://example.org/a.png"),
    ],
)
def test_the_build_fails_on(added: str, said: str, tmp_path: Path) -> None:
    for name in ("docs", "distillery"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    page = tmp_path / "docs" / "tutorial.md"
    page.write_text(f"{page.read_text()}\n{added}\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
