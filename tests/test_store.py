"""One set of tests for every kind of store: a local folder, Swift, and MinIO where its binary is.

What only a broken server shows is in test_store_failures.py.
"""

import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from _artifacts import FILES, child, make, raises_quickly
from _servers import Server, available

from distillery import artifact
from distillery.artifact import MANIFEST
from distillery.errors import CorruptArtifact, StoreError, UserError
from distillery.store import MissingKey, Store, _lease, _patience, check_access, open_store

MIB = 1 << 20
FOREIGN = {"host": "elsewhere", "pid": 7, "since": "noon", "place": "another boot", "token": "t", "beats": 0}


@pytest.fixture(params=available())
def server(request: pytest.FixtureRequest, servers: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch) -> Server:
    """A running server that the environment points to, with the bucket `bucket`."""
    found = servers(request.param)
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def bucket(server: Server) -> str:
    """URI of a prefix in a new bucket."""
    name = f"b-{uuid.uuid4().hex}"
    server.make_bucket(name)
    return f"s3://{name}/runs/one"


@pytest.fixture(params=["local", *available()])
def uri(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of an empty store of each kind."""
    if request.param == "local":
        return (request.getfixturevalue("tmp_path") / "a store").as_uri()
    server = request.getfixturevalue("servers")(request.param)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    name = f"b-{uuid.uuid4().hex}"
    server.make_bucket(name)
    return f"s3://{name}/runs/one"


@pytest.fixture
def quick_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that beat and settle in tenths of seconds; only who says so gives up a holder that is silent."""
    for name, value in {"BEAT": 0.3, "STALE": 60.0, "SETTLE": 0.1, "POLL": 0.1}.items():
        monkeypatch.setattr(_lease, name, value)


def sent(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the files that are really uploaded from now on."""
    keys: list[str] = []
    put = store.put

    def noted(key: str, path: Path, sha256: str = "") -> None:
        keys.append(key)
        put(key, path, sha256)

    monkeypatch.setattr(store, "put", noted)
    return keys


def test_objects_are_written_read_listed_and_deleted(uri: str) -> None:
    store = open_store(uri)
    assert store.list() == []
    store.write("a/one", b"1")
    store.write("a/two", b"22")
    store.write("ab", b"")
    store.write("a/one", b"new")
    assert [(e.key, e.bytes) for e in store.list()] == [("a/one", 3), ("a/two", 2), ("ab", 0)]
    assert [e.key for e in store.list("a/")] == ["a/one", "a/two"]
    assert [e.key for e in store.list("a/t")] == ["a/two"]
    assert store.list("nothing/here") == []
    assert store.read("a/one") == b"new"
    assert (store.exists("ab"), store.exists("a"), store.exists("x")) == (True, False, False)
    assert (store.read_part("a/one", 0, 3), store.read_part("a/one", 1, 2)) == (b"new", b"ew")
    for start in (1, 3, 9):
        with pytest.raises(StoreError, match="a/one"):
            store.read_part("a/one", start, 3)
    with pytest.raises(MissingKey, match="a/none"):
        store.read_part("a/none", 0, 1)
    store.delete("a/one")
    store.delete("a/one")
    with pytest.raises(MissingKey, match="a/one"):
        store.read("a/one")
    assert open_store(f"{uri}/a").read("two") == b"22"


def test_etags_change_with_the_content(uri: str) -> None:
    store = open_store(uri)
    etags = set()
    for data in (b"1", b"22", b"333"):
        store.write("x", data)
        etags.add(store.list()[0].etag)
    assert len(etags) == 3


@pytest.mark.parametrize("key", ["", "/x", "../x", "a/../../x", "a//b"])
def test_keys_stay_inside_the_store(uri: str, key: str) -> None:
    store = open_store(uri)
    for act in (store.read, store.delete, store.exists, store.sha256, lambda name: store.write(name, b"")):
        with pytest.raises(UserError, match="cannot be a key"):
            act(key)


def test_files_of_several_parts_travel_whole(uri: str, tmp_path: Path) -> None:
    store, data = open_store(uri), os.urandom(35 * MIB + 5)
    (tmp_path / "big").write_bytes(data)
    store.put("big", tmp_path / "big")
    sha = store.sha256("big")
    store.fetch("big", tmp_path / "back", sha)
    assert (tmp_path / "back").read_bytes() == data
    with pytest.raises(CorruptArtifact, match="big"):
        store.fetch("big", tmp_path / "back", "0" * 64)
    assert (tmp_path / "back").read_bytes() == data, "a wrong download must not replace what is there"
    with pytest.raises(MissingKey):
        store.fetch("none", tmp_path / "none")
    assert sorted(p.name for p in tmp_path.glob("b*")) == ["back", "big"]


def test_an_artifact_comes_back_equal(uri: str, tmp_path: Path) -> None:
    store, steps = open_store(uri), []
    manifest = make(tmp_path / "a", FILES)
    store.push(tmp_path / "a", "cell/synthetic", progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (1500, 1500)
    pulled = store.pull("cell/synthetic", tmp_path / "b", progress=lambda done, total: steps.append((done, total)))
    assert pulled.fingerprint == manifest.fingerprint == artifact.read(tmp_path / "b").fingerprint
    assert {name: (tmp_path / "b" / name).read_bytes() for name in FILES} == FILES
    assert (tmp_path / "b" / MANIFEST).read_bytes() == (tmp_path / "a" / MANIFEST).read_bytes()


def test_a_push_sends_only_what_is_missing(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(uri)
    make(tmp_path / "a", FILES)
    store.push(tmp_path / "a", "x")
    keys = sent(store, monkeypatch)
    store.push(tmp_path / "a", "x")
    assert keys == []
    make(tmp_path / "a", {"empty": b"no longer"})
    store.push(tmp_path / "a", "x")
    assert keys == ["x/empty"]
    store.delete("x/images.bin")
    store.push(tmp_path / "a", "x")
    assert keys == ["x/empty", "x/images.bin"]
    store.pull("x", tmp_path / "b")


def test_a_broken_off_push_is_not_believed(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(uri)
    make(tmp_path / "a", FILES, version=1)
    store.push(tmp_path / "a", "x")
    make(tmp_path / "a", {name: data + b"!" for name, data in FILES.items()}, version=2)
    put = store.put

    def fails(key: str, path: Path, sha256: str = "") -> None:
        if key.endswith("images.bin"):
            raise StoreError(f"{key}: as if the process had been killed")
        put(key, path, sha256)

    with monkeypatch.context() as patch:
        patch.setattr(store, "put", fails)
        with pytest.raises(StoreError, match="killed"):
            store.push(tmp_path / "a", "x")
    with pytest.raises(CorruptArtifact, match=MANIFEST):
        store.pull("x", tmp_path / "b")
    store.push(tmp_path / "a", "x")
    assert store.pull("x", tmp_path / "b").meta == {"version": 2}


def test_a_damaged_artifact_is_not_pushed(uri: str, tmp_path: Path) -> None:
    store = open_store(uri)
    make(tmp_path / "a", FILES, version=1)
    for damaged in (b"I" * 1000, b"i" * 999):
        (tmp_path / "a" / "images.bin").write_bytes(damaged)
        with pytest.raises(CorruptArtifact, match=r"images\.bin"):
            store.push(tmp_path / "a", "x")
        assert not {"x/images.bin", f"x/{MANIFEST}"} & {entry.key for entry in store.list()}
    make(tmp_path / "b", FILES, version=2)
    store.push(tmp_path / "b", "x")
    with pytest.raises(CorruptArtifact, match=r"images\.bin"):
        store.push(tmp_path / "a", "x")
    assert store.pull("x", tmp_path / "c").meta == {"version": 2}, "a whole artifact does not give way to a damaged one"


FILE_DAMAGE, MANIFEST_DAMAGE = ("flipped", "truncated", "missing"), ("newer schema", "not JSON", "climbs out")


@pytest.mark.parametrize(
    ("uri", "damage"),
    [(kind, damage) for kind in ("local", *available()) for damage in FILE_DAMAGE]
    + [("local", damage) for damage in MANIFEST_DAMAGE],  # read by the same code, whatever it came from
    indirect=["uri"],
)
def test_a_damaged_artifact_is_not_pulled(uri: str, tmp_path: Path, damage: str) -> None:
    store = open_store(uri)
    make(tmp_path / "a", FILES)
    store.push(tmp_path / "a", "x")
    raw = json.loads(store.read(f"x/{MANIFEST}"))
    outside = {"../out": {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}}
    named, act = {
        "flipped": (r"images\.bin", lambda: store.write("x/images.bin", b"i" * 999 + b"I")),
        "truncated": (r"images\.bin", lambda: store.write("x/images.bin", b"i" * 10)),
        "missing": (r"images\.bin", lambda: store.delete("x/images.bin")),
        "newer schema": ("upgrade", lambda: store.write(f"x/{MANIFEST}", json.dumps(raw | {"schema": 2}).encode())),
        "not JSON": ("not readable JSON", lambda: store.write(f"x/{MANIFEST}", b"{")),
        "climbs out": (
            r"\.\./out",
            lambda: store.write(f"x/{MANIFEST}", json.dumps(raw | {"files": outside}).encode()),
        ),
    }[damage]
    act()
    with pytest.raises(CorruptArtifact, match=named) as caught:
        store.pull("x", tmp_path / "b" / "c")
    assert store.uri.removeprefix("file://").replace("%20", " ") in str(caught.value).replace("%20", " ")
    assert not artifact.is_finished(tmp_path / "b" / "c")
    assert not (tmp_path / "b" / "out").exists()


def test_a_pull_fetches_only_what_is_wrong(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(uri)
    make(tmp_path / "a", FILES)
    store.push(tmp_path / "a", "x")
    store.pull("x", tmp_path / "b")
    (tmp_path / "b" / "images.bin").write_bytes(b"damaged")
    keys, fetch = [], store.fetch

    def noted(key: str, path: Path, sha256: str = "") -> None:
        keys.append(key)
        fetch(key, path, sha256)

    monkeypatch.setattr(store, "fetch", noted)
    store.pull("x", tmp_path / "b")
    store.pull("x", tmp_path / "b")
    assert keys == ["x/images.bin"]


def test_a_full_disk_is_named(uri: str, tmp_path: Path) -> None:
    store = open_store(uri)
    store.write("x", b"data")
    part = tmp_path / f"x.{os.getpid()}-{threading.get_ident()}.part"
    part.symlink_to("/dev/full")
    with pytest.raises(StoreError, match=r"disk of .* is full .* free space"):
        store.fetch("x", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("quick_lease")
def test_a_second_holder_is_refused_by_name(uri: str) -> None:
    one, two = open_store(uri), open_store(uri)
    with one.hold("run/main"):
        with pytest.raises(UserError, match=rf"run/main.*process {os.getpid()} on .* since 20"), two.hold("run/main"):
            pass
        with two.hold("run/other"):
            assert two.list() == [], "locks are not content"
    with two.hold("run/main"):
        pass


HOLDS = """
import sys, time
sys.path[:0] = {path!r}
from distillery.store import _lease, open_store
_lease.BEAT, _lease.SETTLE = 0.3, 0.1
with open_store({uri!r}).hold("run"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.usefixtures("quick_lease")
def test_the_lock_of_a_killed_process_is_free(uri: str) -> None:
    store = open_store(uri)
    with child(HOLDS.format(path=sys.path, uri=uri)) as process:
        with pytest.raises(UserError, match=f"process {process.pid} "), store.hold("run"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        start = time.monotonic()
        with store.hold("run"):
            assert time.monotonic() - start < _lease.STALE / 2, "it was not seen that its process is dead"


def test_access_is_checked_without_a_trace(uri: str) -> None:
    check_access(uri)
    assert open_store(uri).list() == []


@pytest.mark.usefixtures("quick_lease")
def test_the_lease_of_a_silent_machine_is_taken_over(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lease, "STALE", 2.0)
    store = open_store(bucket)
    store.write(".hold/run", json.dumps(FOREIGN).encode())
    start = time.monotonic()
    with store.hold("run"):
        assert time.monotonic() - start > 0.5, "it might have been alive"
        assert b"elsewhere" not in store.read(".hold/run")
    assert not store.exists(".hold/run")


@pytest.mark.usefixtures("quick_lease")
def test_the_lease_of_a_living_machine_is_not_taken(bucket: str) -> None:
    store, stop = open_store(bucket), threading.Event()
    store.write(".hold/run", json.dumps(FOREIGN).encode())

    def beat() -> None:
        for beats in range(1000):
            open_store(bucket).write(".hold/run", json.dumps(FOREIGN | {"beats": beats}).encode())
            if stop.wait(0.2):
                return

    other = threading.Thread(target=beat)
    other.start()
    try:
        with pytest.raises(UserError, match="process 7 on elsewhere since noon"), store.hold("run"):
            pass
    finally:
        stop.set()
        other.join()


@pytest.mark.usefixtures("quick_lease")
def test_a_lost_lease_is_said_and_not_taken_back(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(bucket)
    peek = store.peek

    def slept(key: str) -> object:
        if threading.current_thread() is not threading.main_thread():
            store.write(".hold/run", json.dumps(FOREIGN).encode())
        return peek(key)

    monkeypatch.setattr(store, "peek", slept)
    with store.hold("run"):
        wait_for_words(caplog, "lost the lock")
    assert json.loads(store.read(".hold/run")) == FOREIGN


@pytest.mark.parametrize("server", available()[1:], indirect=True)  # Swift does not know conditions
@pytest.mark.usefixtures("quick_lease")
def test_a_sign_of_life_that_comes_too_late_takes_nothing_back(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(bucket)
    peek, looks = store.peek, list[str]()

    def slept(key: str) -> object:
        seen = peek(key)
        if threading.current_thread() is not threading.main_thread():
            looks.append(key)
            if len(looks) == 1:
                store.write(".hold/run", json.dumps(FOREIGN).encode())
        return seen

    monkeypatch.setattr(store, "peek", slept)
    with store.hold("run"):
        wait_for_words(caplog, "lost the lock")
    assert json.loads(store.read(".hold/run")) == FOREIGN


def wait_for_words(caplog: pytest.LogCaptureFixture, words: str) -> None:
    until = time.monotonic() + 60
    while words not in caplog.text:
        assert time.monotonic() < until, caplog.text
        time.sleep(0.05)


def kill_and_restart(server: Server) -> tuple[Callable[[int, int], None], threading.Event]:
    """A progress callback that kills the server once; it comes back a second later."""
    back, killed = threading.Event(), threading.Event()

    def restart() -> None:
        time.sleep(1)
        server.start()
        back.set()

    def progress(done: int, total: int) -> None:
        if done < total and not killed.is_set():
            killed.set()
            server.kill()
            threading.Thread(target=restart).start()

    return progress, back


@pytest.mark.parametrize("server", available()[-1:], indirect=True)  # to start again takes seconds
def test_a_server_killed_in_mid_transfer_is_survived(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_patience, "LONGEST_PAUSE", 1.0)
    files = {f"small{i}": os.urandom(1000) for i in range(10)} | {"big": os.urandom(12 * MIB)}
    manifest, store = make(tmp_path / "a", files), open_store(bucket)
    for move in (lambda p: store.push(tmp_path / "a", "x", p), lambda p: store.pull("x", tmp_path / "b", p)):
        progress, back = kill_and_restart(server)
        move(progress)
        assert back.wait(60), "the server was not killed in the middle"
    assert artifact.read(tmp_path / "b").fingerprint == manifest.fingerprint


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_the_users_mistake(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    make(tmp_path / "a", FILES)
    monkeypatch.setenv(variable, "test:wrong")
    store = open_store(bucket)
    named = ("credentials", "AWS_SECRET_ACCESS_KEY", server.endpoint)
    for act in (
        lambda: check_access(bucket),
        lambda: store.read("x"),
        lambda: store.exists("x"),
        lambda: store.list(),
        lambda: store.push(tmp_path / "a", "x"),
        lambda: store.pull("x", tmp_path / "b"),
        lambda: store.hold("x").__enter__(),
    ):
        raises_quickly(act, UserError, *named)


def test_a_missing_bucket_is_the_users_mistake(server: Server, tmp_path: Path) -> None:
    make(tmp_path / "a", FILES)
    store = open_store("s3://not-there/x")
    for act in (
        lambda: check_access("s3://not-there/x"),
        lambda: store.read("x"),
        lambda: store.list(),
        lambda: store.write("x", b""),
        lambda: store.push(tmp_path / "a", "x"),
        lambda: store.pull("x", tmp_path / "b"),
    ):
        raises_quickly(act, UserError, "'not-there'", "create that bucket", server.endpoint)


def test_keys_may_come_from_the_clients_other_places(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    raises_quickly(lambda: check_access(bucket), UserError, "no credentials", "AWS_ACCESS_KEY_ID", seconds=10)
    (tmp_path / "keys").write_text(f"[p]\naws_access_key_id={server.access}\naws_secret_access_key={server.secret}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "p")
    check_access(bucket)


def test_the_region_is_asked_for_when_unset(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_REGION")
    check_access(bucket)
