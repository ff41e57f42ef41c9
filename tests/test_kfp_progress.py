"""The steps of a run, out of a workflow as Argo keeps it: names, states, pods, reasons."""

import base64
import gzip
import json
from typing import Any

import pytest

from pipelines.api import run_of
from pipelines.progress import Step, last_lines, path_of, place, steps_of, stopped

WORKFLOW = "distill-7hx2k"
TURN = "root.for-loop-2.iteration-iterations(3:3).iteration-item"


def node(name: str, number: int, kind: str, template: str, phase: str, at: int, **more: Any) -> dict[str, Any]:
    """One node; `at` are seconds, and a node that is over ended five seconds later."""
    over = phase not in ("Running", "Pending")
    times = {
        "startedAt": f"2026-11-21T10:00:{at:02d}Z",
        "finishedAt": f"2026-11-21T10:00:{at + 5:02d}Z" if over else None,
    }
    known = {"id": f"{WORKFLOW}-{number}", "name": f"{WORKFLOW}.{name}", "type": kind, "templateName": template}
    return {**known, "phase": phase, **times, **more}


def workflow(*nodes: dict[str, Any]) -> dict[str, Any]:
    """A workflow with these nodes."""
    return {"metadata": {"name": WORKFLOW}, "status": {"nodes": {each["id"]: each for each in nodes}}}


EXECUTOR, IMPL, DRIVER = "system-container-executor", "system-container-impl", "system-container-driver"
NODES = (
    node("root-driver", 1, "Pod", "system-dag-driver", "Succeeded", 0),
    node("root", 2, "DAG", "root", "Running", 6),
    node("root.plan-driver", 3, "Pod", DRIVER, "Succeeded", 7),
    node("root.plan", 4, "DAG", EXECUTOR, "Succeeded", 13),
    node("root.plan.executor", 5, "Pod", IMPL, "Succeeded", 13),
    node("root.prepare-data-driver", 6, "Pod", DRIVER, "Succeeded", 20),
    node("root.prepare-data", 7, "DAG", EXECUTOR, "Succeeded", 26),
    node("root.prepare-data.executor", 8, "Skipped", IMPL, "Skipped", 26),
    node("root.for-loop-2", 9, "DAG", "comp-for-loop-2-for-loop-2-iterator", "Running", 27),
    node("root.for-loop-2.iteration-driver", 10, "Pod", "system-dag-driver", "Succeeded", 27),
    node("root.for-loop-2.iteration-iterations", 11, "TaskGroup", "comp-for-loop-2-iteration", "Running", 30),
    node(f"{TURN}-driver", 12, "Pod", "system-dag-driver", "Succeeded", 30),
    node(TURN, 13, "DAG", "comp-for-loop-2", "Running", 35),
    node(f"{TURN}.cell-driver", 14, "Pod", "system-dag-driver", "Succeeded", 35),
    node(f"{TURN}.cell", 15, "DAG", "comp-cell", "Running", 36),
    node(f"{TURN}.cell.synthesize-driver", 16, "Pod", DRIVER, "Succeeded", 37),
    node(f"{TURN}.cell.synthesize", 17, "DAG", EXECUTOR, "Running", 40),
    node(f"{TURN}.cell.synthesize.executor", 18, "Retry", IMPL, "Running", 40),
    node(f"{TURN}.cell.synthesize.executor(0)", 19, "Pod", IMPL, "Error", 40, message="pod deleted"),
    node(f"{TURN}.cell.synthesize.executor(1)", 20, "Pod", IMPL, "Running", 46),
)


def seen(*nodes: dict[str, Any]) -> dict[str, Step]:
    """The steps of these nodes by path."""
    return {step.path: step for step in steps_of(workflow(*nodes), run_of({"run_id": "r"}))}


def test_steps_have_the_names_people_know_and_the_state_of_their_last_attempt() -> None:
    found = seen(*NODES)
    assert {path: step.state for path, step in found.items()} == {
        "plan": "SUCCEEDED",
        "prepare_data": "CACHED",
        "cell/3/synthesize": "RUNNING",
    }
    assert found["plan"].started == "2026-11-21T10:00:07Z"
    assert found["plan"].ended == "2026-11-21T10:00:18Z"
    assert found["cell/3/synthesize"].pods == (f"{WORKFLOW}-{IMPL}-20", f"{WORKFLOW}-20")


def test_a_driver_that_fails_is_the_steps_failure_and_what_follows_is_not_reached() -> None:
    driver = node("root.plan-driver", 3, "Pod", DRIVER, "Failed", 7, message="quantities must match")
    found = seen(*NODES[:2], driver, node("root.plan", 4, "Skipped", EXECUTOR, "Omitted", 13))
    assert (found["plan"].state, found["plan"].message) == ("FAILED", "quantities must match")
    assert found["plan"].pods[0] == f"{WORKFLOW}-{DRIVER}-3"
    loop = node("root.for-loop-2.iteration-driver", 10, "Pod", "system-dag-driver", "Failed", 27, message="no items")
    assert seen(loop)["for_loop_2"].message == "no items"
    report = seen(node("root.report", 30, "Skipped", EXECUTOR, "Omitted", 50))["report"]
    assert report.state == ""


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("wf.root.plan.executor", "plan"),
        ("wf(0).root(0).plan(0).executor(2)", "plan"),
        (
            "wf.root.for-loop-2.iteration-iterations(11:11)(0).iteration-item(0).cell(0).relabel.executor",
            "cell/11/relabel",
        ),
        (
            "wf.root.for-loop-1.iteration-iterations(0:0).iteration-item.teacher.train-teacher-driver",
            "teacher/0/train_teacher",
        ),
        ("wf.root.for-loop-1.iteration-iterations(2:x).iteration-item-driver", "for_loop_1/2"),
        ("wf", ""),
        ("wf.root", ""),
    ],
)
def test_paths(name: str, path: str) -> None:
    assert path_of(name) == path


def test_packed_nodes_are_read_and_broken_ones_are_none() -> None:
    plain = workflow(*NODES)
    packed = base64.b64encode(gzip.compress(json.dumps(plain["status"]["nodes"]).encode())).decode()
    run = run_of({"run_id": "r"})
    assert steps_of({**plain, "status": {"compressedNodes": packed}}, run) == steps_of(plain, run)
    assert steps_of({**plain, "status": {"compressedNodes": "bm90IGd6aXA="}}, run) == []


def test_steps_come_from_task_details_where_the_workflow_is_not_shown() -> None:
    names = {
        "root": "RUNNING",
        "root-driver": "SUCCEEDED",
        "plan": "SUCCEEDED",
        "executor": "SUCCEEDED",
        "report": "FAILED",
    }
    details = [{"task_id": name, "display_name": name, "state": state} for name, state in names.items()]
    details.append({"display_name": WORKFLOW, "state": "RUNNING", "child_tasks": [{"pod_name": f"{WORKFLOW}-12"}]})
    run = run_of({"run_id": "r", "run_details": {"task_details": details}})
    assert {step.path: step.state for step in steps_of({}, run)} == {"plan": "SUCCEEDED", "report": "FAILED"}


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("pod deleted", True),
        ("Pod was evicted: node was low on resource: memory", True),
        ("Error (exit code 143)", True),
        ("Error (exit code 1)", False),
        ("OOMKilled (exit code 137)", False),
        ("Pod was active on the node longer than the specified deadline", False),
    ],
)
def test_a_pod_that_was_taken_away_is_told_from_one_that_failed(message: str, lost: bool) -> None:
    assert Step("plan", "FAILED", "", "", message=message).lost is lost


def test_equal_failures_have_equal_places_and_progress_makes_another_one() -> None:
    step = Step("cell/0/synthesize", "FAILED", "", "", message="Error (exit code 1)")
    first = place(step, ["2026-11-21T10:00:00Z ValueError: no class 7 after 3.21 s at 0x7f00aa"])
    assert first == place(step, ["2026-11-22T11:30:12Z ValueError: no class 7 after 4.5 s at 0x7f11bb"])
    assert first != place(step, ["2026-11-22T11:30:12Z ValueError: no class 8 after 4.5 s at 0x7f11bb"])
    assert place(step, []) == "cell/0/synthesize: Error (exit code 1)"


def test_the_end_of_a_log_leaves_out_what_kfp_prints() -> None:
    kfp = "I1121 10:00:00.1 1 launcher_v2.go:145] uploading\nF1121 10:00:01 1 main.go:50] exit status 1\n"
    log = f"loading\nUserError: root 'x'\n{kfp}"
    assert last_lines(log) == ["loading", "UserError: root 'x'"]
    assert last_lines("F1121 10:00:01 1 main.go:50] no such image\n") == ["F1121 10:00:01 1 main.go:50] no such image"]


def test_a_canceled_workflow_is_known_by_its_deadline() -> None:
    assert stopped({"spec": {"activeDeadlineSeconds": 0}})
    assert not stopped({"spec": {"activeDeadlineSeconds": 3600}})
    assert not stopped({})
