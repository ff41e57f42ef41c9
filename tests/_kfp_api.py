"""A Kubeflow Pipelines API for tests: the routes and JSON of v2beta1 (KFP 2.17), over HTTP, on this machine.

It executes nothing. A run follows the script that was set when it was created: each time somebody asks for the run,
its step comes nearer to its end. What it keeps of a run it also tells as KFP does: as task details without pod names,
and under v1beta1 as the Argo workflow that the API server stores.

    with FakeKfp(steps=[Act("plan"), Act("cell/0/synthesize", fails=1, log="boom")]) as kfp:
        ...  # kfp.endpoint
"""

import contextlib
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

ACTIVE = ("PENDING", "RUNNING", "PAUSED")
PHASES = {"Pending": "PENDING", "Running": "RUNNING", "Succeeded": "SUCCEEDED", "Failed": "FAILED"}
LOOPS = {"teacher": "for-loop-1", "cell": "for-loop-2", "piece": "for-loop-2"}
OPERATIONS = {1: "EQUALS", 2: "NOT_EQUALS", 8: "IN", 9: "IS_SUBSTRING"}
TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "STRING": ("string", lambda value: isinstance(value, str)),
    "NUMBER_DOUBLE": ("double or integer", lambda value: type(value) in (int, float)),
    "NUMBER_INTEGER": ("double or integer", lambda value: type(value) in (int, float)),
    "BOOLEAN": ("boolean", lambda value: isinstance(value, bool)),
    "LIST": ("list", lambda value: isinstance(value, list)),
    "STRUCT": ("struct", lambda value: isinstance(value, dict)),
}
COLUMNS = {
    "experiments": ("name", "display_name", "namespace", "storage_state"),
    "runs": ("name", "display_name", "description", "state", "storage_state", "experiment_id", "recurring_run_id"),
    "recurringruns": ("name", "display_name", "description", "recurring_run_id"),
}
DEFAULT_STEPS = ("plan", "prepare-data", "teacher/0/train-teacher", "cell/0/synthesize", "report", "verdict")


@dataclass
class Act:
    """One step of a script.

    Attributes:
        path: the step: `plan`, or `cell/3/synthesize` for the fourth turn of the loop over cells.
        polls: how many looks at the run it takes.
        fails: how many times it fails before it works.
        log: what its pod prints; a list gives each attempt a log of its own, the last one stays.
        message: what Argo notes about a failed pod.
        cached: KFP finds the outputs of an earlier task, so that no pod starts.
        driver: it is the driver's pod that fails.
        lost_log: the pod is gone, and its log with it.
    """

    path: str
    polls: int = 1
    fails: int = 0
    log: str | list[str] = ""
    message: str = "Error (exit code 1)"
    cached: bool = False
    driver: bool = False
    lost_log: bool = False

    def text(self, attempt: int) -> str:
        """What the attempt with this number (from 0) prints."""
        return self.log if isinstance(self.log, str) else self.log[min(attempt, len(self.log) - 1)]


@dataclass
class Played:
    """Where a run has got to."""

    acts: list[Act]
    told: dict[str, Any]
    phases: list[str] = field(default_factory=list)  # of each act: "" = not yet
    looks: int = 0
    attempts: list[int] = field(default_factory=list)
    spans: list[list[float]] = field(default_factory=list)  # start and end of each act's last attempt
    task_ids: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


class Answer(Exception):
    """An HTTP error that the API answers with."""

    def __init__(self, status: int, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Fault:
    """What goes wrong with the next requests that match: a status, `drop`, `drop after` or `slow SECONDS`."""

    kind: str
    match: str = ""
    times: int = 1


class FakeKfp:
    """The server; use it as a context manager.

    Attributes:
        steps: script of runs created from now on.
        token: what requests must carry; "" = nothing. `forbidden` namespaces answer 403.
        runs, experiments, recurring: what was created, by id, as JSON.
        requests: method, path and body of everything that was asked.
        forgets: lose a run's state history at a retry, as servers before 2.17 do.
        old_api: show workflows, as v1beta1 does. logs: let this caller read them.
        version: "" makes it a server without v2beta1.
    """

    def __init__(
        self,
        steps: list[Act] | None = None,
        multi_user: bool = False,
        token: str = "",
        namespaces: tuple[str, ...] = ("kubeflow",),
        version: str = "2.17.0",
        forgets: bool = False,
        old_api: bool = True,
        logs: bool = True,
    ) -> None:
        self.steps = steps if steps is not None else [Act(path) for path in DEFAULT_STEPS]
        self.multi_user, self.token, self.namespaces, self.version = multi_user, token, namespaces, version
        self.forgets, self.old_api, self.logs = forgets, old_api, logs
        self.played: dict[str, Played] = {}
        self.experiments: dict[str, dict[str, Any]] = {}
        self.recurring: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, Any]] = []
        self.faults: list[Fault] = []
        self.port = 0
        self.lock = threading.RLock()
        self.open: set[socket.socket] = set()
        self.skew = 0.0
        self._count = 0

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """The runs by id, without anybody looking at them."""
        return {run_id: played.told for run_id, played in self.played.items()}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake.serve(self)

            do_POST = do_DELETE = do_GET

            def setup(self) -> None:
                super().setup()
                fake.open.add(self.connection)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Stop listening; what it knows stays."""
        self._server.shutdown()
        self._server.server_close()
        while self.open:  # a client that keeps its connection would not notice
            with contextlib.suppress(OSError):
                self.open.pop().shutdown(socket.SHUT_RDWR)

    def fault(self, kind: str, match: str = "", times: int = 1) -> None:
        """Let the next requests whose `METHOD path` matches the regular expression go wrong."""
        self.faults.append(Fault(kind, match, times))

    def asked(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(pattern, f"{method} {path}")) for method, path, _ in self.requests)

    def now(self) -> float:
        """Its clock, which goes on by a second with every change of a run's state: the API knows only seconds."""
        return time.time() + self.skew

    # One request

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request, or not."""
        length = int(request.headers.get("Content-Length") or 0)
        text = request.rfile.read(length)
        body = json.loads(text) if text else None
        split = urlsplit(request.path)
        query = {key: values[0] for key, values in parse_qs(split.query).items()}
        with self.lock:
            self.requests.append((request.command, request.path, body))
            line = f"{request.command} {split.path}"
            fault = next((f for f in self.faults if f.times > 0 and re.search(f.match, line)), None)
            if fault:
                fault.times -= 1
        kind = fault.kind if fault else ""
        if kind.startswith("slow"):
            time.sleep(float(kind.split()[1]))
        if kind == "drop":
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        try:
            if kind.isdigit():
                raise Answer(int(kind), "upstream connect error or disconnect")
            with self.lock:
                told = self.route(request, split.path, query, body)
            status = 200
        except Answer as error:
            status, told = error.status, {"code": error.code, "message": error.message, "details": []}
        if kind == "drop after":
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        raw = told.encode() if isinstance(told, str) else json.dumps(told).encode()
        request.send_response(status)
        request.send_header("Content-Type", "text/plain" if isinstance(told, str) else "application/json")
        request.send_header("Content-Length", str(len(raw)))
        request.end_headers()
        request.wfile.write(raw)

    def route(self, request: BaseHTTPRequestHandler, path: str, query: dict[str, str], body: Any) -> Any:
        """The answer's body; raises `Answer` for everything that is not 200."""
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            raise Answer(401, "Request header error: there is no user identity header.", 16)
        if path == "/apis/v1beta1/healthz":
            return {"commit_sha": "0", "tag_name": self.version or "1.8.22", "multi_user": self.multi_user}
        if not self.version:
            raise Answer(404, "Not Found", 5)
        if path == "/apis/v2beta1/healthz":
            return {"multi_user": self.multi_user}
        if match := re.fullmatch(r"/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log", path):
            return self.log(match[1], unquote(match[2]))
        if match := re.fullmatch(r"/apis/v1beta1/runs/([^/]+)", path):
            if not self.old_api:
                raise Answer(404, "Not Found", 5)
            return {"run": {"id": match[1]}, "pipeline_runtime": {"workflow_manifest": self.manifest(match[1])}}
        if not (
            match := re.fullmatch(r"/apis/v2beta1/(experiments|runs|recurringruns)(?:/([^/:]+)(?::(\w+))?)?", path)
        ):
            raise Answer(404, f"no route {path}", 5)
        what, key, verb = match[1], unquote(match[2] or ""), match[3] or ""
        if request.command == "GET" and not key:
            return self.listed(what, query)
        if request.command == "POST" and not key:
            create = {"experiments": self.new_experiment, "runs": self.new_run, "recurringruns": self.new_recurring}
            return create[what](body)
        known = {"experiments": self.experiments, "runs": self.runs, "recurringruns": self.recurring}[what]
        if key not in known:
            name = {"experiments": "Experiment", "runs": "Run", "recurringruns": "Recurring run"}[what]
            raise Answer(404, f"Failed to get a {name.lower()}: ResourceNotFoundError: {name} {key} not found.", 5)
        self.allowed(known[key].get("namespace"))
        if request.command == "DELETE":
            if what == "recurringruns" and query.get("propagation_policy") != "ORPHAN":
                self.collect(key)
            del {"experiments": self.experiments, "runs": self.played, "recurringruns": self.recurring}[what][key]
            return {}
        if request.command == "POST":
            act = {"retry": self.retry, "terminate": self.terminate, "enable": self.enable, "disable": self.disable}
            return act[verb](key)
        return self.look(key) if what == "runs" else known[key]

    # Lists

    def listed(self, what: str, query: dict[str, str]) -> dict[str, Any]:
        """One page of a list, filtered and sorted."""
        namespace = query.get("namespace", "")
        if namespace and not self.multi_user:
            raise Answer(400, f"In single-user mode, listing {what} cannot filter by namespace.", 3)
        if self.multi_user and not namespace and "experiment_id" not in query:
            raise Answer(400, f"Failed to list {what}: a namespace is required in multi-user mode.", 3)
        if namespace:
            self.allowed(namespace)
        known = {"experiments": self.experiments, "runs": self.runs, "recurringruns": self.recurring}[what]
        found = [one for one in known.values() if meets(one, query.get("filter", ""), COLUMNS[what])]
        if "experiment_id" in query:
            found = [one for one in found if one["experiment_id"] == query["experiment_id"]]
        if namespace:
            found = [one for one in found if one.get("namespace", namespace) == namespace]
        by, _, direction = (query.get("sort_by") or "created_at").partition(" ")
        found.sort(key=lambda one: (one.get(by) or "", one["_at"]), reverse=direction == "desc")
        size, start = int(query.get("page_size") or 20), int(query.get("page_token") or 0)
        page = found[start : start + size]
        more = str(start + size) if start + size < len(found) else ""
        key = {"recurringruns": "recurringRuns"}.get(what, what)
        return {key: [shown(one) for one in page], "total_size": len(found), "next_page_token": more}

    # What can be created

    def stamp(self) -> dict[str, Any]:
        """Creation time, and an order finer than seconds."""
        self._count += 1
        return {"created_at": rfc3339(self.now()), "_at": self._count}

    def allowed(self, namespace: str | None) -> None:
        """Whether the caller may work there."""
        if self.multi_user and namespace and namespace not in self.namespaces:
            said = f'User "me" is not authorized with reason: (request: namespace:"{namespace}")'
            raise Answer(403, f"Failed to authorize with API: PermissionDenied: {said}", 7)

    def new_experiment(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST experiments."""
        namespace = body.get("namespace") or ("" if self.multi_user else "kubeflow")
        if self.multi_user and not namespace:
            raise Answer(400, "Failed to create an experiment: namespace is empty.", 3)
        self.allowed(namespace)
        for one in self.experiments.values():
            if (one["display_name"], one["namespace"]) == (body["display_name"], namespace):
                raise Answer(409, f"Already exist error: experiment {body['display_name']} already exists.", 6)
        key = str(uuid.uuid4())
        known = {"display_name": body["display_name"], "namespace": namespace, "storage_state": "AVAILABLE"}
        self.experiments[key] = {"experiment_id": key, **known, **self.stamp()}
        return shown(self.experiments[key])

    def new_run(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST runs."""
        experiment = self.checked(body, "run")
        key = str(uuid.uuid4())
        state = {"state": "PENDING", "finished_at": rfc3339(0), "storage_state": "AVAILABLE", **self.stamp()}
        told = {"run_id": key, "description": "", **body, **state, "namespace": experiment["namespace"]}
        told["scheduled_at"] = told["created_at"]
        told["state_history"] = [{"update_time": told["created_at"], "state": "PENDING"}]
        acts = list(self.steps)
        count = len(acts)
        self.played[key] = Played(acts, told, [""] * count, 0, [0] * count, [[0.0, 0.0] for _ in acts])
        return shown(told)

    def new_recurring(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST recurringruns."""
        experiment = self.checked(body, "recurring run")
        if not body.get("display_name"):
            raise Answer(400, "Recurring run's name cannot be empty", 3)
        if not 1 <= int(body.get("max_concurrency") or 0) <= 10:
            said = f"Received {body.get('max_concurrency')}"
            raise Answer(400, f"Max concurrency of a recurring run must be at least 1 and at most 10. {said}", 3)
        trigger = json.loads(json.dumps(body.get("trigger") or {}))
        cron = (trigger.get("cron_schedule") or {}).get("cron")
        if cron is not None and len(cron.split()) not in (5, 6):
            raise Answer(400, f"Schedule cron is not a supported format. Error: found {len(cron.split())} fields", 3)
        for inside in trigger.values():
            if "interval_second" in inside:
                inside["interval_second"] = str(int(inside["interval_second"]))  # as JSON has 64-bit integers
            inside.setdefault("start_time", rfc3339(0))
        key = str(uuid.uuid4())
        status = "ENABLED" if body.get("mode") == "ENABLE" else "DISABLED"
        given = {**body, "trigger": trigger, "max_concurrency": str(int(body["max_concurrency"]))}
        given["service_account"] = body.get("service_account") or "pipeline-runner"
        told = {"recurring_run_id": key, **given, "status": status, "namespace": experiment["namespace"]}
        self.recurring[key] = {**told, **self.stamp(), "updated_at": rfc3339(self.now())}
        return shown(self.recurring[key])

    def fire(self, key: str) -> str:
        """Do what the scheduler does when a recurring run's time has come; returns the run's id."""
        known = self.recurring[key]
        fields = ("pipeline_spec", "runtime_config", "service_account", "experiment_id")
        body = {name: known[name] for name in fields if name in known}
        told = self.new_run({**body, "display_name": f"{known['display_name']}-1", "recurring_run_id": key})
        return str(told["run_id"])

    def collect(self, key: str) -> None:
        """What Kubernetes does with workflows whose owner is deleted: their runs end."""
        for played in self.played.values():
            if played.told.get("recurring_run_id") == key and played.told["state"] in ACTIVE:
                self.turn(played, "FAILED")

    def checked(self, body: dict[str, Any], what: str) -> dict[str, Any]:
        """The experiment that a run or recurring run belongs to, once its specification and parameters are fine."""
        experiment = self.experiments.get(body.get("experiment_id", ""))
        if experiment is None:
            raise Answer(404, f"Failed to create a {what}: Experiment {body.get('experiment_id')} not found.", 5)
        self.allowed(experiment["namespace"])
        spec = body.get("pipeline_spec") or {}
        spec = spec.get("pipeline_spec", spec)
        if "root" not in spec:
            raise Answer(400, f"Failed to create a {what}: invalid pipeline spec: root is missing", 3)
        wanted = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        given = (body.get("runtime_config") or {}).get("parameters") or {}
        for name, value in given.items():
            if name not in wanted:
                raise Answer(400, f"InvalidInputError: parameter {name} is not found in the pipeline spec", 3)
            kind, fits = TYPES[wanted[name]["parameterType"]]
            if not fits(value):
                said = f"input parameter {name} requires type {kind}, but the parameter value is not of this type"
                raise Answer(400, f"Failed to create a {what}: InvalidInputError: {said}", 3)
        for name, asked in wanted.items():
            if name not in given and "defaultValue" not in asked and not asked.get("isOptional"):
                raise Answer(400, f"InvalidInputError: parameter {name} is required", 3)
        return experiment

    # A run's life

    def look(self, key: str) -> dict[str, Any]:
        """GET a run: one poll."""
        played = self.played[key]
        if played.told["state"] == "CANCELING":
            self.turn(played, "CANCELED")
        elif played.told["state"] in ACTIVE:
            self.advance(played)
        details = {"task_details": self.task_details(played)}
        return shown(played.told) | {"run_details": details}

    def advance(self, played: Played) -> None:
        """One poll further in the script."""
        if played.told["state"] == "PENDING":
            self.turn(played, "RUNNING")
        index = next((i for i, phase in enumerate(played.phases) if phase in ("", "Running")), None)
        if index is None:
            self.turn(played, "SUCCEEDED")
            return
        act = played.acts[index]
        if not played.phases[index]:
            played.phases[index], played.looks = "Running", 0
            self.skew += 1.0
            played.spans[index] = [self.now(), 0.0]
            if act.polls > 0:
                return
        played.looks += 1
        if played.looks < act.polls:
            return
        self.skew += 1.0
        played.spans[index][1] = self.now()
        if played.attempts[index] < act.fails:
            played.phases[index] = "Failed"
            self.turn(played, "FAILED")
        else:
            played.phases[index] = "Succeeded"

    def turn(self, played: Played, state: str) -> None:
        """Change a run's state."""
        self.skew += 1.0
        now = rfc3339(self.now())
        played.told["state"] = state
        played.told["state_history"].append({"update_time": now, "state": state})
        if state in ("SUCCEEDED", "FAILED", "CANCELED"):
            played.told["finished_at"] = now

    def retry(self, key: str) -> dict[str, Any]:
        """POST runs/ID:retry."""
        played = self.played[key]
        if played.told["state"] not in ("FAILED", "CANCELED"):
            raise Answer(400, f"Failed to retry run {key}: Workflow must be Failed/Error to retry", 3)
        for index, phase in enumerate(played.phases):
            if phase == "Failed":
                played.phases[index] = ""
                played.attempts[index] += 1
        played.told["finished_at"] = rfc3339(0)
        if self.forgets:
            played.told["state_history"] = []
        self.turn(played, "RUNNING")
        return {}

    def terminate(self, key: str) -> dict[str, Any]:
        """POST runs/ID:terminate."""
        played = self.played[key]
        if played.told["state"] not in ACTIVE:
            raise Answer(400, f"Failed to terminate a run {key}. Row not found", 3)
        played.told["state"], played.stopped = "CANCELING", True
        return {}

    def enable(self, key: str, status: str = "ENABLED") -> dict[str, Any]:
        """POST recurringruns/ID:enable."""
        mode = {"ENABLED": "ENABLE", "DISABLED": "DISABLE"}[status]
        self.recurring[key] |= {"status": status, "mode": mode, "updated_at": rfc3339(self.now())}
        return {}

    def disable(self, key: str) -> dict[str, Any]:
        """POST recurringruns/ID:disable."""
        return self.enable(key, "DISABLED")

    # What KFP tells of the steps

    def nodes(self, played: Played) -> dict[str, dict[str, Any]]:
        """Argo's nodes of the steps that have begun, by id."""
        workflow = workflow_name(played)
        found: dict[str, dict[str, Any]] = {}

        def add(name: str, kind: str, template: str, phase: str, span: list[float], message: str = "") -> None:
            node_id = workflow if name == workflow else f"{workflow}-{digest(name)}"
            times = {"startedAt": rfc3339(span[0]), "finishedAt": rfc3339(span[1]) if span[1] else None}
            display = name.rpartition(".")[2] or name
            node = {"id": node_id, "name": name, "displayName": display, "type": kind, "templateName": template}
            found[node_id] = node | {"phase": phase, "message": message, **times}
            parent = name.rpartition(".")[0]
            if parent and f"{workflow}-{digest(parent)}" in found:
                found[f"{workflow}-{digest(parent)}"].setdefault("children", []).append(node_id)

        begun = [i for i, phase in enumerate(played.phases) if phase]
        whole = {"SUCCEEDED": "Succeeded", "FAILED": "Failed", "CANCELED": "Failed"}.get(
            played.told["state"], "Running"
        )
        span = [played.spans[begun[0]][0] if begun else self.now(), 0.0]
        add(workflow, "DAG", "entrypoint", whole, span)
        add(f"{workflow}.root-driver", "Pod", "system-dag-driver", "Succeeded", [span[0], span[0]])
        add(f"{workflow}.root", "DAG", "root", whole, span)
        for index in begun:
            act, phase, span = played.acts[index], played.phases[index], played.spans[index]
            *scope, step = act.path.split("/")
            name = f"{workflow}.root"
            if scope:
                loop = f"{name}.{LOOPS[scope[0]]}"
                turn = f"{loop}.iteration-iterations({scope[1]}:{scope[1]})"
                for part, kind in ((loop, "DAG"), (turn, "TaskGroup"), (f"{turn}.iteration-item", "DAG")):
                    add(part, kind, "comp-" + LOOPS[scope[0]], "Running", span)
                name = f"{turn}.iteration-item.{scope[0]}"
                add(f"{name}-driver", "Pod", "system-dag-driver", "Succeeded", [span[0], span[0]])
                add(name, "DAG", f"comp-{scope[0]}", "Running", span)
            note = act.message if phase == "Failed" else ""
            broken = act.driver and phase == "Failed"
            driver = phase if broken else "Succeeded"
            add(f"{name}.{step}-driver", "Pod", "system-container-driver", driver, span, note if broken else "")
            if broken:
                add(f"{name}.{step}", "Skipped", "system-container-executor", "Omitted", span)
                continue
            add(f"{name}.{step}", "DAG", "system-container-executor", phase, span)
            cached = act.cached and phase == "Succeeded"
            kind, phase = ("Skipped", "Skipped") if cached else ("Pod", phase)
            add(f"{name}.{step}.executor", kind, "system-container-impl", phase, span, note)
        return found

    def manifest(self, key: str) -> str:
        """The stored workflow, as JSON text; empty before the first report."""
        if key not in self.played:
            raise Answer(404, f"ResourceNotFoundError: Run {key} not found.", 5)
        played = self.played[key]
        if not any(played.phases):
            return ""
        name = workflow_name(played)
        head = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "metadata": {"name": name}}
        stopped = {"activeDeadlineSeconds": 0} if played.stopped else {}
        return json.dumps({**head, "spec": stopped, "status": {"phase": "Running", "nodes": self.nodes(played)}})

    def task_details(self, played: Played) -> list[dict[str, Any]]:
        """The nodes as v2beta1 shows them: neither pod names nor reasons."""
        details = []
        for node in self.nodes(played).values() if any(played.phases) else ():
            task_id = played.task_ids.setdefault(node["id"], str(uuid.uuid4()))
            state = PHASES.get(node["phase"], "SKIPPED" if node["phase"] == "Skipped" else "RUNTIME_STATE_UNSPECIFIED")
            times = {"start_time": node["startedAt"], "end_time": node["finishedAt"] or rfc3339(0)}
            children = [{"pod_name": child} for child in node.get("children", [])]
            told = {"run_id": played.told["run_id"], "task_id": task_id, "display_name": node["displayName"]}
            created = {"create_time": played.told["created_at"]}
            details.append(told | created | times | {"state": state, "child_tasks": children})
        return details

    def log(self, key: str, pod: str) -> str:
        """A pod's log."""
        if not self.logs:
            raise Answer(403, "Failed to authorize the request: PermissionDenied: verb readLog", 7)
        played = self.played.get(key)
        if played is None:
            raise Answer(400, f"Failed to read logs for run {key} due to run fetching error", 3)
        for node in self.nodes(played).values():
            name = f"{workflow_name(played)}-{node['templateName']}-{node['id'].rpartition('-')[2]}"
            act = next((a for a in played.acts if node_path(node["name"]) == a.path), None)
            if name == pod and node["type"] == "Pod" and act is not None:
                index = played.acts.index(act)
                if act.lost_log and played.phases[index] == "Failed":
                    break
                return act.text(played.attempts[index])
        raise Answer(500, f'Failed to read logs for run {key}: pods "{pod}" not found')


def node_path(name: str) -> str:
    """`wf.root.for-loop-2.iteration-iterations(3:3).iteration-item.cell.relabel.executor` -> `cell/3/relabel`."""
    turn = re.search(r"\((\d+):", name)
    parts = re.sub(r"\.executor$|-driver$", "", name).split(".")
    return f"{parts[-2]}/{turn[1]}/{parts[-1]}" if turn else parts[-1]


def workflow_name(played: Played) -> str:
    """The workflow's name."""
    return f"distill-{played.told['run_id'][:5]}"


def digest(name: str) -> str:
    """A number that stands for a node's name, as Argo has one."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, name).int % 10**10)


def rfc3339(seconds: float) -> str:
    """A time as the API writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def shown(told: dict[str, Any]) -> dict[str, Any]:
    """Without what only this file knows."""
    return {key: value for key, value in told.items() if not key.startswith("_")}


def meets(one: dict[str, Any], text: str, columns: tuple[str, ...]) -> bool:
    """Whether all predicates of a filter hold."""
    return all(holds(one, predicate, columns) for predicate in (json.loads(text)["predicates"] if text else []))


def holds(one: dict[str, Any], predicate: dict[str, Any], columns: tuple[str, ...]) -> bool:
    """Whether one predicate holds; a key or an operation that the API does not have answers 400."""
    operation = OPERATIONS.get(predicate["operation"], predicate["operation"])
    key = predicate["key"]
    wanted = predicate.get("string_value", predicate.get("stringValue"))
    several = (predicate.get("string_values") or predicate.get("stringValues") or {}).get("values")
    if key not in columns:
        raise Answer(400, f"Invalid input error: no support for filtering on unrecognized field {key}", 3)
    value = str(one.get({"name": "display_name"}.get(key, key)) or "")
    if operation == "IN":
        return value in several
    tests = {
        "EQUALS": value == wanted,
        "NOT_EQUALS": value != wanted,
        "IS_SUBSTRING": str(wanted).lower() in value.lower(),  # as the collations of its databases have it
    }
    if operation not in tests:
        raise Answer(400, f"Invalid input error: unrecognized operation {operation}", 3)
    return tests[operation]
