"""Compile the pipeline into the package that is committed: `python -m pipelines.compile`.

The compiled text is not the same from run to run (its comments change order), so packages are compared as parsed
documents, and a package that says the same is left as it is.
"""

from pathlib import Path
from typing import Any, List

import yaml

PACKAGE = Path(__file__).with_name("distill_pipeline.yaml")


def compile_to(path: Path) -> Path:
    """Compile the pipeline of `distill_pipeline.py` to a package at `path`."""
    from kfp.compiler import Compiler

    from pipelines.distill_pipeline import distill

    Compiler().compile(distill, str(path))
    return path


def documents(path: Path) -> List[Any]:
    """What a package says: the pipeline's specification and its Kubernetes settings."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8"))) if path.exists() else []


def main() -> None:
    """Bring the committed package up to date."""
    fresh = compile_to(PACKAGE.with_suffix(".part.yaml"))
    if documents(fresh) == documents(PACKAGE):
        fresh.unlink()
        print(f"{PACKAGE} is up to date")
    else:
        fresh.replace(PACKAGE)
        print(f"{PACKAGE} compiled")


if __name__ == "__main__":
    main()
