"""Chromium over a pipe: a small client of its DevTools protocol, without a port and without another package."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from select import select
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions "
    "--disable-background-networking --disable-component-update --disable-sync --remote-debugging-pipe"
)
PATIENCE = 60.0  # seconds for one answer; a loaded machine takes some to start


class Tab:
    """One page of a browser.

    Args:
        to, back: file descriptors of the browser's pipe.
    """

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._last = to, back, b"", 0
        self.events: list[dict[str, Any]] = []
        self._session = ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> Any:
        """The answer to one command; events that come before it are kept."""
        self._last += 1
        said: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        said |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(said).encode() + b"\0")
        while (answer := self._next()).get("id") != self._last:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def open(self, page: Path) -> None:
        """Load a page from the disk, until everything in it is there; forgets the events of the page before."""
        self.events.clear()
        self.ask("Page.navigate", url=page.as_uri())
        while not self.seen("Page.loadEventFired"):
            self.events.append(self._next())

    def seen(self, *methods: str) -> list[dict[str, Any]]:
        """What was said in events of these names."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def run(self, expression: str) -> Any:
        """The JSON value of an expression in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def show(self, width: int, *, dark: bool = False, media: str = "screen") -> None:
        """Take the form of a screen or sheet of that width in CSS pixels."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            assert select([self._back], [], [], max(0.0, until - time.monotonic()))[0], "the browser says nothing"
            more = os.read(self._back, 1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A browser of its own; `folder` takes its profile and what it prints."""
    assert CHROMIUM is not None
    theirs, to = os.pipe()
    back, answers = os.pipe()
    # The protocol's numbers: the browser reads from 3 and writes to 4.
    command = f'exec {CHROMIUM} {FLAGS} --user-data-dir="$1" 3<&{theirs} 4>&{answers}'
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", command, "chromium", str(folder / "profile")],
            pass_fds=(theirs, answers),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "HOME": str(folder)},
            start_new_session=True,
        )
    os.close(theirs)
    os.close(answers)
    try:
        yield Tab(to, back)
    finally:
        os.close(to)  # the end of its pipe ends the browser
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        os.close(back)
