"""One interface for a local folder and for any S3 store (`s3://bucket/prefix`).

    store = open_store("s3://bucket/runs")
    store.push(folder, "cell1/synthetic")        # verified, in parallel, manifest last
    store.pull("cell1/synthetic", other_folder)

S3 needs the minio package, which is imported only when an s3:// URI is opened.
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from urllib.parse import unquote

from distillery.errors import StoreError, UserError, nearest
from distillery.store._base import Entry, MissingKey, Progress, Store, hidden
from distillery.store.local import LocalStore

__all__ = ["Entry", "MissingKey", "Progress", "Store", "check_access", "check_uri", "open_store"]

SCHEMES = ("file", "s3")
PROBE_SECONDS = 10.0  # a check before the work should not take the patience of the work


def open_store(uri: str | Path, patience: float = 0.0) -> Store:
    """Open a store; nothing is created or contacted yet.

    Args:
        uri: a path, `file:///path` or `s3://bucket/prefix`.
        patience: seconds to go on trying while the store does not answer (S3 only); 0 means the environment's
            DISTILLERY_STORE_TIMEOUT, or 300.

    Raises:
        UserError: another scheme, no bucket, bad settings in the environment, or minio is not installed.
    """
    text = str(uri) if isinstance(uri, Path) else check_uri(uri)
    scheme, colon, rest = text.partition(":")
    if isinstance(uri, Path) or not colon or not (rest.startswith("//") or scheme in SCHEMES):
        return LocalStore(Path(uri))
    if scheme not in SCHEMES or not rest.startswith("//"):
        raise UserError(
            f"{hidden(text)!r} is not a place to store things{nearest(scheme, SCHEMES)}; "
            "allowed: a path, file:///path, s3://bucket/prefix"
        )
    if scheme == "file":
        return LocalStore(Path(unquote(re.sub("^//(localhost(?=/))?", "", rest))))
    try:
        from distillery.store.s3 import S3Store
    except ModuleNotFoundError as error:
        if error.name not in ("minio", "urllib3"):
            raise
        raise UserError(f"{text!r} needs the minio package: pip install minio") from error
    return S3Store(text, patience)


def check_uri(uri: str) -> str:
    """The URI itself, if nobody can read credentials in it.

    Raises:
        UserError: it has a user or a password in it; they are not shown.
    """
    _, colon, rest = uri.partition("://")
    if colon and "@" in rest.partition("/")[0]:
        raise UserError(
            f"{hidden(uri)!r} carries credentials, which whoever reads parameters and logs would have: give them as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, on a cluster from a secret, and write s3://bucket/prefix"
        )
    return uri


def check_access(uri: str | Path) -> None:
    """Write, read, list and delete a probe, so that a wrong setting shows before hours of work.

    Raises:
        UserError: wrong credentials, missing bucket, a place that may not be written, or bad settings.
        StoreError: the store does not answer within 10 seconds, or answers wrongly.
    """
    store = open_store(uri, PROBE_SECONDS)
    key, data = f"probe-{uuid.uuid4().hex}", b"distillery checks that it may write here"
    store.list(key)  # a server that is not S3 may hang up on a request with a body before its answer is read
    store.write(key, data)
    try:
        if store.read(key) != data or [entry.key for entry in store.list(key)] != [key]:
            raise StoreError(f"{store.uri} did not give back what was just written to it ({key}); check that store")
    finally:
        store.delete(key)
