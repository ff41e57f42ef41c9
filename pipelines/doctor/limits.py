"""What the namespace allows a pod: ResourceQuota and LimitRange; and memory that is given away twice."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from pipelines.doctor.asks import Ask
from pipelines.doctor.case import Case
from pipelines.doctor.finding import Finding, ok, wrong
from pipelines.doctor.nodes import DRIVER, amounts, container, quantity, shown

Object = dict[str, Any]
DRIVER_LIMITS = Ask(cpu="500m", memory="512Mi")
# Every pod of a run has requests, and a deadline where it is a step's.
SCOPES = {"NotBestEffort": True, "BestEffort": False, "Terminating": True, "NotTerminating": False}


def quota(case: Case) -> Iterator[Finding]:
    """What the namespace's quotas and limit ranges refuse."""
    assert case.cluster is not None
    quotas = [q for q in case.cluster.items(case.path("resourcequotas")) if _applies(q)]
    ranges = list(case.cluster.items(case.path("limitranges")))
    found = [*_quota(case, quotas), *_range(case, ranges)]
    names = [f"ResourceQuota {q['metadata']['name']}" for q in quotas]
    names += [f"LimitRange {r['metadata']['name']}" for r in ranges]
    yield from found or [
        ok("quota", f"{', '.join(names) or 'no ResourceQuota and no LimitRange'}: room for every step")
    ]


def shm(case: Case) -> Iterator[Finding]:
    """Shared memory is a part of the pod's memory, and must be smaller."""
    asks = case.asks.steps if case.asks else {}
    wide = {
        ask: steps
        for ask, steps in asks.items()
        if ask.shm and ask.memory and quantity(ask.shm) >= quantity(ask.memory)
    }
    for ask, steps in wide.items():
        yield wrong(
            "shared memory",
            f"{', '.join(steps)}: /dev/shm may take {ask.shm}, all of the {ask.memory} memory it is counted against",
            "give the step more memory",
        )
    if asks and not wide:
        sizes = sorted({ask.shm for ask in asks if ask.shm}, key=quantity)
        yield ok(
            "shared memory",
            f"/dev/shm of {' to '.join(dict.fromkeys((sizes[0], sizes[-1])))}, within each memory limit"
            if sizes
            else "no step asks for more than a pod's 64 MiB",
        )


def _quota(case: Case, quotas: list[Object]) -> Iterator[Finding]:
    for one in quotas:
        name, status = one["metadata"]["name"], one.get("status") or {}
        hard, used = status.get("hard") or one["spec"].get("hard") or {}, status.get("used") or {}
        over: dict[tuple[str, bool], tuple[Decimal, list[str]]] = {}  # what, and whether ever -> the most, and who
        for ask, steps in _everyone(case):
            for key, amount in _counted(ask).items():
                if key in hard and amount > quantity(hard[key]) - quantity(used.get(key, "0")):
                    most, who = over.get((key, amount > quantity(hard[key])), (Decimal(0), []))
                    over[key, amount > quantity(hard[key])] = max(most, amount), [*who, *steps]
        for (key, never), (amount, who) in over.items():
            room = f"{shown(key, quantity(hard[key]))}, {shown(key, quantity(used.get(key, '0')))} used"
            yield wrong(
                "quota",
                f"ResourceQuota {name} of {case.namespace} allows {key} {room}: {', '.join(who)} "
                f"{'can never start' if never else 'must wait'}, a pod takes {shown(key, amount)}",
                f"raise it (kubectl -n {case.namespace} edit resourcequota {name}) or ask for less",
            )


def _range(case: Case, ranges: list[Object]) -> Iterator[Finding]:
    for one in ranges:
        name = one["metadata"]["name"]
        for rule in one["spec"].get("limits") or []:
            if rule.get("type") not in ("Container", "Pod"):
                continue
            for ask, steps in _everyone(case):
                most = DRIVER_LIMITS if ask == DRIVER else ask
                for key, amount in (container(most) if rule["type"] == "Container" else amounts(most)).items():
                    for bound, broken in (
                        ("max", amount > _bound(rule, "max", key)),
                        ("min", amount < _bound(rule, "min", key)),
                    ):
                        if broken and key in (rule.get(bound) or {}):
                            yield wrong(
                                "limits",
                                f"{', '.join(steps)} is refused: asks {shown(key, amount)} {key}; LimitRange {name} of "
                                f"{case.namespace} has a {bound} of {rule[bound][key]} per {rule['type'].lower()}",
                                f"change it (kubectl -n {case.namespace} edit limitrange {name}) or what the step asks",
                            )


def _everyone(case: Case) -> list[tuple[Ask, list[str]]]:
    return [(DRIVER, ["KFP's drivers"]), *(case.asks.steps.items() if case.asks else ())]


def _counted(ask: Ask) -> dict[str, Decimal]:
    """What a pod counts for in a quota; a step's limits are its requests."""
    found, most = amounts(ask), amounts(DRIVER_LIMITS if ask == DRIVER else ask)
    counted = {"pods": Decimal(1), "count/pods": Decimal(1)}
    for name in set(found) - {"pods"}:
        counted |= {f"requests.{name}": found[name], f"limits.{name}": most[name]}
    return counted | {"cpu": found["cpu"], "memory": found["memory"]}


def _bound(rule: Object, bound: str, key: str) -> Decimal:
    text = (rule.get(bound) or {}).get(key)
    return quantity(text) if text is not None else Decimal("Infinity" if bound == "max" else 0)


def _applies(one: Object) -> bool:
    """Whether a quota counts pods without a priority class."""
    spec = one.get("spec", {})
    named = [e for e in _expressions(spec) if e.get("scopeName") == "PriorityClass"]
    return all(SCOPES.get(scope, False) for scope in spec.get("scopes") or []) and not named


def _expressions(spec: Object) -> list[Object]:
    return (spec.get("scopeSelector") or {}).get("matchExpressions") or []
