"""Build the image of the pods, push it, and write down its digest: `make image` (docs/images.md).

It needs Python and a container engine, no installed package. After a push the reference by digest is in
`k8s/image/image.env`, which the pipelines and the manifests read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from distillery import __version__
from distillery.code_version import code_version

ROOT = Path(__file__).resolve().parent.parent
IMAGE_ENV = ROOT / "k8s" / "image" / "image.env"
CONTAINERFILE = ROOT / "images" / "Containerfile"
# Engines take these from a build argument without keeping them in the image.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY")


def main(given: list[str]) -> None:
    """Build, and push when asked to; a mistake or a failing engine ends the process with its message."""
    asked = arguments(given)
    base = asked.base or default_base()
    if "@sha256:" not in base:
        print(f"BASE={base} has no digest: another image may carry that name tomorrow", file=sys.stderr)
    code = code_version()
    pushed = f"{asked.push}:{code.replace('+', '-')}-{asked.variant}" if asked.push else ""
    name, _, digest = base.partition("@")
    values = {
        "BASE": base,
        "VARIANT": asked.variant,
        "TORCH_INDEX": asked.torch_index,
        "CODE_VERSION": code,
        "REVISION": revision(),
        "BASE_NAME": name,
        "BASE_DIGEST": digest or image_id(asked.engine, base),
    }
    command = [asked.engine, "build", "--file", str(CONTAINERFILE), "--tag", asked.tag]
    for key, value in values.items():
        command += ["--build-arg", f"{key}={value}"]
    for key in PROXIES:
        command += [part for each in (key, key.lower()) if os.environ.get(each) for part in ("--build-arg", each)]
    for key, path in (("ca", asked.ca), ("pip", asked.pip_conf)):
        command += ["--secret", f"id={key},src={readable(path)}"] if path else []
    command += ["--network", asked.network] if asked.network else []
    command += ["--platform", asked.platform] if asked.platform else []
    run([*command, str(ROOT)], {"DOCKER_BUILDKIT": "1"})
    print(f"built {asked.tag} ({asked.variant}, {code})")
    if pushed:
        run([asked.engine, "tag", asked.tag, pushed])
        reference = push(asked.engine, pushed)
        IMAGE_ENV.write_text(f"IMAGE={reference}\n", encoding="utf-8")
        print(f"{os.path.relpath(IMAGE_ENV)}: IMAGE={reference}")


def arguments(given: list[str]) -> argparse.Namespace:
    """The command line; an empty value means the default, as make passes them."""
    parser = argparse.ArgumentParser(prog="make image", description=__doc__)
    parser.add_argument("--engine", default="docker", help="docker or podman")
    parser.add_argument("--base", default="", help="image with Python, by digest; empty: the Containerfile's")
    parser.add_argument("--variant", default="gpu", choices=("cpu", "gpu"))
    parser.add_argument("--tag", default=f"distillery:{__version__}", help="name on this machine")
    parser.add_argument("--push", default="", help="registry/name to push to")
    parser.add_argument("--torch-index", default="", help="package index with torch builds without CUDA (cpu)")
    parser.add_argument("--ca", default="", help="file with the certificates that pip trusts while it builds")
    parser.add_argument("--pip-conf", default="", help="configuration of pip while it builds, for another index")
    parser.add_argument("--network", default="", help="network of the build, for example host")
    parser.add_argument(
        "--platform", default="", help="of the cluster's nodes where it is not this machine's: linux/amd64"
    )
    words = list(given)
    while "" in words:
        del words[words.index("") - 1 : words.index("") + 1]
    asked = parser.parse_args(words)
    if asked.push and ("@" in asked.push or ":" in asked.push.rpartition("/")[2]):
        parser.error(f"PUSH={asked.push}: give registry/name alone; the tag is made from the code's version")
    return asked


def default_base() -> str:
    """The base that the Containerfile names."""
    found = re.search(r"^ARG BASE=(\S+)$", CONTAINERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{CONTAINERFILE} has no `ARG BASE=`"
    return found[1]


def readable(path: str) -> Path:
    """A file for the build, or the end."""
    found = Path(path).expanduser().resolve()
    if not found.is_file():
        sys.exit(f"make image: {path} is not a file")
    return found


def revision() -> str:
    """The commit that the tree is at, `-dirty` after changes; empty where there is no repository."""
    said = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip()


def image_id(engine: str, name: str) -> str:
    """Id of an image on this machine, for a base that no registry has a digest of; empty where it is not there yet."""
    said = subprocess.run(
        [engine, "image", "inspect", "--format", "{{.Id}}", name], capture_output=True, text=True, check=False
    )
    return said.stdout.strip()


def push(engine: str, tagged: str) -> str:
    """Push a tag; returns the reference by digest, as the registry stated it."""
    name = tagged.rpartition(":")[0]
    if engine == "podman":
        with tempfile.TemporaryDirectory() as folder:
            stated = Path(folder) / "digest"
            run([engine, "push", "--digestfile", str(stated), tagged])
            return f"{name}@{stated.read_text(encoding='utf-8').strip()}"
    run([engine, "push", tagged])
    said = subprocess.run(
        [engine, "image", "inspect", "--format", "{{json .RepoDigests}}", tagged],
        capture_output=True,
        text=True,
        check=True,
    )
    (reference,) = [each for each in json.loads(said.stdout) if each.startswith(f"{name}@sha256:")]
    return str(reference)


def run(command: list[str], more: dict[str, str] | None = None) -> None:
    """Run the engine; its own words are the message when it fails."""
    try:
        status = subprocess.run(command, env={**os.environ, **(more or {})}, check=False).returncode
    except FileNotFoundError:
        sys.exit(f"make image: {command[0]} is not installed; ENGINE=docker or ENGINE=podman names another engine")
    if status:
        sys.exit(f"make image: `{' '.join(command[:2])}` failed with exit status {status}")


if __name__ == "__main__":
    main(sys.argv[1:])
