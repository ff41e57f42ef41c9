"""The image's recipe and `make image`, without an engine: what is pinned, passed, kept out and written down."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import components
import distillery
from components._step import IMAGE_ENV, image
from distillery.code_version import code_version

ROOT = Path(__file__).resolve().parent.parent
CONTAINERFILE = (ROOT / "images" / "Containerfile").read_text(encoding="utf-8")
DIGEST = "sha256:" + "5e" * 32
# Plays docker and podman: notes its arguments, knows one pushed digest of each of two registries.
ENGINE = f"""#!{sys.executable}
import json, os, pathlib, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(sys.argv) + chr(10))
if sys.argv[1] == "image" and "json" in sys.argv[4]:
    print(json.dumps(["elsewhere:5000/distillery@sha256:" + "0" * 64, "registry:5000/team/distillery@{DIGEST}"]))
elif sys.argv[1] == "image":
    print("sha256:1d")
elif "--digestfile" in sys.argv:
    pathlib.Path(sys.argv[sys.argv.index("--digestfile") + 1]).write_text("{DIGEST}")
sys.exit(int(os.environ.get("STATUS", "0")))
"""


def pins(name: str) -> dict[str, set[str]]:
    """Package -> versions in a requirement file."""
    found: dict[str, set[str]] = {}
    for package, version in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE):
        found.setdefault(package, set()).add(version)
    return found


def make_image(tmp_path: Path, *given: str, **variables: str) -> tuple["subprocess.CompletedProcess[str]", list[str]]:
    """`images.build` with an engine that only notes what it is told: (the process, one line per call)."""
    tmp_path.mkdir(exist_ok=True)
    for name in ("docker", "podman"):
        (tmp_path / name).write_text(ENGINE)
        (tmp_path / name).chmod(stat.S_IRWXU)
    (tmp_path / "image.env").write_text("IMAGE=before:1\n")
    code = f"""
import pathlib, sys
from images import build
build.IMAGE_ENV = pathlib.Path({str(tmp_path / "image.env")!r})
build.main(sys.argv[1:])
"""
    known = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    found = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", code, *given],
        cwd=ROOT,
        env={**known, "PATH": found, "CALLS": str(tmp_path / "calls"), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    calls = tmp_path / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_every_stage_stands_on_a_base_that_is_pinned() -> None:
    (base,) = re.findall(r"^ARG BASE=(\S+)$", CONTAINERFILE, re.MULTILINE)
    assert re.fullmatch(r"\S+:\S+@sha256:[0-9a-f]{64}", base), "the default base has a tag for people and a digest"
    stages: set[str] = set()
    for line in re.findall(r"^FROM .*$", CONTAINERFILE, re.MULTILINE):
        source, _, name = line.removeprefix("FROM ").partition(" AS ")
        assert source == "${BASE}" or source in stages, line
        stages.add(name)
    assert not re.search(r"^#\s*syntax=", CONTAINERFILE, re.MULTILINE), "a build fetches its base and nothing else"


def test_pods_run_as_a_user_with_a_number_that_is_not_root() -> None:
    user = re.findall(r"^USER (\S+)$", CONTAINERFILE, re.MULTILINE)[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "runAsNonRoot cannot judge a name"


def test_pods_have_what_the_steps_need_in_the_tested_versions_and_no_client_of_kubernetes() -> None:
    own, tested = pins("images/requirements.txt"), pins("requirements.txt")
    assert own == {name: tested[name] for name in own}
    assert {"torch", "torchvision", "minio", "kfp", "scikit-learn", "matplotlib", "jinja2", "prometheus-client"} <= set(
        own
    )
    assert not {"kubernetes", "google-cloud-storage", "requests", "kfp-kubernetes"} & set(own)


def test_the_file_of_the_image_is_what_pipelines_name() -> None:
    assert IMAGE_ENV == ROOT / "k8s" / "image" / "image.env"
    assert f"IMAGE={components.IMAGE}\n" == IMAGE_ENV.read_text(encoding="utf-8")
    assert re.fullmatch(rf"\S+:{re.escape(distillery.__version__)}|\S+@sha256:[0-9a-f]{{64}}", components.IMAGE)


@pytest.mark.parametrize("text", ["", "IMAGE=", "IMAGE=a b", "OTHER=a:1", "IMAGE=a:1\nIMAGE=b:1"])
def test_file_that_names_no_single_image_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "image.env").write_text(text)
    with pytest.raises(ValueError, match=r"image\.env holds .* it must be one line: "):
        image(tmp_path / "image.env")


def test_installed_package_without_the_file_names_its_version(tmp_path: Path) -> None:
    assert image(tmp_path / "image.env") == f"distillery:{distillery.__version__}"


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_push_writes_the_digest_that_the_registry_gave(tmp_path: Path, engine: str) -> None:
    asked = ("--engine", engine, "--push", "registry:5000/team/distillery", "--base", f"base:1@{DIGEST}")
    done, calls = make_image(tmp_path, *asked, "--variant", "cpu", "--tag", "")
    assert done.returncode == 0, done.stderr
    assert image(tmp_path / "image.env") == f"registry:5000/team/distillery@{DIGEST}"
    tag = f"registry:5000/team/distillery:{code_version().replace('+', '-')}-cpu"
    (built,) = [call for call in calls if '"build"' in call]
    for part in (f"BASE=base:1@{DIGEST}", "BASE_NAME=base:1", f"BASE_DIGEST={DIGEST}", "VARIANT=cpu", "TORCH_INDEX="):
        assert f'"{part}"' in built
    assert f'"CODE_VERSION={code_version()}"' in built
    assert f'"distillery:{distillery.__version__}"' in built, "an empty --tag is the default"
    assert any('"push"' in call and f'"{tag}"' in call for call in calls)
    assert "digest" not in done.stderr


def test_build_alone_leaves_the_file_and_warns_of_a_base_that_may_change(tmp_path: Path) -> None:
    done, calls = make_image(tmp_path, "--base", "mine:1")
    assert done.returncode == 0, done.stderr
    assert "BASE=mine:1 has no digest" in done.stderr
    assert any('"BASE_DIGEST=sha256:1d"' in call for call in calls), "the id says which base it was"
    assert not any('"push"' in call for call in calls)
    assert image(tmp_path / "image.env") == "before:1"


def test_build_behind_a_proxy_passes_names_and_files_but_no_values(tmp_path: Path) -> None:
    for name in ("ca.crt", "pip.conf"):
        (tmp_path / name).write_text("marked-secret")
    given = (
        "--ca",
        str(tmp_path / "ca.crt"),
        "--pip-conf",
        str(tmp_path / "pip.conf"),
        "--network",
        "host",
        "--platform",
        "linux/arm64",
    )
    done, calls = make_image(tmp_path, *given, https_proxy="http://me:marked-secret@proxy:3128")
    assert done.returncode == 0, done.stderr
    built = calls[-1]
    assert f'"id=ca,src={tmp_path / "ca.crt"}"' in built
    assert f'"id=pip,src={tmp_path / "pip.conf"}"' in built
    assert '"--build-arg", "https_proxy"' in built
    assert '"--network", "host"' in built
    assert '"--platform", "linux/arm64"' in built
    assert "marked-secret" not in built + done.stdout + done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--push", "registry/name:1"), "PUSH=registry/name:1: give registry/name alone"),
        (("--variant", "tpu"), "tpu"),
        (("--ca", "no/such/file"), "no/such/file is not a file"),
        (("--engine", "no-such-engine"), "no-such-engine is not installed"),
    ],
)
def test_mistakes_end_before_anything_is_built(tmp_path: Path, given: tuple[str, ...], said: str) -> None:
    done, calls = make_image(tmp_path, *given)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not any('"build"' in call for call in calls)


def test_failed_build_is_not_pushed(tmp_path: Path) -> None:
    done, calls = make_image(tmp_path, "--push", "registry/name", STATUS="1")
    assert done.returncode != 0
    assert "`docker build` failed with exit status 1" in done.stderr
    assert not any('"push"' in call for call in calls)
    assert image(tmp_path / "image.env") == "before:1"
