"""Kubernetes as plain dicts, with a limit on every wait and errors in our words.

The official client carries keys, certificates and plugins. Its models are left aside: they refuse what a newer server
sends, and the checks look at few fields.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from distillery.errors import DistilleryError

CONNECT, READ = 5.0, 15.0  # seconds of one request
LIMIT = 25.0  # seconds of one request with everything around it: names, plugins that fetch a token
PAGE = 500
SHOWN = 300  # characters of a server's message

Got = TypeVar("Got")
Object = dict[str, Any]


class ClusterError(DistilleryError):
    """The cluster did not answer, or refused; `status` is HTTP's, 0 without an answer."""

    def __init__(self, says: str, status: int = 0, reason: str = "") -> None:
        super().__init__(says)
        self.status, self.reason = status, reason


class Cluster:
    """A connection to the API server of the current context.

    Raises:
        ClusterError: there is no configuration, or it cannot be used.
    """

    def __init__(self) -> None:
        self._client, self.name = within(LIMIT, "reading the Kubernetes configuration", _connect)

    def get(self, path: str, **query: str) -> Object:
        """The object at a path such as `/api/v1/namespaces/kubeflow`."""
        return self._call("GET", path, query=query)

    def find(self, path: str) -> Object | None:
        """The object at a path, or None if there is none."""
        try:
            return self.get(path)
        except ClusterError as error:
            if error.status == 404:
                return None
            raise

    def items(self, path: str, **query: str) -> Iterator[Object]:
        """All objects of a list, page by page."""
        more = ""
        while True:
            page = self.get(path, limit=str(PAGE), **({"continue": more} if more else {}), **query)
            yield from page.get("items") or []
            more = page.get("metadata", {}).get("continue") or ""
            if not more:
                return

    def create(self, path: str, body: Object) -> Object:
        """Create an object."""
        return self._call("POST", path, body)

    def delete(self, path: str) -> None:
        """Delete an object at once; it need not exist."""
        try:
            self._call("DELETE", path, {"gracePeriodSeconds": 0})
        except ClusterError as error:
            if error.status != 404:
                raise

    def text(self, path: str, **query: str) -> str:
        """What a path answers that is not an object: a log."""
        return bytes(self._call("GET", path, query=query, raw=True)).decode("utf-8", "replace")

    def _call(
        self, method: str, path: str, body: Object | None = None, query: dict[str, str] | None = None, raw: bool = False
    ) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        def call() -> Any:
            answer = self._client.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params={"Accept": "*/*" if raw else "application/json"},
                body=body,
                response_type="object",
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _preload_content=not raw,  # or it parses a log that looks like JSON
                _request_timeout=(CONNECT, READ),
            )
            return answer.data if raw else answer

        what = f"{method} {path}"
        try:
            return within(LIMIT, what, call)
        except ApiException as error:
            said = _said(error)
            raise ClusterError(f"{what}: {said['message']}", error.status or 0, said["reason"]) from error
        except (HTTPError, OSError, ValueError) as error:
            cause = getattr(error, "reason", None) or error  # what was behind the last try
            raise ClusterError(f"{self.name}: {cause!s:.{SHOWN}}") from error


def within(seconds: float, what: str, work: Callable[[], Got]) -> Got:
    """The result of `work`, or an error after so many seconds: names and plugins know no time limit of their own.

    Raises:
        ClusterError: it took longer. Whatever `work` raises.
    """
    done: list[Got] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True, name=what)
    thread.start()
    thread.join(seconds)
    for error in failed:
        raise error
    if not done:
        raise ClusterError(f"{what}: no answer within {seconds:.0f} s")
    return done[0]


def _connect() -> tuple[Any, str]:
    from kubernetes import client, config
    from kubernetes.config import ConfigException

    settings = client.Configuration()
    settings.retries = 0
    try:
        path = os.environ.get("KUBECONFIG") or config.KUBE_CONFIG_DEFAULT_LOCATION  # it reads the variable only once
        config.load_kube_config(path, client_configuration=settings)
        name = f"context {config.list_kube_config_contexts(path)[1]['name']} at {settings.host}"
    except ConfigException as outside:
        try:
            config.load_incluster_config(client_configuration=settings)
        except ConfigException as error:
            raise ClusterError(f"no usable Kubernetes configuration ({outside})", reason="NoConfig") from error
        name = f"the cluster around this pod, at {settings.host}"
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ClusterError(f"the Kubernetes configuration cannot be read: {error!s:.{SHOWN}}") from error
    return client.ApiClient(settings), name


def _said(error: Any) -> dict[str, str]:
    """`message` and `reason` of an error answer, which is a Status object unless a proxy wrote it."""
    body = error.body or ""
    try:
        said = json.loads(body)
        return {"message": str(said["message"]), "reason": str(said.get("reason", ""))}
    except (ValueError, TypeError, KeyError):
        text = body if isinstance(body, str) else body.decode(errors="replace")
        return {"message": f"{error.status} {error.reason} {text[:SHOWN]}".strip(), "reason": ""}
