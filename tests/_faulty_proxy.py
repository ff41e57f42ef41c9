"""A TCP proxy with a bad line: slow, cut or silent, as a test asks."""

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

CHUNK = 1 << 16
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST instead of FIN


@dataclass
class Line:
    """What is wrong with the line; may be changed while it is in use."""

    latency: float = 0.0  # seconds before each chunk
    bandwidth: float = 0.0  # bytes a second and connection; 0: as fast as it goes
    reset_after: int = 0  # a connection is reset after that many bytes; 0: never
    close_after: int = 0  # a connection is closed politely after that many bytes down
    silent_after: int = -1  # nothing is passed on after that many bytes, both ways; -1: never
    swallow: bytes = b""  # the answer to the first request that holds these bytes is lost
    left: int = 1  # resets, closes or swallowed answers still to come; below 0: for ever
    passed: int = field(default=0, init=False)  # bytes so far, both ways
    faults: int = field(default=0, init=False)  # connections ended so far
    connections: int = field(default=0, init=False)
    _counting: threading.Lock = field(default_factory=threading.Lock, init=False)

    def fault(self) -> bool:
        """Whether one more fault is wanted; counts it."""
        with self._counting:
            if self.left == 0:
                return False
            self.left -= 1
            self.faults += 1
            return True

    def passes(self, nbytes: int) -> float:
        """Count bytes that are passed on; the seconds that takes."""
        with self._counting:
            self.passed += nbytes
        bandwidth = self.bandwidth  # may be changed at any moment
        return self.latency + (nbytes / bandwidth if bandwidth else 0.0)


@contextmanager
def faulty(port: int, line: Line) -> Iterator[int]:
    """The port of a proxy to 127.0.0.1:`port`."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0), backlog=128) as door:
        threading.Thread(target=_accept, args=(door, port, line, stop), daemon=True).start()
        try:
            yield door.getsockname()[1]
        finally:
            stop.set()
            with contextlib.suppress(OSError):
                door.shutdown(socket.SHUT_RDWR)


def _accept(door: socket.socket, port: int, line: Line, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            client, _ = door.accept()
        except OSError:
            return
        line.connections += 1
        threading.Thread(target=_serve, args=(client, port, line, stop), daemon=True).start()


def _serve(client: socket.socket, port: int, line: Line, stop: threading.Event) -> None:
    with client:
        try:
            server = socket.create_connection(("127.0.0.1", port))
        except OSError:
            return  # closes the client: the server is down
        with server, contextlib.suppress(OSError):
            _pump(client, server, line, stop)


def _pump(client: socket.socket, server: socket.socket, line: Line, stop: threading.Event) -> None:
    """Pass on bytes until either side closes or a fault ends the connection."""
    up = down = 0
    swallowing = False
    with selectors.DefaultSelector() as ready:
        ready.register(client, selectors.EVENT_READ, server)
        ready.register(server, selectors.EVENT_READ, client)
        while not stop.is_set():
            for key, _ in ready.select(0.05):
                source = key.fileobj
                assert isinstance(source, socket.socket)
                data = source.recv(CHUNK)
                if not data:
                    return None
                if 0 <= line.silent_after <= line.passed:
                    continue
                seconds = line.passes(len(data))
                swallowing |= bool(line.swallow) and source is client and line.swallow in data
                if swallowing and source is server and line.fault():
                    return _reset(client)
                up, down = (up + len(data), down) if source is client else (up, down + len(data))
                if line.reset_after and up + down > line.reset_after and line.fault():
                    return _reset(client)
                time.sleep(seconds)
                key.data.sendall(data)
                if line.close_after and down > line.close_after and line.fault():
                    return None
    return None


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
