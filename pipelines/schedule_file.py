"""What `schedule.yaml` may say, and what Kubeflow is sent for it. Everything is checked before anything is sent."""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Annotated, Any, Dict, List, Literal, Optional, Tuple, Union
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field

from distillery.config import Name, Strict, parse, read_yaml
from distillery.errors import UserError, choices
from pipelines import compiled, cron
from pipelines.submit import default_experiment, digest, typed

MARK = "distillery-schedule:"  # in the description of a recurring run, so that it can be found again
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
MAX_FILE = 1 << 20  # bytes
PARAMETER = "schedule"  # tells the run who started it, where the package has such a parameter


def _time(text: str) -> str:
    """A time with its zone, as Kubeflow takes it: in UTC, whole seconds."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no time; write it as 2026-12-01T03:00:00Z") from error
    if found.tzinfo is None:
        raise ValueError(f"{text!r} is a time without its zone; write {text}Z, or +01:00 instead of Z")
    return found.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def zone(text: str) -> tzinfo:
    """The time zone of that name.

    Raises:
        UserError: this machine knows none of that name.
    """
    if text == "UTC":  # also where no database of zones is installed
        return UTC
    try:
        return ZoneInfo(text)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise UserError(
            f"{text!r} is no time zone that this machine knows; write UTC or such as Europe/Berlin"
        ) from error


def _zone(text: str) -> str:
    zone(text)
    return text


def _interval(value: Union[int, str]) -> int:
    """Seconds of `6h`, `1d12h` or a number of seconds."""
    if isinstance(value, str):
        if not re.fullmatch(r"(\d+[smhdw])+", value):
            raise ValueError(f"{value!r} is no length; write whole seconds, or for example 90m, 6h, 7d or 1d12h")
        value = sum(int(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)([smhdw])", value))
    if not 1 <= value <= 10 * 366 * 86400:
        raise ValueError(f"{value} seconds; an interval has at least one, and at most ten years")
    return value


Time = Annotated[str, AfterValidator(_time)]


class Schedule(Strict):
    """One schedule."""

    name: Name
    experiment: str  # a shipped name, a file (from the schedule's folder), or a URI
    set: Dict[str, Any] = Field(default_factory=dict)  # key path -> value, as `submit --set`
    cron: str = ""  # six fields, seconds first
    interval: Annotated[Union[int, str], AfterValidator(_interval)] = 1
    start: Optional[Time] = None
    end: Optional[Time] = None
    timezone: Annotated[str, AfterValidator(_zone)] = "UTC"  # what the cluster's cronScheduleTimezone says
    package: str = ""  # compiled pipeline, from the schedule's folder; "" = the one that comes along
    parameters: Dict[str, Any] = Field(default_factory=dict)
    profile: str = ""
    queue: str = ""
    pull_secret: str = ""
    parallelism: Annotated[int, Field(ge=0, le=1000)] = 0
    cache: bool = True
    experiment_name: str = ""  # KFP's experiment
    max_concurrency: Annotated[int, Field(ge=1, le=10)] = 1
    catchup: bool = False
    enabled: bool = True
    service_account: str = ""
    pipeline_root: str = ""


class File(Strict):
    """A file with several."""

    schedules: List[Schedule]


@dataclass(frozen=True)
class Wanted:
    """A schedule that has been checked, and what Kubeflow is sent for it.

    Attributes:
        name: the schedule's.
        group: name of KFP's experiment.
        timezone: the cluster's, for words.
        enabled: whether it shall fire.
        body: of the recurring run, without the experiment's id; it starts disabled.
    """

    name: str
    group: str
    timezone: str
    enabled: bool
    body: Dict[str, Any]

    @property
    def hash(self) -> str:
        """Short name of all that cannot be changed once it exists."""
        return digest([self.group, self.timezone, self.body])

    @property
    def package(self) -> str:
        """Short name of the package."""
        return digest(self.body["pipeline_spec"])[:12]

    @property
    def description(self) -> str:
        """What the recurring run carries, so that it is recognised however the server writes its fields."""
        marks = f"{MARK}{self.name} spec:{self.hash} package:{self.package} zone:{self.timezone}"
        return f"{self.timing}, by Distillery; {marks}" if len(self.timing) <= 60 else f"by Distillery; {marks}"

    @property
    def timing(self) -> str:
        """When it fires, in words."""
        return timing(self.body["trigger"], self.timezone)


def read(path: Path) -> List[Wanted]:
    """Every schedule of a file, checked as `submit` checks.

    Raises:
        UserError: not readable, a mistake in it, or an experiment or a parameter that cannot work.
    """
    found = written(path)
    packages: Dict[Tuple[Any, ...], compiled.Package] = {}
    return [_wanted(schedule, path, packages) for schedule in found]


def written(path: Path) -> List[Schedule]:
    """What a file says, with its form checked but not its experiments.

    Raises:
        UserError: not readable, an unknown key or a wrong value, or two schedules of one name.
    """
    try:
        if path.stat().st_size > MAX_FILE:
            raise UserError(f"{path}: {path.stat().st_size} bytes; a file of schedules has fewer than {MAX_FILE}")
        data = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; give a file with schedules, as pipelines/schedules/nightly.yaml") from error
    if "schedules" in data:
        schedules = parse(File, data, str(path)).schedules
    else:
        schedules = [parse(Schedule, data, str(path))]
    names = [schedule.name.lower() for schedule in schedules]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: {choices(twice)} stands there more than once; every schedule needs its own name")
    for schedule in schedules:
        _check_time(schedule, f"{path}: {schedule.name}")
    return schedules


def _check_time(schedule: Schedule, where: str) -> None:
    chosen = schedule.model_fields_set & {"cron", "interval"}
    if len(chosen) != 1:
        raise UserError(
            f"{where}: {'both cron and interval' if chosen else 'neither cron nor interval'} given; write one, for "
            "example cron: 0 0 3 * * * (six fields, seconds first) or interval: 6h"
        )
    if schedule.start and schedule.end and schedule.start >= schedule.end:
        raise UserError(f"{where}: it ends ({schedule.end}) before it starts ({schedule.start}); exchange the two")
    try:
        first = next_time(_trigger(schedule), schedule.timezone, datetime.now(UTC))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if first is None:
        what = f"cron {schedule.cron!r}" if schedule.cron else f"interval {schedule.interval} s"
        raise UserError(f"{where}: {what} never fires (end: {schedule.end}); correct it, or take the schedule out")


def _wanted(schedule: Schedule, path: Path, packages: Dict[Tuple[Any, ...], compiled.Package]) -> Wanted:
    where = f"{path}: {schedule.name}"
    source = path.parent / schedule.package if schedule.package else compiled.DISTILL
    constants = (source, schedule.queue, schedule.pull_secret, schedule.parallelism, schedule.cache)
    beside = path.parent / schedule.experiment
    try:
        if constants not in packages:
            packages[constants] = compiled.load(source).changed(*constants[1:])
        chosen = packages[constants]
        given = dict(schedule.parameters)
        if PARAMETER in chosen.parameters:
            given.setdefault(PARAMETER, schedule.name)
        changes = [f"{key}={json.dumps(value)}" for key, value in schedule.set.items()]
        experiment = str(beside) if beside.is_file() else schedule.experiment
        parameters, _ = typed(chosen, experiment, changes, given, schedule.profile)
    except UserError as error:
        said = str(error).removeprefix("--").replace("give --param NAME=VALUE", "write it under parameters")
        raise UserError(f"{where}: {said}") from error
    body: Dict[str, Any] = {
        "display_name": schedule.name,
        "pipeline_spec": chosen.document(),
        "runtime_config": {"parameters": parameters},
        "trigger": _trigger(schedule),
        "max_concurrency": schedule.max_concurrency,
        "no_catchup": not schedule.catchup,
        "mode": "DISABLE",
    }
    if schedule.pipeline_root:
        body["runtime_config"]["pipeline_root"] = schedule.pipeline_root
    if schedule.service_account:
        body["service_account"] = schedule.service_account
    group = schedule.experiment_name or default_experiment()
    return Wanted(schedule.name, group, schedule.timezone, schedule.enabled, body)


def _trigger(schedule: Schedule) -> Dict[str, Any]:
    """The trigger as the API takes it."""
    bounds = {"start_time": schedule.start, "end_time": schedule.end}
    known = {key: value for key, value in bounds.items() if value}
    if schedule.cron:
        return {"cron_schedule": {"cron": cron.parse(schedule.cron).text, **known}}
    return {"periodic_schedule": {"interval_second": str(schedule.interval), **known}}


def kind(trigger: Dict[str, Any]) -> Tuple[Literal["cron", "interval", ""], Dict[str, Any]]:
    """Which kind of trigger it is, and what stands in it."""
    if trigger.get("cron_schedule"):
        return "cron", dict(trigger["cron_schedule"])
    return ("interval", dict(trigger["periodic_schedule"])) if trigger.get("periodic_schedule") else ("", {})


def timing(trigger: Dict[str, Any], timezone: str) -> str:
    """When a trigger fires, in words."""
    name, inside = kind(trigger)
    if name == "cron":
        try:
            said = f"{cron.parse(str(inside.get('cron', ''))).words} ({timezone})"
        except UserError:  # made by somebody else
            said = f"cron {inside.get('cron', '')!r}"
    elif name == "interval":
        said = f"every {length(int(inside.get('interval_second') or 0))}"
    else:
        return "never"
    for word, key in (("from", "start_time"), ("until", "end_time")):
        if set_time(inside.get(key)):
            said += f", {word} {set_time(inside.get(key))}"
    return said


def length(seconds: int) -> str:
    """`5400` -> `1h30m`."""
    parts = []
    for unit in "wdhms":
        count, seconds = divmod(seconds, UNITS[unit])
        parts += [f"{count}{unit}"] if count else []
    return "".join(parts) or "0s"


def set_time(value: Any) -> str:
    """A time of the API in one spelling; "" for none, which some servers write as 1970."""
    text = str(value or "")
    try:
        return "" if not text or text.startswith("1970-") else _time(text)
    except ValueError:
        return text


def next_time(
    trigger: Dict[str, Any], timezone: str, after: datetime, since: Optional[datetime] = None
) -> Optional[datetime]:
    """The next time at which a trigger fires, in UTC.

    Args:
        trigger: as the API has it.
        timezone: the cluster's.
        after: a time with its zone.
        since: what an interval counts from: the last run, or when the schedule was made.

    Returns:
        None if it never fires again.

    Raises:
        UserError: a cron expression that is none, or a zone that this machine does not know.
    """
    name, inside = kind(trigger)
    start, end = (
        datetime.fromisoformat(text) if (text := set_time(inside.get(key))) else None
        for key in ("start_time", "end_time")
    )
    if name == "cron":
        after = max(after, start) if start else after
        found = cron.parse(str(inside.get("cron", ""))).next(after.astimezone(zone(timezone)))
    elif name == "interval":
        counted = max(filter(None, (since or after, start)))
        found = counted + timedelta(seconds=int(inside.get("interval_second") or 1))
    else:
        found = None
    return found.astimezone(UTC) if found and not (end and found > end) else None
