"""The one place that talks to Kubeflow Pipelines: a small client of its REST API, with errors in our words.

No kfp is imported: it takes seconds to load, its client hides most failures, and the image in the cluster holds only a
part of it. Names of fields are those of `/apis/v2beta1`. Two things come from older interfaces, which KFP 2.17 still
serves and v2beta1 lacks: the log of a pod, and the workflow as Argo keeps it (see `progress.py`).
"""

import itertools
import json
import os
import ssl
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional
from urllib.parse import quote, urlencode, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, NewConnectionError, SSLError

from distillery.errors import DistilleryError, UserError

IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
TOKEN_FILE = Path("/var/run/secrets/kubeflow/pipelines/token")  # where kfp looks for a projected token too
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
CONNECT, READ = 5.0, 30.0  # seconds for one try
PATIENCE = 30.0  # seconds that a request is repeated while nobody answers
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between tries; the last one repeats
TRANSIENT = {408, 429, 502, 503, 504}
LONGEST_MESSAGE = 800
MAX_ANSWER = 64 << 20  # bytes of one answer; a workflow of thousands of nodes stays far below
LONGEST = 300.0  # seconds that one answer may take to arrive, however steadily it does
PAGE = 100
Predicate = Dict[str, str]


class ApiError(DistilleryError):
    """KFP did not do what was asked."""


class Unreachable(ApiError):
    """No answer, or none that comes from KFP.

    `sent` tells whether the request may have arrived all the same.
    """

    def __init__(self, message: str, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class NotFound(ApiError):
    """KFP knows no such thing."""


class Refused(UserError):
    """401 or 403: the token is missing, wrong, expired or not allowed to do this."""


class BadRequest(UserError):
    """400: what was sent cannot work."""


@dataclass(frozen=True)
class Connection:
    """Where KFP is and who asks.

    Attributes:
        endpoint: URL of the API, with scheme; a path (as behind Kubeflow's gateway) is kept.
        namespace: the user's profile; only a multi-user Kubeflow is told.
        token: bearer token; "" = none or from `token_file`.
        token_file: file that holds it, read again for every request since Kubernetes renews it.
        ca: file with the certificate authority of the endpoint; "" = the system's.
        ui: URL under which people open the web interface; "" = the endpoint.
        headers: sent along with every request, for example a session's cookie.
        patience: seconds that a request is repeated while nobody answers.
    """

    endpoint: str
    namespace: str = ""
    token: str = field(default="", repr=False)
    token_file: str = ""
    ca: str = ""
    ui: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    patience: float = PATIENCE


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    status: int
    headers: Mapping[str, str]
    data: bytes


@dataclass(frozen=True)
class Run:
    """One run, as the API tells it. Times are RFC 3339 strings, "" while unknown; `state` is one of KFP's words."""

    id: str
    name: str
    state: str
    created: str
    finished: str
    description: str
    experiment_id: str
    history: List[Dict[str, Any]] = field(repr=False)
    raw: Dict[str, Any] = field(repr=False)

    @property
    def ended(self) -> bool:
        """Whether nothing more happens unless somebody retries it."""
        return self.state in ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")

    @property
    def failures(self) -> int:
        """How often it has failed so far; a server before 2.17 forgets all but the last one when it retries."""
        states = [str(entry.get("state", "")) for entry in self.history]
        changes = [state for state, _ in itertools.groupby(states)]
        return max(changes.count("FAILED"), int(self.state == "FAILED"))


def connection(
    endpoint: str = "",
    namespace: str = "",
    token: str = "",
    token_file: str = "",
    ca: str = "",
    ui: str = "",
    headers: Optional[Mapping[str, str]] = None,
    patience: float = PATIENCE,
) -> Connection:
    """A connection from what was given, from KFP's environment variables, and from what a pod finds mounted.

    Raises:
        UserError: no endpoint, or a file that cannot be read.
    """
    endpoint = endpoint or os.environ.get("KF_PIPELINES_ENDPOINT", "")
    if not endpoint and os.environ.get("KUBERNETES_SERVICE_HOST"):
        endpoint = IN_CLUSTER
    if not endpoint:
        raise UserError(
            f"endpoint: nothing given ({endpoint!r}); give --endpoint URL or set KF_PIPELINES_ENDPOINT, for example "
            "http://127.0.0.1:8888 while `kubectl port-forward -n kubeflow svc/ml-pipeline 8888:8888` runs"
        )
    if "://" not in endpoint:
        endpoint = f"https://{endpoint}"  # as kfp does
    if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).hostname:
        raise UserError(f"endpoint {endpoint!r}: not a URL; write it as http://HOST:PORT or https://HOST/PATH")
    token_file = token_file or os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", "")
    if not token and not token_file and TOKEN_FILE.exists():
        token_file = str(TOKEN_FILE)
    if not namespace and NAMESPACE_FILE.exists():
        namespace = NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    ui = ui or os.environ.get("KF_PIPELINES_UI_ENDPOINT", "")
    return Connection(endpoint.rstrip("/"), namespace, token, token_file, ca, ui, dict(headers or {}), patience)


class Client:
    """Requests to one KFP. Every method raises `Unreachable`, `Refused`, `NotFound`, `BadRequest` or `ApiError`."""

    def __init__(self, to: Connection) -> None:
        self.to = to
        self._health: Dict[str, Any] = {}
        options: Dict[str, Any] = {"timeout": urllib3.Timeout(connect=CONNECT, read=READ), "retries": False}
        if to.endpoint.startswith("https://"):
            try:
                options["ssl_context"] = ssl.create_default_context(cafile=to.ca or None)
            except (OSError, ssl.SSLError) as error:
                raise UserError(f"--ca {to.ca!r}: {error}; give a file with certificates (PEM)") from error
        self._pool = urllib3.PoolManager(**options)

    # What the server is

    @property
    def health(self) -> Dict[str, Any]:
        """The server's own words about itself, asked for once.

        Raises:
            Unreachable: something answers, but it is no KFP 2.
        """
        if not self._health:
            try:
                self._health = {"multi_user": False, **self.get("/apis/v2beta1/healthz")}
            except NotFound as error:
                raise Unreachable(self._foreign()) from error
        return self._health

    @property
    def multi_user(self) -> bool:
        """Whether every user has a namespace."""
        return bool(self.health["multi_user"])

    @property
    def version(self) -> str:
        """The server's version, or "" where it does not say."""
        try:
            return str(self.get("/apis/v1beta1/healthz").get("tag_name", ""))
        except NotFound:
            return ""

    def _foreign(self) -> str:
        try:
            old = self.get("/apis/v1beta1/healthz")
        except DistilleryError:
            return (
                f"{self.to.endpoint}: there is a server, but no Kubeflow Pipelines API under /apis/v2beta1; is it the "
                "address of ml-pipeline (port 8888), or of Kubeflow's gateway with the path /pipeline?"
            )
        version = old.get("tag_name") or "1"
        return f"{self.to.endpoint}: this is Kubeflow Pipelines {version}; version 2 is needed (2.15 or newer)"

    @property
    def namespace(self) -> str:
        """The namespace that requests must name: "" on a Kubeflow for one user.

        Raises:
            UserError: a multi-user Kubeflow, and none is known.
        """
        if not self.multi_user:
            return ""
        if not self.to.namespace:
            raise UserError(
                f"namespace: this Kubeflow ({self.to.endpoint}) has many users and none was named "
                f"({self.to.namespace!r}); give --namespace with your profile's name"
            )
        return self.to.namespace

    def link(self, run_id: str) -> str:
        """Where people look at a run."""
        return f"{(self.to.ui or self.to.endpoint).rstrip('/')}/#/runs/details/{run_id}"

    # Experiments and runs

    def experiment(self, name: str, create: bool = False) -> str:
        """The id of the experiment with that name.

        Raises:
            NotFound: there is none and none shall be made.
        """
        body = {"display_name": name, **({"namespace": self.namespace} if self.namespace else {})}
        found = next(self.pages("experiments", where=[equals("display_name", name)]), None)
        if found:
            return str(found["experiment_id"])
        if not create:
            raise NotFound(f"no experiment is called {name!r} on {self.to.endpoint}; give --experiment-name")
        try:
            return str(self.post("/apis/v2beta1/experiments", body)["experiment_id"])
        except (ApiError, BadRequest) as error:  # somebody else made it in between
            found = next(self.pages("experiments", where=[equals("display_name", name)]), None)
            if found is None:
                raise error
            return str(found["experiment_id"])

    def experiment_name(self, experiment_id: str) -> str:
        """The name of the experiment with that id."""
        return str(self.get(f"/apis/v2beta1/experiments/{quote(experiment_id, safe='')}")["display_name"])

    def create_run(self, body: Mapping[str, Any]) -> Run:
        """Start a run; never sent twice, since a lost answer does not mean that nothing was started."""
        return run_of(self.post("/apis/v2beta1/runs", body))

    def run(self, run_id: str, patience: Optional[float] = None) -> Run:
        """One run by its id."""
        return run_of(self.get(f"/apis/v2beta1/runs/{quote(run_id, safe='')}", patience=patience))

    def runs(self, where: Optional[List[Predicate]] = None, experiment_id: str = "") -> Iterator[Run]:
        """Runs, newest first, that meet all predicates; archived ones are left out."""
        where = [*(where or []), {"operation": "NOT_EQUALS", "key": "storage_state", "string_value": "ARCHIVED"}]
        known = {"experiment_id": experiment_id} if experiment_id else {}
        yield from map(run_of, self.pages("runs", where, "created_at desc", **known))

    def retry(self, run_id: str) -> None:
        """Run the failed steps of a failed run again; what succeeded stays."""
        self.post(f"/apis/v2beta1/runs/{quote(run_id, safe='')}:retry", {})

    def terminate(self, run_id: str) -> None:
        """End a run that is still going."""
        self.post(f"/apis/v2beta1/runs/{quote(run_id, safe='')}:terminate", {}, again=True)

    def delete_run(self, run_id: str) -> None:
        """Forget a run."""
        self.delete(f"/apis/v2beta1/runs/{quote(run_id, safe='')}")

    def workflow(self, run_id: str) -> Dict[str, Any]:
        """The run's Argo workflow, or an empty dict where the server does not show it (yet)."""
        try:
            told = self.get(f"/apis/v1beta1/runs/{quote(run_id, safe='')}")
        except (NotFound, Refused, BadRequest):
            return {}
        text = (told.get("pipeline_runtime") or {}).get("workflow_manifest") or "{}"
        try:
            found = json.loads(text)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def log(self, run_id: str, pod: str) -> str:
        """What a pod's main container has printed so far.

        Raises:
            ApiError: the pod and its log are gone, or not there yet.
        """
        path = f"/apis/v1alpha1/runs/{quote(run_id, safe='')}/nodes/{quote(pod, safe='')}/log"
        return self._ask("GET", path, raw=True)["text"]

    # Recurring runs

    def create_recurring(self, body: Mapping[str, Any]) -> Dict[str, Any]:
        """Create a recurring run."""
        return self.post("/apis/v2beta1/recurringruns", body)

    def recurring(self, where: Optional[List[Predicate]] = None, experiment_id: str = "") -> Iterator[Dict[str, Any]]:
        """Recurring runs that meet all predicates, newest first."""
        known = {"experiment_id": experiment_id} if experiment_id else {}
        yield from self.pages("recurringruns", where or [], "created_at desc", **known)

    def recurring_run(self, recurring_id: str) -> Dict[str, Any]:
        """One recurring run by its id."""
        found: Dict[str, Any] = self.get(f"/apis/v2beta1/recurringruns/{quote(recurring_id, safe='')}")
        return found

    def delete_recurring(self, recurring_id: str) -> None:
        """Delete a recurring run; its runs stay, and go on.

        Without the policy, Kubernetes takes the workflows that it has started along, those at work too. A server before
        2.16 knows no policy and does so.
        """
        path = f"/apis/v2beta1/recurringruns/{quote(recurring_id, safe='')}"
        self._ask("DELETE", path, query={"propagation_policy": "ORPHAN"}, again=True)

    def enable_recurring(self, recurring_id: str, enabled: bool = True) -> None:
        """Let a recurring run fire, or pause it."""
        verb = "enable" if enabled else "disable"
        self.post(f"/apis/v2beta1/recurringruns/{quote(recurring_id, safe='')}:{verb}", {}, again=True)

    # Requests

    def get(self, path: str, query: Optional[Mapping[str, Any]] = None, patience: Optional[float] = None) -> Any:
        """The answer to a GET, as parsed JSON."""
        return self._ask("GET", path, query=query, patience=patience)

    def post(self, path: str, body: Mapping[str, Any], again: bool = False) -> Any:
        """The answer to a POST, which is sent again only if it cannot have arrived, or if doing it twice is harmless.

        Args:
            path, body: where and what.
            again: whether doing it twice is harmless.
        """
        return self._ask("POST", path, body=body, again=again)

    def delete(self, path: str) -> Any:
        """The answer to a DELETE."""
        return self._ask("DELETE", path, again=True)

    def pages(
        self, what: str, where: Optional[List[Predicate]] = None, sort: str = "", **query: Any
    ) -> Iterator[Dict[str, Any]]:
        """Every entry of a list, page after page.

        Args:
            what: experiments, runs or recurringruns.
            where: predicates that all must hold.
            sort: a field, with " desc" for the other direction.
            query: further parameters; the namespace is added where no experiment is named.
        """
        if self.namespace and "experiment_id" not in query:
            query["namespace"] = self.namespace
        text = json.dumps({"predicates": where}) if where else ""
        query |= {"page_size": PAGE, "sort_by": sort, "filter": text}
        token = ""
        while True:
            answer = self.get(f"/apis/v2beta1/{what}", {**query, "page_token": token})
            key = {"recurringruns": "recurringRuns"}.get(what, what)
            yield from answer.get(key) or answer.get("recurring_runs") or []
            token = answer.get("next_page_token") or ""
            if not token:
                return

    def _ask(
        self,
        method: str,
        path: str,
        query: Optional[Mapping[str, Any]] = None,
        body: Optional[Mapping[str, Any]] = None,
        patience: Optional[float] = None,
        raw: bool = False,
        again: bool = False,
    ) -> Any:
        until = time.monotonic() + (self.to.patience if patience is None else patience)
        tries = 0
        while True:
            sent = True
            try:
                answer = self._send(method, path, query, body)
                if answer.status not in TRANSIENT:
                    return self._read(answer, method, path, raw)
                cause = f"HTTP {answer.status} {said(answer)}".rstrip()
            except SSLError as error:
                raise self._untrusted(error) from error
            except MaxRetryError as error:
                if isinstance(error.reason, SSLError):
                    raise self._untrusted(error.reason) from error
                cause, sent = str(error.reason), not isinstance(error.reason, NewConnectionError)
            except NewConnectionError as error:
                cause, sent = str(error), False
            except (HTTPError, OSError) as error:
                cause = str(error) or type(error).__name__
            left = until - time.monotonic()
            if not (again or method == "GET" or not sent) or left <= 0:
                raise self._silent(cause, sent)
            pause = min(PAUSES[min(tries, len(PAUSES) - 1)], left)
            tries += 1
            time.sleep(pause)

    def _send(
        self, method: str, path: str, query: Optional[Mapping[str, Any]], body: Optional[Mapping[str, Any]]
    ) -> Answer:
        headers = {"Accept": "application/json", **self.to.headers}
        if token := self._token():
            headers["Authorization"] = f"Bearer {token}"
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body).encode()
        fields = {key: value for key, value in (query or {}).items() if value != ""}
        url = self.to.endpoint + path
        if fields:
            url += "?" + urlencode(fields)
        given: Dict[str, Any] = {"headers": headers, "body": content, "redirect": False, "preload_content": False}
        response = self._pool.request(method, url, **given)
        data, until = bytearray(), time.monotonic() + LONGEST
        try:
            for part in response.stream(1 << 16):
                data += part
                if len(data) > MAX_ANSWER or time.monotonic() > until:
                    raise ApiError(
                        f"{method} {path}: {len(data)} bytes in {time.monotonic() - until + LONGEST:.0f} s and no end; "
                        f"an answer may have {MAX_ANSWER} bytes and take {LONGEST:.0f} s"
                    )
        except ApiError:
            response.close()
            raise
        response.release_conn()
        return Answer(response.status, response.headers, bytes(data))

    def _token(self) -> str:
        token, where = self.to.token.strip(), "--existing-token"
        if not token and self.to.token_file:
            where = f"token file {self.to.token_file!r}"
            try:
                token = Path(self.to.token_file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{where}: {error}; give --token-file or unset it") from error
        if not token.isascii() or not token.isprintable():
            raise UserError(f"{where}: {len(token)} characters, some of which no token has; is it the right one?")
        return token

    def _read(self, answer: Answer, method: str, path: str, raw: bool) -> Any:
        status = answer.status
        if 200 <= status < 300:
            if raw:
                return {"text": answer.data.decode("utf-8", "replace")}
            try:
                return json.loads(answer.data or b"{}")
            except ValueError as error:
                kind = answer.headers.get("Content-Type", "")
                raise Unreachable(
                    f"{self.to.endpoint}{path}: the answer is no JSON but {kind or 'of no type'}; this is not the "
                    "API of Kubeflow Pipelines, or a login page stands in front of it"
                ) from error
        words = said(answer)
        if 300 <= status < 400:
            where = answer.headers.get("Location", "")
            raise Refused(
                f"{self.to.endpoint}: sends us to {where!r}, so nobody is logged in; give a token "
                "(--token-file) or the session's cookie (--header 'Cookie: ...')"
            )
        if status == 401:
            held = "was not accepted" if self._token() else "is missing"
            raise Refused(
                f"{self.to.endpoint}: the token {held} (401 {words}); give --token-file FILE with a valid one"
            )
        if status == 403:
            raise Refused(
                f"{method} {path}: not allowed (403 {words}); namespace {self.to.namespace!r} must exist, and whoever "
                f"asks ({'with' if self._token() else 'without'} a token) must have a role in it"
            )
        if status == 404:
            raise NotFound(f"{method} {path}: not found on {self.to.endpoint} (404 {words})")
        if status in (400, 409, 412):
            raise BadRequest(f"{method} {path}: Kubeflow says no ({status} {words})")
        raise ApiError(f"{method} {path}: Kubeflow failed ({status} {words}); its own log is that of ml-pipeline")

    def _silent(self, cause: str, sent: bool) -> Unreachable:
        return Unreachable(
            f"{self.to.endpoint}: no usable answer ({cause[:LONGEST_MESSAGE]}); is the address right, does the "
            "port-forward still run, is the ml-pipeline pod up?",
            sent,
        )

    def _untrusted(self, error: Exception) -> UserError:
        return UserError(
            f"{self.to.endpoint}: TLS failed ({error}); give --ca FILE with the authority that signed its "
            "certificate, or http:// if it speaks no TLS"
        )


def equals(key: str, value: str) -> Predicate:
    """A predicate for lists."""
    return {"operation": "EQUALS", "key": key, "string_value": value}


def contains(key: str, value: str) -> Predicate:
    """A predicate for lists."""
    return {"operation": "IS_SUBSTRING", "key": key, "string_value": value}


def run_of(told: Mapping[str, Any]) -> Run:
    """A run out of the API's JSON."""
    known = {name: str(told.get(name) or "") for name in ("run_id", "display_name", "created_at", "finished_at")}
    finished = "" if known["finished_at"].startswith("1970-") else known["finished_at"]
    return Run(
        known["run_id"],
        known["display_name"],
        str(told.get("state") or "PENDING"),
        known["created_at"],
        finished,
        str(told.get("description") or ""),
        str(told.get("experiment_id") or ""),
        list(told.get("state_history") or []),
        dict(told),
    )


def age(text: str) -> float:
    """Seconds since a time as the API writes it; 0 for none."""
    if not text or text.startswith("1970-"):
        return 0.0
    try:
        then = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return 0.0
    return (datetime.now(UTC) - then).total_seconds()


def said(answer: Answer) -> str:
    """What an error's body says, in one line."""
    text = answer.data[: 1 << 16].decode("utf-8", "replace")
    try:
        told = json.loads(text)
    except ValueError:
        told = {}
    if isinstance(told, dict):
        text = str(told.get("message") or told.get("error_message") or told.get("error") or ("" if told else text))
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_MESSAGE else line[:LONGEST_MESSAGE] + "..."
