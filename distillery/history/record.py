"""What a run leaves in the history: types, and their JSON. Imports nothing heavy: exporter and dashboards read it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distillery import __version__
from distillery.errors import CorruptArtifact

SCHEMA = 1
RECORD = "record.json"  # the copy inside the report artifact


@dataclass(frozen=True)
class Reached:
    """One student of a cell. Accuracies are fractions; None where they were no finite numbers."""

    net: str  # as on the leaderboard: with the options that tell it from others of the run
    recipe: str  # likewise
    regime: str
    acc_last: float | None
    acc_best: float | None


@dataclass(frozen=True)
class Fault:
    """Why a cell has no result."""

    step: str
    error: str


@dataclass(frozen=True)
class CellRecord:
    """One cell of a run."""

    id: str
    dataset: str
    method: str
    options: dict[str, Any]  # resolved
    ipc: int
    seed: int
    images_sha256: str  # of the file with the images; "" = not known
    seconds: dict[str, float]  # by step, the shared ones before it included
    image_bytes: int | None
    label_bytes: int | None  # of all its students
    students: tuple[Reached, ...]
    failure: Fault | None = None
    entry: str = ""  # the method as on the leaderboard: with the options that tell it from others of the run
    teacher: str = ""  # names of its teachers, joined with " + "
    hardware: str = ""


@dataclass(frozen=True)
class Taught:
    """A teacher, or several that label together; the accuracy is then the mean of theirs."""

    name: str
    net: str
    accuracy: float


@dataclass(frozen=True)
class Regression:
    """Something that is worse than in the run before, or that changed without a reason in the configuration.

    `before` and `after` are fractions for accuracy, seconds for slower, and for images the number of sets compared and
    of those that changed.
    """

    kind: str  # accuracy | slower | images
    entry: str  # what it is about, in words
    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Record:
    """What a finished run leaves for those who come later. Keys that a reader does not know are ignored."""

    run: str
    experiment: str
    schedule: str  # name of the recurring run; "" = started by hand
    finished: str  # ISO, UTC
    seconds: float  # sum of all steps
    status: str  # succeeded | failed (some cell did)
    code_version: str
    hardware: tuple[str, ...]
    config: str  # the experiment as its author wrote it
    config_sha256: str  # of all that can change a number, resolved; names, places and pods are left out
    teachers: tuple[Taught, ...]
    cells: tuple[CellRecord, ...]
    previous: str = ""  # id of the run it was compared with
    regressions: tuple[Regression, ...] = ()
    steps: dict[str, float] = field(default_factory=dict)  # seconds by step; what cells share counts once
    data: str = ""  # fingerprint of the real images
    schema: int = SCHEMA

    @property
    def ended(self) -> datetime:
        """When it finished."""
        return datetime.fromisoformat(self.finished).astimezone(UTC)

    def json(self) -> bytes:
        """The content of its file."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


_RECORD = TypeAdapter(Record)


def parse(data: bytes, where: str) -> Record:
    """A record from its bytes; `where` names it in errors.

    Raises:
        CorruptArtifact: half written, something else, or newer than this program.
    """
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifact(f"{where}: no record of a run ({error}); delete it") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise CorruptArtifact(
            f"{where}: a record of schema {schema!r}; distillery {__version__} reads schema {SCHEMA}: upgrade it, or "
            "delete what is no record"
        )
    try:
        record = _RECORD.validate_python(raw)
        assert record.ended
    except (ValidationError, ValueError) as error:
        raise CorruptArtifact(f"{where}: no record of a run ({' '.join(str(error).split())[:300]})") from error
    return record


def identifier(run: str) -> str:
    """A run's id as it can stand in a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", run).strip("-.")[:100]
