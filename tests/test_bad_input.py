"""Mistakes and mishaps at the command line: one message that names thing and remedy, and never a traceback.

Exit status 2 is the user's mistake, 1 anything else. The parts' own tests try more cases; here each kind goes the whole
way through `main`, and what should be known before the work is refused before the work.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from _pictures import folder
from _servers import free_port
from safetensors.torch import load_file, save_file
from test_experiment import mutate
from test_store_failures import refusal, scripted

from distillery import __main__ as command
from distillery import artifact, run
from distillery.data import _sources, label_file
from distillery.store import open_store

SMALL = {"net": "convnet1", "net_options": {"width": 8}}
BASE: dict[str, Any] = {
    "name": "toy",
    "dataset": {"name": "digits", "per_class": 10},
    "teacher": {**SMALL, "epochs": 4, "batch": 20, "lr": 0.05, "flip": 0.0},
    "methods": [{"method": "random", "ipc": [1]}],
    "students": [{**SMALL, "recipe": {"preset": "fair-soft", "epochs": 2}}],
    "labels": {"mode": "stored"},
}
ENDPOINT = "http://127.0.0.1:9"  # nobody listens there


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., Said]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLERY_LOG", "quiet")
    monkeypatch.setenv("DISTILLERY_CACHE", str(tmp_path / "cache"))
    for name, value in {"ENDPOINT_URL": ENDPOINT, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b" * 8}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("DISTILLERY_STORE_TIMEOUT", "0.5")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`distillery ARGUMENTS` in this process; an exception that leaks out of `main` fails the test by itself."""

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["distillery", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        return Said(int(ended.value.code or 0), shown.out, shown.err)

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that went well; tests work on copies."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLERY_LOG", "quiet")
        assert run.run(yaml.safe_dump(BASE), str(out)).failures == []
        yield out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def written(tmp_path: Path, **changes: Any) -> Path:
    """The base experiment as a file, with top-level values replaced."""
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(BASE | changes, sort_keys=False))
    return path


def refused(said: Said, code: int, *words: str) -> None:
    """The command ended with this status and one message that holds all of these words."""
    assert said.code == code, said
    assert "error: " in said.err.lower(), said.err
    for word in words:
        assert word in said.err, f"{word!r} is missing in: {said.err}"


# --- the experiment file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["check", "plan", "run"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labls": {}}, ["labls", "did you mean 'labels'"]),
        ({"teacher": {**SMALL, "epochs": "4"}}, ["teacher.epochs", "'4'", "integer"]),
        ({"methods": [{"method": "rded", "ipc": [2], "options": {"mipc": 1}}]}, ["ipc 2", "mipc 1", "raise mipc to 2"]),
        ({"methods": [{"method": "rdet", "ipc": [1]}]}, ["methods[0].method", "'rdet'", "did you mean 'rded'"]),
        ({"students": [{"net": "resnet19_modified"}]}, ["students[0].net", "did you mean 'resnet18_modified'"]),
        ({"dataset": {"name": "digit"}}, ["dataset.name", "'digit'", "did you mean 'digits'"]),
    ],
)
def test_a_faulty_experiment_starts_nothing(
    cli: Cli, tmp_path: Path, verb: str, changes: dict[str, Any], words: list[str]
) -> None:
    out = tmp_path / "out"
    refused(cli(verb, written(tmp_path, **changes), *(["--out", out] if verb == "run" else [])), 2, *words)
    assert not out.exists()


def test_more_images_than_a_class_has_are_refused_before_the_teacher(cli: Cli, tmp_path: Path) -> None:
    path = written(tmp_path, methods=[{"method": "random", "ipc": [11]}])
    refused(cli("run", path, "--out", tmp_path / "out"), 2, "ipc 11", "10 real training images", "lower ipc")
    assert not (tmp_path / "out" / "2-teachers").exists()


def test_a_student_that_cannot_take_the_images_is_refused_before_the_work(cli: Cli, tmp_path: Path) -> None:
    path = written(tmp_path, students=[{"net": "convnet6"}])  # 16 px can be halved four times
    refused(cli("check", path), 2, "students[0]", "convnet6", "16")


def test_an_experiment_that_is_not_there_is_named(cli: Cli, tmp_path: Path) -> None:
    refused(cli("check", tmp_path / "no.yaml"), 2, "no.yaml", "shipped experiments")
    refused(cli("check", tmp_path), 2, str(tmp_path), "give a path")


@pytest.mark.parametrize(
    "arguments", [["run"], ["run", "x", "--bogus"], ["check"], ["bogus"], ["run", "x", "--out", "y", "--log", "loud"]]
)
def test_a_mistyped_command_is_explained(cli: Cli, arguments: list[str]) -> None:
    refused(cli(*arguments), 2)


def test_mutated_files_at_the_command_line_give_no_traceback(cli: Cli, tmp_path: Path) -> None:
    rng, codes = random.Random(3), []
    for _ in range(60):
        text = yaml.safe_dump(mutate(mutate(BASE, rng), rng))
        cut = rng.randrange(len(text))
        (tmp_path / "x.yaml").write_text(
            text if rng.random() < 0.7 else text[:cut] + rng.choice("{:\x00\t") + text[cut:]
        )
        codes.append(cli("check", tmp_path / "x.yaml").code)
    assert set(codes) <= {0, 2}, codes
    assert codes.count(2) > 30, codes


# --- the data ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A sound folder of three classes of images."""
    return folder(tmp_path / "in", {"ant": 2, "bee": 2, "cow": 2})


def of_folder(tmp_path: Path, root: Path | str, **options: Any) -> Path:
    return written(tmp_path, dataset={"name": "imagefolder", "root": str(root), "size": 8, **options})


def test_a_root_that_is_missing_is_named(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(cli("run", of_folder(tmp_path, tmp_path / "nowhere"), "--out", out), 2, "nowhere", "correct root")
    path = written(tmp_path, dataset={"name": "cifar10", "root": str(tmp_path / "nowhere")})
    refused(cli("run", path, "--out", out), 2, "cifar10", "nowhere", "download: true")


@pytest.mark.parametrize("verb", ["check", "run"])
def test_no_classes_are_refused(cli: Cli, tmp_path: Path, verb: str) -> None:
    for split in ("train", "val"):
        (tmp_path / "none" / split).mkdir(parents=True)
        (tmp_path / "none" / split / "loose.png").touch()
    path = of_folder(tmp_path, tmp_path / "none")
    refused(cli(verb, path, *(["--out", tmp_path / "out"] if verb == "run" else [])), 2, "0 class folders", "layout")


def test_classes_that_do_not_fit_are_named(cli: Cli, tmp_path: Path, pictures: Path) -> None:
    path = of_folder(tmp_path, pictures)
    (pictures / "train" / "dog").mkdir()
    refused(cli("run", path, "--out", tmp_path / "out"), 2, "train/dog is an empty class", "remove the folder")
    (pictures / "train" / "dog").rename(pictures / "val" / "cat")
    _sources.class_names.cache_clear()  # a new process would list the folder again
    refused(cli("run", path, "--out", tmp_path / "out"), 2, "class 'cat', which train lacks", "rename or remove")


def test_an_unreadable_image_stops_the_run_or_is_skipped_up_to_the_limit(
    cli: Cli, tmp_path: Path, pictures: Path
) -> None:
    for cls in ("ant", "bee"):
        path = pictures / "train" / cls / "1.png"
        path.write_bytes(path.read_bytes()[:200])
    out = ("--out", tmp_path / "out")
    refused(cli("run", of_folder(tmp_path, pictures), *out), 2, "train/ant/1.png", "truncated", "on_unreadable: skip")
    skip = of_folder(tmp_path, pictures, on_unreadable="skip", max_unreadable=1)
    refused(cli("run", skip, *out), 2, "2 unreadable", "max_unreadable: 1", "train/ant/1.png", "raise max_unreadable")
    assert cli("run", of_folder(tmp_path, pictures, on_unreadable="skip", max_unreadable=2), *out).code == 0


# --- the teacher ---------------------------------------------------------------------------------------------------


def taught(finished: Path) -> tuple[Path, float]:
    """Weights of the finished run's teacher, and its accuracy."""
    (card,) = finished.glob("2-teachers/*/teacher.json")
    return card.parent / "weights.safetensors", json.loads(card.read_text())["accuracy"]


def with_weights(tmp_path: Path, weights: Path, **changes: Any) -> Path:
    return written(tmp_path, teacher=BASE["teacher"] | {"weights": str(weights)} | changes)


def test_the_gate_tells_a_teacher_of_other_normalisation(cli: Cli, tmp_path: Path, finished: Path) -> None:
    weights, accuracy = taught(finished)
    right = {"expected_accuracy": accuracy, "tolerance": 0.01}
    out = ("--out", tmp_path / "out")
    wrong = with_weights(tmp_path, weights, **right, mean=[5.0, -5.0, 5.0], std=[0.1, 3.0, 0.1])
    refused(cli("run", wrong, *out), 2, "expected_accuracy", "another normalisation", "teacher.mean")
    assert not (tmp_path / "out" / "3-synthetic").exists(), "something was spent on synthesis"
    assert cli("run", with_weights(tmp_path, weights, **right), *out).code == 0


def test_a_teacher_of_other_classes_is_refused(cli: Cli, tmp_path: Path, finished: Path, pictures: Path) -> None:
    weights, _ = taught(finished)
    dataset = {"name": "imagefolder", "root": str(pictures), "size": 16}
    teacher = BASE["teacher"] | {"weights": str(weights)}
    out = ("--out", tmp_path / "out")
    refused(cli("run", written(tmp_path, dataset=dataset, teacher=teacher), *out), 2, "10 classes", "weights")
    named = teacher | {"classes": [f"digit {i}" for i in range(10)]}
    refused(cli("run", written(tmp_path, dataset=dataset, teacher=named), *out), 2, "teacher.classes", "ant, bee, cow")


def test_weights_that_do_not_fit_are_refused(cli: Cli, tmp_path: Path, finished: Path) -> None:
    weights, _ = taught(finished)
    out = ("--out", tmp_path / "out")
    wide = with_weights(tmp_path, weights, net_options={"width": 16})
    refused(cli("run", wide, *out), 2, "do not fit", "of another shape", "teacher.net_options")
    refused(cli("run", with_weights(tmp_path, tmp_path / "weights.pt"), *out), 2, "weights.pt", "no such file")
    (tmp_path / "weights.pt").write_bytes(b"\x80\x04K\x01.")
    refused(cli("run", with_weights(tmp_path, tmp_path / "weights.pt"), *out), 2, "weights.pt", "safetensors")
    state = load_file(weights)
    save_file(
        {k: v * torch.nan if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "nan.safetensors"
    )
    refused(cli("run", with_weights(tmp_path, tmp_path / "nan.safetensors"), *out), 2, "nan.safetensors", "NaN")


def test_a_teacher_that_diverges_stops_the_run(cli: Cli, tmp_path: Path) -> None:
    path = written(tmp_path, teacher=BASE["teacher"] | {"lr": 1e30})
    refused(cli("run", path, "--out", tmp_path / "out"), 1, "loss is", "at step", "checkpoint", "lower lr")


def test_a_student_that_diverges_fails_its_cell_and_leaves_the_report(cli: Cli, tmp_path: Path) -> None:
    bad = {**SMALL, "recipe": {"preset": "fair-hard", "epochs": 6, "lr": 1e30}}
    said = cli("run", written(tmp_path, students=[bad]), "--out", tmp_path / "out")
    refused(said, 1, "evaluate_student", "loss is", "at step", "checkpoint", "lower lr")
    assert (tmp_path / "out" / "6-report" / "report.html").exists()


# --- the output place ----------------------------------------------------------------------------------------------


def test_the_output_of_another_experiment_is_refused(cli: Cli, tmp_path: Path, copy: Path) -> None:
    refused(cli("run", written(tmp_path, name="other"), "--out", copy), 2, "'toy'", "'other'", "choose another --out")


def test_a_second_process_on_the_same_output_is_refused(cli: Cli, tmp_path: Path) -> None:
    with open_store(tmp_path / "out").hold("run"):
        said = cli("run", written(tmp_path), "--out", tmp_path / "out")
    refused(said, 2, "in use by process", str(os.getpid()), "choose another output")


def test_an_output_that_is_no_folder_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(cli("run", written(tmp_path), "--out", tmp_path / "file"), 2, "file", "give a folder")
    refused(cli("run", written(tmp_path), "--out", "gs://bucket/x"), 2, "gs://bucket/x", "s3://bucket/prefix")
    refused(cli("run", written(tmp_path), "--out", "~nobody-of-that-name/x"), 2, "nobody-of-that-name")


def test_a_file_uri_and_its_path_are_one_place(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "with space"
    assert cli("run", written(tmp_path), "--out", out.as_uri()).code == 0
    assert {p.name for p in out.iterdir()} >= {"experiment.yaml", "1-data", "6-report"}


DAMAGES = ("flipped", "truncated", "missing")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("what", ["1-data/*/train-*.safetensors", "3-synthetic/*/images.safetensors"])
def test_a_damaged_shard_is_named(cli: Cli, tmp_path: Path, copy: Path, what: str, damage: str) -> None:
    (path,) = copy.glob(what)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(data if damage == "flipped" else data[:-5])
    refused(cli("inspect", path.parent), 1, str(path), "delete")
    refused(cli("run", written(tmp_path), "--out", copy), 1, str(path), "delete")


def test_a_manifest_of_a_newer_version_is_refused(cli: Cli, tmp_path: Path, copy: Path) -> None:
    (path,) = copy.glob("2-teachers/convnet1-*/manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    for said in (cli("inspect", path.parent), cli("run", written(tmp_path), "--out", copy)):
        refused(said, 1, str(path), "schema 99", "upgrade distillery")


# --- a full disk ---------------------------------------------------------------------------------------------------

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")


@needs_full
def test_a_disk_full_from_the_start_is_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    part = tmp_path / "out" / f"experiment.yaml.{os.getpid()}-{threading.get_ident()}.part"
    part.symlink_to("/dev/full")
    said = cli("run", written(tmp_path), "--out", tmp_path / "out")
    refused(said, 1, "full", str(tmp_path / "out" / "experiment.yaml"), "free space")


@needs_full
@pytest.mark.parametrize("name", ["log.jsonl", "5-students/*/result.json"])
def test_a_disk_full_in_the_middle_is_named(cli: Cli, tmp_path: Path, copy: Path, name: str) -> None:
    (path,) = copy.glob(name)
    path.unlink()
    path.symlink_to("/dev/full")
    (path.parent / artifact.MANIFEST).unlink(missing_ok=True)
    said = cli("run", written(tmp_path), "--out", copy)
    refused(said, 1, str(copy), "free space")


def test_stored_labels_take_their_space_before_they_are_mapped(tmp_path: Path) -> None:
    """Writing to a mapped hole on a full disk is a SIGBUS: the process would end without a word."""
    label_file.create(tmp_path / "x.part", images=1000, epochs=50, classes=10, top_k=0)
    stat = (tmp_path / "x.part").stat()
    assert stat.st_blocks * 512 >= stat.st_size


# --- the object store ----------------------------------------------------------------------------------------------


def test_a_store_that_does_not_answer_is_named(cli: Cli, tmp_path: Path) -> None:
    refused(cli("run", written(tmp_path), "--out", "s3://bucket/x"), 1, ENDPOINT, "'bucket'", "AWS_ENDPOINT_URL")
    refused(cli("check", of_folder(tmp_path, "s3://bucket/x")), 1, ENDPOINT, "AWS_ENDPOINT_URL")
    refused(cli("check", "s3://bucket/toy.yaml"), 1, ENDPOINT, "AWS_ENDPOINT_URL")


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (403, "InvalidAccessKeyId", ["wrong credentials", "AWS_ACCESS_KEY_ID"]),
        (403, "SignatureDoesNotMatch", ["wrong credentials", "AWS_SECRET_ACCESS_KEY"]),
        (404, "NoSuchBucket", ["'bucket'", "create that bucket"]),
    ],
)
def test_wrong_keys_and_missing_buckets_are_the_users_mistake(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, answer: str, words: list[str]
) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("DISTILLERY_STORE_TIMEOUT", "60")  # somebody answers, in his time
    with scripted(endpoint, [refusal(status, answer)]):
        refused(cli("run", written(tmp_path), "--out", "s3://bucket/x"), 2, *words)
        refused(cli("check", of_folder(tmp_path, "s3://bucket/x")), 2, *words)


# --- what must be installed and set --------------------------------------------------------------------------------


def test_a_report_that_could_not_be_written_is_known_before_the_work(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "distillery.report.page", raising=False)
    said = cli("run", written(tmp_path), "--out", tmp_path / "out")
    refused(said, 2, "jinja2", "pip install")
    assert not (tmp_path / "out" / "2-teachers").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("DISTILLERY_CHECKPOINT_SECONDS", "soon"), ("DISTILLERY_LOG", "loud")], ids=["every", "log"]
)
def test_bad_settings_are_named(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    refused(cli("run", written(tmp_path), "--out", tmp_path / "out"), 2, name, repr(value))


def test_an_interrupted_run_says_how_to_go_on(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", stop)
    said = cli("run", written(tmp_path), "--out", tmp_path / "out")
    assert said.code == 130
    assert "start the same command again" in said.err
