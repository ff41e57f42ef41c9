"""What every test starts from: a scrubbed environment, loopback only, two threads."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _servers import Server

# Before anything reads it, and for child processes too: a developer's keys and settings never reach a test.
SCRUBBED = ("AWS_", "DISTILLERY_", "MINIO_", "KFP_", "_KFP_", "KF_PIPELINES_")
for _name in [name for name in os.environ if name.startswith(SCRUBBED) and name != "DISTILLERY_MINIO"]:
    del os.environ[_name]
os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
os.environ["MPLBACKEND"] = "Agg"

# A background job of a shell ignores Ctrl-C, and so would every process the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402 - the environment comes first
import torch  # noqa: E402 - the environment comes first
from hypothesis import HealthCheck, settings  # noqa: E402 - the environment comes first

# More threads than cores cost time, and the order of additions (so the last bit) depends on their number.
torch.set_num_threads(min(2, torch.get_num_threads()))

# Not every machine has time just when an example runs.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def loopback_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse connections to any machine but this one, as an unplugged cable would."""
    if request.node.get_closest_marker("cluster") or request.node.get_closest_marker("containers"):
        yield
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(("127.", "::1", "localhost")):
            raise ConnectionRefusedError(f"a quick test tried to reach {address[0]}:{address[1]}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield


@pytest.fixture
def watched_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recover loop looks at its clock after every step, so that tests may kill it anywhere."""
    from distillery.methods import _recover

    monkeypatch.setattr(_recover, "STRIDE_PIXELS", 1)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], "Server"]]:
    """Object stores by name, started at first use."""
    from _servers import running

    found: dict[str, Server] = {}
    with ExitStack() as stack:

        def get(name: str) -> "Server":
            if name not in found:
                found[name] = stack.enter_context(running(name, tmp_path_factory.mktemp(name)))
            return found[name]

        yield get
