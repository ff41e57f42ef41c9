"""Weights from and to safetensors files, and torchvision's own weights; nothing a user supplies is ever unpickled."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from distillery.errors import StoreError, UserError, choices, nearest
from distillery.files import sha256_of, write_atomic
from distillery.nets import zoo
from distillery.nets.head import classifier_name

State = Mapping[str, torch.Tensor]
OFFICIAL = "torchvision:"
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads of GoogLeNet and Inception that only their training used
COUNTER = "num_batches_tracked"  # of batch norm; older files lack it and nothing here reads it
SHOWN = 4  # names listed per kind of misfit


def load(net: nn.Module, source: str, name: str, rows: Sequence[int] = ()) -> None:
    """Fill a net with given weights, strictly: every tensor must be there and fit.

    Args:
        net: the net as declared; unchanged when an error is raised.
        source: path or URI (file://, s3://) of a safetensors file, or `torchvision:IMAGENET1K_V1`.
        name: the name the net was declared by.
        rows: which outputs of the file to keep, in this order; () keeps all as they are.

    Raises:
        UserError: no such file or weights, not safetensors, not finite, or not for this net.
        StoreError: the weights could not be fetched.
    """
    if source.startswith(OFFICIAL):
        state = _official(net, source, name)
    elif "://" in source:
        state = _fetched(source)
    else:
        state = _file(Path(source).expanduser(), source)
    fill(net, _rows(net, state, rows, source), source, name)


def fill(net: nn.Module, state: State, where: str, name: str) -> None:
    """Copy named tensors into a net after checking that they fit; `where` names them in errors.

    Raises:
        UserError: names, shapes or kinds of number differ, or a value is NaN or infinite.
    """
    target = net.state_dict()
    given = {k: v for k, v in _unwrapped(state).items() if k in target or not k.startswith(AUXILIARY)}
    given |= {k: torch.zeros_like(v) for k, v in target.items() if k.endswith(COUNTER) and k not in given}
    _check(net, given, where, name)
    with torch.no_grad():
        for key, tensor in target.items():
            tensor.copy_(given[key])


def save(net: nn.Module, path: Path) -> None:
    """Write a net's weights as safetensors, atomically; equal weights give equal bytes.

    Raises:
        StoreError, UserError: the disk is full or not writable.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    write_atomic(path, safetensors.torch.save(state, metadata={"format": "pt"}))


def class_names(source: str, name: str) -> tuple[str, ...]:
    """Class names in the order of the weights' outputs, for torchvision's weights; () for a file, which has none."""
    if not source.startswith(OFFICIAL):
        return ()
    return tuple(_entry(source, name).meta["categories"])


def identity(source: str) -> str:
    """What tells these weights from others at the same place: a file's sha256 or etag, else the address itself."""
    path = Path(source).expanduser()
    if path.is_file():
        return sha256_of(path)
    if "://" not in source:
        return source
    from distillery import store  # here, so that weights in plain files need no store

    folder, _, key = source.rpartition("/")
    return next((f"{source} {entry.etag}" for entry in store.open_store(folder).list(key) if entry.key == key), source)


def _file(path: Path, source: str) -> State:
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.safetensors"))
        raise UserError(
            f"weights {source!r} are a folder; name one file in it: {choices(inside) or 'no *.safetensors here'}"
        )
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.safetensors")] if path.parent.is_dir() else []
        raise UserError(
            f"weights {source!r}: no such file{nearest(path.name, beside)}; give a safetensors file, its file:// or "
            f"s3:// URI, or {OFFICIAL}IMAGENET1K_V1"
        )
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"weights {source!r}: not a readable safetensors file ({error}). If it is a .pt, .pth or .npz: those are "
            "not read, because unpickling a file can run code; convert it once where you trust it with "
            "safetensors.torch.save_file(net.state_dict(), 'weights.safetensors'). Otherwise copy it again"
        ) from error


def _fetched(source: str) -> State:
    """A file in a store: copied to a temporary file, read, and forgotten."""
    from distillery import store  # here, so that weights in plain files need no store

    folder, _, key = source.rpartition("/")
    bucket = store.open_store(folder)
    if not key or not bucket.exists(key):
        raise UserError(f"weights {source!r}: nothing is stored there; name one safetensors file by its full URI")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "weights.safetensors"
        bucket.fetch(key, path)
        return _file(path, source)


def _official(net: nn.Module, source: str, name: str) -> State:
    """Torchvision's own download, its hash checked, read with torch's weights-only reader."""
    entry = _entry(source, name)
    if getattr(net, "transform_input", True) is False:
        raise UserError(
            f"weights {source!r} of {name} expect other normalisation than ImageNet's; declare net_options: "
            "{transform_input: true}, which converts it inside the net"
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch announces a download on stdout, which is for results
            state: State = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise StoreError(
            f"weights {source!r} of {name}: {entry.url} could not be fetched ({error}); on a machine without internet "
            f"put the file into {torch.hub.get_dir()}/checkpoints, or give a safetensors file"
        ) from error
    # DenseNet's files are older than its module names: denselayer1.norm.1.weight is norm1.weight today
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d\.)", r"\1\2", k): v for k, v in state.items()}


def _entry(source: str, name: str) -> Any:
    """Torchvision's record of one set of weights: url and meta."""
    if name not in zoo.names():
        raise UserError(f"weights {source!r} are for torchvision's own models, and net {name!r} is not one of them")
    import torchvision.models  # here, because the import takes seconds

    wanted = source.removeprefix(OFFICIAL)
    found = {entry.name: entry for entry in torchvision.models.get_model_weights(name)}
    if wanted not in found:
        raise UserError(
            f"weights {source!r}: torchvision has no {wanted!r} for {name}{nearest(wanted, found)}; "
            f"it has {choices(found)}"
        )
    return found[wanted]


def _unwrapped(state: State) -> State:
    """Names without the prefix of a wrapper around the whole net."""
    for prefix in WRAPPERS * 2:  # twice: either wrapper may be the outer one
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _rows(net: nn.Module, state: State, rows: Sequence[int], source: str) -> State:
    """The state with only the given outputs in its last layer."""
    if not rows:
        return state
    chosen, last = dict(_unwrapped(state)), classifier_name(net)
    for key in (f"{last}.weight", f"{last}.bias"):
        if key in chosen:
            outputs = len(chosen[key])
            if wrong := [row for row in rows if not 0 <= row < outputs]:
                raise UserError(
                    f"weights {source!r}: they have outputs 0 to {outputs - 1}, and output {wrong[0]} is asked for"
                )
            chosen[key] = chosen[key][list(rows)]
    return chosen


def _check(net: nn.Module, state: State, where: str, name: str) -> None:
    """Refuse weights that do not fit, with what differs and the likely cause."""
    target = net.state_dict()
    shapes = {k: (tuple(state[k].shape), tuple(t.shape)) for k, t in target.items() if k in state}
    misfits = [
        _some("missing", [k for k in target if k not in state]),
        _some("unexpected", [k for k in state if k not in target and not k.endswith(COUNTER)]),
        _some("of another shape", [f"{k} {a} in the file, {b} in the net" for k, (a, b) in shapes.items() if a != b]),
        _some(
            "of another kind of number",
            [f"{k} {state[k].dtype}" for k in shapes if state[k].is_floating_point() != target[k].is_floating_point()],
        ),
    ]
    if any(misfits):
        cause = _cause(net, {k: pair for k, pair in shapes.items() if pair[0] != pair[1]})
        raise UserError(
            f"weights {where!r} do not fit the declared net {name}: {'; '.join(filter(None, misfits))}. {cause}"
        )
    if broken := [k for k, v in state.items() if not bool(torch.isfinite(v).all())]:
        raise UserError(
            f"weights {where!r}: NaN or infinite numbers in {_some('tensors', broken)}; take an earlier checkpoint"
        )


def _some(what: str, names: Iterable[str]) -> str:
    """`3 missing: a, b, c`, cut after a few; empty for none."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return f"{len(listed)} {what}: {choices(listed[:SHOWN])}{more}" if listed else ""


def _cause(net: nn.Module, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    """The likely cause, from the shapes that differ (in the file, in the net)."""
    last = classifier_name(net)
    if shapes and set(shapes) <= {f"{last}.weight", f"{last}.bias"}:
        theirs, ours = next(iter(shapes.values()))
        if theirs[0] != ours[0]:
            return f"They tell {theirs[0]} classes apart, this net {ours[0]}: give weights trained on this data set"
        return f"Their last layer reads {theirs[1]} features, this net's {ours[1]}: trained at another image size"
    if {pair[2:] for pair in shapes.get("conv1.weight", ())} == {(7, 7), (3, 3)}:
        return "A 7x7 conv1 belongs to torchvision's resnet18, 34, 50 or 101, a 3x3 one to resnet18_modified and so on"
    return (
        "Declare the net, options and image size that the weights were trained with (teacher.net, teacher.net_options)"
    )
