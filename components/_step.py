"""What all components share: the image they run in, the decorator, and what they tell KFP about an artifact."""

import functools
from typing import Any, Dict

from kfp import dsl

IMAGE = "distillery:0.1.0"  # the pipeline's parameter `image` replaces it; a tag must never be pushed twice (cache key)


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
