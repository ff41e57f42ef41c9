"""What else of the cluster decides how a run goes: namespace, rights, service account, retries, queue."""

from collections.abc import Iterator
from typing import Any

import yaml

from pipelines.doctor.case import CONTROLLER, Case
from pipelines.doctor.cluster import Cluster, ClusterError
from pipelines.doctor.finding import Finding, ok, skipped, wrong

Object = dict[str, Any]
LEVELS = 4  # Argo templates around a step of a loop; the default applies at each of them
# What doctor does itself: verb, resource, whether in the namespace.
NEEDED = (
    ("get", "secrets", True),
    ("get", "configmaps", True),
    ("get", "serviceaccounts", True),
    ("list", "resourcequotas", True),
    ("list", "limitranges", True),
    ("list", "nodes", False),
    ("list", "pods", False),
)
FOR_POD = (
    ("create", "pods", True),
    ("get", "pods", True),
    ("delete", "pods", True),
    ("get", "pods/log", True),
    ("list", "events", True),
)


def connect(case: Case) -> Iterator[Finding]:
    """Kubernetes answers."""
    try:
        cluster = Cluster()
        version = cluster.get("/version").get("gitVersion", "of an unknown version")
    except ClusterError as error:
        if error.reason == "NoConfig":
            yield skipped("kubernetes", f"{error}; what only Kubernetes knows is not looked at (set KUBECONFIG)")
        else:
            do = (
                "log in again (kubectl get namespaces must work)"
                if error.status in (401, 403)
                else "check `kubectl config view` and the network"
            )
            yield wrong("kubernetes", str(error), do)
        return
    case.cluster = cluster
    yield ok("kubernetes", f"{version}, {cluster.name}")


def namespace(case: Case) -> Iterator[Finding]:
    """The namespace is there."""
    assert case.cluster is not None
    if case.multi_user and case.namespace == CONTROLLER:
        yield wrong(
            "namespace",
            f"this Kubeflow has many users, and {CONTROLLER} is nobody's",
            "give --namespace with your profile's name",
        )
        return
    try:
        found = case.cluster.find(f"/api/v1/namespaces/{case.namespace}")
    except ClusterError as error:
        if error.status != 403:
            raise
        yield skipped("namespace", f"you may not look at namespace {case.namespace}")
        case.has_namespace = True
        return
    if found is None:
        do = (
            "give --namespace with your profile's name"
            if case.multi_user
            else f"give --namespace, or kubectl create namespace {case.namespace}"
        )
        yield wrong("namespace", f"there is no namespace {case.namespace}", do)
        return
    case.has_namespace = True
    if found.get("status", {}).get("phase") == "Terminating":
        yield wrong("namespace", f"{case.namespace} is being deleted", "wait until it is gone and make it again")
        return
    level = (found["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce", "none")
    yield ok("namespace", f"{case.namespace}, pod security level: {level}")


def rights(case: Case) -> Iterator[Finding]:
    """What this user may do, of what doctor does."""
    assert case.cluster is not None
    lacking = []
    for verb, resource, inside in (*NEEDED, *(FOR_POD if case.pod else ())):
        kind, _, sub = resource.partition("/")
        asked = {"verb": verb, "resource": kind, "subresource": sub} | ({"namespace": case.namespace} if inside else {})
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": asked},
        }
        answer = case.cluster.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body)
        if not answer.get("status", {}).get("allowed"):
            lacking.append((f"{verb} {resource}{'' if inside else ' of the whole cluster'}", resource))
    if case.pod and (
        pods := [what for what, resource in lacking if (resource.startswith("pods") and "cluster" not in what)]
    ):
        case.pod = False
        case.no_pod = f"you may not {', '.join(pods)} in {case.namespace}"
    if lacking:
        yield skipped(
            "rights",
            f"you may not {', '.join(what for what, _ in lacking)}; a run does not need it, some lines here do",
        )
    else:
        yield ok("rights", "you may look at everything that is checked here")


def account(case: Case) -> Iterator[Finding]:
    """The service account that a run's pods get."""
    assert case.cluster is not None
    wanted = case.accounts
    case.account = next((name for name in wanted if case.cluster.find(case.path("serviceaccounts", name))), "")
    if case.account:
        yield ok("service account", case.account)
        return
    yield wrong(
        "service account",
        f"there is no service account {' or '.join(wanted)} in namespace {case.namespace}",
        "is this the namespace KFP runs in, or a profile of Kubeflow? Give --namespace, or apply k8s/ to it",
    )


def retries(case: Case) -> Iterator[Finding]:
    """What Argo does with failed pods unless a step says otherwise; no step of ours does."""
    assert case.cluster is not None
    check, where = "retries", "workflow-controller-configmap"
    path = f"/api/v1/namespaces/{case.system}/configmaps/{where}"
    found = case.cluster.find(path)
    if found is None:
        yield skipped(check, f"there is no ConfigMap {where} in namespace {case.system}")
        return
    data = found.get("data") or {}
    edit = f"see docs/operations.md; kubectl -n {case.system} edit configmap {where}"
    try:
        whole = yaml.safe_load(data.get("config") or "") or {}
        defaults = yaml.safe_load(data.get("workflowDefaults") or "") or whole.get("workflowDefaults") or {}
        spec = defaults.get("spec") or {}
        strategy = (spec.get("templateDefaults") or {}).get("retryStrategy")
    except (yaml.YAMLError, AttributeError) as error:
        yield wrong(check, f"{where}: workflowDefaults cannot be read: {error}", edit)
        return
    if strategy is None:
        yield ok(check, "Argo retries nothing by itself; resubmit or `watch` continues a failed run")
        return
    limit, policy = strategy.get("limit"), strategy.get("retryPolicy") or "OnFailure"
    times = f"{limit} times" if limit is not None else "without end"
    most = (
        f" (up to {(int(limit) + 1) ** LEVELS} pods for one step, as it applies at {LEVELS} nested levels)"
        if str(limit).isdigit()
        else ""
    )
    if str(limit) == "0":
        yield ok(check, "Argo retries nothing by itself (limit 0)")
    elif policy == "OnError":
        yield ok(
            check,
            f"Argo repeats pods {times} after errors of its own{most}, not what failed or was lost: `watch` does that",
        )
    else:
        yield wrong(
            check,
            f"Argo repeats every failing pod {times}, policy {policy}{most}: a mistake is paid for as often",
            f"set retryPolicy OnError or limit 0 ({edit})",
        )


def queue(case: Case) -> Iterator[Finding]:
    """The Kueue queue that the pods are put in."""
    assert case.cluster is not None
    name = case.queue
    if not name:
        yield skipped("queue", "the package has none, and none is given (--queue NAME)")
        return
    version = _kueue(case.cluster)
    if not version:
        yield wrong(
            "queue",
            f"queue {name!r} is asked for, but the cluster has no Kueue",
            "install Kueue, or send a package without it",
        )
        return
    found = case.cluster.find(f"/apis/{version}/namespaces/{case.namespace}/localqueues/{name}")
    if found is None:
        names = [
            q["metadata"]["name"]
            for q in case.cluster.items(f"/apis/{version}/namespaces/{case.namespace}/localqueues")
        ]
        yield wrong(
            "queue",
            f"there is no LocalQueue {name} in {case.namespace}; it has {', '.join(names) or 'none'}",
            "create it (k8s/ has a component for Kueue), or name another one",
        )
        return
    inactive = [
        c for c in found.get("status", {}).get("conditions") or [] if c["type"] == "Active" and c["status"] == "False"
    ]
    if inactive:
        yield wrong(
            "queue",
            f"LocalQueue {name} is not active: {inactive[0].get('message', '')}",
            f"kubectl -n {case.namespace} describe localqueue {name}",
        )
    else:
        yield ok("queue", f"LocalQueue {name} of ClusterQueue {found.get('spec', {}).get('clusterQueue', '?')}")


def _kueue(cluster: Cluster) -> str:
    """Kueue's API group with the version this cluster prefers; "" without Kueue."""
    group = cluster.find("/apis/kueue.x-k8s.io")
    return str((group or {}).get("preferredVersion", {}).get("groupVersion", ""))
