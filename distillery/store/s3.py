"""A store in an S3 bucket, on any server that speaks S3. The only module that imports minio.

Settings come from the environment:

    AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL   http(s)://host[:port]; Amazon when unset
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN
    AWS_REGION, AWS_DEFAULT_REGION          asked of the bucket when unset
    AWS_CA_BUNDLE                           PEM file for https with a private authority
    AWS_S3_ADDRESSING_STYLE                 auto | path | virtual; auto: virtual for Amazon, path for others
    DISTILLERY_STORE_TIMEOUT                seconds to try after the last sign of life, default 300, at most 840

Without keys there, the minio client's other providers are tried: MINIO_ACCESS_KEY and MINIO_SECRET_KEY, the files
~/.aws/credentials and ~/.mc/config.json, then the roles of pods and machines (IAM).
Only calls that every S3 server has are used. Files above 16 MiB travel in parts, 8 at a time in all; a transfer holds
256 MiB at most. A part is asked for by the ETag of the version whose first part came, so two versions never mix.
What a fault costs: a broken connection, a restarted or overloaded server: the parts in flight, which are sent again.
A replaced object: that download starts over, three times. Wrong or expired keys, no permission, no bucket, a clock that
is off, a full disk, a certificate nobody vouches for: one error at once. A server that says nothing: one error when
DISTILLERY_STORE_TIMEOUT is over. A name that does not resolve takes as long as this machine's resolver on top.
Uploads broken off by a crash are not visible; a lifecycle rule of the bucket can remove what they left in the server.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit
from xml.etree.ElementTree import ParseError

import certifi
import urllib3
from minio import Minio
from minio.credentials import providers
from minio.credentials.credentials import Credentials
from minio.datatypes import Part
from minio.error import InvalidResponseError, MinioException, S3Error
from minio.helpers import check_bucket_name
from urllib3.exceptions import HTTPError

from distillery.errors import CorruptArtifact, DistilleryError, StoreError, StoreRefused, UserError, choices, nearest
from distillery.files import disk, remember, replacing, sha256_of
from distillery.store import _crew
from distillery.store._base import HOLD, Entry, MissingKey, Store, check_key, hidden, join
from distillery.store._lease import Seen, lease
from distillery.store._patience import FIRST_PAUSE, GaveUp, PatientPool, Untrusted, heard_at

BLOCK = 1 << 20
BUFFER = 1 << 18  # bytes that stay in a core's cache between reading and hashing
PART = 16 << 20  # bytes; a larger file travels in parts
PARTS = 1000  # of one file, which is what OpenStack Swift takes; parts grow beyond 16 GB
THREADS = 8  # parts in flight
AMAZON = "https://s3.amazonaws.com"
STYLES = ("auto", "path", "virtual")
SHA = "x-amz-meta-sha256"
T = TypeVar("T")
RESTARTS = 3  # uploads that a server forgets, or downloads of an object that others replace, before giving up

FORGOTTEN = {"NoSuchUpload", "InvalidPart", "InternalError"}  # an upload in parts that has to start again

ADVICE: tuple[tuple[set[str], type[DistilleryError], str], ...] = (
    ({"NoSuchKey", "NoSuchObject", "ResourceNotFound"}, MissingKey, "there is nothing under that key"),
    ({"NoSuchBucket", "InvalidBucketName"}, StoreRefused, "create that bucket or correct its name"),
    (
        {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidTokenId"},
        StoreRefused,
        "wrong credentials, or temporary ones that have expired: check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
        "AWS_SESSION_TOKEN",
    ),
    (
        {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"},
        StoreRefused,
        "the credentials have expired: put new ones into AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN",
    ),
    (
        {"AccessDenied", "AllAccessDisabled", "AccountProblem", "InvalidSecurity"},
        StoreRefused,
        "wrong credentials (check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), or they may not do that: they need to "
        "list the bucket and to get, put and delete objects (and AWS_REGION set, if they may not ask for the bucket's)",
    ),
    (
        {"PermanentRedirect", "Redirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"},
        StoreRefused,
        "set AWS_REGION to the bucket's region",
    ),
    ({"RequestTimeTooSkewed"}, StoreRefused, "set the clock that is wrong (15 minutes are tolerated)"),
    (
        {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "InsufficientStorage"},
        StoreError,
        "the store is full: free space there, then start again (finished artifacts are kept)",
    ),
)


class _Unsigned(logging.Filter):
    """Addresses without what stands behind `?`: a presigned one is a credential, and debug logs are read by many."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(hidden(arg) if isinstance(arg, str) and "?" in arg else arg for arg in record.args)
        return True


logging.getLogger("urllib3.connectionpool").addFilter(_Unsigned())


class S3Store(Store):
    """Keys are object names below `s3://bucket/prefix`."""

    def __init__(self, uri: str, patience: float = 0.0) -> None:
        bucket, _, prefix = uri.partition("://")[2].partition("/")
        super().__init__(join(f"s3://{bucket}", prefix.strip("/")).rstrip("/"))
        self._bucket, self._prefix = bucket, prefix.strip("/")
        self._endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or AMAZON
        self._http = PatientPool(patience or _timeout(), maxsize=32, ca_certs=_authorities(), cert_reqs="CERT_REQUIRED")
        self._client = _connect(self._endpoint, self._http)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="store")
        try:
            check_bucket_name(bucket, s3_check=self._endpoint == AMAZON)
        except ValueError as error:
            raise UserError(f"{uri!r}: {error}; write s3://bucket/prefix") from error

    def exists(self, key: str) -> bool:
        try:
            with self._errors(key):
                self._client.stat_object(self._bucket, self._name(key))
        except MissingKey:
            return False
        return True

    def read(self, key: str) -> bytes:
        with self._errors(key):
            return self._whole(key)[0]

    def write(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._put(key, data, {})

    def delete(self, key: str) -> None:
        with contextlib.suppress(MissingKey), self._errors(key):
            self._client.remove_object(self._bucket, self._name(key))

    def read_part(self, key: str, start: int, nbytes: int) -> bytes:
        if not nbytes:
            return b""
        with self._errors(key):
            try:
                data = self._restarting(
                    key, lambda: b"".join(self._blocks(key, self._open(key, start, start + nbytes)))
                )
            except S3Error as error:
                if error.code != "InvalidRange":
                    raise
                data = b""
        if len(data) != nbytes:
            raise StoreError(f"{self.uri}/{key} ends before byte {start + nbytes}; it was cut or replaced")
        return data

    def list(self, prefix: str = "") -> list[Entry]:
        root = join(self._prefix, "")
        with self._errors(prefix):
            found = list(self._client.list_objects(self._bucket, prefix=root + prefix, recursive=True))
        entries = (Entry(o.object_name.removeprefix(root), o.size or 0, o.etag or "") for o in found if not o.is_dir)
        hidden = f"{HOLD}/"
        return sorted((e for e in entries if not e.key.startswith(hidden)), key=lambda e: e.key)

    def sha256(self, key: str) -> str:
        with self._errors(key):
            return str((self._client.stat_object(self._bucket, self._name(key)).metadata or {}).get(SHA, ""))

    def put(self, key: str, path: Path, sha256: str = "") -> None:
        with self._errors(key), disk(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > PART:
                self._put_parts(key, path, file, sha256 or sha256_of(path))
                return
            data = file.read()
            found = hashlib.sha256(data).hexdigest()
            _compare(path, found, sha256)
            self._put(key, data, {SHA: found})

    def fetch(self, key: str, path: Path, sha256: str = "") -> None:
        with self._errors(key), replacing(path, flushed=False) as file:
            found = self._restarting(key, lambda: self._fetch(key, file))
            if sha256 and found != sha256:
                raise CorruptArtifact(
                    f"{self.uri}/{key} has sha256 {found[:12]}, {sha256[:12]} was expected; "
                    "delete that artifact there and run its step again"
                )
        remember(path, found)

    def hold(self, name: str) -> AbstractContextManager[None]:
        return lease(self, f"{HOLD}/{name}", f"{self.uri} ({name})")

    def peek(self, key: str) -> Seen | None:
        """A small object with its age by the server's clock, or None."""
        try:
            with self._errors(key):
                data, headers = self._whole(key)
        except MissingKey:
            return None
        now = parsedate_to_datetime(headers["Date"]) if "Date" in headers else datetime.now(UTC)
        written = parsedate_to_datetime(headers["Last-Modified"])
        return Seen(data, headers.get("ETag", ""), (now - written).total_seconds())

    def claim(self, key: str, data: bytes, replaces: str) -> bool:
        """Write `key` if it still has the etag `replaces` (empty: if it does not exist).

        A server that does not know conditions writes anyway; the caller reads back.
        """
        condition = {"If-Match": replaces} if replaces else {"If-None-Match": "*"}
        with self._errors(key):
            # The client's own upload cannot send conditions; a presigned request can.
            url = self._client.presigned_put_object(self._bucket, self._name(key), timedelta(hours=1))
            answer = self._http.urlopen("PUT", url, body=data, headers={"Content-Length": str(len(data)), **condition})
            if answer.status in (404, 409, 412):
                seen = self.peek(key)  # a first try may have succeeded whose answer was lost
                return seen is not None and seen.data == data
            if answer.status != 200:
                self.write(key, data)
        return True

    def _name(self, key: str) -> str:
        return join(self._prefix, check_key(key))

    def _put(self, key: str, data: bytes, headers: dict[str, str]) -> None:
        size = len(data)
        name, part = self._name(key), max(size, PART)  # one request: there, or not
        self._client.put_object(self._bucket, name, io.BytesIO(data), size, metadata=dict(headers), part_size=part)

    def _put_parts(self, key: str, path: Path, file: io.BufferedReader, sha256: str) -> None:
        """Send a large file in parts, side by side, and hash it meanwhile; it counts when the last call is through."""
        name, handle = self._name(key), file.fileno()
        before = os.fstat(handle)

        def send(span: tuple[int, int, int]) -> Part:
            number, start, stop = span
            data = os.pread(handle, stop - start, start)
            return Part(number, self._client._upload_part(self._bucket, name, data, None, upload, number))

        for left in reversed(range(RESTARTS)):
            upload = self._client._create_multipart_upload(self._bucket, name, {SHA: sha256})
            try:
                with _crew.together(self._threads, send, _spans(0, before.st_size)) as sent:
                    file.seek(0)
                    _compare(path, hashlib.file_digest(file, "sha256").hexdigest(), sha256)
                    parts = [future.result() for future in sent]
                after = os.fstat(handle)
                if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                    raise CorruptArtifact(f"{path} changed while it was sent; send it again when it is finished")
                if self._client._complete_multipart_upload(self._bucket, name, upload, parts).etag:
                    return
                cause: Exception = StoreError(f"{self._endpoint} did not put the parts of {name} together")
            except S3Error as error:
                if error.code not in FORGOTTEN:
                    self._abort(name, upload)
                    raise
                cause = error
            except BaseException:
                self._abort(name, upload)
                raise
            with contextlib.suppress(S3Error):  # the answer to the last call may have been lost
                there = self._client.stat_object(self._bucket, name)
                if there.size == before.st_size and (there.metadata or {}).get(SHA) == sha256:
                    return
            self._abort(name, upload)
            if not left:
                raise cause

    def _abort(self, name: str, upload: str) -> None:
        with contextlib.suppress(MinioException, HTTPError, GaveUp):
            self._client._abort_multipart_upload(self._bucket, name, upload)

    def _restarting(self, key: str, work: Callable[[], T]) -> T:
        """Do a download over when somebody replaces the object meanwhile."""
        for _ in range(RESTARTS):
            with contextlib.suppress(_Replaced):
                return work()
        raise StoreError(
            f"{self.uri}/{key} changed while it was read, {RESTARTS} times; stop whoever writes there, then start again"
        )

    def _whole(self, key: str) -> tuple[bytes, Mapping[str, str]]:
        """The bytes under `key` and the answer's headers."""

        def get() -> tuple[bytes, Mapping[str, str]]:
            found = self._open(key)
            return b"".join(self._blocks(key, found)), found.answer.headers

        return self._restarting(key, get)

    def _fetch(self, key: str, file: BinaryIO) -> str:
        """Write what is under `key` to `file`, a large one in parts side by side; its sha256."""
        if os.fstat(file.fileno()).st_size:  # an earlier version's bytes
            file.seek(0)
            file.truncate()
        try:
            first = self._open(key, 0, PART)
        except S3Error as error:
            if error.code != "InvalidRange":
                raise
            first = self._open(key)  # it is empty
        digest, handle = hashlib.sha256(), file.fileno()

        def get(span: tuple[int, int, int]) -> tuple[int, int]:
            _, start, stop = span
            at = start
            for block in self._blocks(key, self._open(key, start, stop, first.etag)):
                at += os.pwrite(handle, block, at)
            return start, stop

        with _crew.together(self._threads, get, _spans(first.stop, first.size)) as rest:
            for block in self._blocks(key, first):
                digest.update(block)
                file.write(block)
            file.flush()
            buffer = memoryview(bytearray(BUFFER))
            for future in rest:
                start, stop = future.result()
                while start < stop:
                    count = os.preadv(handle, [buffer[: stop - start]], start)
                    digest.update(buffer[:count])
                    start += count
        return digest.hexdigest()

    def _open(self, key: str, start: int = 0, stop: int = 0, etag: str = "", heard: float = 0.0) -> _Range:
        """Ask for bytes start..stop (0: to the end) of the version `etag` (empty: whichever there is).

        Raises:
            _Replaced: there is another version now.
        """
        condition: dict[str, str | list[str] | tuple[str]] = {"If-Match": etag} if etag else {}
        try:
            with heard_at(heard):
                answer = self._client.get_object(
                    self._bucket, self._name(key), start, stop - start if stop else 0, request_headers=condition
                )
        except S3Error as error:
            if error.code == "PreconditionFailed" or (etag and error.code == "InvalidRange"):
                raise _Replaced(f"{key} is not {etag} any more") from error
            raise
        found, length = answer.headers.get("ETag", ""), int(answer.headers.get("Content-Length", -1))
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(total) if total.isdigit() else start + length
        partial = answer.status == 206
        if (
            (start and not partial)
            or (etag and found != etag)
            or (partial and start + length != min(stop or size, size))
        ):
            answer.close()
            raise _Replaced(f"{key} is {found}, not {etag}, or not the bytes asked for")
        return _Range(answer, start, start + length, size, found)

    def _blocks(self, key: str, part: _Range) -> Iterator[bytes]:
        """The bytes of a range; a broken transfer goes on where it stopped."""
        at, heard, url = part.start, time.monotonic(), f"{self._endpoint}/{self._bucket}/{self._name(key)}"
        while True:
            try:
                for block in part.answer.stream(BLOCK):
                    at, heard = at + len(block), time.monotonic()
                    yield block
                    if _crew.abandoned():
                        raise GaveUp(f"{key} is not wanted any more")
                return
            except HTTPError as error:
                if at == part.stop:
                    return
                self._http.wait(url, f"{type(error).__name__}: {error}", heard, FIRST_PAUSE)
            finally:
                part.answer.close()
                part.answer.release_conn()
            part = self._open(key, at, part.stop if part.stop < part.size else 0, part.etag, heard)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn whatever minio and urllib3 raise into one error that says where, why and what to do."""
        where = f"{self._endpoint}, bucket {self._bucket!r}, key {join(self._prefix, key)!r}"
        try:
            yield
        except DistilleryError:
            raise
        except GaveUp as error:
            raise StoreError(
                f"no answer from {where} within {self._http.patience:.0f} s; last cause: {error}; check that the "
                "server runs and that AWS_ENDPOINT_URL is right (DISTILLERY_STORE_TIMEOUT sets how long to try; with "
                "AWS_S3_ADDRESSING_STYLE=virtual the bucket is part of the host's name)"
            ) from error
        except Untrusted as error:
            raise StoreRefused(
                f"{where}: TLS failed: {error}; set AWS_CA_BUNDLE to the authority's PEM file; AWS_ENDPOINT_URL "
                "must have the name that the certificate is for, and http:// for a server without TLS"
            ) from error
        except S3Error as error:
            raise _explain(error, where) from error
        except (InvalidResponseError, ParseError) as error:
            raise StoreRefused(
                f"{where}: the answer is not S3's ({error!s:.200}); AWS_ENDPOINT_URL must be the server's S3 port, "
                "not its web console or a proxy's page, and https:// where that port speaks TLS"
            ) from error
        except (MinioException, HTTPError) as error:
            raise StoreError(f"{where}: {error}; check the server's log and start again") from error
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error


@dataclass(frozen=True)
class _Range:
    """Bytes start..stop of one version of an object, about to be read."""

    answer: urllib3.BaseHTTPResponse
    start: int
    stop: int
    size: int  # of the whole object
    etag: str


class _Replaced(Exception):
    """The object is not the one whose first bytes were read."""


def _spans(start: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Parts of a file from `start` on: number (from 1), first byte, and the byte after the last."""
    step = max(PART, -(-size // PARTS))
    for number, at in enumerate(range(start, size, step), 1):
        yield number, at, min(at + step, size)


def _compare(path: Path, found: str, sha256: str) -> None:
    if sha256 and found != sha256:
        raise CorruptArtifact(
            f"{path} has sha256 {found[:12]}, {sha256[:12]} was expected; delete its folder and run its step again"
        )


class _Credentials(providers.ChainedProvider):
    """The client's chain of providers, with an error that says what to set."""

    def retrieve(self) -> Credentials:
        try:
            return super().retrieve()
        except (ValueError, KeyError, OSError, HTTPError, configparser.Error) as error:
            raise StoreRefused(
                f"no credentials for S3 ({error!s:.200}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error


def _explain(error: S3Error, where: str) -> DistilleryError:
    text = f"{where}: {error.code}: {error.message}"
    if error.code == "RequestTimeTooSkewed":
        text += f" (here it is {formatdate(usegmt=True)}, there {error.response.headers.get('Date', 'another time')})"
    for codes, kind, advice in ADVICE:
        if error.code in codes:
            return kind(f"{text}; {advice}")
    return StoreError(f"{text}; check the server's log")


def _connect(endpoint: str, http: PatientPool) -> Minio:
    parts = urlsplit(endpoint)
    wrong = parts.username is not None or bool(parts.query) or bool(parts.path.strip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname or wrong:
        raise UserError(
            f"AWS_ENDPOINT_URL is {hidden(endpoint)!r}; write http://host:port or https://host:port, no path"
        )
    style = os.environ.get("AWS_S3_ADDRESSING_STYLE") or "auto"
    if style not in STYLES:
        raise UserError(f"AWS_S3_ADDRESSING_STYLE is {style!r}; allowed: {choices(STYLES)}{nearest(style, STYLES)}")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None
    # A machine without an IAM role must learn that in seconds.
    quick = urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=1, read=5), retries=urllib3.Retry(2), ca_certs=_authorities()
    )
    chain = _Credentials(
        [
            providers.EnvAWSProvider(),
            providers.EnvMinioProvider(),
            providers.AWSConfigProvider(),
            providers.MinioClientConfigProvider(),
            providers.IamAwsProvider(http_client=quick),
        ]
    )
    try:
        client = Minio(parts.netloc, secure=parts.scheme == "https", region=region, http_client=http, credentials=chain)
    except ValueError as error:
        raise UserError(f"AWS_ENDPOINT_URL {endpoint!r} or AWS_REGION {region!r}: {error}") from error
    if style == "virtual":
        client.enable_virtual_style_endpoint()  # type: ignore[no-untyped-call]
    elif style == "path":
        client.disable_virtual_style_endpoint()  # type: ignore[no-untyped-call]
    return client


def _timeout() -> float:
    text = os.environ.get("DISTILLERY_STORE_TIMEOUT") or "300"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"DISTILLERY_STORE_TIMEOUT is {text!r}; give a number of seconds above 0, like 300")
    return seconds


def _authorities() -> str:
    path = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or certifi.where()
    if not Path(path).is_file():
        raise UserError(f"AWS_CA_BUNDLE is {path!r}, which is not a file; give a PEM file")
    return path
