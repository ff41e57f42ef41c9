"""Bring the schedules of a server to what a file wants: the differences first, then the steps.

Kubeflow cannot change a recurring run, so a changed one is made anew: create it switched off, switch the old one off,
switch the new one on, delete the old one. At most one of them is on at any moment, so none fires twice; both exist
until the new one is on, so whoever finds the work half done can finish it: `apply` again does.
"""

import contextlib
import difflib
import json
import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Callable, Dict, List, Literal, Optional

from distillery.errors import DistilleryError, UserError
from pipelines.api import ApiError, Client, NotFound, Unreachable, contains
from pipelines.schedule_file import MARK, Wanted, kind, next_time, set_time, timing

MARKED = re.compile(rf"{MARK}(\S+) spec:(\w+) package:(\w+) zone:(\S+)")
GUARD = 10.0  # seconds around a time to fire in which nothing is exchanged: the scheduler looks so often
FREQUENT = 60.0  # seconds: what fires more often is exchanged at any time
DEFAULT_ACCOUNTS = ("", "pipeline-runner", "default-editor")  # what a server fills in where nobody asked for one
POLICY_SINCE = (2, 16)  # the version that lets runs live on when their schedule is deleted


@dataclass(frozen=True)
class Known:
    """A recurring run of ours, as the server has it."""

    id: str
    name: str
    spec: str
    package: str
    timezone: str
    enabled: bool
    raw: Dict[str, Any] = field(repr=False)

    @property
    def created(self) -> str:
        """When it was made."""
        return str(self.raw.get("created_at") or "")

    @property
    def trigger(self) -> Dict[str, Any]:
        """When it fires."""
        return dict(self.raw.get("trigger") or {})

    @property
    def timing(self) -> str:
        """When it fires, in words."""
        return timing(self.trigger, self.timezone)


@dataclass(frozen=True)
class Change:
    """What has to be done about one schedule.

    Attributes:
        what: `gone` is on the server and not in the file; `half done` has more than one recurring run.
        lines: the differences, for people.
        wanted: None where it is gone.
        found: the recurring runs of that name.
    """

    name: str
    what: Literal["new", "changed", "unchanged", "half done", "gone"]
    lines: List[str]
    wanted: Optional[Wanted]
    found: List[Known]


def ours(client: Client, name: str = "") -> Dict[str, List[Known]]:
    """Recurring runs that Distillery made, by schedule; of one name: those that fire first, then the newest first."""
    found: Dict[str, List[Known]] = {}
    for raw in client.recurring([contains("description", MARK + name)]):
        marked = MARKED.search(str(raw.get("description") or ""))
        if marked and name in ("", marked[1]):
            enabled = raw.get("status") == "ENABLED"
            known = Known(str(raw["recurring_run_id"]), marked[1], marked[2], marked[3], marked[4], enabled, raw)
            found.setdefault(known.name, []).append(known)
    return {key: sorted(several, key=lambda known: not known.enabled) for key, several in sorted(found.items())}


def plan(client: Client, wanted: List[Wanted]) -> List[Change]:
    """What differs between a file and the server."""
    there = ours(client)
    changes = [_change(client, one, there.get(one.name, [])) for one in wanted]
    names = {one.name for one in wanted}
    for name, found in there.items():
        if name not in names:
            changes.append(Change(name, "gone", [f"  {found[0].timing}"], None, found))
    return changes


def _change(client: Client, wanted: Wanted, found: List[Known]) -> Change:
    same = [known for known in found if known.spec == wanted.hash]
    if not found:
        return Change(wanted.name, "new", [f"  {wanted.timing}{'' if wanted.enabled else ', paused'}"], wanted, found)
    main = (same or found)[0]
    lines = _switch(main.enabled, wanted.enabled)
    if not same:
        lines += differences(_server_view(client, main), _wanted_view(wanted))
        lines = lines or ["  something that the server does not show"]
    if len(found) > 1:
        note = f"  {len(found)} recurring runs have this name, {sum(known.enabled for known in found)} of them on"
        return Change(wanted.name, "half done", [note, *lines], wanted, found)
    return Change(wanted.name, "changed" if lines else "unchanged", lines, wanted, found)


def _switch(there: bool, wanted: bool) -> List[str]:
    return [] if there == wanted else [f"  enabled: {_text(there)} -> {_text(wanted)}"]


def _wanted_view(wanted: Wanted) -> Dict[str, str]:
    return _view(wanted.body, wanted.group, wanted.timezone, wanted.package)


def _server_view(client: Client, known: Known) -> Dict[str, str]:
    group = str(known.raw.get("experiment_id") or "")
    with contextlib.suppress(DistilleryError):  # it may be gone, and is only shown
        group = client.experiment_name(group)
    return _view(known.raw, group, known.timezone, known.package)


def _view(body: Dict[str, Any], group: str, timezone: str, package: str) -> Dict[str, str]:
    """What people can compare, however a server writes numbers and times."""
    _, inside = kind(body.get("trigger") or {})
    runtime = body.get("runtime_config") or {}
    account = str(body.get("service_account") or "")
    shown = {
        "cron": str(inside.get("cron") or ""),
        "interval": str(inside.get("interval_second") or ""),
        "start": set_time(inside.get("start_time")),
        "end": set_time(inside.get("end_time")),
        "timezone": timezone,
        "experiment_name": group,
        "package, queue, parallelism, cache": package,
        "max_concurrency": str(body.get("max_concurrency") or ""),
        "catchup": _text(not body.get("no_catchup", False)),
        "service_account": "" if account in DEFAULT_ACCOUNTS else account,
        "pipeline_root": str(runtime.get("pipeline_root") or ""),
    }
    return {**shown, **{f"{key}": _text(value) for key, value in (runtime.get("parameters") or {}).items()}}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def differences(old: Dict[str, str], new: Dict[str, str]) -> List[str]:
    """One line per value that differs; texts of several lines as a unified diff."""
    lines = []
    for key in [*new, *(key for key in old if key not in new)]:
        before, after = old.get(key, ""), new.get(key, "")
        if before == after:
            continue
        if "\n" in before or "\n" in after:
            compared = difflib.unified_diff(before.splitlines(), after.splitlines(), "server", "file", lineterm="", n=2)
            lines += [f"  {key}:", *(f"    {line}" for line in compared)]
        else:
            lines.append(f"  {key}: {before or '(none)'} -> {after or '(none)'}")
    return lines


# Doing it


def converge(client: Client, wanted: Wanted, say: Callable[[str], None]) -> None:
    """Leave exactly one recurring run of that name, as wanted.

    Raises:
        ApiError, UserError: it could not be done; what fired before fires still, or the same again repairs it.
    """
    found = ours(client, wanted.name).get(wanted.name, [])
    fresh = [known for known in found if known.spec == wanted.hash]
    firing = [known for known in found if known.enabled]
    if fresh and firing and not fresh[0].enabled:
        # Left behind, and too old to be switched on: it would make up for times at which the other one has fired.
        for known in fresh:
            remove(client, known)
        fresh = []
    if not fresh:
        if wanted.enabled and firing:
            _keep_clear(wanted, firing, say)
        _create(client, wanted)
        fresh = [known for known in ours(client, wanted.name).get(wanted.name, []) if known.spec == wanted.hash]
    if not fresh:
        raise ApiError(f"schedule {wanted.name}: made, and not to be found; look for it with `schedule list`")
    keep = min(fresh, key=lambda known: (not known.enabled, known.created, known.id))
    others = [known for known in ours(client, wanted.name)[wanted.name] if known.id != keep.id]
    stopped: List[Known] = []
    try:
        for known in others:
            if known.enabled:
                stopped.append(known)
                client.enable_recurring(known.id, False)
        if keep.enabled != wanted.enabled:
            client.enable_recurring(keep.id, wanted.enabled)
    except BaseException:
        _undo(client, keep, stopped)
        raise
    for known in others:
        remove(client, known, say)


def _create(client: Client, wanted: Wanted) -> None:
    group = client.experiment(wanted.group, create=True)
    body = {**wanted.body, "description": wanted.description, "experiment_id": group}
    before = {known.id for known in ours(client, wanted.name).get(wanted.name, [])}
    try:
        client.create_recurring(body)
    except Unreachable as error:
        if not error.sent:
            raise
        if not [known for known in ours(client, wanted.name).get(wanted.name, []) if known.id not in before]:
            client.create_recurring(body)


def _undo(client: Client, keep: Known, stopped: List[Known]) -> None:
    """Let the old ones fire again, once it is certain that the new one does not."""
    with contextlib.suppress(DistilleryError):
        if client.recurring_run(keep.id).get("status") == "DISABLED":
            for known in stopped:
                client.enable_recurring(known.id)


def _keep_clear(wanted: Wanted, firing: List[Known], say: Callable[[str], None]) -> None:
    """Wait while a time to fire is so near that both the old and the new one might take it for theirs."""
    now = datetime.now(UTC)
    for trigger, timezone in [(known.trigger, known.timezone) for known in firing] + [
        (wanted.body["trigger"], wanted.timezone)
    ]:
        if kind(trigger)[0] != "cron":
            continue
        with contextlib.suppress(UserError):
            near = next_time(trigger, timezone, now - timedelta(seconds=GUARD))
            after = near and next_time(trigger, timezone, near)
            if near is None or (after and (after - near).total_seconds() < FREQUENT):
                continue
            if (near - now).total_seconds() <= GUARD:
                say(f"{wanted.name}: fires at {near:%H:%M:%S} UTC; waiting until that is over")
                time.sleep((near - now).total_seconds() + GUARD)
                return


def remove(client: Client, known: Known, say: Callable[[str], None] = lambda _: None) -> None:
    """Delete one; what it has started goes on.

    On a server that would end such a run, a schedule with one is only switched off.
    """
    with contextlib.suppress(NotFound):
        if active(client, known) and not _spares_runs(client.version):
            client.enable_recurring(known.id, False)
            say(
                f"{known.name}: its old version is switched off and stays, since a run of it is going and Kubeflow "
                f"{client.version} would end it; apply again afterwards"
            )
            return
        client.delete_recurring(known.id)


def active(client: Client, known: Known) -> bool:
    """Whether a run of it is going."""
    where = [{"operation": "EQUALS", "key": "recurring_run_id", "string_value": known.id}]
    return any(not run.ended for run in client.runs(where, str(known.raw.get("experiment_id") or "")))


def _spares_runs(version: str) -> bool:
    """Whether a version lets runs live on; an unknown one is taken for a new one."""
    numbers = re.match(r"v?(\d+)\.(\d+)", version)
    return numbers is None or (int(numbers[1]), int(numbers[2])) >= POLICY_SINCE
