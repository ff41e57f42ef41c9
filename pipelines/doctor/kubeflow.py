"""Kubeflow Pipelines itself: reachable, new enough, and willing to talk to this user."""

import re
from collections.abc import Iterator

from distillery.errors import DistilleryError
from pipelines.api import Client, Refused
from pipelines.doctor.case import CONTROLLER, Case
from pipelines.doctor.cluster import ClusterError
from pipelines.doctor.finding import Finding, ok, skipped, told, wrong
from pipelines.options import client_of

OLDEST = (2, 15)  # older ones keep artifacts elsewhere and lack what the package asks for
SECONDS = 5.0  # for a server that does not answer; a person waits


def check(case: Case) -> Iterator[Finding]:
    """Endpoint, version, token and namespace, as far as KFP's own API knows them."""
    case.namespace = str(case.options.get("namespace") or CONTROLLER)
    try:
        client = client_of(**(case.options | {"patience": SECONDS}))
        case.namespace = client.to.namespace or CONTROLLER
        case.tokens |= {client.to.token, *client.to.headers.values()}
        health = client.health
    except DistilleryError as error:
        check = "token" if isinstance(error, Refused) and ": the token " in str(error) else "endpoint"
        yield told(check, error)
        return
    case.multi_user = bool(health["multi_user"])
    users = "many users" if case.multi_user else "one user"
    yield ok("endpoint", f"{client.to.endpoint}: Kubeflow Pipelines for {users}")
    yield from _version(case, client, str(health.get("tag_name") or ""))
    try:
        named = client.namespace
        client.get("/apis/v2beta1/experiments", {"page_size": 1, "namespace": named})
    except DistilleryError as error:
        yield told("namespace" if "namespace" in str(error) and "401" not in str(error) else "token", error)
        return
    who = "the token is accepted" if client.to.token or client.to.token_file else "none is given, none is asked for"
    yield ok("token", f"{who}{f', and may work in namespace {named}' if named else ''}")


def _version(case: Case, client: Client, told: str) -> Iterator[Finding]:
    text = told if _numbers(told) else client.version
    if not _numbers(text):
        text = _image_tag(case)
    found = _numbers(text)
    if found is None:
        yield skipped(
            "version", f"the server does not tell its version ({text or told or 'nothing'!r}); 2.15 or newer is needed"
        )
    elif found < OLDEST:
        yield wrong(
            "version", f"this is Kubeflow Pipelines {text}; 2.15 or newer is needed", "upgrade Kubeflow Pipelines"
        )
    else:
        yield ok("version", f"Kubeflow Pipelines {text}")


def _image_tag(case: Case) -> str:
    """The tag of the API server's image, for servers that were built without a version."""
    if case.cluster is None:
        return ""
    try:
        found = case.cluster.find(f"/apis/apps/v1/namespaces/{case.system}/deployments/ml-pipeline")
    except ClusterError:
        return ""
    containers = ((found or {}).get("spec") or {}).get("template", {}).get("spec", {}).get("containers") or [{}]
    image = str(containers[0].get("image", "")).partition("@")[0]
    return image.rpartition(":")[2] if ":" in image.rpartition("/")[2] else ""


def _numbers(text: str) -> "tuple[int, int] | None":
    found = re.match(r"v?(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None
