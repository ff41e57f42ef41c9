"""The object store, from here: write, read, list and delete with the keys that the run will have."""

import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from distillery.errors import DistilleryError, StoreError
from pipelines.doctor.case import Case, Place
from pipelines.doctor.cluster import within
from pipelines.doctor.finding import Finding, ok, skipped, told

SECONDS = 40.0  # the store's own patience ends long before


def check(case: Case) -> Iterator[Finding]:
    """One line for each place."""
    if not case.store and not case.parameter("checkpoints"):
        yield skipped("store", "no place given: --store s3://bucket/prefix, or --param checkpoints=s3://...")
    for place in case.places:
        yield from_here(case, place)


def from_here(case: Case, place: Place) -> Finding:
    """Whether this machine may use a place."""
    check = f"{place.name}, here"
    if place.secret in case.absent:
        return skipped(check, f"{place.uri}: secret {place.secret} is not usable, see above")
    if place.secret not in case.keys and not os.environ.get("AWS_ACCESS_KEY_ID"):
        why = f"the keys of secret {place.secret} cannot be read here, and AWS_ACCESS_KEY_ID is not set"
        return skipped(check, f"{place.uri}: {why}")
    host = urlsplit(place.endpoint).hostname or ""
    if host and not _known(host):
        return skipped(check, f"{place.uri}: {host} is a name that this machine does not know; the pod tells")
    from distillery.store import check_access

    with variables(settings(case, place)), quiet():
        try:
            within(SECONDS, place.uri, lambda: check_access(place.uri))
        except StoreError as error:
            if case.pod and case.cluster is not None and host and _inside(host):
                return skipped(check, f"{place.uri}: {place.endpoint} does not answer here; the pod tells")
            return told(check, error)
        except DistilleryError as error:
            return told(check, error)
    return ok(check, f"{place.uri}{f' at {place.endpoint}' if place.endpoint else ''}: written, read, listed, deleted")


def settings(case: Case, place: Place) -> dict[str, str]:
    """The environment that a step has for this place; keys that cannot be read are this machine's own."""
    found = {"AWS_ENDPOINT_URL": place.endpoint, "AWS_ENDPOINT_URL_S3": "", "AWS_REGION": place.region}
    values = case.keys.get(place.secret)
    if values is not None:
        found |= {"AWS_ACCESS_KEY_ID": values.get(place.access, ""), "AWS_SECRET_ACCESS_KEY": values.get(place.key, "")}
        found |= {"AWS_SESSION_TOKEN": values.get("sessiontoken", "")}
        found |= {"AWS_REGION": place.region or values.get("region", "")}
    authority = case.keys.get(case.authority, {}).get("ca.crt", "")
    return found | ({"AWS_CA_BUNDLE": authority} if authority else {})


@contextmanager
def variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a while; an empty text unsets one, and a certificate becomes a file."""
    before = {name: os.environ.get(name) for name in wanted}
    with tempfile.TemporaryDirectory() as folder:
        for name, value in wanted.items():
            if name == "AWS_CA_BUNDLE":
                path = Path(folder) / "ca.crt"
                path.write_text(value, encoding="utf-8")
                value = str(path)
            _set(name, value)
        try:
            yield
        finally:
            for name, old in before.items():
                _set(name, old or "")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the store's warnings that it tries again: what comes of it is told anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _set(name: str, value: str) -> None:
    os.environ.pop(name, None)
    if value:
        os.environ[name] = value


def _known(host: str) -> bool:
    try:
        within(10.0, host, lambda: socket.getaddrinfo(host, None))
    except (OSError, DistilleryError):
        return False
    return True


def _inside(host: str) -> bool:
    """Whether a name looks like a service of the cluster."""
    return "." not in host or host.endswith((".svc", ".cluster.local"))
