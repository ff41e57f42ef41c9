"""The report: statistics against hand arithmetic, and a page that is self-contained, safe, small and repeatable."""

import base64
import csv
import hashlib
import json
import math
import re
import statistics
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distillery import artifact, console, evaluate, report
from distillery.preview import write_preview
from distillery.report import words
from distillery.report.load import Outcome, shared_seconds
from distillery.rng import generator

CLASSES = ("<b>cat</b>", "dog & co", "a|b")
LABELS = {"mode": "on_the_fly", "top_k": 0}
STEPS = {"prepare_data": 1.5, "train_teacher": 20.0, "synthesize": 4.0, "relabel": 0.5}


def student(name: str = "rded", regime: str = "soft", **options: Any) -> dict[str, Any]:
    """A planned student."""
    return {"net": "convnet3", "net_options": options, "recipe": {"name": name, "regime": regime, "epochs": 2}}


def cell(method: str, seed: int = 0, ipc: int = 10, students: tuple[Any, ...] = (), **options: Any) -> dict[str, Any]:
    """A planned cell."""
    return {
        "id": f"{method}-ipc{ipc}-seed{seed}-{len(options)}{options.get('factor', '')}",
        "name": "toy",
        "dataset": {"name": "digits"},
        "teachers": ["convnet3"],
        "method": method,
        "ipc": ipc,
        "seed": seed,
        "options": options,
        "labels": LABELS,
        "students": list(students or (student(),)),
    }


def upstream(folder: Path) -> artifact.Manifest:
    """A labels artifact whose manifest knows the seconds of every earlier step."""
    if artifact.is_finished(folder / "relabel"):
        return artifact.read(folder / "relabel")
    made: dict[str, artifact.Manifest] = {}
    for step, seconds in STEPS.items():
        said = {"kind": "labels", "step": step, "config": {}, "meta": {}, "seconds": seconds, "hardware": ""}
        said["peak"] = {"ram": 5_000_000 if step == "synthesize" else 1_000_000}
        made = {"earlier": artifact.finish(folder / step, inputs=made, **said)}
    return made["earlier"]


def preview(folder: Path, side: int) -> bytes:
    """The picture of ten classes of noise."""
    noise = torch.randint(0, 256, (100, 3, side, side), generator=generator("preview"), dtype=torch.uint8)
    write_preview(noise, torch.arange(10).repeat_interleave(10), folder / "noise.png")
    return (folder / "noise.png").read_bytes()


def finish(folder: Path, planned: Mapping[str, Any], files: Mapping[str, bytes], kind: str = "result") -> Path:
    """A finished artifact of the last step."""
    out = folder / planned["id"]
    out.mkdir(parents=True)
    for name, data in files.items():
        (out / name).write_bytes(data)
    config = {name: planned[name] for name in ("students", "labels")}
    inputs = {"labels": upstream(folder / "earlier")}
    said = {"kind": kind, "step": "evaluate_student", "meta": {}, "seconds": 9.0, "hardware": "2 cores"}
    artifact.finish(out, config=config, inputs=inputs, **said)
    return out


def result(folder: Path, planned: dict[str, Any], *last: float, best: float = 0.0, **more: Any) -> Path:
    """A result whose students end at the given accuracies (fractions); `more`: classes, picture, predicted, ..."""
    classes = more.get("classes", CLASSES)
    students = [
        {"net": s["net"], "recipe": s["recipe"]["name"], "regime": s["recipe"]["regime"], "seed": planned["seed"]}
        | {
            "acc_last": acc,
            "acc_best": max(best, acc),
            "best_epoch": 2,
            "per_class": more.get("per_class", [acc] * len(classes)),
        }
        | {"curve": [[1, acc / 2, 2.0], [2, acc, 1.0]], "images": 30, "image_bytes": 5760, "label_bytes": 7}
        | {"fkd_bytes": 360, "views": 60}
        for s, acc in zip(planned["students"], last, strict=True)
    ]
    said = {k: planned[k] for k in ("id", "method", "ipc", "seed", "options")} | {"dataset": "digits"}
    teacher = {"net": "convnet3", "net_options": {}, "accuracy": 0.9, "classes": len(classes)}
    content = {"cell": said, "teacher": teacher, "classes": classes, "students": students}
    content["data"] = {"images": 1500, "bytes": 288_000, "validation": len(classes)}
    content["neighbours"] = [{"image": i, "real": i, "rms": float(i)} for i in range(3)]
    picture = more.get("picture") or preview(folder, 8)
    files = {"result.json": json.dumps(content).encode(), "preview.png": picture, "neighbours.png": picture}
    if more.get("predicted"):
        evaluate.write_predictions(more["predicted"], [1] * len(classes), folder)
        files["predictions.safetensors"] = (folder / "predictions.safetensors").read_bytes()
    return finish(folder, planned, files)


def failure(folder: Path, planned: dict[str, Any], error: str) -> Path:
    """A cell that failed in synthesis."""
    content = {
        "step": "synthesize",
        "cell": planned,
        "error": error,
        "hint": "do <this>",
        "traceback": "line 1\nline 2",
    }
    return finish(folder, planned, {"failure.json": json.dumps(content).encode()}, "failure")


@pytest.fixture
def three_seeds(tmp_path: Path) -> list[Path]:
    """rded and random at three seeds, median at one."""
    accuracies = {"random": (0.50, 0.51, 0.52), "rded": (0.60, 0.62, 0.61)}
    found = [
        result(tmp_path, cell(method, seed), acc)
        for method, values in accuracies.items()
        for seed, acc in enumerate(values)
    ]
    return [*found, result(tmp_path, cell("median"), 0.512, best=0.53)]


def entry(summary: report.Summary, method: str, **wanted: Any) -> dict[str, Any]:
    """The one leaderboard line of this method with these values."""
    found = [e for e in summary.leaderboard if e["method"] == method and wanted.items() <= e.items()]
    assert len(found) == 1, found
    return found[0]


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        """Attributes of every tag of this name."""
        return [attributes for name, attributes in self.tags if name == tag]


def page(out: Path) -> Page:
    """The parsed report.html."""
    return Page((out / "report.html").read_text(encoding="utf-8"))


def rows(out: Path) -> list[dict[str, str]]:
    """The lines of results.csv."""
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_leaderboard_is_mean_and_sample_std_of_the_last_epoch(three_seeds: list[Path], tmp_path: Path) -> None:
    summary = report.build("toy", three_seeds, tmp_path / "out", "v1")
    rded, random, median = (entry(summary, name) for name in ("rded", "random", "median"))
    assert [e["method"] for e in summary.leaderboard] == ["rded", "median", "random"]
    assert rded["acc_last"] == 61.0
    assert rded["acc_last_std"] == round(statistics.stdev([60, 62, 61]), 2)
    assert (rded["seeds"], rded["to_random"], rded["to_teacher"], rded["tie_with_random"]) == (3, 10.0, -29.0, False)
    assert (random["to_random"], random["baseline"], random["to_teacher"]) == (None, True, -39.0)
    assert (median["acc_last_std"], median["seeds"], median["to_random"]) == (None, 1, 0.2)
    assert median["tie_with_random"] is True  # under half a point whatever the spread
    assert median["acc_best"] == 53.0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["leaderboard"] == summary.leaderboard
    assert summary.metrics["cells"] == 7
    assert all(isinstance(v, int | float) and re.fullmatch(r"[\w. -]+", k) for k, v in summary.metrics.items())


def test_noise_is_two_standard_errors_of_the_difference(tmp_path: Path) -> None:
    values = {"random": (0.50, 0.54), "rded": (0.53, 0.57)}
    made = [result(tmp_path, cell(m, s), acc) for m, accs in values.items() for s, acc in enumerate(accs)]
    rded = entry(report.build("toy", made, tmp_path / "out", ""), "rded")
    assert rded["to_random"] == 3.0
    assert rded["tie_with_random"] is True  # both std 2.83, so two standard errors are 5.66
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "Inside the noise" in markdown
    assert "Fewer than 3 seeds" in markdown


def test_a_single_seed_is_never_judged(tmp_path: Path) -> None:
    made = [result(tmp_path, cell("random"), 0.5), result(tmp_path, cell("rded"), 0.6)]
    assert entry(report.build("toy", made, tmp_path / "out", ""), "rded")["tie_with_random"] is None
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| **rded** | 60.00 | 60.00 | +10.00 | -30.00 | 1 |" in markdown
    assert "One seed: no spread is known" in markdown


def test_csv_has_a_row_per_cell_and_student_and_counts_failures(tmp_path: Path) -> None:
    both = (student("rded"), student("hard", "hard"))
    made = [
        result(tmp_path, cell("rded", students=both), 0.61234, 0.4, best=0.7),
        failure(tmp_path, cell("random", students=both), "UserError: no\nsuch thing"),
    ]
    report.build("toy", made, tmp_path / "out", "v1")
    lines = rows(tmp_path / "out")
    assert [(r["method"], r["recipe"], r["regime"], r["status"]) for r in lines] == [
        ("random", "hard", "hard", "failed"),
        ("rded", "hard", "hard", "ok"),
        ("random", "rded", "soft", "failed"),
        ("rded", "rded", "soft", "ok"),
    ]
    last, failed = lines[3], lines[0]
    assert (last["acc_last"], last["acc_best"], last["teacher"], last["teacher_acc"]) == (
        "61.23",
        "70.00",
        "convnet3",
        "90.00",
    )
    assert {s: float(last[f"seconds_{s}"]) for s in STEPS} == STEPS
    assert (last["seconds_evaluate_student"], last["hardware"], last["dataset"]) == ("9.00", "2 cores", "digits")
    assert [last[k] for k in ("images", "image_bytes", "label_bytes", "fkd_bytes", "views")] == [
        "30",
        "5760",
        "7",
        "360",
        "60",
    ]
    assert (failed["acc_last"], failed["failure"]) == ("", "synthesize: UserError: no such thing")


def test_failures_are_listed_and_do_not_hide_results(three_seeds: list[Path], tmp_path: Path) -> None:
    broken = result(tmp_path, cell("rded", seed=9), 0.99)
    (broken / "preview.png").write_bytes(b"flipped")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    failed = failure(tmp_path, cell("rded", seed=8), "NonFiniteLoss: loss is nan")
    summary = report.build("toy", [failed, unfinished, broken, *three_seeds], tmp_path / "out", "v1")
    assert len(summary.failures) == 3
    assert any("rded, IPC 10, seed 8: synthesize: NonFiniteLoss: loss is nan" in line for line in summary.failures)
    assert any("unfinished" in line and "manifest.json" in line for line in summary.failures)
    assert any("preview.png" in line for line in summary.failures)
    assert entry(summary, "rded")["acc_last"] == 61.0
    assert summary.metrics["cells_failed"] == 3


def test_settings_are_compared_only_with_their_own_baseline(tmp_path: Path) -> None:
    both = (student("rded"), student("hard", "hard"))
    made = [
        result(tmp_path, cell("random", students=both), 0.5, 0.2),
        result(tmp_path, cell("rded", students=both), 0.6, 0.1),
        result(tmp_path, cell("rded", ipc=50, students=both), 0.8, 0.4),
    ]
    summary = report.build("toy", made, tmp_path / "out", "")
    assert entry(summary, "rded", ipc=10, recipe="rded")["to_random"] == 10.0
    assert entry(summary, "rded", ipc=10, recipe="hard")["to_random"] == -10.0
    assert entry(summary, "rded", ipc=50, recipe="hard")["to_random"] is None
    assert entry(summary, "rded", ipc=10, recipe="hard")["labels"] == "none"
    assert "No random baseline in this block" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "Accuracy and number of images" in page(tmp_path / "out").text


def test_variants_of_a_method_and_of_a_recipe_stay_apart(tmp_path: Path) -> None:
    longer = student()
    longer["recipe"] = longer["recipe"] | {"epochs": 5}
    pair = (student(), longer)
    made = [
        result(tmp_path, cell("rded", factor=1, crops=5, students=pair), 0.6, 0.65),
        result(tmp_path, cell("rded", factor=2, crops=5, students=pair), 0.7, 0.75),
        result(tmp_path, cell("rded", ipc=50, factor=2, crops=9, students=pair), 0.8, 0.85),  # crops grows with ipc
    ]
    summary = report.build("toy", made, tmp_path / "out", "")
    assert entry(summary, "rded factor=1", recipe="rded epochs=2")["acc_last"] == 60.0
    assert entry(summary, "rded factor=2", recipe="rded epochs=5", ipc=10)["acc_last"] == 75.0
    assert entry(summary, "rded factor=2", recipe="rded epochs=5", ipc=50)["acc_last"] == 85.0


def test_teachers_go_by_their_names(tmp_path: Path) -> None:
    """Two teachers of one net and one accuracy are two, and of several together no common accuracy is claimed."""
    planned = [cell("cda", factor=f) for f in (1, 2, 3)]
    taught = dict(
        zip((c["id"] for c in planned), ("convnet3", "wide (convnet3)", "convnet3 + wide (convnet3)"), strict=True)
    )
    for one in planned:
        one["options"] = {}
    made = [result(tmp_path, one, acc) for one, acc in zip(planned, (0.5, 0.6, 0.7), strict=True)]
    lost = cell("gvbsm")
    made.append(failure(tmp_path, lost, "UserError: x"))
    taught[lost["id"]] = "convnet3 + wide (convnet3)"
    summary = report.build("toy", made, tmp_path / "out", "", teachers=taught)
    assert {e["teacher"]: e["acc_last"] for e in summary.leaderboard} == {
        "convnet3": 50.0,
        "wide (convnet3)": 60.0,
        "convnet3 + wide (convnet3)": 70.0,
    }
    assert sorted(line["teacher"] for line in rows(tmp_path / "out")) == sorted(taught.values())
    found, markdown = page(tmp_path / "out"), (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "78 % of what its teachers reach (90.00 % on average)" in found.text
    for text in (found.text, markdown):
        assert "digits, teacher wide (convnet3) at 90.00 %" in text
        assert "digits, teachers convnet3 + wide (convnet3) at 90.00 % on average" in text
    assert "convnet3, 90.00 %; convnet3 + wide (convnet3), 90.00 % on average; wide (convnet3), 90.00 %" in found.text
    assert {image["alt"].split(",")[1] for image in found.all("img") if image["alt"].startswith("Images of")} == {
        f" teacher {name}" for name in taught.values()
    }
    assert found.text.count("cda wide (convnet3)") == 1  # a line of its own in the times


def test_a_teacher_counts_once_alone_and_with_others() -> None:
    """convnet3 took 20 s and its companion 5 s; a third, known only beside the companion, 7 s."""
    used = {frozenset("a"): 20.0, frozenset("ab"): 25.0, frozenset("b"): 5.0, frozenset("bc"): 12.0}
    outcomes = [
        Outcome({}, (), None, (), None, "", "", {"prepare_data": 1.5, "train_teacher": seconds}, teachers)
        for teachers, seconds in [*used.items(), *used.items()]
    ]
    assert shared_seconds(outcomes) == {"prepare_data": 1.5, "train_teacher": 32.0}
    assert shared_seconds(outcomes[:2]) == {"prepare_data": 1.5, "train_teacher": 25.0}


def test_accuracy_is_charted_against_ipc_only_where_a_method_has_two(tmp_path: Path) -> None:
    made = [result(tmp_path, cell("random", ipc=1), 0.5), result(tmp_path, cell("rded"), 0.6)]
    report.build("toy", made, tmp_path / "one", "")
    assert "Accuracy and number of images" not in page(tmp_path / "one").text
    report.build("toy", [*made, result(tmp_path, cell("rded", ipc=1), 0.4)], tmp_path / "two", "")
    assert "Accuracy and number of images" in page(tmp_path / "two").text


def test_what_holds_for_every_entry_is_said_once(tmp_path: Path) -> None:
    made = [result(tmp_path, cell("random"), 0.5), result(tmp_path, cell("rded"), 0.6)]
    report.build("toy", made, tmp_path / "out", "")
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "- One seed: no spread is known, so no difference to it can be judged: every entry\n" in markdown


def test_equal_results_in_any_order_give_equal_bytes(three_seeds: list[Path], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    report.build("toy", three_seeds, one, "v1")
    report.build("toy", three_seeds[::-1], two, "v1")
    for name in ("results.csv", "report.md", "report.html", "summary.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_user_text_is_shown_and_never_run(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> $x^2$ | `code` <img src=x onerror=y>"
    made = [result(tmp_path, cell("rded"), 0.6), failure(tmp_path, cell("random"), evil)]
    report.build(evil, made, tmp_path / "out", "<i>v1</i>", config="a: </pre><script>")
    found = page(tmp_path / "out")
    assert found.all("script") == [{}], "the page's own"
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    own = text.partition("<script>")[2].partition("</script>")[0]
    allowed = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in text, "no other script may run"
    assert not found.all("i")
    assert all("onerror" not in attributes for _, attributes in found.tags)
    assert found.text.count(evil) >= 3  # title, heading, failure
    assert all(name in found.text for name in CLASSES)
    assert "</pre><script>" in found.text
    lines = (tmp_path / "out" / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == r"# &lt;script>alert(1)&lt;/script> $x^2$ \| \`code\` &lt;img src=x onerror=y>"


def test_page_asks_for_nothing_and_reads_without_eyes(three_seeds: list[Path], tmp_path: Path) -> None:
    report.build("toy", three_seeds, tmp_path / "out", "v1")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    found = page(tmp_path / "out")
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in found.all("img"))
    assert all(svg["role"] == "img" and "rded 61.0 %" in svg["aria-label"] for svg in found.all("svg"))
    assert len(found.all("img")) == 6, "images and their neighbours"
    assert found.text.count("1 of 3 are training images as they are; any other is 2 of 255 grey levels") == 3
    assert len(found.all("svg")) == 1
    assert all("scope" in header for header in found.all("th"))
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {link["href"][1:] for link in found.all("a")} | {a["aria-labelledby"] for a in found.all("section")}
    drawn = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    assert wanted | drawn <= set(ids)
    assert not re.search(r"#0000[af]\d", text), "a placeholder colour was not turned into a variable"
    assert "prefers-color-scheme: dark" in text


def test_empty_and_failed_runs_have_pages_that_say_so(tmp_path: Path) -> None:
    nothing = report.build("toy", [], tmp_path / "empty", "v1")
    assert (nothing.failures, nothing.leaderboard, nothing.metrics) == ([], [], {"cells": 0, "cells_failed": 0})
    assert "No results reached this report." in page(tmp_path / "empty").text
    summary = report.build("toy", [failure(tmp_path, cell("rded"), "UserError: x")], tmp_path / "failed", "v1")
    found = page(tmp_path / "failed")
    assert len(summary.failures) == 1
    assert "every cell failed" in found.text
    assert all(text in found.text for text in ("UserError: x", "do <this>", "line 2"))
    assert "there is nothing to compare" in (tmp_path / "failed" / "report.md").read_text(encoding="utf-8")


def test_300_cells_stay_under_two_megabytes(tmp_path: Path) -> None:
    names, noise = [f"class {i}" for i in range(100)], preview(tmp_path, 32)
    methods = ("random", "median", "rded", "sre2l", "delt", "dwa")
    cells = [cell(m, ipc=ipc, factor=f) for m in methods for ipc in range(1, 11) for f in range(4)]
    cells += [cell("cda", seed=seed, ipc=ipc) for seed in range(10) for ipc in range(1, 4)]
    predicted = [[(i * 7) % 100 for i in range(100)]]
    made = [result(tmp_path, c, 0.5, classes=names, picture=noise, predicted=predicted) for c in cells]
    made += [failure(tmp_path, cell("random", seed=1 + s), "word " * 5000) for s in range(30)]
    report.build("toy", made, tmp_path / "out", "v1", config="key: value\n" * 20_000)
    text = page(tmp_path / "out").text
    assert len(made) == 300
    assert (tmp_path / "out" / "report.html").stat().st_size < 2_000_000
    for what in ("tables", "grids", "failures"):
        assert f"more {what} left out" in text
    assert "20 more failures left out" not in text
    assert "10 more failures left out" in text


@pytest.mark.parametrize("count", [0, 1, 2, 21, 1000])
def test_any_number_of_classes_renders(tmp_path: Path, count: int) -> None:
    names = [f"class-{i}." for i in range(count)]
    right = [i / count for i in range(count)]
    wrong = [0, *range(count - 1)]  # each class is taken for the one before it
    made = result(tmp_path, cell("rded"), 0.5, classes=names, per_class=right, predicted=[wrong] if count > 1 else [])
    report.build("toy", [made], tmp_path / "out", "v1")
    found = page(tmp_path / "out")
    assert (tmp_path / "out" / "report.html").stat().st_size < 2_000_000
    matrices = [table for table in found.all("table") if "matrix" in table.get("class", "")]
    drawn = [image for image in found.all("img") if "Confusion matrix" in image["alt"]]
    assert (len(matrices), len(drawn)) == {2: (1, 0), 21: (0, 1)}.get(count, (0, 0))
    assert ("class-1. taken for class-0. (100 %)" in found.text) == (count > 1)
    assert ("class-500." in found.text) is False
    assert ("class-999." in found.text) == (count == 1000), "the best and the worst are named"


def test_numbers_that_are_none_are_a_failure_of_their_cell(tmp_path: Path) -> None:
    made = [result(tmp_path, cell("rded"), math.nan), result(tmp_path, cell("random"), 0.5)]
    (empty := result(tmp_path, cell("delt"), 0.5)).joinpath("result.json").write_text("{}")
    (empty / "manifest.json").unlink()
    said = {"config": {}, "inputs": {}, "meta": {}, "seconds": 1.0, "hardware": ""}
    artifact.finish(empty, kind="result", step="evaluate_student", **said)
    summary = report.build("toy", [*made, empty], tmp_path / "out", "v1")
    assert len(summary.failures) == 2
    assert any("an accuracy is nan" in line for line in summary.failures)
    assert any("holds something else than expected (KeyError: 'cell')" in line for line in summary.failures)
    assert [e["method"] for e in summary.leaderboard] == ["random"]
    assert "2 of 3 cells failed" in page(tmp_path / "out").text


def test_the_answer_is_one_sentence(three_seeds: list[Path], tmp_path: Path) -> None:
    report.build("toy", three_seeds, tmp_path / "out", "v1")
    sentence = (
        "rded with 10 images per class reaches 61.0 \u00b1 1.0 % on digits (convnet3, 3 seeds), 68 % of the 90.0 % "
        "that the same net reaches on all images; the best of 3 methods, 10.0 points over random images; "
        "50 times fewer images; 1 min 56 s of compute in all."
    )
    assert sentence in page(tmp_path / "out").text
    assert f"**{sentence}**" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    tried = [result(tmp_path, cell("sre2l", ipc=2, factor=f), f / 10) for f in (1, 2, 3)]
    report.build("toy", tried, tmp_path / "tried", "v1")
    assert "sre2l factor=3 with 2 images per class reaches 30.0 %" in page(tmp_path / "tried").text
    assert "; the best of 3 variants;" in page(tmp_path / "tried").text
    report.build("toy", [*tried, result(tmp_path, cell("rded", ipc=2), 0.1)], tmp_path / "both", "v1")
    assert "; the best of 2 methods;" in page(tmp_path / "both").text, "options of a method make no further one"
    worse = [result(tmp_path, cell("sre2l", ipc=1), 0.4), result(tmp_path, cell("random", ipc=1), 0.5)]
    report.build("toy", worse, tmp_path / "worse", "v1")
    text = page(tmp_path / "worse").text
    assert "sre2l with 1 image per class reaches 40.0 %" in text
    assert "behind random (50.0 %), 10.0 points under random images" in text


def test_weak_evidence_is_named(tmp_path: Path) -> None:
    values = {"random": (0.50, 0.51), "rded": (0.60, 0.61), "sre2l": (0.2, 0.21)}
    made = [result(tmp_path, cell(m, s), acc) for m, accs in values.items() for s, acc in enumerate(accs)]
    report.build("toy", made, tmp_path / "out", "", ungated=["convnet3"])
    lines = (tmp_path / "out" / "report.md").read_text(encoding="utf-8").splitlines()
    where = "(IPC 10 \u00b7 convnet3 \u00b7 rded recipe \u00b7 soft labels, on the fly)"
    assert f"- Worse than random real images, beyond the noise: sre2l {where}" in lines
    assert "- No accuracy was demanded of the teacher (min_accuracy, expected_accuracy): convnet3" in lines
    assert any(line.endswith("not reproduced with this code so far: sre2l") for line in lines)


def test_several_students_of_the_same_sets_stand_side_by_side(tmp_path: Path) -> None:
    nets = ({**student(), "net": "convnet3"}, {**student(), "net": "resnet18"})
    made = [
        result(tmp_path, cell(m, students=nets), *accs) for m, accs in (("random", (0.5, 0.2)), ("rded", (0.6, 0.1)))
    ]
    report.build("toy", made, tmp_path / "out", "")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    table = Page(text[text.index('<table class="nets">') :].partition("</table>")[0])
    title = "IPC 10 \u00b7 rded recipe \u00b7 soft labels, on the fly"
    assert table.text.split("\n")[1:3] == [f"    {title}", "    Methodconvnet3resnet18"]
    assert [line.strip() for line in table.text.splitlines() if "." in line] == ["rded60.0010.00", "random50.0020.00"]
    report.build("toy", made[:0], tmp_path / "none", "")
    assert "Other networks" not in page(tmp_path / "none").text


def test_costs_and_hashes_are_those_of_the_artifacts(tmp_path: Path) -> None:
    made = result(tmp_path, cell("rded"), 0.5)
    report.build("toy", [made], tmp_path / "out", "v1", config="name: toy")
    found = page(tmp_path / "out")
    manifest = artifact.read(made)
    assert "7.5" in found.text.partition("Time and memory")[2], "30 images in 4 s"
    assert "4.8 MiB" in found.text, "the peak of synthesize, larger than the last step's"
    assert "50\u00d7" in found.text, "288,000 bytes of all images against 5,767 bytes"
    hashes = [attributes["title"] for attributes in found.all("code") if "title" in attributes]
    assert manifest.fingerprint in hashes
    assert manifest.inputs["labels"] in hashes
    assert hashlib.sha256(b"name: toy").hexdigest() in found.text


def test_sizes_are_said_alike_everywhere() -> None:
    said = {0: "0 B", 1023: "1023 B", 5767: "5.6 KiB", 3 << 20: "3.0 MiB", 5 << 40: "5.0 TiB", 5 << 50: "5120.0 TiB"}
    assert {count: words.size(count) for count in said} == said == {count: console.size(count) for count in said}
    assert words.size(None) == words.NOTHING


@pytest.mark.parametrize(("side", "shown", "gap"), [(8, 32, 2), (32, 32, 2), (64, 64, 4), (224, 96, 6)])
def test_preview_is_a_grid_of_classes(tmp_path: Path, side: int, shown: int, gap: int) -> None:
    labels = torch.arange(12).repeat_interleave(3)
    images = (labels * 20).to(torch.uint8)[:, None, None, None].expand(-1, 3, side, side)
    write_preview(images, labels, tmp_path / "a.png", max_classes=4, per_class=2)
    write_preview(images, labels, tmp_path / "b.png", max_classes=4, per_class=2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        step = shown + gap
        assert picture.size == (2 * step - gap, 4 * step - gap)
        pixels = [picture.getpixel((step + shown // 2, y * step + shown // 2)) for y in range(4)]
        assert pixels == [(20 * y, 20 * y, 20 * y, 255) for y in range(4)]
        assert picture.getpixel((shown, 0)) == (0, 0, 0, 0)


def test_preview_of_uneven_classes_leaves_gaps(tmp_path: Path) -> None:
    images = torch.full((3, 3, 32, 32), 200, dtype=torch.uint8)
    write_preview(images, torch.tensor([5, 1, 5]), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (66, 66)
        assert picture.getpixel((50, 10)) == (0, 0, 0, 0)  # label 1 has one image, so its second place is empty
        assert picture.getpixel((50, 50)) == (200, 200, 200, 255)
