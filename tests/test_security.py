"""No secret is written anywhere, text from outside stays text, and what is read from outside has limits."""

from __future__ import annotations

import html
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from _pictures import folder
from _servers import Server, minio_binary, wait_for
from _servers import minio as minio_server
from PIL import Image

from distillery import artifact, console, experiment, run, steps
from distillery.data import _decode
from distillery.errors import CorruptArtifact, DistilleryError, UserError
from distillery.store import check_access, open_store

ROOT = Path(__file__).resolve().parent.parent
MARKS = {name: f"{name}MARK{uuid.uuid4().hex[:16]}" for name in ("user", "secret", "token", "typo")}
TEXT = """
name: toy
dataset: {name: digits, per_class: 10}
teacher: {net: convnet1, net_options: {width: 4}, epochs: 1, batch: 50, flip: 0.0, lr: 0.05}
methods:
  - {method: random, ipc: [1]}
students:
  - {net: convnet1, net_options: {width: 4}, recipe: {preset: rded, epochs: 2}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """MinIO with keys that are found again wherever they are written."""
    if not minio_binary():
        pytest.skip("Swift's keys cannot be chosen; `make minio` builds MinIO")
    found = minio_server(tmp_path_factory.mktemp("minio"))
    found.access, found.secret = MARKS["user"], MARKS["secret"]
    found.variables |= {"MINIO_ROOT_USER": found.access, "MINIO_ROOT_PASSWORD": found.secret}
    try:
        found.start()
        wait_for(found.endpoint, found.process, found.log) if found.process else None
        yield found
    finally:
        found.kill()


def leaks(place: str, data: bytes) -> list[str]:
    """The secrets in some bytes."""
    return [f"{name} in {place}" for name, mark in MARKS.items() if mark.encode() in data]


def fails(act: object) -> str:
    """The message of an act that must fail."""
    with pytest.raises(DistilleryError) as caught:
        act()  # type: ignore[operator]
    chain, error = [], caught.value
    while error is not None:  # a traceback in a log shows the causes too
        chain.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(chain)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("form", ["json", "quiet"])
def test_no_secret_is_written_anywhere(
    server: Server,
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "urllib3")  # the Kubernetes client, where a test has used it, has made it quieter
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DISTILLERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DISTILLERY_LOG", form)
    monkeypatch.setenv("DISTILLERY_CHECKPOINT_SECONDS", "0")
    bucket = f"b-{uuid.uuid4().hex}"
    server.make_bucket(bucket)
    assert run.run(TEXT, f"s3://{bucket}/run").failures == []
    steps.prepare_data(TEXT, tmp_path / "data", f"s3://{bucket}/checkpoints")
    console.emit({"event": "plan", "cells": steps.plan(TEXT, checkpoints=f"s3://{bucket}/checkpoints")})

    said = [fails(lambda: check_access("s3://no-such-bucket/x"))]
    for name, value in (
        ("AWS_SECRET_ACCESS_KEY", MARKS["typo"]),
        ("AWS_ACCESS_KEY_ID", MARKS["typo"]),
        ("AWS_SESSION_TOKEN", MARKS["token"]),
        ("AWS_ENDPOINT_URL", f"http://{MARKS['user']}:{MARKS['secret']}@127.0.0.1:{server.port}"),
        ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}/?X-Amz-Signature={MARKS['secret']}"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            patch.setenv("DISTILLERY_STORE_TIMEOUT", "1")  # here alone: what must succeed may take its time
            said.append(fails(lambda: check_access(f"s3://{bucket}/x")))
            said.append(fails(lambda: steps.prepare_data(TEXT, tmp_path / "again", f"s3://{bucket}/elsewhere")))
    with_keys = f"s3://{MARKS['user']}:{MARKS['secret']}@{bucket}/x"
    said.append(fails(lambda: open_store(with_keys)))
    said.append(fails(lambda: open_store(f"https://{MARKS['user']}@host/x?X-Amz-Signature={MARKS['secret']}")))
    said.append(fails(lambda: run.run(TEXT, with_keys)))
    said.append(fails(lambda: steps.plan(TEXT, checkpoints=with_keys)))
    for key in ("root", "store"):
        said.append(fails(lambda key=key: experiment.load(TEXT.replace("per_class: 10", f"{key}: '{with_keys}'"))))

    assert all(text.strip() for text in said)
    found = leaks("an error", "\n".join(said).encode())
    out, err = capfd.readouterr()
    assert (form == "json") == bool(err)
    found += leaks("the output", (out + err).encode()) + leaks("the log", caplog.text.encode())
    assert "urllib3" in caplog.text, "the debug log was not looked at"
    assert "X-Amz-Signature" not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "manifest.json" for path in files)
    for path in files:
        found += leaks(str(path), path.read_bytes())
    store = open_store(f"s3://{bucket}")
    entries = store.list()
    assert {"run", "checkpoints"} <= {entry.key.split("/")[0] for entry in entries}
    for entry in entries:
        found += leaks(entry.key, store.read(entry.key)) + leaks("a key", entry.key.encode())
    assert not found, found


def test_compiled_pipelines_take_keys_from_secrets_alone() -> None:
    for path in sorted((ROOT / "pipelines").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        assert "secretAsEnv" in text
        named = re.findall(r"- name: (AWS_\w*(?:KEY|SECRET|TOKEN)\w*)\n\s+value", text)
        assert not named, f"{path.name} carries values of {named}"


class Tags(HTMLParser):
    """The tags of a page and what their attributes say."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, [name for name, _ in attrs]))


EVIL = (
    "<img src=x onerror=alert(1)>",
    "%2F..%2F..%2Fescaped",
    "'; touch escaped; $(touch escaped) `touch escaped` #",
    '"><svg onload=alert(1)>',
    "{{ 7 * 7 }}{% include x %}",
    "|..\\escaped\n# title",
    "\N{PILE OF POO}\N{RIGHT-TO-LEFT OVERRIDE}gnp",
    "x" * 250,
)


@pytest.mark.timeout(300)
def test_names_of_classes_and_files_stay_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From folders of images to the report: nothing lands elsewhere, nothing becomes a tag."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILLERY_LOG", "json")
    root = folder(tmp_path / "pictures", dict.fromkeys(EVIL, 3), val=2, side=(16, 16))
    (root / "train" / EVIL[0] / "<b>$(touch escaped).png").write_bytes(
        (root / "train" / EVIL[0] / "0.png").read_bytes()
    )
    dataset = {"name": "imagefolder", "root": str(root), "size": 16}
    text = TEXT.replace("batch: 50", "batch: 4").replace("{name: digits, per_class: 10}", json.dumps(dataset))
    before = set(tmp_path.parent.iterdir())
    done = run.run(text, str(tmp_path / "out"))
    assert done.failures == []
    (data,) = (tmp_path / "out").glob("1-data/*/data.json")
    assert sorted(json.loads(data.read_text())["classes"]) == sorted(EVIL)
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "out"}
    assert set(tmp_path.parent.iterdir()) == before
    assert not list(tmp_path.rglob("escaped*"))
    page, tags = (done.report / "report.html").read_text(encoding="utf-8"), Tags()
    tags.feed(page)
    assert html.escape(EVIL[0]) in page
    assert not [attrs for tag, attrs in tags.seen if any(name.startswith("on") for name in attrs)]
    assert "src=x" not in [a for _, attrs in tags.seen for a in attrs]
    for line in capfd.readouterr().err.splitlines():
        json.loads(line)  # no name breaks a line of the log in two


@pytest.mark.parametrize("name", [EVIL[0], "../../x", "a\0b", "x" * 300])
def test_an_experiment_has_a_plain_name(name: str) -> None:
    with pytest.raises(UserError, match="name: String should match pattern"):
        experiment.load(TEXT.replace("name: toy", f"name: {json.dumps(name)}"))


def test_a_name_that_is_a_path_is_refused() -> None:
    with pytest.raises(UserError, match="key of a store"):
        open_store("s3://bucket/x").read("../secret")
    manifest = {"schema": artifact.SCHEMA, "files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}
    with pytest.raises(CorruptArtifact):
        artifact.parse(json.dumps(manifest).encode(), "here")


def bombs(tmp_path: Path) -> dict[str, str]:
    """Experiments that would fill a memory."""
    laughs = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))
    big = tmp_path / "big.yaml"
    big.write_bytes(b"name: x\n" + b"#" * 2**21)
    return {
        "aliases": f"a0: &a0 [1]\n{laughs}\n",
        "text": "name: x\n#" + "x" * 2**21,
        "file": str(big),
        "uri": big.as_uri(),
    }


@pytest.mark.parametrize("kind", ["aliases", "text", "file", "uri"])
def test_an_experiment_has_a_size(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match="more than"):
        experiment.load(bombs(tmp_path)[kind])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_manifest_and_an_image_have_a_size(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact, match="more than a manifest can have"):
        artifact.parse(b" " * (artifact.MAX_MANIFEST + 1), "here")
    path = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(path)
    assert os.path.getsize(path) < 100_000
    with pytest.raises(_decode.Unreadable, match="12000 x 12000 px: more than"):
        _decode.picture(path.read_bytes())
