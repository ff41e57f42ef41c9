"""Pushing and pulling artifacts against the minio client's own best loop, on one MinIO server on this machine.

    python benchmarks/store_transfer.py --out RESULT
    python benchmarks/store_transfer.py --cases 1x64 100x1 --repeats 2 --folder /dev/shm --out RESULT

A case NxM is N files of M MiB. The reference is a thread pool over fput_object and fget_object, with the settings
(threads, size and number of parts) that were fastest in a first round; for downloads get_object by ranges is shown too.
Then both take turns, `--repeats` times, each upload into an empty prefix, each download into an empty folder. The
library's way hashes every file (sha256) both ways and checks it against the manifest; the reference does not. At the
end the objects and the files of both are compared.

RESULT gets config.json, metrics.json and log.txt. MinIO: `make minio`, or DISTILLERY_MINIO names its binary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import urllib3
from minio import Minio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from _servers import Server, minio_binary, running

from distillery import artifact, files
from distillery.artifact import Manifest
from distillery.code_version import code_version
from distillery.store import open_store

MIB = 1 << 20
BUCKET = "bench"


@dataclass(frozen=True)
class Way:
    """One setting of the reference: files at a time, and of each so many parts of so many MiB at a time."""

    threads: int
    part: int = 5
    parallel: int = 1
    ranges: bool = False  # downloads: parts by get_object instead of fget_object

    def __str__(self) -> str:
        parts = f", parts of {self.part} MiB, {self.parallel} at a time" if self.parallel > 1 else ""
        return f"{self.threads} threads{parts}{', ranges' if self.ranges else ''}"


UP = {"one": [Way(1, 16, 4), Way(1, 16, 8), Way(1, 64, 4)], "many": [Way(4), Way(8)]}
DOWN = {
    "one": [Way(1), Way(1, 16, 4, True), Way(1, 16, 8, True)],
    "many": [Way(4), Way(8), Way(8, 5, 1, True)],
}


@dataclass
class Bench:
    """A case: an artifact at rest, a server and a client."""

    source: Path
    folder: Path
    manifest: Manifest
    client: Minio

    @property
    def names(self) -> list[str]:
        """The artifact's files."""
        return sorted(self.manifest.files)

    def plain_up(self, way: Way, prefix: str) -> None:
        """The reference's upload."""

        def send(name: str) -> None:
            self.client.fput_object(
                BUCKET,
                f"{prefix}/{name}",
                str(self.source / name),
                part_size=way.part * MIB,
                num_parallel_uploads=way.parallel,
            )

        with ThreadPoolExecutor(way.threads) as pool:
            list(pool.map(send, self.names))

    def plain_down(self, way: Way, prefix: str, target: Path) -> None:
        """The reference's download."""
        target.mkdir()

        def get(name: str) -> None:
            if way.ranges:
                self._ranges(way, f"{prefix}/{name}", target / name)
            else:
                self.client.fget_object(BUCKET, f"{prefix}/{name}", str(target / name))

        with ThreadPoolExecutor(way.threads) as pool:
            list(pool.map(get, self.names))

    def _ranges(self, way: Way, key: str, path: Path) -> None:
        size, step = self.manifest.files[path.name]["bytes"], way.part * MIB
        with path.open("wb") as file:

            def part(start: int) -> None:
                length = min(step, size - start)
                with closing(self.client.get_object(BUCKET, key, start, length)) as answer:
                    for block in answer.stream(MIB):
                        start += os.pwrite(file.fileno(), block, start)
                answer.release_conn()

            if way.parallel == 1:
                for start in range(0, size, step):
                    part(start)
                return
            with ThreadPoolExecutor(way.parallel) as pool:
                list(pool.map(part, range(0, size, step)))

    def ours_up(self, prefix: str) -> None:
        """The library's upload, hashing every file."""
        files._hashes.clear()  # or what was hashed while it was made would not be hashed again
        open_store(f"s3://{BUCKET}").push(self.source, prefix)

    def ours_down(self, prefix: str, target: Path) -> None:
        """The library's download, checking every file."""
        open_store(f"s3://{BUCKET}").pull(prefix, target)

    def sums(self, prefix: str) -> dict[str, str]:
        """sha256 of the objects under a prefix, read by the client."""
        found = {}
        for name in self.names:
            digest = hashlib.sha256()
            with closing(self.client.get_object(BUCKET, f"{prefix}/{name}")) as answer:
                for block in answer.stream(MIB):
                    digest.update(block)
            answer.release_conn()
            found[name] = digest.hexdigest()
        return found

    def clear(self, prefix: str) -> None:
        """Delete what is under a prefix."""
        keys = [str(found.object_name) for found in self.client.list_objects(BUCKET, prefix, recursive=True)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: self.client.remove_object(BUCKET, key), keys))


def build(folder: Path, count: int, size: int) -> Manifest:
    """A finished artifact of `count` random files of `size` MiB."""
    folder.mkdir()
    for i in range(count):
        with (folder / f"file{i:05d}").open("wb") as file:
            for _ in range(size):
                file.write(os.urandom(MIB))
    return artifact.finish(
        folder, kind="dataset", step="benchmark", config={}, inputs={}, meta={}, seconds=0.0, hardware="none"
    )


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of one call by the clock, and seconds of CPU of this process (the server's are not in it)."""
    os.sync()  # what the last one wrote is not written in this one's time
    began, clock = time.process_time(), time.perf_counter()
    work()
    return time.perf_counter() - clock, time.process_time() - began


def measure(bench: Bench, kind: str, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Choose the reference's setting, then both in turn, up and down; then compare what they left."""
    total = sum(facts["bytes"] for facts in bench.manifest.files.values()) / MIB
    found: dict[str, Any] = {"mebibytes": total}
    target = bench.folder / "target"

    def prepared(direction: str, name: str, way: Way | None) -> Callable[[], object]:
        """One transfer, with nothing in its way that an earlier one left; ours has no `way`."""
        if direction == "up":
            bench.clear(f"{name}/")
            return partial(bench.plain_up, way, name) if way else partial(bench.ours_up, name)
        shutil.rmtree(target, ignore_errors=True)
        return partial(bench.plain_down, way, "reference", target) if way else partial(bench.ours_down, "ours", target)

    for direction, ways in (("up", UP[kind]), ("down", DOWN[kind])):
        tuned = {}
        for way in ways:
            tuned[way] = timed(prepared(direction, "reference", way))[0]
            say(f"{direction}, reference, {way}: {tuned[way]:.2f} s")
        kinds = {"reference": False} | ({"ranges": True} if direction == "down" else {})
        best = {name: min((w for w in ways if w.ranges is r), key=lambda w: tuned[w]) for name, r in kinds.items()}
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in ("ours", *best)}
        for turn in range(repeats):
            for name in sorted(turns, reverse=bool(turn % 2)):  # who begins changes from turn to turn
                turns[name].append(timed(prepared(direction, name, best.get(name))))
                say(f"{direction}, turn {turn + 1}/{repeats}: {name}: {turns[name][-1][0]:.2f} s")
                if direction == "down" and turn == repeats - 1:
                    same = all(files.sha256_of(target / n) == f["sha256"] for n, f in bench.manifest.files.items())
                    found[f"{name}_files_equal_the_source"] = same
        middle = {name: statistics.median(seconds for seconds, _ in done) for name, done in turns.items()}
        found[direction] = {
            "settings": {name: str(way) for name, way in best.items()},
            "tuning_seconds": {str(way): seconds for way, seconds in tuned.items()},
            "turns_seconds_and_cpu_seconds": turns,
            "median_seconds": middle,
            "median_cpu_seconds": {name: statistics.median(cpu for _, cpu in done) for name, done in turns.items()},
            "ratio": {name: middle[name] / middle["ours"] for name in best},
        }
        for name, value in middle.items():
            say(f"{direction}: {name}: median {value:.2f} s, {total / value:.0f} MiB/s")
        for name, way in best.items():
            pairs = [100 * theirs[0] / ours[0] for theirs, ours in zip(turns[name], turns["ours"], strict=True)]
            say(f"{direction}: ours reaches {100 * middle[name] / middle['ours']:.0f} % of {name} ({way}); of turns: "
                + ", ".join(f"{pair:.0f}" for pair in pairs))  # fmt: skip
    want = {name: facts["sha256"] for name, facts in bench.manifest.files.items()}
    for name in ("ours", "reference"):
        found[f"{name}_objects_equal_the_source"] = bench.sums(name) == want
    say("equal to the source: " + ", ".join(f"{k}: {v}" for k, v in found.items() if k.endswith("source")))
    return found


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """A MinIO with an empty bucket, and the environment that points to it."""
    with running("minio", folder) as server:
        os.environ.update(server.environment())
        server.make_bucket(BUCKET)
        yield server


def main() -> None:
    """Measure, print, and leave a result folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["1x2048", "2000x1"], help="files x MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where server, files and copies lie; default: temporary"
    )
    parser.add_argument("--out", type=Path, required=True, help="the result folder to write")
    given = parser.parse_args()
    if not minio_binary():
        parser.error("there is no MinIO server here: make minio")
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    server_version = subprocess.run([minio_binary(), "--version"], capture_output=True, text=True, check=True).stdout
    versions = {name: metadata.version(name) for name in ("minio", "urllib3")} | {
        "server": server_version.split("\n")[0]
    }
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    say(f"{processor()}, {cores} threads, load {load:.1f} before; {platform.platform()}; "
        f"python {platform.python_version()}; {versions}; {code_version()}")  # fmt: skip
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        kind = subprocess.run(
            ["stat", "-f", "-c", "%T", place], capture_output=True, text=True, check=False
        ).stdout.strip()
        for case in given.cases:
            count, _, size = case.partition("x")
            say(f"case {case}: {count} files of {size} MiB, on {kind}")
            folder = Path(place) / case
            folder.mkdir()
            manifest = build(folder / "source", int(count), int(size))
            with served(folder / "server") as server:
                client = Minio(
                    server.endpoint.removeprefix("http://"),
                    server.access,
                    server.secret,
                    secure=False,
                    region="us-east-1",
                    http_client=urllib3.PoolManager(maxsize=64),
                )
                bench = Bench(folder / "source", folder, manifest, client)
                found[case] = measure(bench, "one" if int(count) == 1 else "many", given.repeats, say)
            shutil.rmtree(folder)
    config = {
        "cases": given.cases,
        "repeats": given.repeats,
        "file_system": kind,
        "hardware": f"{processor()}, {cores} threads",
    }
    config |= {"load_before": load, "load_after": os.getloadavg()[0], "versions": versions, "code": code_version()}
    given.out.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config), ("metrics.json", found)):
        (given.out / name).write_text(json.dumps(content, indent=1) + "\n")
    (given.out / "log.txt").write_text("\n".join(lines) + "\n")


def processor() -> str:
    """The CPU's name."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
