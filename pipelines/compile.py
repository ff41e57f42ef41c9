"""Compile the pipelines into the packages that are committed: `python -m pipelines.compile`.

The compiled text is not the same from run to run (its comments change order), so packages are compared as parsed
documents, and a package that says the same is left as it is.
"""

from pathlib import Path
from typing import Any, List

import yaml

PACKAGE = Path(__file__).with_name("distill_pipeline.yaml")
SHARDED = Path(__file__).with_name("distill_sharded_pipeline.yaml")


def compile_to(path: Path, package: Path = PACKAGE) -> Path:
    """Compile the pipeline of a committed package to a package at `path`."""
    from kfp.compiler import Compiler

    from pipelines.distill_pipeline import distill
    from pipelines.distill_sharded_pipeline import distill_sharded

    Compiler().compile({PACKAGE: distill, SHARDED: distill_sharded}[package], str(path))
    return path


def documents(path: Path) -> List[Any]:
    """What a package says: the pipeline's specification and its Kubernetes settings."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8"))) if path.exists() else []


def main() -> None:
    """Bring the committed packages up to date."""
    for package in (PACKAGE, SHARDED):
        fresh = compile_to(package.with_suffix(".part.yaml"), package)
        if documents(fresh) == documents(package):
            fresh.unlink()
            print(f"{package} is up to date")
        else:
            fresh.replace(package)
            print(f"{package} compiled")


if __name__ == "__main__":
    main()
