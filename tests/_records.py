"""Records of runs that nobody ran, for tests of what reads a history."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from distillery.history import FOLDER, SCHEMA, STAMP, CellRecord, Fault, Reached, Record, Regression, Taught

NOW = datetime.now(UTC).replace(microsecond=0)


def record(run: str = "run", *, ago: timedelta = timedelta(), acc: float = 0.5, **changes: object) -> Record:
    """A run of two methods with two seeds each; `acc` is what rded reaches, random images reach 0.1 less."""
    cells = []
    for method, reached in (("rded", acc), ("random", acc - 0.1)):
        for seed in (0, 1):
            students = (Reached("convnet3", "fair", "soft", reached + 0.01 * seed, reached + 0.02),)
            cells.append(
                CellRecord(
                    f"{method}-{seed}",
                    "cifar10",
                    method,
                    {},
                    10,
                    seed,
                    "0" * 64,
                    {"synthesize": 2.0},
                    1000,
                    200,
                    students,
                )
            )
    whole = Record(
        run=run,
        experiment="nightly",
        schedule="",
        finished=(NOW - ago).isoformat(),
        seconds=9.0,
        status="succeeded",
        code_version="0.1.0+abc",
        hardware=("cpu",),
        config="name: nightly",
        config_sha256="0" * 64,
        teachers=(Taught("convnet3", "convnet3", 0.85),),
        cells=tuple(cells),
        steps={"synthesize": 8.0, "evaluate_student": 1.0},
        schema=SCHEMA,
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def failed(run: str, *, ago: timedelta = timedelta(), **changes: object) -> Record:
    """A run whose only cell failed."""
    cell = record().cells[0]
    broken = replace(cell, students=(), failure=Fault("synthesize", "out of memory"))
    return record(run, ago=ago, status="failed", cells=(broken,), **changes)


def worse(run: str, kind: str, *, ago: timedelta = timedelta(), **changes: object) -> Record:
    """A run that stands in the history as worse than the one before."""
    return record(run, ago=ago, regressions=(Regression(kind, "rded", "rded is worse", 0.5, 0.4),), **changes)


def put(place: Path, *records: Record) -> None:
    """Write records below `place` as runs leave them."""
    (place / FOLDER).mkdir(parents=True, exist_ok=True)
    for one in records:
        (place / FOLDER / f"{one.ended.strftime(STAMP)}-{one.run}.json").write_bytes(one.json())
