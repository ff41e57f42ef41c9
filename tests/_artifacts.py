"""What the store tests share: a small artifact, a child process, and a failure that must be quick and clear."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distillery import artifact
from distillery.artifact import Manifest
from distillery.errors import DistilleryError

FILES = {"images.bin": b"i" * 1000, "sub folder/labels+1.bin": b"l" * 500, "empty": b""}


def make(folder: Path, files: dict[str, bytes], **meta: object) -> Manifest:
    """A finished artifact of these files."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return artifact.finish(
        folder, kind="synthetic", step="synthesize", config={}, inputs={}, meta=meta, seconds=1.0, hardware="cpu"
    )


@contextmanager
def child(code: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process running `code` that has printed its first line."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def raises_quickly(act: Callable[[], object], kind: type[DistilleryError], *words: str, seconds: float = 20) -> None:
    """Assert that `act` fails with one clear error and without long retries."""
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        act()
    took = time.monotonic() - start
    assert took < seconds, f"{took:.1f} s until: {caught.value}"
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
