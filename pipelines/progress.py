"""The steps of a run, as people know them: `plan`, or `cell/3/synthesize` in the fourth turn of the loop over cells.

KFP runs as an Argo workflow of many nodes: drivers, loops, turns of loops, wrappers, attempts. The API's own task
details name neither the turn, nor the pod, nor the reason of a failure, so steps are read from the workflow that the
server stores. Where it does not show that (KFP without v1beta1), they come from the task details, with what is there.
"""

import base64
import gzip
import io
import json
import re
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Tuple

from pipelines.api import ApiError, BadRequest, Client, Refused, Run, Unreachable

STATES = {"Pending": "PENDING", "Running": "RUNNING", "Succeeded": "SUCCEEDED", "Failed": "FAILED", "Error": "FAILED"}
LOST = re.compile(
    r"pod (was )?deleted|evicted|preempt|node (was )?(lost|shut|not ready)|nodelost|terminated by the|"
    r"exit code (137|143)|imminent node shutdown",
    re.IGNORECASE,
)
MEMORY = re.compile(r"OOMKilled", re.IGNORECASE)
NOISE = re.compile(r"^[IWEF]\d{4} |^time=\S+ level=|^\[KFP Executor|^\s*$")
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
MAX_NODES = 64 << 20  # bytes of an unpacked list of nodes
LAST_LINES = 15
PLUMBING = ("root", "executor", "iteration-item", "iteration-iterations")


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        path: its name, with the turn of the loop it stands in.
        state: PENDING, RUNNING, SUCCEEDED, CACHED, FAILED, or "" where it was never reached.
        started, ended: RFC 3339, "" = not yet.
        pods: names under which its pod's log may be asked for, likeliest first.
        message: what Argo says of a failure.
    """

    path: str
    state: str
    started: str
    ended: str
    pods: Tuple[str, ...] = ()
    message: str = ""

    @property
    def lost(self) -> bool:
        """Whether its pod was taken away, rather than ending by itself."""
        return self.state == "FAILED" and bool(LOST.search(self.message)) and not MEMORY.search(self.message)


def steps(client: Client, run: Run) -> List[Step]:
    """The steps of a run that have begun, in the order in which they did."""
    return steps_of(client.workflow(run.id), run)


def steps_of(workflow: Mapping[str, Any], run: Run) -> List[Step]:
    """The same, out of a workflow that was fetched before."""
    nodes = nodes_of(workflow)
    found = from_nodes(*nodes) if nodes[1] else from_details(run)
    return sorted(found, key=lambda step: (step.started or "9", step.path))


def stopped(workflow: Mapping[str, Any]) -> bool:
    """Whether somebody ended the run on purpose, which KFP may report as a failure: it sets the deadline to 0."""
    deadline = (workflow.get("spec") or {}).get("activeDeadlineSeconds")
    return deadline is not None and int(deadline) == 0


def nodes_of(workflow: Mapping[str, Any]) -> Tuple[Mapping[str, Any], List[Dict[str, Any]]]:
    """A workflow's metadata, and its nodes, which Argo packs when they are many."""
    status = workflow.get("status") or {}
    nodes = status.get("nodes") or {}
    if packed := status.get("compressedNodes"):
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(base64.b64decode(packed))) as file:
                nodes = json.loads(file.read(MAX_NODES))
        except (OSError, ValueError, EOFError):
            nodes = {}
    return workflow.get("metadata") or {}, list(nodes.values())


def from_nodes(metadata: Mapping[str, Any], nodes: List[Dict[str, Any]]) -> List[Step]:
    """Steps out of Argo's nodes.

    A step is a driver, a wrapper with its name, and under it the pod that works; its state is that of the last of them
    that says anything. Loops and inner pipelines show only if their driver fails.
    """
    groups: Dict[str, List[Dict[str, Any]]] = {}
    for node in nodes:
        if path := path_of(str(node.get("name") or "")):
            groups.setdefault(path, []).append(node)
    found = []
    for path, members in groups.items():
        wrappers = [node for node in members if wraps(node)]
        pods = [node for node in members if node.get("type") == "Pod"]
        works = [node for node in pods if ".executor" in node["name"]]
        skipped = any(node.get("type") == "Skipped" and ".executor" in node["name"] for node in members)
        if not wrappers and not works and not any(STATES.get(node.get("phase", "")) == "FAILED" for node in pods):
            continue  # a loop or an inner pipeline that does what it should, or a step whose driver still runs
        last = max(works or pods or wrappers, key=lambda node: str(node.get("startedAt") or ""))
        phase = str(last.get("phase") or "")
        done = any(node.get("phase") == "Succeeded" for node in wrappers)
        state = "CACHED" if skipped and done else STATES.get(phase, "")
        starts = [str(node["startedAt"]) for node in members if node.get("startedAt")]
        ended = str(last.get("finishedAt") or "") if state in ("SUCCEEDED", "FAILED", "CACHED") else ""
        message = str(last.get("message") or "")
        names = pod_names(metadata, last) if works or state == "FAILED" else ()  # a driver's log only where it failed
        found.append(Step(path, state, min(starts, default=""), ended, names, message))
    return found


def wraps(node: Mapping[str, Any]) -> bool:
    """Whether a node stands for a step that runs in a container."""
    return str(node.get("templateName") or "").endswith("system-container-executor")


def path_of(name: str) -> str:
    """A node's full name in Argo -> the step it belongs to; "" for the workflow itself."""
    found: List[str] = []
    loop = turn = ""
    for part in name.split(".")[1:]:
        part, _, tail = part.partition("(")  # (3:3) is a turn of a loop, (0) an attempt
        if part == "iteration-iterations" and ":" in tail:
            turn = tail.partition(":")[0]
        if part.startswith("for-loop-"):
            loop = part
        if part in ("iteration-driver", "iteration-item-driver"):
            part = f"{loop}-driver"
        elif part in PLUMBING or part.startswith("for-loop-"):
            continue
        found.append(part.removesuffix("-driver"))
        if turn:
            found.append(turn)
            turn = ""
    return "/".join(found).replace("-", "_")


def pod_names(metadata: Mapping[str, Any], node: Mapping[str, Any]) -> Tuple[str, ...]:
    """Names that a node's pod may have: Argo's newer naming, then its older one."""
    if node.get("type") != "Pod":
        return ()
    workflow, node_id = str(metadata.get("name") or ""), str(node.get("id") or "")
    number = node_id.rpartition("-")[2]
    return (f"{workflow}-{node.get('templateName')}-{number}", node_id)


def from_details(run: Run) -> List[Step]:
    """Steps out of the API's own task details: without turns, pods and reasons."""
    found = []
    for task in ((run.raw.get("run_details") or {}).get("task_details")) or []:
        name = str(task.get("display_name") or "").partition("(")[0]
        own = name in ("root", "executor") or name.startswith(("iteration", "for-loop-", "exit-handler-"))
        if own or name.endswith("-driver") or not name or name == run.name or is_workflow(task, run):
            continue
        ended = str(task.get("end_time") or "")
        pods = (str(task["pod_name"]),) if task.get("pod_name") else ()
        state = {"SKIPPED": "CACHED"}.get(str(task.get("state") or ""), str(task.get("state") or ""))
        if state in ("", "RUNTIME_STATE_UNSPECIFIED"):
            continue
        started = str(task.get("start_time") or "")
        end = "" if ended.startswith("1970-") else ended
        found.append(Step(name.replace("-", "_"), state, started, end, pods))
    return found


def is_workflow(task: Mapping[str, Any], run: Run) -> bool:
    """Whether a task stands for the whole workflow, or for an inner pipeline: those have a task's driver as child."""
    children = [str(child.get("pod_name") or "") for child in task.get("child_tasks") or []]
    name = str(task.get("display_name") or "")
    return any(child.startswith(f"{name}-") and child[len(name) + 1 :].isdigit() for child in children)


def log_of(client: Client, run: Run, step: Step) -> str:
    """What a step's pod printed.

    Raises:
        ApiError: nobody has it any more, it never had a pod, or whoever asks may not read it.
    """
    error = f"{step.path}: no pod of it is known" + (f" ({step.message})" if step.message else "")
    for pod in step.pods:
        try:
            return COLOURS.sub("", client.log(run.id, pod))
        except Unreachable:
            raise
        except (ApiError, Refused, BadRequest) as found:
            error = str(found)
    raise ApiError(error)


def last_lines(text: str, count: int = LAST_LINES) -> List[str]:
    """The end of a log, without what KFP's own programs print."""
    lines = [line.rstrip() for line in text.splitlines()]
    own = [line for line in lines if not NOISE.match(line)]
    return (own or [line for line in lines if line])[-count:]


def place(step: Step, lines: List[str]) -> str:
    """Where and how a step failed, in a form that two equal failures share."""
    said = lines[-1] if lines else step.message
    for pattern in (
        r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\S*",
        r"0x[0-9a-f]+",
        r"[0-9a-f]{8}-[0-9a-f-]{27}",
        r"\d+\.\d+ ?s\b",
    ):
        said = re.sub(pattern, "*", said)
    return f"{step.path}: {said.strip()}"
