"""A store in an S3 bucket, on any server that speaks S3. The only module that imports minio.

Settings come from the environment:

    AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL   http(s)://host[:port]; Amazon when unset
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN
    AWS_REGION, AWS_DEFAULT_REGION          asked of the bucket when unset
    AWS_CA_BUNDLE                           PEM file for https with a private authority
    AWS_S3_ADDRESSING_STYLE                 auto | path | virtual; auto: virtual for Amazon, path for others
    DISTILLERY_STORE_TIMEOUT                seconds to go on trying while the store does not answer, default 300

Without keys there, the minio client's other providers are tried: MINIO_ACCESS_KEY and MINIO_SECRET_KEY, the files
~/.aws/credentials and ~/.mc/config.json, then the roles of pods and machines (IAM).
Only calls that every S3 server has are used. Uploads broken off by a crash are not visible; a lifecycle rule of the
bucket can remove what they left inside the server.
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import io
import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree.ElementTree import ParseError

import certifi
import urllib3
from minio import Minio
from minio.credentials import providers
from minio.credentials.credentials import Credentials
from minio.error import InvalidResponseError, MinioException, S3Error
from minio.helpers import check_bucket_name
from urllib3.exceptions import HTTPError

from distillery.errors import CorruptArtifact, DistilleryError, StoreError, UserError, choices, nearest
from distillery.files import disk, remember, replacing, sha256_of
from distillery.store._base import HOLD, Entry, MissingKey, Store, check_key, hidden, join
from distillery.store._lease import Seen, lease
from distillery.store._patience import FIRST_PAUSE, GaveUp, PatientPool, Untrusted

BLOCK = 1 << 20
AMAZON = "https://s3.amazonaws.com"
STYLES = ("auto", "path", "virtual")
SHA = "x-amz-meta-sha256"
RESTARTS = 3  # uploads of one file before giving up on a server that forgets them

FORGOTTEN = {"NoSuchUpload", "InvalidPart", "InternalError"}  # an upload in parts that has to start again

ADVICE: tuple[tuple[set[str], type[DistilleryError], str], ...] = (
    ({"NoSuchKey", "NoSuchObject", "ResourceNotFound"}, MissingKey, "there is nothing under that key"),
    ({"NoSuchBucket", "InvalidBucketName"}, UserError, "create that bucket or correct its name"),
    (
        {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidTokenId"},
        UserError,
        "wrong credentials: check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN",
    ),
    (
        {"AccessDenied", "AllAccessDisabled", "AccountProblem", "InvalidSecurity"},
        UserError,
        "wrong credentials (check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), or they may not do that: they need to "
        "list the bucket and to get, put and delete objects (and AWS_REGION set, if they may not ask for the bucket's)",
    ),
    (
        {"PermanentRedirect", "Redirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"},
        UserError,
        "set AWS_REGION to the bucket's region",
    ),
    ({"RequestTimeTooSkewed"}, UserError, "this machine's clock is wrong: set it"),
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
        self._http = PatientPool(
            patience or _timeout(), self._stop, maxsize=32, ca_certs=_authorities(), cert_reqs="CERT_REQUIRED"
        )
        self._client = _connect(self._endpoint, self._http)
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
            return b"".join(self._blocks(key))

    def write(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._client.put_object(self._bucket, self._name(key), io.BytesIO(data), len(data))

    def delete(self, key: str) -> None:
        with contextlib.suppress(MissingKey), self._errors(key):
            self._client.remove_object(self._bucket, self._name(key))

    def read_part(self, key: str, start: int, nbytes: int) -> bytes:
        data, heard = bytearray(), time.monotonic()
        with self._errors(key):
            while len(data) < nbytes:  # a broken transfer goes on where it stopped
                answer = self._client.get_object(
                    self._bucket, self._name(key), offset=start + len(data), length=nbytes - len(data)
                )
                before = len(data)
                try:
                    for block in answer.stream(BLOCK):
                        data += block
                    if len(data) == before:
                        raise StoreError(f"{self.uri}/{key} ends before byte {start + nbytes}; it was cut or replaced")
                except HTTPError as error:
                    heard = time.monotonic() if len(data) > before else heard
                    if time.monotonic() - heard > self._http.patience:
                        raise GaveUp(f"{type(error).__name__}: {error}") from error
                    time.sleep(FIRST_PAUSE)
                finally:
                    answer.close()
                    answer.release_conn()
        return bytes(data[:nbytes])

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

    def put(self, key: str, path: Path) -> None:
        with self._errors(key), disk(path):
            size, sha = path.stat().st_size, sha256_of(path)
            for left in reversed(range(RESTARTS)):
                try:
                    with path.open("rb") as file:
                        self._client.put_object(self._bucket, self._name(key), file, size, metadata={SHA: sha})
                    return
                except S3Error as error:
                    if error.code not in FORGOTTEN or not left:
                        raise

    def fetch(self, key: str, path: Path, sha256: str = "") -> None:
        digest = hashlib.sha256()
        with self._errors(key), replacing(path) as file:
            for block in self._blocks(key):
                digest.update(block)
                file.write(block)
            if sha256 and digest.hexdigest() != sha256:
                raise CorruptArtifact(
                    f"{self.uri}/{key} has sha256 {digest.hexdigest()[:12]}, {sha256[:12]} was expected; "
                    "delete that artifact there and run its step again"
                )
        remember(path, digest.hexdigest())

    def hold(self, name: str) -> AbstractContextManager[None]:
        return lease(self, f"{HOLD}/{name}", f"{self.uri} ({name})")

    def peek(self, key: str) -> Seen | None:
        """A small object with its age by the server's clock, or None."""
        try:
            with self._errors(key), contextlib.closing(self._get(key)) as answer:
                data, headers = answer.read(), answer.headers
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
                return False
            if answer.status != 200:
                self.write(key, data)
        return True

    def _name(self, key: str) -> str:
        return join(self._prefix, check_key(key))

    def _get(self, key: str, offset: int = 0) -> urllib3.BaseHTTPResponse:
        return self._client.get_object(self._bucket, self._name(key), offset=offset)

    def _blocks(self, key: str) -> Iterator[bytes]:
        """The bytes under `key`; a broken transfer goes on where it stopped."""
        offset, etag, heard = 0, "", time.monotonic()
        while True:
            answer = self._get(key, offset)
            try:
                etag = etag or answer.headers.get("ETag", "")
                if offset and (answer.status != 206 or answer.headers.get("ETag", "") != etag):
                    raise StoreError(f"{self.uri}/{key} changed while it was read; start again")
                for block in answer.stream(BLOCK):
                    offset, heard = offset + len(block), time.monotonic()
                    yield block
                return
            except HTTPError as error:
                if time.monotonic() - heard > self._http.patience or self._stop.wait(FIRST_PAUSE):
                    raise GaveUp(f"{type(error).__name__}: {error}") from error
            finally:
                answer.close()
                answer.release_conn()

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
                "server runs and that AWS_ENDPOINT_URL is right (DISTILLERY_STORE_TIMEOUT sets how long to try)"
            ) from error
        except Untrusted as error:
            raise UserError(
                f"{where}: TLS failed: {error}; set AWS_CA_BUNDLE to the authority's PEM file, or http:// in "
                "AWS_ENDPOINT_URL for a server without TLS"
            ) from error
        except S3Error as error:
            raise _explain(error, where) from error
        except (InvalidResponseError, ParseError) as error:
            raise UserError(
                f"{where}: the answer is not S3's ({error!s:.200}); AWS_ENDPOINT_URL must be the server's S3 port, "
                "not its web console or a proxy's page"
            ) from error
        except (MinioException, HTTPError) as error:
            raise StoreError(f"{where}: {error}; check the server's log and start again") from error
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error


class _Credentials(providers.ChainedProvider):
    """The client's chain of providers, with an error that says what to set."""

    def retrieve(self) -> Credentials:
        try:
            return super().retrieve()
        except (ValueError, KeyError, OSError, HTTPError, configparser.Error) as error:
            raise UserError(
                f"no credentials for S3 ({error!s:.200}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error


def _explain(error: S3Error, where: str) -> DistilleryError:
    for codes, kind, advice in ADVICE:
        if error.code in codes:
            return kind(f"{where}: {error.code}: {error.message}; {advice}")
    return StoreError(f"{where}: {error.code}: {error.message}; check the server's log")


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
    quick = urllib3.PoolManager(timeout=urllib3.Timeout(connect=1, read=5), retries=urllib3.Retry(2))
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
