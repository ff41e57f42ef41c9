"""The same from a pod: a short-lived one with the run's image, keys, place and rights, which is always deleted again.

It proves what only a pod can: the image is pulled, pod security and quota let it in, a node takes it, the network
reaches the store. One container for each place, so that each has the keys its place needs.
"""

import json
import time
import uuid
from typing import Any

from pipelines.doctor.case import Case, Place
from pipelines.doctor.cluster import Cluster, ClusterError
from pipelines.doctor.finding import Finding, ok, one_line, skipped, wrong
from pipelines.doctor.nodes import quantity, shown

Object = dict[str, Any]
POLL = 1.0
SETTLED = 6.0  # seconds a trouble must last before it is believed: the first pull may stumble
UNSCHEDULED = 20.0  # the scheduler looks again when pods end
USER = 1000  # as the steps' pods
CA_FOLDER = "/etc/distillery-ca"
LAST = 300  # characters of a log that are shown
IMAGE = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "RegistryUnavailable",
    "ImageInspectError",
)
BROKEN = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff")


def check(case: Case) -> list[Finding]:
    """One line for the pod, then one for each place."""
    assert case.cluster is not None
    if not case.pod:
        return [skipped("pod", case.no_pod)]
    if not case.parameter("image"):
        return [skipped("pod", "the package has no parameter image, so no image to try")]
    if not case.account:
        return [skipped("pod", "its service account is missing or may not be looked at, see above")]
    missing = [s for s in (case.pull_secret, case.parameter("s3_ca")) if s in case.absent]
    if missing:
        return [skipped("pod", f"secret {', '.join(missing)} is missing, see above")]
    places = [place for place in case.places if place.secret not in case.absent]
    body = manifest(case, f"distillery-doctor-{uuid.uuid4().hex[:8]}", places)
    name, found = body["metadata"]["name"], []
    began = time.monotonic()
    try:
        case.cluster.create(case.path("pods"), body)
        pod = _wait(case, name, began)
        found = [*_pod(case, pod, time.monotonic() - began), *_places(case, pod, places)]
    except ClusterError as error:
        found = [_refused(case, error)]
    finally:
        try:
            case.cluster.delete(case.path("pods", name))
        except ClusterError as error:
            found.append(
                wrong(
                    "pod", f"pod {name} may still be there: {error}", f"kubectl -n {case.namespace} delete pod {name}"
                )
            )
    return found


def manifest(case: Case, name: str, places: list[Place]) -> Object:
    """The pod."""
    shm = max((a.shm for a in (case.asks.steps if case.asks else ()) if a.shm), key=quantity, default="64Mi")
    volumes: list[Object] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}}]
    volumes.append({"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}})  # as /tmp: the root may be read-only
    mounts: list[Object] = [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "scratch", "mountPath": "/tmp"}]
    if authority := case.authority:
        volumes.append({"name": "ca", "secret": {"secretName": authority}})
        mounts.append({"name": "ca", "mountPath": CA_FOLDER, "readOnly": True})
    size = {"cpu": "100m", "memory": "256Mi"}
    common: Object = {
        "image": case.parameter("image"),
        "resources": {"requests": size, "limits": size | {"memory": "512Mi", "cpu": "1"}},
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    home = [{"name": "HOME", "value": "/tmp"}]
    home += [{"name": "AWS_CA_BUNDLE", "value": f"{CA_FOLDER}/ca.crt"}] if authority else []
    containers = [
        {
            "name": _container(place),
            "command": ["python3", "-m", "distillery", "probe", place.uri],
            "env": home + _keys(place),
            **common,
        }
        for place in places
    ]
    no_mesh = {"sidecar.istio.io/inject": "false"}  # as KFP's own pods: a mesh's second container would never end
    alone: Object = {"name": "probe", "command": ["python3", "-m", "distillery", "probe"], "env": home, **common}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/name": "distillery", "app.kubernetes.io/component": "doctor", **no_mesh},
            "annotations": no_mesh,
        },
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": case.account,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 0,
            "activeDeadlineSeconds": int(case.pod_seconds) + 60,  # ends it even where this process was killed
            "securityContext": {
                "runAsUser": USER,
                "runAsGroup": USER,
                "runAsNonRoot": True,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "tolerations": case.parameters.get("tolerations") or [],
            "nodeSelector": case.parameters.get("node_selector") or {},
            "imagePullSecrets": [{"name": case.pull_secret}] if case.pull_secret else [],
            "volumes": volumes,
            "containers": containers or [alone],
        },
    }


def _keys(place: Place) -> list[Object]:
    """A place's settings, as a container's environment."""

    def key(variable: str, name: str, optional: bool = False) -> Object:
        return {
            "name": variable,
            "valueFrom": {"secretKeyRef": {"name": place.secret, "key": name, "optional": optional}},
        }

    found = [key("AWS_ACCESS_KEY_ID", place.access), key("AWS_SECRET_ACCESS_KEY", place.key)]
    found += [key("AWS_SESSION_TOKEN", "sessiontoken", optional=True)]
    found += (
        [{"name": "AWS_REGION", "value": place.region}]
        if place.region
        else [key("AWS_REGION", "region", optional=True)]
    )
    return found + ([{"name": "AWS_ENDPOINT_URL", "value": place.endpoint}] if place.endpoint else [])


def _container(place: Place) -> str:
    return "".join(c if c.isalnum() else "-" for c in place.name.lower().replace("'", ""))


def _wait(case: Case, name: str, began: float) -> Object:
    """The pod, once nothing more is expected of it or the time is over."""
    assert case.cluster is not None
    since: dict[str, float] = {}
    first: dict[str, Object] = {}  # the first message of a trouble; later ones only say that it goes on
    while True:
        pod = case.cluster.get(case.path("pods", name))
        now = time.monotonic()
        troubles = {container: trouble for container in _names(pod) if (trouble := _trouble(pod, container))}
        for container in set(since) - set(troubles):
            del since[container]
        for container, trouble in troubles.items():
            since.setdefault(container, now)
            first.setdefault(container, trouble)
        stuck = {c for c, at in since.items() if now - at >= SETTLED}
        ended = {c for c in _names(pod) if _state(pod, c).get("terminated")}
        unplaced = _unscheduled(pod) is not None and now - began >= UNSCHEDULED
        over = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
        if over or unplaced or stuck | ended == set(_names(pod)) or now - began > case.pod_seconds:
            return pod | {"first": first}
        time.sleep(POLL)


def _pod(case: Case, pod: Object, seconds: float) -> list[Finding]:
    """What the pod's way to its start tells."""
    assert case.cluster is not None
    name, image, status = pod["metadata"]["name"], case.parameter("image"), pod.get("status", {})
    unplaced = _unscheduled(pod)
    if unplaced is not None:
        return [
            wrong(
                "pod",
                f"no node takes it: {unplaced}",
                "see the lines about nodes; tolerations and node_selector are as for the steps",
            )
        ]
    if not pod["spec"].get("nodeName"):
        return [
            wrong(
                "pod",
                f"nothing scheduled it within {seconds:.0f} s: the cluster's scheduler gave no answer",
                "check the scheduler (kubectl -n kube-system get pods), then start again",
            )
        ]
    troubles = {c: pod["first"].get(c, t) for c in _names(pod) if (t := _trouble(pod, c))}
    for trouble in troubles.values():
        if trouble["reason"] in IMAGE:
            said = _last_warning(case.cluster, case, name, "Failed") or trouble.get("message", "")
            do = "push it, correct --param image=..., or name the registry's secret (--pull-secret NAME)"
            return [wrong("image", f"{image} cannot be pulled ({trouble['reason']}): {said}", do)]
    for container, trouble in troubles.items():
        do = f"correct what it names; kubectl -n {case.namespace} describe of a step's pod would say the same"
        return [
            wrong("pod", f"container {container} cannot start ({trouble['reason']}): {trouble.get('message', '')}", do)
        ]
    if not any(_state(pod, c).get("terminated") for c in _names(pod)):
        said = _last_warning(case.cluster, case, name) or status.get("message") or status.get("phase", "")
        do = "a first pull of a large image takes longer: repeat with --pod-timeout 600"
        return [wrong("pod", f"not done after {seconds:.0f} s on node {pod['spec']['nodeName']}: {said}", do)]
    return _ran(case, pod, seconds)


def _ran(case: Case, pod: Object, seconds: float) -> list[Finding]:
    """What a container that ran found about its image."""
    assert case.cluster is not None
    image = case.parameter("image")
    answers = {c: _answer(case, pod, c) for c in _names(pod)}
    found = next((a for a in answers.values() if isinstance(a, dict)), None)
    if found is None:
        container, text = next(iter(answers.items()))
        ended = _state(pod, container).get("terminated") or {}
        why = f"exit code {ended.get('exitCode')}, {ended.get('reason', '')} {ended.get('message', '')}"
        do = "give an image of this version of Distillery (make image)"
        return [wrong("image", f"{image} starts, but is not Distillery's ({why.strip()}): {str(text)[-LAST:]}", do)]
    wanted = max((quantity(a.shm) for a in (case.asks.steps if case.asks else ()) if a.shm), default=quantity("0"))
    shm, node = shown("memory", quantity(str(found["shm"]))), pod["spec"]["nodeName"]
    ran = f"{image} ran on node {node} within {seconds:.0f} s"
    lines = [ok("pod", f"{ran}, as user {found['user']}, Distillery {found['version']}, /dev/shm {shm}")]
    if found["shm"] < wanted:
        do = "something in the cluster replaces the pod's volumes: ask its administrator"
        lines.append(wrong("pod", f"/dev/shm has {shm}, the steps ask for {shown('memory', wanted)}", do))
    if not found["home"]:
        lines.append(
            wrong(
                "pod",
                "HOME and /tmp cannot be written to",
                "give /tmp an emptyDir where the root file system is read-only",
            )
        )
    return lines


def _places(case: Case, pod: Object, places: list[Place]) -> list[Finding]:
    """What each container says of its place."""
    found = []
    for place in places:
        check, answer = f"{place.name}, pod", _answer(case, pod, _container(place))
        if not isinstance(answer, dict):
            found.append(skipped(check, f"{place.uri}: the pod did not get that far"))
        elif answer["fault"]:
            says, _, do = str(answer["fault"]).rpartition("; ")
            found.append(wrong(check, says or do, f"{do} (keys: secret {place.secret} of {case.namespace})"))
        else:
            found.append(
                ok(
                    check,
                    f"{place.uri}{f' at {place.endpoint}' if place.endpoint else ''}: written, read, listed, deleted",
                )
            )
    return found


def _answer(case: Case, pod: Object, container: str) -> "Object | str":
    """The last line of a container's log, parsed; the log itself if that is no answer."""
    assert case.cluster is not None
    if not _state(pod, container).get("terminated"):
        return ""
    try:
        text = case.cluster.text(
            case.path("pods", pod["metadata"]["name"]) + "/log", container=container, tailLines="50"
        )
    except ClusterError as error:
        return str(error)
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        found = json.loads(lines[-1]) if lines else ""
    except ValueError:
        return one_line(text)
    return found if isinstance(found, dict) and "fault" in found else one_line(text)


def _refused(case: Case, error: ClusterError) -> Finding:
    said = str(error)
    if "exceeded quota" in said or "must specify" in said or "LimitRange" in said or "maximum" in said:
        return wrong(
            "pod",
            f"the namespace's quota or limits refuse even a small pod: {said}",
            f"kubectl -n {case.namespace} describe quota,limits",
        )
    if "violates PodSecurity" in said:
        return wrong(
            "pod",
            f"pod security refuses it: {said}",
            f"lower the level of namespace {case.namespace}, or ask why its policy goes beyond `restricted`",
        )
    return wrong(
        "pod", f"Kubernetes refuses it: {said}", "correct what it names; a step's pod would be refused as well"
    )


def _names(pod: Object) -> list[str]:
    return [c["name"] for c in pod["spec"]["containers"]]


def _state(pod: Object, container: str) -> Object:
    statuses = pod.get("status", {}).get("containerStatuses") or []
    return next((s.get("state") or {} for s in statuses if s["name"] == container), {})


def _trouble(pod: Object, container: str) -> "Object | None":
    """The reason why a container does not start, if there is one."""
    waiting = _state(pod, container).get("waiting") or {}
    return waiting if waiting.get("reason") in (*IMAGE, *BROKEN) else None


def _unscheduled(pod: Object) -> "str | None":
    """The scheduler's own words, if it found no node."""
    conditions = pod.get("status", {}).get("conditions") or []
    return next(
        (
            str(c.get("message", ""))
            for c in conditions
            if c["type"] == "PodScheduled" and c["status"] == "False" and c.get("reason") == "Unschedulable"
        ),
        None,
    )


def _last_warning(cluster: Cluster, case: Case, pod: str, reason: str = "") -> str:
    """The newest event that warns, or the newest of all."""
    try:
        events = list(cluster.items(case.path("events"), fieldSelector=f"involvedObject.name={pod}"))
    except ClusterError:
        return ""
    events.sort(
        key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or e["metadata"].get("creationTimestamp") or "")
    )
    if reason:
        # The first says why; those after it only that it failed again.
        return next((str(e.get("message", "")) for e in events if e.get("reason") == reason and e.get("message")), "")
    warnings = [e for e in events if e.get("type") == "Warning"] or events
    return str(warnings[-1].get("message", "")) if warnings else ""
