"""Stores that do not answer, answer wrongly, or are set up wrongly: one clear error, and patience where it helps.

The servers here are fakes that answer as they are told; real ones are in test_store.py.
"""

import contextlib
import http.server
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import urllib3
from _artifacts import FILES, child, make, raises_quickly
from _servers import free_port

from distillery.errors import DistilleryError, StoreError, UserError
from distillery.store import _crew, _patience, check_access, open_store

MIB = 1 << 20


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """An endpoint where nothing listens, and one second of patience."""
    endpoint = f"http://127.0.0.1:{free_port()}"
    for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b" * 8}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("DISTILLERY_STORE_TIMEOUT", "1")
    monkeypatch.setattr(_patience, "FIRST_PAUSE", 0.02)
    return endpoint


def test_an_unreachable_store_gives_one_clear_error(nobody: str, tmp_path: Path) -> None:
    store, named = open_store("s3://bucket/runs"), (nobody, "'bucket'", "runs/x", "refused", "within 1 s")
    make(tmp_path / "a", {f"f{i}": b"" for i in range(30)})
    raises_quickly(lambda: store.read("x"), StoreError, *named)
    time.sleep(0.1)
    raises_quickly(lambda: store.push(tmp_path / "a", "x"), StoreError, *named)


def test_a_machine_that_never_answers_does_not_hang_us(nobody: str) -> None:
    with socket_that_listens(nobody):
        raises_quickly(lambda: open_store("s3://bucket/x").read("x"), StoreError, nobody, "timed out")


@contextmanager
def socket_that_listens(endpoint: str) -> Iterator[None]:
    """Something that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", int(endpoint.rpartition(":")[2]))):
        yield


INTERRUPTED = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from distillery.store import open_store
print("ready", flush=True)
try:
    open_store("s3://bucket/x", patience=100).push(Path({folder!r}), "x")
except KeyboardInterrupt:
    print("stopped")
"""


def test_ctrl_c_does_not_wait_for_retries(nobody: str, tmp_path: Path) -> None:
    make(tmp_path / "a", FILES)
    with child(INTERRUPTED.format(path=sys.path, folder=str(tmp_path / "a"))) as process:
        assert process.stderr is not None
        warning = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        out, err = process.communicate(timeout=30)
    assert out == "stopped\n", err
    assert time.monotonic() - start < 20, "it waited for its retries"
    assert nobody in warning
    assert "trying again" in warning


@pytest.mark.parametrize(
    ("variable", "value", "word"),
    [
        ("DISTILLERY_STORE_TIMEOUT", "soon", "'soon'"),
        ("DISTILLERY_STORE_TIMEOUT", "-1", "'-1'"),
        ("DISTILLERY_STORE_TIMEOUT", "inf", "'inf'"),
        ("AWS_ENDPOINT_URL", "minio.example:9000", "http://"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9000/path", "no path"),
        ("AWS_ENDPOINT_URL", "http://:9000", "AWS_ENDPOINT_URL"),
        ("AWS_S3_ADDRESSING_STYLE", "pth", "did you mean 'path'?"),
        ("AWS_CA_BUNDLE", "/nowhere.pem", "/nowhere.pem"),
        ("AWS_REGION", "?", "'?'"),
    ],
)
@pytest.mark.usefixtures("nobody")
def test_bad_settings_are_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, word: str) -> None:
    monkeypatch.setenv(variable, value)
    raises_quickly(lambda: open_store("s3://bucket/x"), UserError, variable, word)


@pytest.mark.parametrize("uri", ["gs://b/x", "s4://b/x", "s3:/b/x", "s3://", "s3://B", "file:x", "minio://b"])
@pytest.mark.usefixtures("nobody")
def test_a_uri_of_another_kind_is_refused(uri: str) -> None:
    raises_quickly(lambda: open_store(uri), UserError, uri, "s3://")


def test_paths_and_file_uris_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = tmp_path.as_uri() + "/a%20b"
    for uri in ("a b", Path("a b"), tmp_path / "a b", wanted, wanted.replace("file://", "file://localhost")):
        assert open_store(uri).uri == wanted
    (tmp_path / "a b").write_text("")
    raises_quickly(lambda: open_store("a b"), UserError, "is a file")
    raises_quickly(lambda: check_access("a b/c"), UserError, "choose a folder")


def test_without_minio_only_s3_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minio", None)
    monkeypatch.delitem(sys.modules, "distillery.store.s3", raising=False)
    check_access(tmp_path)
    raises_quickly(lambda: open_store("s3://bucket/x"), UserError, "pip install minio")


Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def scripted(endpoint: str, answers: list[Answer]) -> Iterator[list[str]]:
    """Serve these answers in turn, the last one for ever; gives the requests ("GET bytes=3-") as they come."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(f"{self.command} {self.headers.get('Range', '')}".strip())
            status, headers, body = answers[min(len(asked), len(answers)) - 1]
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", int(endpoint.rpartition(":")[2])), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield asked
        finally:
            http_server.shutdown()
            thread.join()


def refusal(status: int, code: str) -> Answer:
    """An S3 error document."""
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return status, {"Content-Type": "application/xml"}, body


OK: Answer = (200, {"ETag": '"1"'}, b"content")


@pytest.mark.parametrize(
    "later",
    [
        refusal(503, "SlowDown"),
        refusal(500, "InternalError"),
        refusal(429, "TooManyRequests"),
        refusal(400, "RequestTimeout"),
        (502, {"Content-Type": "text/html"}, b"<html>bad gateway</html>"),
        (504, {}, b""),
        (200, {"Content-Length": "100"}, b"cut"),
    ],
    ids=str,
)
def test_what_can_pass_is_asked_again(nobody: str, later: Answer) -> None:
    with scripted(nobody, [later, later, OK]) as asked:
        open_store("s3://bucket/x", patience=100).write("x", b"data")
    assert asked == ["PUT"] * 3


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refusal(403, "AccessDenied"), UserError),
        (refusal(403, "RequestTimeTooSkewed"), UserError),
        (refusal(301, "PermanentRedirect"), UserError),
        (refusal(400, "AuthorizationHeaderMalformed"), UserError),
        (refusal(507, "XMinioStorageFull"), StoreError),
        (refusal(501, "NotImplemented"), StoreError),
        ((404, {"Content-Type": "text/html"}, b"<html>a console</html>"), UserError),
        ((403, {"Content-Type": "application/xml"}, b"not <xml"), UserError),
    ],
    ids=str,
)
def test_what_cannot_pass_is_not_asked_again(nobody: str, answer: Answer, kind: type[DistilleryError]) -> None:
    with scripted(nobody, [answer]) as asked:
        raises_quickly(lambda: open_store("s3://bucket/x", patience=100).write("x", b"data"), kind, nobody, "'bucket'")
    assert asked == ["PUT"]


def test_the_last_cause_is_shown(nobody: str) -> None:
    with scripted(nobody, [refusal(503, "SlowDown")]):
        act = lambda: open_store("s3://bucket/x", patience=3).write("x", b"")  # noqa: E731 - it is timed
        raises_quickly(act, StoreError, "HTTP 503 SlowDown")


def test_a_last_try_that_was_cut_short_is_not_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[float] = []

    def urlopen(self: urllib3.PoolManager, method: str, url: str, **options: Any) -> urllib3.HTTPResponse:
        tries.append(options["timeout"].read_timeout)
        if len(tries) == 1:
            time.sleep(0.6)  # less than half the patience is left
            return urllib3.HTTPResponse(b"<Code>SlowDown</Code>", status=503)
        time.sleep(tries[-1])
        raise urllib3.exceptions.ReadTimeoutError(urllib3.HTTPConnectionPool("x"), url, "Read timed out.")

    monkeypatch.setattr(urllib3.PoolManager, "urlopen", urlopen)
    with pytest.raises(_patience.GaveUp, match="HTTP 503 SlowDown"):
        _patience.PatientPool(1.0).urlopen("GET", "http://x/")


CUT: Answer = (200, {"ETag": '"1"', "Content-Length": str(2 * MIB)}, bytes(MIB + 3))


def test_a_cut_off_download_goes_on_where_it_stopped(nobody: str) -> None:
    rest: Answer = (206, {"ETag": '"1"'}, b"tent")
    with scripted(nobody, [CUT, refusal(503, "SlowDown"), rest]) as asked:
        assert open_store("s3://bucket/x", patience=100).read("x") == bytes(MIB) + b"tent"
    assert asked == ["GET", f"GET bytes={MIB}-", f"GET bytes={MIB}-"]


def test_a_download_never_mixes_two_versions(nobody: str) -> None:
    others: list[Answer] = [
        (206, {"ETag": '"2"'}, b"TENT"),
        (200, {"ETag": '"1"'}, b"content"),
        refusal(412, "PreconditionFailed"),
        refusal(416, "InvalidRange"),
    ]
    for other in others:
        with (
            scripted(nobody, [CUT, other] * 3),
            pytest.raises(StoreError, match=r"x changed while it was read, 3 times"),
        ):
            open_store("s3://bucket/x", patience=100).read("x")
        with scripted(nobody, [CUT, other, OK]):
            assert open_store("s3://bucket/x", patience=100).read("x") == b"content"


def test_plain_http_behind_an_https_url_is_named(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", nobody.replace("http", "https"))
    with scripted(nobody, [OK]):
        store = open_store("s3://bucket/x", patience=100)
        raises_quickly(lambda: store.read("x"), UserError, "TLS", "AWS_CA_BUNDLE", "http://")


def test_an_upload_the_server_forgot_starts_again(nobody: str, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(17 * MIB))
    begun = (200, {"Content-Type": "application/xml"}, b"<R><UploadId>1</UploadId></R>")
    done = (200, {}, b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>")
    gone, part, aborted = refusal(404, "NoSuchUpload"), (200, {"ETag": '"1"'}, b""), (204, {}, b"")
    failed: Answer = (200, {}, b"<Error><Code>InternalError</Code></Error>")  # S3 may find out after it said 200
    absent: Answer = (404, {}, b"")
    for first in (gone, failed):
        with scripted(nobody, [begun, part, part, first, absent, aborted, begun, part, part, done]) as asked:
            open_store("s3://bucket/x", patience=100).put("big", tmp_path / "big")
        assert asked == "POST PUT PUT POST HEAD DELETE POST PUT PUT POST".split()


def test_a_failing_transfer_ends_the_waiting_of_its_own_pieces_only() -> None:
    """Three pieces wait for a server: one of another transfer, one of the failing, one of a piece of the failing."""
    with ThreadPoolExecutor(8) as pool:
        answered = threading.Event()

        def nested(_: int) -> bool:
            with _crew.together(pool, _crew.pause, [60.0]) as inner:
                return inner[0].result()

        def waits(_: int) -> bool:
            while not answered.is_set():
                if _crew.pause(0.01):
                    return True
            return False

        with _crew.together(pool, waits, [0]) as others:
            start = time.monotonic()
            with contextlib.suppress(StoreError), _crew.together(pool, nested, [0]) as outer:
                time.sleep(0.2)
                raise StoreError("as if another piece had failed")
            assert time.monotonic() - start < 30
            assert outer[0].result(), "the waiting was not cut short"
            time.sleep(0.2)
            assert not others[0].done(), "another transfer was disturbed"
            answered.set()
            assert not others[0].result(), "another transfer was disturbed"
