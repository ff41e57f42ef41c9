"""Pieces of cells: put side by side for a loop that can take only one artifact, and told apart when they come back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from distillery import artifact
from distillery.artifact import Manifest
from distillery.errors import CorruptArtifact
from distillery.execution import Spec, clear


def bundle(folders: Sequence[Path], out: Path) -> Manifest:
    """Copy pieces, failed ones too, to `out`/CELL/SHARD.

    The pieces themselves and not their URIs: a pod that reads KFP's own store needs other keys than ours.

    Raises:
        CorruptArtifact: something else than a piece, or one piece twice.
    """
    began = time.monotonic()
    clear(artifact.begin(out))
    for folder in folders:
        found = _read(folder)
        place = out / found.config["cell"] / str(found.config["shard"])
        if place.exists():
            raise CorruptArtifact(f"{folder}: piece {_name(found)} is there already; give it once")
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns(artifact.UNLISTED))
    return artifact.finish(
        out,
        kind="pieces",
        step="bundle_pieces",
        config={},
        inputs={f"piece-{place:04d}": folder for place, folder in enumerate(folders)},
        meta={"pieces": len(folders)},
        seconds=time.monotonic() - began,
        hardware="",
    )


def order(folders: Sequence[Path], wanted: Sequence[Spec]) -> list[int]:
    """Which of a cell's shards each folder holds.

    Args:
        folders: finished pieces, in any order.
        wanted: what each shard of the cell must be.

    Raises:
        CorruptArtifact: a piece of another cell or from other inputs, one that is missing, or one twice.
    """
    prints = {name: manifest.fingerprint for name, manifest in wanted[0].sources.items()}
    found = []
    for folder in folders:
        manifest = _read(folder)
        if manifest.inputs != prints or manifest.config not in [spec.config for spec in wanted]:
            raise CorruptArtifact(
                f"{folder}: piece {_name(manifest)}, from other inputs or options than the {len(wanted)} pieces of "
                f"{wanted[0].config['cell']}; give the pieces of one cell, or make them again"
            )
        found.append(int(manifest.config["shard"]))
    lacking = [shard for shard in range(len(wanted)) if shard not in found]
    twice = sorted({shard for shard in found if found.count(shard) > 1})
    if lacking or twice:
        raise CorruptArtifact(
            f"{wanted[0].config['cell']}: of pieces 0 to {len(wanted) - 1}, {lacking or 'none'} are missing and "
            f"{twice or 'none'} are there twice; give each piece once"
        )
    return found


def _read(folder: Path) -> Manifest:
    """The manifest of a piece, or of the failure in its place."""
    manifest = artifact.read(folder)
    if manifest.step != "synthesize_piece":
        raise CorruptArtifact(f"{folder}: a {manifest.kind} of {manifest.step}, not a piece; give pieces only")
    return manifest


def _name(manifest: Manifest) -> str:
    return f"{manifest.config['shard']} of {manifest.config['shards']} of {manifest.config['cell']}"
