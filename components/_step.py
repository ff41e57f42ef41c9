"""What all components share: the image they run in, the decorator, and what they tell KFP about an artifact."""

import functools
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict

from kfp import dsl

# Written by `make image PUSH=...`; the manifests in k8s/ read the same line.
IMAGE_ENV = Path(__file__).resolve().parent.parent / "k8s" / "image" / "image.env"


def image(path: Path = IMAGE_ENV) -> str:
    """The image that a package names when the pipeline's parameter `image` says nothing else.

    The repository says it in one file. An installed package has no such file, and the image must not have it: each push
    would change what the next one is built from.
    """
    if not path.exists():
        return f"distillery:{version('distillery')}"
    text = path.read_text(encoding="utf-8").strip()
    key, _, value = text.partition("=")
    if key != "IMAGE" or len(value.split()) != 1:
        raise ValueError(f"{path} holds {text!r}; it must be one line: IMAGE=name:tag or IMAGE=name@sha256:...")
    return value


IMAGE = image()  # KFP's cache key holds this text and not what it points to: a digest, or a tag that is never reused


def facts(manifest: Any) -> Dict[str, Any]:
    """The part of a manifest that KFP can keep: strings and finite numbers (a list or None breaks its metadata store).

    KFP copies this function's source into every component, so it imports what it needs itself.
    """
    import math

    own = {"kind": manifest.kind, "fingerprint": manifest.fingerprint, "code_version": manifest.code_version}
    numbers = {k: v for k, v in manifest.meta.items() if type(v) in (int, float) and math.isfinite(v)}
    return {**own, **numbers, **{k: v for k, v in manifest.meta.items() if isinstance(v, str)}}


def connect(endpoint: str, region: str) -> None:
    """Tell the store where it is, and whom to trust where the pod was given a certificate authority.

    KFP copies this function's source as well.
    """
    import os

    given = {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": region}
    os.environ.update({name: value for name, value in given.items() if value})
    authority = os.environ.get("DISTILLERY_S3_CA", "")
    if os.path.isfile(authority):  # its secret may be missing, and the folder then is empty
        os.environ.setdefault("AWS_CA_BUNDLE", authority)


# The image holds distillery and `kfp --no-deps`: nothing is installed when a pod starts.
step = functools.partial(dsl.component, base_image=IMAGE, install_kfp_package=False, additional_funcs=[facts, connect])
