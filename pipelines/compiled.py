"""A compiled package, and what it is asked to run with: checked here, before anything is sent."""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

import yaml

from distillery.errors import UserError, choices, nearest
from pipelines import package

DISTILL = Path(__file__).with_name("distill_pipeline.yaml")
SCHEMA = "2.1"
MAX_BYTES = 16 << 20  # of a package; the API takes 32 MiB, the workflow made of it far less
# A pod's volume is called as the secret in it, and volumes have narrower names than secrets.
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
WORDS = {
    "STRING": "a text",
    "NUMBER_INTEGER": "a whole number",
    "NUMBER_DOUBLE": "a number",
    "BOOLEAN": "true or false",
    "LIST": "a list as JSON",
    "STRUCT": "a mapping as JSON",
}


@dataclass(frozen=True)
class Package:
    """A compiled pipeline: its specification, and what Kubernetes is told besides ({} = nothing)."""

    path: Path
    spec: Dict[str, Any]
    platform: Dict[str, Any]

    @property
    def name(self) -> str:
        """The pipeline's name."""
        return str(self.spec["pipelineInfo"]["name"])

    @property
    def parameters(self) -> Dict[str, Dict[str, Any]]:
        """The pipeline's parameters: name -> parameterType, and defaultValue where it has one."""
        known: Dict[str, Dict[str, Any]] = self.spec["root"].get("inputDefinitions", {}).get("parameters", {})
        return known

    def document(self) -> Dict[str, Any]:
        """What the API takes as `pipeline_spec`, in the form in which kfp sends it."""
        return {"pipeline_spec": self.spec, "platform_spec": self.platform} if self.platform else self.spec

    def checked(self, texts: Mapping[str, Any]) -> Dict[str, Any]:
        """Parameters with values of the types that the package wants.

        Args:
            texts: name -> what somebody wrote; what is no text already must have the right type.

        Raises:
            UserError: an unknown name, a value of another type, a secret that no pod could have, or a parameter without
                value.
        """
        values = {name: self._value(name, text) for name, text in texts.items()}
        self._check_secrets(values)
        missing = [
            n for n, asked in self.parameters.items() if "defaultValue" not in asked and not asked.get("isOptional")
        ]
        lacking = sorted(set(missing) - set(values))
        if lacking:
            raise UserError(f"{self.path.name}: no value for {choices(lacking)}; give --param NAME=VALUE")
        return values

    def _check_secrets(self, values: Mapping[str, Any]) -> None:
        """KFP's drivers and Kubernetes refuse such names only when the first step's pod is made."""
        named = [
            (one.get("secretNameParameter", {}).get("componentInputParameter"), kind)
            for pod in package.pods_of(self.platform).values()
            for kind in ("secretAsVolume", "secretAsEnv")
            for one in pod.get(kind) or []
        ]
        for name, kind in dict.fromkeys(named):
            if name not in values:
                continue
            text = str(values[name])
            plain = text.replace(".", "-") if kind == "secretAsEnv" else text
            if not LABEL.fullmatch(plain):
                dots = "" if kind == "secretAsEnv" else " (no dots: it becomes the name of a volume)"
                raise UserError(
                    f"--param {name}={text!r}: no secret of a pod can be called so; write lower-case letters, digits "
                    f"and '-', at most 63{dots}, or leave {name} out: the secret of its default may be missing"
                )

    def _value(self, name: str, text: Any) -> Any:
        if name not in self.parameters:
            raise UserError(
                f"--param {name}: {self.path.name} has no such parameter{nearest(name, self.parameters)}; "
                f"it has {choices(sorted(self.parameters))}"
            )
        kind = self.parameters[name]["parameterType"]
        if kind == "STRING" and isinstance(text, str):
            return text
        try:
            value = json.loads(text) if isinstance(text, str) else text
        except ValueError:
            value = None
        whole = isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer()
        fits = {
            "NUMBER_INTEGER": whole,
            "NUMBER_DOUBLE": isinstance(value, (int, float)) and not isinstance(value, bool),
            "BOOLEAN": isinstance(value, bool),
            "LIST": isinstance(value, list),
            "STRUCT": isinstance(value, dict),
        }
        if not fits.get(kind, False):
            raise UserError(f"--param {name}={text!r}: the pipeline wants {WORDS.get(kind, kind)} here")
        return value

    def changed(self, queue: str = "", pull_secret: str = "", parallelism: int = 0, caching: bool = True) -> "Package":
        """A copy with what KFP takes only as a constant.

        Args:
            queue, pull_secret, parallelism: see `package.changed`.
            caching: False runs every step, whatever KFP has seen before.
        """
        documents = [self.spec, *([self.platform] if self.platform else [])]
        if queue or pull_secret or parallelism:
            documents = package.changed(documents, queue, pull_secret, parallelism)
        if not caching:
            documents = copy.deepcopy(documents)
            for task in package.tasks(documents[0]):
                task["cachingOptions"] = {}
        return Package(self.path, documents[0], documents[1] if self.platform else {})


def load(path: Path = DISTILL) -> Package:
    """Read a compiled package.

    Raises:
        UserError: no such file, or not what kfp 2 compiles.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: {size} bytes; a compiled pipeline has fewer than {MAX_BYTES}")
        found = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=LOADER))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; give the file of a compiled pipeline, or none for {DISTILL.name}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: no YAML ({' '.join(str(error).split())}); give a compiled pipeline") from error
    spec, platform = split(found)
    version = str(spec.get("schemaVersion", ""))
    if "root" not in spec or not version.startswith(SCHEMA) or "name" not in spec.get("pipelineInfo", {}):
        raise UserError(
            f"{path}: no compiled pipeline (schemaVersion {version!r}, keys {choices(sorted(map(str, spec)))[:200]}); "
            "`make compile` writes them, and an experiment's YAML belongs after -x"
        )
    return Package(path, spec, platform)


def split(documents: List[Any]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Specification and platform out of a file's documents; {} for what is missing."""
    known = [document for document in documents if isinstance(document, dict)]
    platform = next((document for document in known if set(document) == {"platforms"}), {})
    return next((document for document in known if document is not platform), {}), platform


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
