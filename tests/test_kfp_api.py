"""The client of KFP's API: what it asks, and what it says when the answer is not what it should be."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from _kfp_api import FakeKfp

from distillery.errors import UserError
from pipelines import api
from pipelines.api import ApiError, BadRequest, Client, NotFound, Refused, Unreachable, connection, contains

SPEC = {"root": {"inputDefinitions": {"parameters": {"count": {"parameterType": "NUMBER_INTEGER"}}}}}


def client(kfp: FakeKfp, **options: object) -> Client:
    """A client of that server, with little patience."""
    return Client(connection(kfp.endpoint, **{"patience": 1.5, **options}))  # type: ignore[arg-type]


def body(to: Client, count: object = 1, name: str = "one") -> dict[str, object]:
    """A run to create."""
    given = {"experiment_id": to.experiment("distill", create=True), "display_name": name}
    return {**given, "pipeline_spec": SPEC, "runtime_config": {"parameters": {"count": count}}}


@pytest.fixture
def kfp() -> Iterator[FakeKfp]:
    """A server."""
    with FakeKfp() as server:
        yield server


def test_runs_are_created_found_and_ended(kfp: FakeKfp) -> None:
    to = client(kfp)
    first, second = (to.create_run(body(to, name=name) | {"description": f"key:{name}"}) for name in ("one", "two"))
    assert [run.name for run in to.runs()] == ["two", "one"]
    assert [run.id for run in to.runs([contains("description", "key:one")])] == [first.id]
    to.terminate(second.id)
    assert to.run(second.id).state == "CANCELED"
    to.delete_run(first.id)
    with pytest.raises(NotFound, match=first.id):
        to.run(first.id)
    assert kfp.asked("POST /apis/v2beta1/experiments$") == 1


def test_lists_are_read_to_the_end(kfp: FakeKfp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "PAGE", 2)
    to = client(kfp)
    for index in range(5):
        to.create_run(body(to, name=f"r{index}"))
    assert [run.name for run in to.runs()] == ["r4", "r3", "r2", "r1", "r0"]
    assert kfp.asked("GET /apis/v2beta1/runs\\?") == 3


def test_nobody_there_is_said_within_the_patience(kfp: FakeKfp) -> None:
    to = client(kfp, patience=0.5)
    kfp.stop()
    began = time.monotonic()
    with pytest.raises(Unreachable, match=f"{kfp.endpoint}.*port-forward"):
        to.run("x")
    assert 0.3 < time.monotonic() - began < 20


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "READ", 0.2)
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        to = Client(connection(f"http://127.0.0.1:{door.getsockname()[1]}", patience=0.1))
        with pytest.raises(Unreachable, match="timed out"):
            to.run("x")


def test_what_passes_is_repeated(kfp: FakeKfp) -> None:
    to = client(kfp, patience=30)
    run = to.create_run(body(to))
    kfp.fault("503", "GET", times=2)
    kfp.fault("drop", "GET", times=1)
    assert to.run(run.id).id == run.id
    kfp.fault("503", "terminate")
    to.terminate(run.id)
    assert kfp.asked("terminate") == 2


@pytest.mark.parametrize("fault", ["503", "drop", "drop after"])
def test_a_run_is_never_created_by_sending_twice(kfp: FakeKfp, fault: str) -> None:
    to = client(kfp)
    asked = body(to)
    kfp.fault(fault, "POST .*runs")
    with pytest.raises(Unreachable) as caught:
        to.create_run(asked)
    assert caught.value.sent
    assert kfp.asked("POST /apis/v2beta1/runs$") == 1
    assert len(kfp.runs) == (fault == "drop after")


def test_a_wrong_parameter_is_the_users_mistake(kfp: FakeKfp) -> None:
    to = client(kfp)
    with pytest.raises(BadRequest, match="count requires type double or integer") as caught:
        to.create_run(body(to, count="12"))
    assert caught.value.exit_code == 2


def test_tokens(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with FakeKfp(token="good") as kfp:
        with pytest.raises(Refused, match="token is missing.*--token-file"):
            client(kfp).run("x")
        file.write_text("bad\n")
        to = client(kfp, token_file=str(file))
        with pytest.raises(Refused, match="was not accepted") as caught:
            _ = to.health
        assert "bad" not in str(caught.value)
        file.write_text("good\n")  # Kubernetes renews it while we run
        assert to.health["multi_user"] is False
        assert client(kfp, token="good").version == "2.17.0"
        file.write_bytes(b"\x00\x01\n\x02")
        with pytest.raises(UserError, match="no token has"):
            _ = client(kfp, token_file=str(file)).health
        with pytest.raises(UserError, match="nowhere"):
            _ = client(kfp, token_file="/nowhere").health
    assert "good" not in repr(connection("http://h", token="good"))


def test_a_namespace_is_named_to_many_users_only() -> None:
    with FakeKfp(multi_user=True, namespaces=("me",)) as kfp:
        assert client(kfp, namespace="me").experiment("distill", create=True)
        with pytest.raises(Refused, match="namespace 'other' must exist.*without a token"):
            client(kfp, namespace="other").experiment("distill")
        with pytest.raises(UserError, match="--namespace"):
            client(kfp).experiment("distill")
    with FakeKfp() as kfp:
        assert client(kfp, namespace="me").experiment("distill", create=True)


def test_an_experiment_that_somebody_else_makes_first_is_used(kfp: FakeKfp, monkeypatch: pytest.MonkeyPatch) -> None:
    to, other = client(kfp), client(kfp)
    post = to.post

    def late(path: str, given: dict[str, object], again: bool = False) -> object:
        other.experiment("distill", create=True)
        return post(path, given, again)

    monkeypatch.setattr(to, "post", late)
    assert to.experiment("distill", create=True) == other.experiment("distill")
    with pytest.raises(NotFound, match="'nix'"):
        to.experiment("nix")


def test_an_answer_without_end_is_cut(kfp: FakeKfp, monkeypatch: pytest.MonkeyPatch) -> None:
    to = client(kfp)
    run = to.create_run(body(to))
    monkeypatch.setattr(api, "MAX_ANSWER", 50)
    with pytest.raises(ApiError, match="an answer may have 50 bytes"):
        to.run(run.id)


def test_a_server_of_kfp_1_is_named() -> None:
    with FakeKfp(version="") as kfp, pytest.raises(Unreachable, match="Kubeflow Pipelines 1.8.22; .*2.15"):
        _ = client(kfp).health


@pytest.mark.parametrize(
    ("status", "headers", "text", "says"),
    [
        (200, {"Content-Type": "text/html"}, "<html>", "login page"),
        (302, {"Location": "/dex/auth"}, "", "'/dex/auth'.*cookie"),
        (404, {}, "nothing here", "no Kubeflow Pipelines API under"),
        (500, {}, '{"error_message": "database is down"}', "database is down"),
    ],
)
def test_something_else_than_kfp(status: int, headers: dict[str, str], text: str, says: str) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises((ApiError, Refused), match=says):
            _ = Client(connection(f"http://127.0.0.1:{server.server_port}", patience=0.5)).health
        server.shutdown()


def test_where_kfp_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(api, "NAMESPACE_FILE", tmp_path / "none")
    with pytest.raises(UserError, match="--endpoint"):
        connection()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert connection().endpoint == "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "kubeflow.example.com/pipeline/")
    assert connection().endpoint == "https://kubeflow.example.com/pipeline"
    assert connection("http://h:1").endpoint == "http://h:1"
    with pytest.raises(UserError, match="'ftp://h'"):
        connection("ftp://h")
    with pytest.raises(UserError, match="--ca"):
        Client(connection("https://h", ca=str(tmp_path / "no.pem")))


def test_tls_that_cannot_be_trusted_is_said_at_once(kfp: FakeKfp) -> None:
    to = Client(connection(kfp.endpoint.replace("http:", "https:"), patience=30))
    began = time.monotonic()
    with pytest.raises(UserError, match="TLS failed.*--ca"):
        _ = to.health
    assert time.monotonic() - began < 10
