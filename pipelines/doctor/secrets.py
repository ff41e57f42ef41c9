"""Secrets: there, with the right keys, and with values that can work. A value is looked at, never shown."""

import base64
import binascii
from collections.abc import Iterator
from typing import Any

import yaml

from pipelines.doctor.case import KFP_SECRET, Case, Place
from pipelines.doctor.finding import Finding, ok, skipped, wrong

Object = dict[str, Any]
KEYS = ("accesskey", "secretkey")
DEFAULT_STORE = "http://seaweedfs.kubeflow:9000"  # KFP's own, since 2.15
DOCKER = {"kubernetes.io/dockerconfigjson": ".dockerconfigjson", "kubernetes.io/dockercfg": ".dockercfg"}


def own(case: Case) -> Iterator[Finding]:
    """The secret that the steps' pods get as their environment."""
    yield _examine(case, "secret", case.secret, KEYS)


def own_places(case: Case) -> Iterator[Place]:
    """Where the steps themselves will read and write."""
    endpoint, region = case.parameter("s3_endpoint"), case.parameter("s3_region")
    for name, uri in (("store", case.store), ("checkpoints", case.parameter("checkpoints"))):
        if uri.startswith("s3://"):
            yield Place(name, uri, endpoint, case.secret, region=region)


def launcher(case: Case) -> Iterator[Finding]:
    """ConfigMap kfp-launcher, which says where KFP keeps artifacts, and the secret it points to."""
    assert case.cluster is not None
    check = "kfp-launcher"
    found = case.cluster.find(case.path("configmaps", check))
    data = (found or {}).get("data") or {}
    default = (
        f"minio://mlpipeline/private-artifacts/{case.namespace}/v2/artifacts"
        if case.multi_user
        else "minio://mlpipeline/v2/artifacts"
    )
    root = data.get("defaultPipelineRoot") or default
    where = f"artifacts go to {root}" + ("" if data.get("defaultPipelineRoot") else " (KFP's default)")
    edit = f"kubectl -n {case.namespace} edit configmap {check}"
    scheme, _, rest = root.partition("://")
    if scheme not in ("minio", "s3", "gs") or not rest.strip("/"):
        yield wrong(
            check, f"defaultPipelineRoot is {root!r}", f"write minio://bucket/prefix or s3://bucket/prefix ({edit})"
        )
        return
    try:
        provider = _provider(yaml.safe_load(data.get("providers") or "") or {}, scheme, rest)
        credentials = _mapping(provider.get("credentials"), "credentials")
        reference = _mapping(credentials.get("secretRef"), "secretRef")
    except (yaml.YAMLError, ValueError) as error:
        yield wrong(check, f"`providers` cannot be read: {error}", f"correct it ({edit})")
        return
    if scheme == "gs" or credentials.get("fromEnv") or (scheme == "s3" and not provider):
        yield ok(check, f"{where}, with the credentials of the pods' environment")
        return
    names = ("secretName", "accessKeyKey", "secretKeyKey")
    if provider and (lacking := [name for name in names if not reference.get(name)]):
        yield wrong(
            check, f"`providers` {scheme}: its credentials.secretRef lacks {', '.join(lacking)}", f"add it ({edit})"
        )
        return
    secret, *keys = (str(reference.get(name, "")) for name in names) if provider else (KFP_SECRET, *KEYS)
    yield ok(check, f"{where}, with the keys {' and '.join(keys)} of secret {secret}")
    yield _examine(case, "KFP's secret", secret, tuple(keys))
    uri, endpoint = f"s3://{rest.strip('/')}", _endpoint(provider)
    case.places.append(
        Place("KFP's artifacts", uri, endpoint, secret, keys[0], keys[1], str(provider.get("region") or ""))
    )


def pull(case: Case) -> Iterator[Finding]:
    """The secret for the image's registry, and that of a private authority."""
    name = case.pull_secret
    if not name:
        yield skipped(
            "pull secret",
            "the package has none, and none is given (--pull-secret NAME): the image must be public or on the nodes",
        )
    else:
        yield _pull(case, name)
    name = case.parameter("s3_ca")
    usual = case.package.parameters.get("s3_ca", {}).get("defaultValue")
    assert case.cluster is not None
    if name and name == usual and case.cluster.find(case.path("secrets", name)) is None:
        yield skipped("store's CA", f"there is no secret {name}: the store's certificate must be of a public authority")
    elif name:
        yield _examine(case, "store's CA", name, ("ca.crt",), trimmed=False)
        case.authority = name if name not in case.absent else ""


def _pull(case: Case, name: str) -> Finding:
    assert case.cluster is not None
    make = f"kubectl -n {case.namespace} create secret docker-registry {name} --docker-server=..."
    found = case.cluster.find(case.path("secrets", name))
    if found is None:
        return wrong("pull secret", f"there is no secret {name} in namespace {case.namespace}", make)
    kind = found.get("type", "")
    if kind not in DOCKER or DOCKER[kind] not in (found.get("data") or {}):
        return wrong(
            "pull secret",
            f"{name} is of type {kind}, which no registry login can be read from",
            f"make it anew: {make}",
        )
    return ok("pull secret", f"{name} is of type {kind}")


def _examine(case: Case, check: str, name: str, keys: tuple[str, ...], trimmed: bool = True) -> Finding:
    """One secret. What is right in it is kept in `case.keys`, what is not enters it into `case.absent`."""
    assert case.cluster is not None
    literals = " ".join(f"--from-literal={key}=..." for key in keys)
    make = f"kubectl -n {case.namespace} create secret generic {name} {literals}"
    again = f"kubectl -n {case.namespace} delete secret {name}; {make}"
    found = case.cluster.find(case.path("secrets", name))
    if found is None:
        case.absent.add(name)
        return wrong(check, f"there is no secret {name} in namespace {case.namespace}", make)
    data = found.get("data") or {}
    missing = [key for key in keys if key not in data]
    if missing:
        case.absent.add(name)
        has = ", ".join(sorted(data)) or "none"
        return wrong(check, f"{name} lacks the key{'s' * (len(missing) > 1)} {', '.join(missing)}; it has {has}", again)
    faults, values = [], {}
    for key, text in data.items():
        try:
            values[key] = base64.b64decode(text or "", validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            faults += [f"{key} is not text"] * (key in keys)
            continue
        faults += [
            fault for fault in [_fault(values[key], trimmed)] if fault and key in keys for fault in [f"{key} {fault}"]
        ]
    case.keys[name] = values
    if faults:
        case.absent.add(name)
        return wrong(check, f"{name}: {', '.join(faults)}", f"{again} (with echo, use echo -n)")
    return ok(check, f"{name} has {', '.join(keys)}")


def _fault(value: str, trimmed: bool) -> str:
    if not value.strip():
        return "is empty"
    if trimmed and value != value.strip():
        return "ends with a line break or a space" if value != value.rstrip() else "begins with a space"
    return ""


def _provider(providers: Any, scheme: str, root: str) -> Object:
    """The launcher's settings for a pipeline root: the default, with a matching override's values over it.

    A root with a query brings its own settings and takes its keys from the environment.

    Raises:
        ValueError: something the launcher would stumble over.
    """
    if "?" in root:
        return {"credentials": {"fromEnv": True}}
    own = _mapping(_mapping(providers, "it").get(scheme), scheme)
    if not own:
        return {}
    found = _mapping(own.get("default"), f"{scheme}.default")
    bucket, _, prefix = root.partition("/")
    for other in own.get("overrides") or own.get("Overrides") or []:
        other = _mapping(other, f"{scheme}.overrides")
        if other.get("bucketName") == bucket and prefix.startswith(str(other.get("keyPrefix") or "")):
            found = found | {name: value for name, value in other.items() if value is not None}
            break
    if scheme != "gs" and not found.get("credentials"):
        raise ValueError(f"{scheme}.default has no credentials")
    return found


def _mapping(value: Any, name: str) -> Object:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping, not {type(value).__name__} {str(value)[:40]!r}")
    return value or {}


def _endpoint(provider: Object) -> str:
    """The endpoint as a URL; the launcher takes a bare host and port."""
    if not provider:
        return DEFAULT_STORE
    host = str(provider.get("endpoint") or "")
    return host if not host or "://" in host else f"{'http' if provider.get('disableSSL') else 'https'}://{host}"
