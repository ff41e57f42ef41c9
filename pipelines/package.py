"""What KFP takes only as a constant, changed in a copy of the package: `python -m pipelines.package --help`.

A pod's labels, its pull secret and how many pods of a loop run at once cannot be pipeline parameters: labels and limits
are fixed when KFP compiles the workflow, an empty name of a secret fails in its driver, and a secret on the pod hides
those of the service account. The committed package has neither label nor pull secret; whoever needs one sends a copy.
"""

import argparse
import copy
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping

import yaml

from distillery.errors import UserError
from pipelines.compile import PACKAGE, documents

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"  # Kueue holds a pod with this label back until its LocalQueue has room


def changed(package: List[Any], queue: str = "", pull_secret: str = "", parallelism: int = 0) -> List[Any]:
    """A package (see `compile.documents`) with constants of its own.

    Args:
        package: specification and Kubernetes settings; left as it is.
        queue: name of a Kueue LocalQueue in the namespace of the runs; "" = no label.
        pull_secret: name of a secret of type dockerconfigjson there; "" = those of the pods' service account.
        parallelism: pods of a loop at once; 0 = as compiled.

    Raises:
        UserError: a negative parallelism, or a document that is no package of this pipeline.
    """
    if parallelism < 0:
        raise UserError(f"parallelism {parallelism}: give a number of pods from 1, or 0 for the package's own")
    made = copy.deepcopy(package)
    for pod in _pods(made):
        if queue:
            pod.setdefault("podMetadata", {}).setdefault("labels", {})[QUEUE_LABEL] = queue
        if pull_secret:
            name = {"secretName": pull_secret, "secretNameParameter": {"runtimeValue": {"constant": pull_secret}}}
            pod["imagePullSecret"] = [name]
    for task in tasks(made[0]):
        if parallelism and "iteratorPolicy" in task:
            task["iteratorPolicy"]["parallelismLimit"] = parallelism
    return made


def pods_of(platform: Mapping[str, Any]) -> Dict[str, Dict[str, Any]]:
    """The Kubernetes settings of each executor; {} where a package says nothing of Kubernetes."""
    found: Any = platform
    for key in ("platforms", "kubernetes", "deploymentSpec", "executors"):
        found = found.get(key) or {}
    return dict(found)


def _pods(package: List[Any]) -> List[Dict[str, Any]]:
    """The Kubernetes settings of every step."""
    try:
        return list(package[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values())
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{len(package)} documents without Kubernetes settings ({error}); give a compiled pipeline"
        ) from error


def tasks(specification: Mapping[str, Any]) -> Iterator[Dict[str, Any]]:
    """Every task of a pipeline, in its loops and inner pipelines too."""
    for part in (specification["root"], *specification.get("components", {}).values()):
        yield from part.get("dag", {}).get("tasks", {}).values()


def main(arguments: List[str]) -> int:
    """Write a changed copy; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.package", description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=Path, default=PACKAGE, help="the compiled pipeline to start from")
    parser.add_argument("--out", type=Path, required=True, help="where to write the copy")
    parser.add_argument("--queue", default="", help="Kueue LocalQueue of every step's pod")
    parser.add_argument("--pull-secret", default="", help="secret with the image registry's credentials")
    parser.add_argument("--parallelism", type=int, default=0, help="pods of a loop at once")
    asked = parser.parse_args(arguments)
    try:
        made = changed(documents(asked.package), asked.queue, asked.pull_secret, asked.parallelism)
        asked.out.write_text(yaml.safe_dump_all(made, sort_keys=False), encoding="utf-8")
    except UserError as error:
        print(f"error: {asked.package}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        parser.error(f"{error}; choose a file that exists for --package, and one you may write for --out")
    print(f"{asked.out} written; send it with: kfp run create -e distill -f {asked.out} experiment=NAME")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
