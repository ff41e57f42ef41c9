"""What each step of a compiled package will ask of the cluster, for given parameters.

The package is walked as the cluster's drivers walk it: parameters are handed down, loops are unrolled. The steps that
only plan are run here, so each cell's own needs are known before anything is submitted.
"""

import graphlib
import inspect
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillery.errors import DistilleryError, UserError
from pipelines.compiled import Package
from pipelines.package import QUEUE_LABEL, pods_of

PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")
SELECTOR = re.compile(r'parseJson\(string_value\)\["([^"]+)"\]')
Object = dict[str, Any]


@dataclass(frozen=True)
class Unknown:
    """A value that only the run itself will know, and why."""

    why: str


class NotKnown(DistilleryError):
    """Something depends on an `Unknown`."""


@dataclass(frozen=True)
class Ask:
    """What the pod of a step asks for. Quantities as Kubernetes writes them; "" where none is set."""

    cpu: str = ""
    memory: str = ""
    gpu_type: str = ""
    gpus: int = 0
    shm: str = ""  # the size of its memory-backed volumes
    tolerations: str = "[]"  # JSON, so that equal asks are equal
    node_selector: str = "{}"
    image: str = ""

    def __str__(self) -> str:
        gpus = f", {self.gpus} {self.gpu_type}" if self.gpus else ""
        return f"{self.cpu or 'any'} cpu, {self.memory or 'any'} memory{gpus}"


@dataclass
class Asks:
    """All steps of a package."""

    steps: dict[Ask, list[str]] = field(default_factory=dict)  # each different ask, and who asks it
    unknown: dict[str, str] = field(default_factory=dict)  # step -> why its ask is not known here

    def add(self, ask: Ask, step: str) -> None:
        """Enter what a step asks."""
        names = self.steps.setdefault(ask, [])
        if step not in names:
            names.append(step)


def values(package: Package, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all parameters: what is given, else the package's default.

    Raises:
        UserError: an unknown name, or a value of another type.
    """
    defaults = {name: asked.get("defaultValue") for name, asked in package.parameters.items()}
    return defaults | package.checked(given)


def queue(package: Package) -> str:
    """The Kueue queue that the package's pods are labelled with; "" for none."""
    return next(
        (
            str(found)
            for pod in _pods(package).values()
            if (found := _at(pod, "podMetadata", "labels").get(QUEUE_LABEL))
        ),
        "",
    )


def pull_secret(package: Package, known_values: Object) -> str:
    """The secret that the package's pods pull their image with; "" for the service account's own."""
    named = (_named(one, known_values) for pod in _pods(package).values() for one in _list(pod, "imagePullSecret"))
    return next(filter(None, named), "")


def asks(package: Package, known_values: Object) -> Asks:
    """What every step's pod asks for.

    Args:
        package: a compiled pipeline.
        known_values: see `values`.

    Raises:
        UserError: the experiment is wrong.
    """
    found = Asks()
    try:
        _Walk(package)._dag(package.spec["root"], known_values, found)
    except (KeyError, TypeError, AttributeError, graphlib.CycleError) as error:
        raise UserError(f"{package.path.name} is not as kfp 2 compiles it ({error!r}); compile it again") from error
    return found


class _Walk:
    """Through a package as the cluster's drivers go."""

    def __init__(self, package: Package) -> None:
        self.components: Object = package.spec["components"]
        self.executors: Object = package.spec["deploymentSpec"]["executors"]
        self.pods = _pods(package)

    def _dag(self, component: Object, inputs: Object, found: Asks) -> None:
        tasks: Object = component["dag"]["tasks"]
        outputs: dict[str, Object] = {}
        for name in graphlib.TopologicalSorter(
            {n: t.get("dependentTasks", ()) for n, t in tasks.items()}
        ).static_order():
            task = tasks[name]
            given = {k: _value(v, inputs, outputs) for k, v in _at(task, "inputs", "parameters").items()}
            outputs[name] = {}
            loop = task.get("parameterIterator")
            if loop is None:
                outputs[name] = self._task(task, given, inputs, found)
                continue
            items = given.get(loop["items"].get("inputParameter", ""), Unknown(f"{name} loops over an artifact"))
            if "raw" in loop["items"]:
                items = json.loads(loop["items"]["raw"])
            if isinstance(items, Unknown):
                items = [items]
            for item in items:
                self._task(task, given | {loop["itemInput"]: item}, inputs, found)

    def _task(self, task: Object, given: Object, outside: Object, found: Asks) -> Object:
        """Enter one task, and return those of its outputs that are known without running it."""
        name = task["componentRef"]["name"]
        component = self.components[name]
        defaults = {
            k: d["defaultValue"]
            for k, d in _at(component, "inputDefinitions", "parameters").items()
            if "defaultValue" in d
        }
        inputs = defaults | given
        if "dag" in component:
            self._dag(component, inputs, found)
            return {}
        step, label = name.removeprefix("comp-").replace("-", "_"), component["executorLabel"]
        step = re.sub(r"_\d+$", "", step)
        try:
            found.add(_ask(self.executors[label], self.pods.get(label, {}), inputs, outside), step)
        except NotKnown as error:
            found.unknown[step] = str(error)
        wanted: Object = _at(component, "outputDefinitions", "parameters")
        artifacts = _at(component, "inputDefinitions", "artifacts") or _at(component, "outputDefinitions", "artifacts")
        if not wanted or artifacts:
            return {}
        return _plan_here(step, inputs, wanted)


def _plan_here(step: str, inputs: Object, wanted: Object) -> Object:
    """The outputs of a step that reads parameters and gives parameters: those that plan."""
    import components

    unknown = next((v for v in inputs.values() if isinstance(v, Unknown)), None)
    function = getattr(getattr(components, step, None), "python_func", None)
    if function is None or unknown is not None:
        why = unknown.why if unknown else f"this version of Distillery has no step {step!r}"
        return dict.fromkeys(wanted, Unknown(why))
    arguments = {name: inputs[name] for name in inspect.signature(function).parameters if name in inputs}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in wanted if name != "Output"}
        try:
            result = function(**arguments, **{name: str(path) for name, path in files.items()})
        except UserError:
            raise
        except DistilleryError as error:
            return dict.fromkeys(wanted, Unknown(f"{step} cannot be run here: {error}"))
        named = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.exists()}
    return named | {"Output": result}


def _ask(executor: Object, pod: Object, inputs: Object, outside: Object) -> Ask:
    """What an executor's pod asks for.

    Args:
        executor: its entry in the package.
        pod: its settings for Kubernetes.
        inputs, outside: parameters of the step, and of the pipeline around it, which `pod` refers to.

    Raises:
        NotKnown: it depends on what only the run will know.
    """
    container = executor.get("container", {})
    resources = container.get("resources", {})
    accelerator = resources.get("accelerator", {})
    cpu = resources.get("resourceCpuRequest") or resources.get("resourceCpuLimit") or ""
    memory = resources.get("resourceMemoryRequest") or resources.get("resourceMemoryLimit") or ""
    count = _filled(accelerator.get("resourceCount") or accelerator.get("count") or "0", inputs)
    try:
        gpus = int(float(count or 0))
    except ValueError as error:
        raise UserError(f"a GPU count of {count!r}; give a whole number, 0 for none") from error
    tolerations = [
        _parameter(t["tolerationJson"], outside) if "tolerationJson" in t else t for t in _list(pod, "tolerations")
    ]
    place = pod.get("nodeSelector") or {}
    json_place = place.get("nodeSelectorJson")
    selector = known(_parameter(json_place, outside)) if json_place else place.get("labels", {})
    memory_volumes = [m for m in _list(pod, "emptyDirMounts") if m.get("medium") == "Memory"]
    return Ask(
        cpu=_filled(cpu, inputs),
        memory=_filled(memory, inputs),
        gpu_type=_filled(accelerator.get("resourceType") or accelerator.get("type") or "", inputs) if gpus else "",
        gpus=gpus,
        shm=memory_volumes[0].get("sizeLimit", "") if memory_volumes else "",
        tolerations=json.dumps(_flat(map(known, tolerations)), sort_keys=True),
        node_selector=json.dumps(selector or {}, sort_keys=True),
        image=_filled(container.get("image", ""), inputs),
    )


def _value(spec: Object, inputs: Object, outputs: dict[str, Object]) -> Any:
    """The value of a task's parameter."""
    if "taskOutputParameter" in spec:
        where = spec["taskOutputParameter"]
        why = f"{where['producerTask']} gives it while the run goes on"
        value = outputs.get(where["producerTask"], {}).get(where["outputParameterKey"], Unknown(why))
    else:
        value = _parameter(spec, inputs)
    selector = SELECTOR.fullmatch(spec.get("parameterExpressionSelector", ""))
    if selector is None or isinstance(value, Unknown):
        return value
    item = json.loads(value) if isinstance(value, str) else value
    return item.get(selector[1], Unknown(f"an item of the loop has no {selector[1]!r}"))


def _parameter(spec: Object, inputs: Object) -> Any:
    if "componentInputParameter" in spec:
        name = spec["componentInputParameter"]
        return inputs.get(name, Unknown(f"the parameter {name!r} has no value"))
    return spec.get("runtimeValue", {}).get("constant", spec.get("constant"))


def _named(spec: Object, outside: Object) -> str:
    """The name of a secret, which is written down or a parameter."""
    if "secretNameParameter" in spec:
        return str(known(_parameter(spec["secretNameParameter"], outside)) or "")
    return str(spec.get("secretName", ""))


def _filled(text: str, inputs: Object) -> str:
    """A text with its placeholders replaced.

    Raises:
        NotKnown: by a value that only the run will know.
    """
    for name in PLACEHOLDER.findall(text):
        value = known(inputs.get(name, Unknown(f"the parameter {name!r} has no value")))
        if isinstance(value, str):
            value = _filled(value, {k: v for k, v in inputs.items() if k != name})
        text = text.replace(f"{{{{$.inputs.parameters['{name}']}}}}", str(value))
    return text


def known(value: Any) -> Any:
    """The value itself.

    Raises:
        NotKnown: only the run will know it.
    """
    if isinstance(value, Unknown):
        raise NotKnown(value.why)
    return value


def _flat(many: Iterable[Any]) -> list[Object]:
    return [one for some in many if some for one in (some if isinstance(some, list) else [some])]


def _list(tree: Object, key: str) -> list[Object]:
    return tree.get(key) or []


def _pods(package: Package) -> Object:
    """The Kubernetes settings of each executor."""
    return pods_of(package.platform)


def _at(tree: Any, *path: str) -> Object:
    """The dict at a path of keys, empty where there is none."""
    for key in path:
        tree = (tree or {}).get(key)
    return tree or {}
