"""A Kubernetes API for tests: the routes and JSON that `doctor` uses, over HTTP, on this machine.

It keeps objects by their paths. A pod that is created goes the way a cluster would take it: admission, scheduler,
image, start, end. Its containers' commands are really run, as processes of this machine, with the environment that the
pod's specification and the kept secrets give. `plant` sets what goes wrong on that way.
"""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import yaml

Object = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
COLLECTION = re.compile(
    r"(nodes|namespaces|pods|events|secrets|configmaps|serviceaccounts|resourcequotas|limitranges|localqueues)$"
)


@dataclass
class Plant:
    """What goes wrong with pods.

    Attributes:
        refusal: admission answers 403 with this.
        unschedulable: what the scheduler says instead of choosing a node.
        no_scheduler: nobody looks at pods at all.
        pull: why the image cannot be pulled; "" = it is there.
        broken: reason and message of a container that cannot be created.
        slow: seconds before a container starts.
        output: what containers print instead of running their command.
        code: and their exit code.
    """

    refusal: str = ""
    unschedulable: str = ""
    no_scheduler: bool = False
    pull: str = ""
    broken: tuple[str, str] = ("", "")
    slow: float = 0.0
    output: str | None = None
    code: int = 0


@dataclass
class FakeKube:
    """The server; use it as a context manager.

    Attributes:
        token: what requests must carry.
        objects: everything it knows, by path.
        plant: what goes wrong with pods.
        forbidden: regular expressions of `VERB PATH`; they answer 403, and reviews of access say no to `VERB RESOURCE`.
        silent: accept requests and never answer.
        requests: `METHOD path` of everything that was asked.
    """

    token: str = "kube-token"
    objects: dict[str, Object] = field(default_factory=dict)
    plant: Plant = field(default_factory=Plant)
    forbidden: list[str] = field(default_factory=list)
    silent: bool = False
    requests: list[str] = field(default_factory=list)
    logs: dict[tuple[str, str], str] = field(default_factory=dict)
    pods_made: list[Object] = field(default_factory=list)

    def __enter__(self) -> Self:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake.serve(self)

            do_POST = do_DELETE = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._stop = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def kubeconfig(self, path: Path, token: str | None = None) -> Path:
        """Write a configuration that leads here."""
        named = {"name": "fake"}
        text = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [named | {"cluster": {"server": self.endpoint}}],
            "users": [named | {"user": {"token": self.token if token is None else token}}],
            "contexts": [named | {"context": {"cluster": "fake", "user": "fake"}}],
        }
        path.write_text(yaml.safe_dump(text))
        return path

    # What is there

    def put(self, path: str, **content: Any) -> Object:
        """Keep an object under its path."""
        name = path.rpartition("/")[2]
        self.objects[path] = {"metadata": {"name": name, **content.pop("metadata", {})}, **content}
        return self.objects[path]

    def secret(self, namespace: str, name: str, kind: str = "Opaque", **values: str) -> None:
        """Keep a secret; underscores in the keys become dots."""
        data = {key.replace("_", "."): base64.b64encode(value.encode()).decode() for key, value in values.items()}
        self.put(f"/api/v1/namespaces/{namespace}/secrets/{name}", type=kind, data=data)

    def node(
        self, name: str, taints: list[Object] | None = None, labels: dict[str, str] | None = None, **size: str
    ) -> None:
        """Keep a ready node; `size` names resources, `nvidia` standing for nvidia.com/gpu."""
        allocatable = {"cpu": "16", "memory": "64Gi", "pods": "110"} | {
            {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}.get(key, key): value for key, value in size.items()
        }
        status = {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": "True"}]}
        spec = {"taints": taints} if taints else {}
        self.put(f"/api/v1/nodes/{name}", metadata={"labels": labels or {}}, spec=spec, status=status)

    def running_pod(self, node: str, name: str, namespace: str = "other", **requests: str) -> None:
        """Keep a pod that occupies a node."""
        names = {"nvidia": "nvidia.com/gpu"}
        asked = {names.get(key, key): value for key, value in requests.items()}
        spec = {"nodeName": node, "containers": [{"name": "main", "resources": {"requests": asked}}]}
        self.put(f"/api/v1/namespaces/{namespace}/pods/{name}", spec=spec, status={"phase": "Running"})

    # Requests

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request, or never."""
        body = json.loads(request.rfile.read(int(request.headers.get("Content-Length") or 0)) or b"{}")
        split = urlsplit(request.path)
        query = {key: values[0] for key, values in parse_qs(split.query).items()}
        self.requests.append(f"{request.command} {split.path}")
        if self.silent:
            self._stop.wait(60)
            return
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            status, told = failure(401, "Unauthorized", "Unauthorized")
        elif any(re.search(pattern, f"{request.command} {split.path}") for pattern in self.forbidden):
            status, told = failure(
                403, "Forbidden", f'{split.path} is forbidden: User "me" cannot {request.command} it'
            )
        else:
            status, told = self.route(request.command, split.path, query, body)
        raw = told.encode() if isinstance(told, str) else json.dumps(told).encode()
        request.send_response(status)
        request.send_header("Content-Type", "text/plain" if isinstance(told, str) else "application/json")
        request.send_header("Content-Length", str(len(raw)))
        request.end_headers()
        request.wfile.write(raw)

    def route(self, method: str, path: str, query: dict[str, str], body: Object) -> tuple[int, Object | str]:
        """Status and body of an answer."""
        if path == "/version":
            return 200, {"gitVersion": "v1.36.0"}
        if path.endswith("/selfsubjectaccessreviews"):
            asked = body["spec"]["resourceAttributes"]
            what = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
            line = f"{asked['verb']} {what}"
            return 201, body | {"status": {"allowed": not any(re.search(p, line) for p in self.forbidden)}}
        if match := re.fullmatch(r"(.*/pods/[^/]+)/log", path):
            return 200, self.logs.get((match[1], query.get("container", "")), "")
        if method == "POST":
            return self.create(path, body)
        if method == "DELETE":
            gone = self.objects.pop(path, None)
            return (200, gone) if gone else failure(404, "NotFound", f"{path} not found")
        if path in self.objects:
            return 200, self.objects[path]
        if COLLECTION.search(path):
            return 200, self.listed(path, query)
        return failure(404, "NotFound", f'"{path.rpartition("/")[2]}" not found')

    def listed(self, path: str, query: dict[str, str]) -> Object:
        """One page of a list, of one namespace or of all."""
        if match := re.fullmatch(r"/api/v1/(pods|events)", path):
            pattern = rf"/api/v1/namespaces/[^/]+/{match[1]}/[^/]+"
        else:
            pattern = rf"{re.escape(path)}/[^/]+"
        found = [o for p, o in sorted(self.objects.items()) if re.fullmatch(pattern, p) and meets(o, query)]
        start, size = int(query.get("continue") or 0), int(query.get("limit") or 500)
        more = str(start + size) if start + size < len(found) else ""
        return {"kind": "List", "metadata": {"continue": more}, "items": found[start : start + size]}

    def create(self, path: str, body: Object) -> tuple[int, Object]:
        """Admission of a new object; a pod then goes its way."""
        namespace = path.split("/")[4]
        if f"/api/v1/namespaces/{namespace}" not in self.objects:
            return failure(404, "NotFound", f'namespaces "{namespace}" not found')
        if self.plant.refusal:
            return failure(403, "Forbidden", f'pods "{body["metadata"]["name"]}" is forbidden: {self.plant.refusal}')
        place = f"{path}/{body['metadata']['name']}"
        self.objects[place] = body | {"status": {"phase": "Pending"}}
        self.pods_made.append(body)
        threading.Thread(target=self.live, args=(place, self.objects[place]), daemon=True).start()
        return 201, body

    # A pod's life

    def live(self, place: str, pod: Object) -> None:
        """Scheduler and kubelet."""
        plant, status = self.plant, pod["status"]
        if plant.no_scheduler:
            return
        if plant.unschedulable:
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
            status["conditions"] = [condition | {"message": plant.unschedulable}]
            return
        pod["spec"]["nodeName"] = "node-1"
        names = [container["name"] for container in pod["spec"]["containers"]]
        if plant.pull:
            self.event(place, "Failed", f'Failed to pull image "{pod["spec"]["containers"][0]["image"]}": {plant.pull}')
            self.event(place, "Failed", "Error: ErrImagePull")
        reason, message = ("ErrImagePull", plant.pull) if plant.pull else plant.broken
        if reason:
            self.states(status, {name: {"waiting": {"reason": reason, "message": message}} for name in names})
            return
        if self._stop.wait(plant.slow):
            return
        ends: dict[str, Object] = {name: {"running": {}} for name in names}
        self.states(status, ends)
        for container in pod["spec"]["containers"]:
            text, code = (plant.output, plant.code) if plant.output is not None else self.run(place, container)
            self.logs[place, container["name"]] = str(text)
            ends[container["name"]] = {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed"}}
            self.states(status, ends)
        status["phase"] = "Succeeded"

    def states(self, status: Object, states: dict[str, Object]) -> None:
        """Set what the kubelet says of the containers."""
        status["containerStatuses"] = [{"name": name, "state": state} for name, state in states.items()]

    def run(self, place: str, container: Object) -> tuple[str, int]:
        """Run a container's command here; returns what it printed and its exit code."""
        namespace, variables = place.split("/")[4], {}
        for one in container["env"]:
            reference = one.get("valueFrom", {}).get("secretKeyRef")
            if reference is None:
                variables[one["name"]] = one["value"]
                continue
            secret = self.objects.get(f"/api/v1/namespaces/{namespace}/secrets/{reference['name']}", {})
            if reference["key"] in secret.get("data", {}):
                variables[one["name"]] = base64.b64decode(secret["data"][reference["key"]]).decode()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        kept["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, *container["command"][1:]]
        done = subprocess.run(command, env=kept | variables, capture_output=True, text=True, timeout=60, check=False)
        return done.stderr + done.stdout, done.returncode

    def event(self, place: str, reason: str, message: str) -> None:
        """Keep an event about a pod."""
        namespace, pod = place.split("/")[4], place.rpartition("/")[2]
        count = len(self.objects)
        self.put(
            f"/api/v1/namespaces/{namespace}/events/{pod}.{count}",
            involvedObject={"name": pod},
            type="Warning",
            reason=reason,
            message=message,
            lastTimestamp=f"2026-01-01T00:00:{count % 60:02d}Z",
        )


def meets(one: Object, query: dict[str, str]) -> bool:
    """Whether an object meets a field selector."""
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        path, operator, value = re.fullmatch(r"([\w.]+)(!?=)(.*)", term).groups()  # type: ignore[union-attr]
        found: Any = one
        for key in path.split("."):
            found = (found or {}).get(key)
        if (found == value) == (operator == "!="):
            return False
    return True


def failure(status: int, reason: str, message: str) -> tuple[int, Object]:
    """An error as Kubernetes answers it."""
    told = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": status,
    }
    return status, told
