"""Is there a node for each step? Compares what pods ask with what is free, and says which node is short of what."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from distillery.errors import UserError
from pipelines.doctor.asks import Ask
from pipelines.doctor.case import Case
from pipelines.doctor.cluster import Cluster, ClusterError
from pipelines.doctor.finding import Finding, ok, skipped, wrong

Object = dict[str, Any]
Amounts = dict[str, Decimal]
SHOWN = 3  # nodes named in one line
BESIDE = {"cpu": Decimal("0.01"), "memory": Decimal(32 << 20)}  # Argo's container that waits for the step's own
DRIVER = Ask(cpu="100m", memory="64Mi")  # what KFP gives its drivers


@dataclass
class Node:
    """A node as the scheduler sees it."""

    name: str
    whole: Amounts
    free: Amounts
    labels: dict[str, str] = field(default_factory=dict)
    taints: list[Object] = field(default_factory=list)
    ready: bool = True


@dataclass
class Misfit:
    """Why a node cannot take a pod."""

    node: Node
    place: list[str] = field(default_factory=list)  # readiness, taints, labels
    size: list[str] = field(default_factory=list)  # too small even when empty
    busy: list[str] = field(default_factory=list)  # large enough, but taken

    def __str__(self) -> str:
        return f"{self.node.name}: {', '.join([*self.place, *self.size, *self.busy])}"

    @property
    def distance(self) -> tuple[int, int, int]:
        """Smaller is nearer to fitting."""
        return len(self.place) + len(self.size), len(self.size), len(self.busy)


def check(case: Case) -> Iterator[Finding]:
    """One line for KFP's drivers and one for each different ask of the package's steps."""
    assert case.cluster is not None
    try:
        nodes, seen = load(case.cluster)
    except ClusterError as error:
        if error.status != 403:
            raise
        yield skipped("nodes", f"you may not list nodes ({error}); the pod below shows whether one fits")
        return
    if not nodes:
        yield wrong("nodes", "the cluster has no nodes", "add one; nothing can run")
        return
    if not seen:
        yield skipped("nodes", "you may not list the pods of all namespaces: compared with empty nodes")
    yield _judge("drivers", "KFP's driver pods (no tolerations, no node selector)", DRIVER, nodes)
    for ask, steps in (case.asks.steps if case.asks else {}).items():
        yield _judge(f"node for {steps[0]}", ", ".join(steps), ask, nodes)


def load(cluster: Cluster) -> tuple[list[Node], bool]:
    """All nodes, and whether the pods on them were visible.

    Raises:
        ClusterError: nodes may not be listed.
    """
    nodes = {node.name: node for node in map(_node, cluster.items("/api/v1/nodes"))}
    try:
        running = "status.phase!=Succeeded,status.phase!=Failed"
        for pod in cluster.items("/api/v1/pods", fieldSelector=running):
            node = nodes.get(pod["spec"].get("nodeName", ""))
            if node is not None and pod.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
                for name, amount in requests(pod["spec"]).items():
                    node.free[name] = node.free.get(name, Decimal(0)) - amount
                node.free["pods"] = node.free.get("pods", Decimal(0)) - 1
    except ClusterError as error:
        if error.status != 403:
            raise
        return list(nodes.values()), False
    return list(nodes.values()), True


def misfit(node: Node, ask: Ask) -> Misfit | None:
    """Why the node cannot take a pod that asks this; None when it can."""
    found = Misfit(node)
    if not node.ready:
        found.place.append("not ready")
    tolerations = json.loads(ask.tolerations)
    for taint in node.taints:
        if taint.get("effect") != "PreferNoSchedule" and not any(tolerates(t, taint) for t in tolerations):
            found.place.append(f"taint {name_of(taint)}")
    for name, value in json.loads(ask.node_selector).items():
        if node.labels.get(name) != value:
            found.place.append(f"label {name} is {node.labels.get(name, 'missing')}, not {value}")
    for name, amount in amounts(ask).items():
        whole, free = node.whole.get(name, Decimal(0)), node.free.get(name, Decimal(0))
        if amount > whole:
            found.size.append(f"has {shown(name, whole)} {name}" if whole else f"no {name}")
        elif amount > free:
            found.busy.append(f"{shown(name, max(free, Decimal(0)))} of {shown(name, whole)} {name} free")
    return found if found.place or found.size or found.busy else None


def tolerates(toleration: Object, taint: Object) -> bool:
    """Whether a toleration covers a taint, by the scheduler's rules."""
    if toleration.get("effect") and toleration["effect"] != taint.get("effect"):
        return False
    if not toleration.get("key"):
        return bool(toleration.get("operator") == "Exists")
    same = toleration["key"] == taint["key"]
    return same and (
        toleration.get("operator") == "Exists" or (toleration.get("value") or "") == (taint.get("value") or "")
    )


def amounts(ask: Ask) -> Amounts:
    """What a pod takes from a node, by resource.

    Raises:
        UserError: a quantity that Kubernetes would refuse.
    """
    return total([container(ask), BESIDE, {"pods": Decimal(1)}])


def container(ask: Ask) -> Amounts:
    """What the step's own container asks, by resource."""
    found = {"cpu": quantity(ask.cpu or "0"), "memory": quantity(ask.memory or "0")}
    return found | ({ask.gpu_type: Decimal(ask.gpus)} if ask.gpus else {})


def requests(spec: Object) -> Amounts:
    """What a pod holds of its node: its containers together, or the largest of those that run before them."""
    together: Amounts = defaultdict(Decimal)
    before: Amounts = defaultdict(Decimal)
    for one in spec.get("initContainers") or []:
        asked = _requested(one)
        if one.get("restartPolicy") == "Always":
            _add(together, asked)
        for name, amount in asked.items():
            before[name] = max(before[name], amount)
    for one in spec.get("containers") or []:
        _add(together, _requested(one))
    found = {name: max(together[name], before[name]) for name in {*together, *before}}
    for name, text in (spec.get("overhead") or {}).items():
        found[name] = found.get(name, Decimal(0)) + quantity(text)
    return found


def quantity(text: str) -> Decimal:
    """A quantity as a number.

    Raises:
        UserError: Kubernetes would refuse it.
    """
    from kubernetes.utils import parse_quantity

    try:
        return Decimal(parse_quantity(text))
    except ValueError as error:
        raise UserError(f"{text!r} is not a quantity ({error}); write for example 500m, 4, 16Gi") from error


def shown(name: str, amount: Decimal) -> str:
    """An amount as people write it."""
    if name in ("memory", "ephemeral-storage") or name.endswith((".memory", "-storage")):
        for unit, size in (("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)):
            if amount >= size:
                return f"{float(amount / size):.1f}".removesuffix(".0") + unit
    return f"{float(amount):.2f}".rstrip("0").rstrip(".")


def name_of(taint: Object) -> str:
    """A taint as kubectl writes it."""
    value = f"={taint['value']}" if taint.get("value") else ""
    return f"{taint['key']}{value}:{taint.get('effect', '')}"


def _judge(title: str, who: str, ask: Ask, nodes: list[Node]) -> Finding:
    misfits, asks = [misfit(node, ask) for node in nodes], str(ask)
    fits = [node.name for node, fault in zip(nodes, misfits, strict=True) if fault is None]
    if fits:
        more = f" and {len(fits) - 1} more" if len(fits) > 1 else ""
        return ok(title, f"{who}: {asks} fits {fits[0]}{more}")
    found = sorted((m for m in misfits if m is not None), key=lambda m: m.distance)
    near = "; ".join(map(str, found[:SHOWN])) + (f"; and {len(found) - SHOWN} more nodes" if found[SHOWN:] else "")
    later = any(not m.place and not m.size for m in found)
    when = "no node has room now (the pod waits until others end)" if later else "no node takes it"
    return wrong(title, f"{who} asks {asks}: {when}: {near}", _advice(ask, found, nodes, title == "drivers"))


def _advice(ask: Ask, found: list[Misfit], nodes: list[Node], drivers: bool) -> str:
    """What would make the nearest node fit."""
    near = found[0]
    if drivers:
        free = "leave a healthy node without NoSchedule taints, with room for small pods"
        return free if near.place else f"{free}: end or move other pods, or add a node"
    said = []
    if ask.gpus and not any(node.whole.get(ask.gpu_type) for node in nodes):
        offered = sorted(
            {n for node in nodes for n, amount in node.whole.items() if "/" in n and amount} - {"hugepages"}
        )
        offers = f"; nodes offer {', '.join(offered)} (--param gpu_type=...)" if offered else ""
        said.append(f"add a node with {ask.gpu_type} and its device plugin, or ask for no GPU{offers}")
    else:
        untolerated = [t for t in near.node.taints if t.get("effect") != "PreferNoSchedule" and not _own_sign(t)]
        untolerated = [t for t in untolerated if not any(tolerates(o, t) for o in json.loads(ask.tolerations))]
        if untolerated:
            wanted = [{"key": t["key"], "operator": "Exists", "effect": t["effect"]} for t in untolerated]
            said.append(f"--param 'tolerations={json.dumps(json.loads(ask.tolerations) + wanted)}'")
        if _sick(near.node):
            said.append(f"repair or uncordon {near.node.name} (kubectl describe node {near.node.name})")
        if any(text.startswith("label ") for text in near.place):
            said.append(
                f"another --param node_selector=..., or label the node: kubectl label node {near.node.name} ..."
            )
        if near.size:
            said.append(
                "ask for less (the step's cpu, memory and gpus parameters, or another profile), or a larger node"
            )
        elif near.busy:
            said.append("wait for running pods to end, ask for less, or add a node")
    return "; ".join(said)


def _own_sign(taint: Object) -> bool:
    """Whether Kubernetes itself set the taint, because of the node's state; nobody should tolerate it."""
    return str(taint["key"]).startswith("node.kubernetes.io/")


def _sick(node: Node) -> bool:
    return not node.ready or any(map(_own_sign, node.taints))


def _node(found: Object) -> Node:
    spec, status = found.get("spec", {}), found.get("status", {})
    whole = {name: quantity(text) for name, text in (status.get("allocatable") or {}).items()}
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or [])
    taints = list(spec.get("taints") or [])
    if spec.get("unschedulable") and not any(t["key"] == "node.kubernetes.io/unschedulable" for t in taints):
        taints.append({"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"})
    return Node(found["metadata"]["name"], whole, dict(whole), found["metadata"].get("labels") or {}, taints, ready)


def _requested(container: Object) -> Amounts:
    given = container.get("resources") or {}
    return {
        name: quantity(text) for name, text in {**(given.get("limits") or {}), **(given.get("requests") or {})}.items()
    }


def _add(to: Amounts, more: Amounts) -> None:
    for name, amount in more.items():
        to[name] += amount


def total(many: Iterable[Amounts]) -> Amounts:
    """The sum, by resource."""
    found: Amounts = defaultdict(Decimal)
    for one in many:
        _add(found, one)
    return found
