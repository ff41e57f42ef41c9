"""What `kubectl kustomize` makes of k8s/, for the tests of the manifests."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
K8S = ROOT / "k8s"
OVERLAYS = sorted(p.name for p in (K8S / "overlays").iterdir())
COMPONENTS = sorted(p.name for p in (K8S / "components").iterdir())
NAMESPACE = "team"  # of an administrator's own kustomization

Doc = dict[str, Any]


def combinations() -> list[Any]:
    """Every overlay with each component, and with all of them, as parameters of a test."""
    found = []
    for overlay in OVERLAYS:
        has = (K8S / "overlays" / overlay / "kustomization.yaml").read_text(encoding="utf-8")
        free = [name for name in COMPONENTS if f"components/{name}" not in has]
        choices: list[tuple[str, ...]] = [(), *((name,) for name in free), tuple(free)]
        found += [pytest.param(overlay, chosen, id="+".join([overlay, *chosen])) for chosen in choices]
    return found


def kubectl() -> str:
    """The binary, or the test is skipped."""
    found = shutil.which("kubectl")
    if found is None:
        pytest.skip("kubectl is not on PATH")
    return found


def own(folder: Path, overlay: str, components: tuple[str, ...], namespace: str = NAMESPACE) -> Path:
    """A folder of an administrator's own: an overlay and optional components, as docs/operations.md says."""
    content: Doc = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": namespace}
    content["resources"] = [os.path.relpath(K8S / "overlays" / overlay, folder)]
    content["components"] = [os.path.relpath(K8S / "components" / name, folder) for name in components]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


def build(folder: Path) -> list[Doc]:
    """The documents of a folder with a kustomization."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # kustomize says here what is deprecated
    return [doc for doc in yaml.safe_load_all(done.stdout) if doc]


def pod_templates(documents: list[Doc]) -> Iterator[tuple[str, Doc]]:
    """Name and pod template of everything that starts pods."""
    for doc in documents:
        spec = doc.get("spec") or {}
        template = spec.get("jobTemplate", {}).get("spec", {}).get("template") or spec.get("template")
        if template:
            yield f"{doc['kind']}/{doc['metadata']['name']}", template
