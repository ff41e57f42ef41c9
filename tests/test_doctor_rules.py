"""The scheduler's rules as `doctor` applies them: tolerations, what pods hold, and what a node is short of."""

from decimal import Decimal
from typing import Any

import pytest

from distillery.errors import UserError
from pipelines.doctor.asks import Ask
from pipelines.doctor.finding import hide, line, wrong
from pipelines.doctor.nodes import Node, misfit, quantity, requests, shown, tolerates

TAINT = {"key": "gpu", "value": "a100", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("toleration", "fits"),
    [
        ({"operator": "Exists"}, True),
        ({"key": "gpu", "operator": "Exists"}, True),
        ({"key": "gpu", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "gpu", "value": "a100"}, True),
        ({"key": "gpu", "operator": "Equal", "value": "h100"}, False),
        ({"key": "gpu", "operator": "Equal"}, False),
        ({"key": "other", "operator": "Exists"}, False),
        ({"value": "a100"}, False),
    ],
)
def test_tolerations(toleration: dict[str, Any], fits: bool) -> None:
    assert tolerates(toleration, TAINT) == fits


def container(cpu: str = "", limit: str = "", **more: Any) -> dict[str, Any]:
    """A container with a request and a limit."""
    both = {"requests": {"cpu": cpu} if cpu else {}, "limits": {"cpu": limit} if limit else {}}
    return {"resources": both, **more}


def test_what_a_pod_holds() -> None:
    assert requests({"containers": [container("1"), container("500m", "2")]}) == {"cpu": Decimal("1.5")}
    assert requests({"containers": [container(limit="2")]}) == {"cpu": 2}  # a limit alone is the request
    first = {"initContainers": [container("3")], "containers": [container("1")]}
    assert requests(first) == {"cpu": 3}  # the larger of what runs before and what runs then
    beside = {"initContainers": [container("3", restartPolicy="Always")], "containers": [container("1")]}
    assert requests(beside) == {"cpu": 4}  # a sidecar stays
    assert requests(first | {"overhead": {"cpu": "250m"}}) == {"cpu": Decimal("3.25")}
    assert requests({"containers": [{}]}) == {}


def node(**free: str) -> Node:
    """A node of 8 cores, 32 GiB and 2 GPUs with some of it free."""
    whole = {"cpu": Decimal(8), "memory": Decimal(32 << 30), "nvidia.com/gpu": Decimal(2), "pods": Decimal(10)}
    return Node("n", whole, whole | {name: quantity(text) for name, text in free.items()})


@pytest.mark.parametrize(
    ("ask", "free", "why"),
    [
        (Ask("4", "16Gi"), {}, ""),
        (Ask("7990m", "16Gi"), {}, ""),
        (Ask("8", "16Gi"), {}, "n: has 8 cpu"),  # Argo's own container needs its share
        (Ask("4", "64Gi"), {}, "n: has 32Gi memory"),
        (Ask("4", "16Gi"), {"cpu": "1", "memory": "8Gi"}, "n: 1 of 8 cpu free, 8Gi of 32Gi memory free"),
        (Ask("1", "1Gi"), {"pods": "0"}, "n: 0 of 10 pods free"),
        (Ask("1", "1Gi", "nvidia.com/gpu", 2), {}, ""),
        (Ask("1", "1Gi", "nvidia.com/gpu", 4), {}, "n: has 2 nvidia.com/gpu"),
        (Ask("1", "1Gi", "amd.com/gpu", 1), {}, "n: no amd.com/gpu"),
        (Ask("1", "1Gi", node_selector='{"zone": "b"}'), {}, "n: label zone is missing, not b"),
    ],
)
def test_what_a_node_is_short_of(ask: Ask, free: dict[str, str], why: str) -> None:
    found = misfit(node(**free), ask)
    assert str(found or "") == why


def test_a_node_that_is_not_ready_or_tainted() -> None:
    bad = node()
    bad.ready = False
    bad.taints = [TAINT, {"key": "soft", "effect": "PreferNoSchedule"}]
    assert str(misfit(bad, Ask("1", "1Gi"))) == "n: not ready, taint gpu=a100:NoSchedule"


def test_quantities() -> None:
    assert quantity("1500m") == Decimal("1.5")
    assert quantity("2Gi") == 2 << 30
    assert shown("memory", quantity("1536Mi")) == "1.5Gi"
    assert shown("cpu", quantity("250m")) == "0.25"
    for text in ("lots", "4GB", "-"):
        with pytest.raises(UserError, match="not a quantity"):
            quantity(text)


def test_values_of_secrets_and_control_characters_never_show() -> None:
    found = hide(
        wrong("store", "denied for key-of-somebody\n\x1b[31mred", "use key-of-somebody"), {"key-of-somebody", "s"}
    )
    assert "somebody" not in line(found)
    assert "\x1b" not in line(found)
    assert line(found).count("\n") == 1
    assert "denied" in line(found)  # too short a value hides nothing
