"""READ THIS FIRST: the steps in order. Everything else serves one of them.

    plan -> prepare_data
         -> for each teacher: train_teacher
         -> gather_teachers
         -> for each cell: synthesize -> relabel -> evaluate_student
         -> report -> verdict

A cell with shards goes another way to the same images: for each of its pieces synthesize_piece, then gather_pieces.

A step is a plain function `step(config, *input_folders, out)`. It reads finished artifacts and leaves one finished
artifact in `out`. The in-process runner, kfp.local and the cluster call these same functions; equal inputs give equal
artifacts. A step whose `out` already holds its artifact returns at once; a killed one continues from its checkpoint,
which lies in `out` or, with `checkpoints` (a URI), in an object store.

In a cell's three steps a failure becomes an artifact of kind "failure", which later steps pass on and the report shows:
one bad cell does not take the others' report with it. `stop_on_failure: true` raises instead, and so does a store or
a disk that fails: that is not the cell's fault, and a retry of the step may find it well.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distillery import (
    artifact,
    console,
    evaluate,
    experiment,
    labels,
    methods,
    neighbours,
    profiles,
    regress,
    sharding,
    statistics,
)
from distillery import report as reports
from distillery import teacher as teaching
from distillery.artifact import Manifest
from distillery.checkpoints import Checkpoints
from distillery.code_version import code_version
from distillery.config import Cell, Piece, parse, plain
from distillery.data import prepare, real, synthetic
from distillery.data.synthetic import Synthetic
from distillery.device import Compute, choose
from distillery.errors import CorruptArtifact, DistilleryError, UserError, choices
from distillery.execution import Execution, Spec, clear
from distillery.history import enter, of_run
from distillery.history.record import RECORD, Record
from distillery.nets import pretrained
from distillery.preview import write_preview
from distillery.profiles import Wish
from distillery.report.notes import Past
from distillery.store import check_access

Folder = str | Path
MOST_SHOWN = 100  # classes of a confusion matrix that Kubeflow keeps in its database


def plan(
    source: str, code: str = "", pods: Mapping[str, str] | None = None, checkpoints: str = "", history: str = ""
) -> list[dict[str, Any]]:
    """The cells of an experiment, as JSON-able dicts.

    Args:
        source: see `experiment.read`.
        code: code version to stamp on the cells; default is this package's.
        pods: what was said about pods, see `profiles.Wish`; None where the steps run on this machine.
        checkpoints: the URI that later steps get; it, `history` and the data set's own store are tried before anything
            is spent.
        history: the URI that `report` gets.

    Raises:
        UserError: anything wrong with the experiment or with what was said about pods, or a store that may not be
            written.
        StoreError: a store that does not answer.
    """
    cells = experiment.check(source, code, None if pods is None else Wish(**pods))
    for place in {checkpoints, history, experiment.load(source).dataset.store} - {""}:
        check_access(place)
    return [plain(cell) for cell in cells]


def plan_teachers(source: str, code: str = "", pods: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The teachers of an experiment, as JSON-able dicts: `teacher`, the name, `experiment`, and what its pod asks for.

    `experiment` is all that this teacher depends on, as the text of an experiment; `train_teacher` takes both.

    Raises:
        UserError: anything wrong with the experiment, or with what was said about pods.
    """
    wanted = experiment.load(source)
    own = asdict(profiles.of_teachers(wanted, Wish(**(pods or {}))))
    texts = {one.name: experiment.reduced(wanted, code, (one,)) for one in wanted.every_teacher}
    return [{"teacher": name, "experiment": text} | own for name, text in texts.items()]


def upstream(source: str, code: str = "", pods: Mapping[str, str] | None = None) -> dict[str, dict[str, str]]:
    """What `prepare_data` and `gather_teachers` depend on and ask for, by step: `experiment`, `cpu`, `memory`, `gpus`.

    `experiment` is the text of a smaller experiment; with `pods` it names the device that the teachers' pods have.
    """
    wanted, wish = experiment.load(source), Wish(**(pods or {}))
    asking = [choice for choice in wanted.methods if methods.find(choice.method).NEEDS.statistics]
    data, teachers = profiles.of_data(wanted, wish), profiles.of_teachers(wanted, wish, working=bool(asking))
    if pods is not None:
        wanted = profiles.for_teachers(wanted, wish)
    gathering = experiment.reduced(wanted, code, wanted.every_teacher, asking)
    return {
        "prepare_data": {"experiment": experiment.reduced(wanted, code)} | asdict(data),
        "gather_teachers": {"experiment": gathering} | asdict(teachers),
    }


def dataset_spec(source: str) -> Spec:
    """What `prepare_data` will make."""
    config = plain(experiment.load(source).dataset)
    places = {name: str(config.pop(name)) for name in ("root", "download", "store")}
    places["state"] = prepare.source_state(experiment.load(source).dataset)
    return Spec("prepare_data", "dataset", {"dataset": config}, {}, ("data.prepare",), places=places)


def prepare_data(source: str, out: Folder, checkpoints: Checkpoints = "") -> Manifest:
    """Real images -> `dataset` artifact: uint8 shards up to 64 px, original photo bytes in tar shards above."""
    step = Execution(dataset_spec(source), Path(out), checkpoints)
    with step.running() as work:
        if work:
            config = experiment.load(source).dataset
            step.meta = prepare.prepare(config, step.out, step.track())
            step.summary = f"{config.name}: {sum(step.meta['counts']['train'])} training images"
    return step.manifest


def check_counts(cells: list[dict[str, Any]], data: Folder) -> None:
    """Refuse cells that the data's class sizes make impossible, before the teacher is paid for.

    Raises:
        UserError: names the method, the class and both numbers.
    """
    images = real.load(Path(data))
    for cell in cells:
        this = parse(Cell, cell, "cell")
        options = methods.config_of(this.method, this.options, this.dataset.name, this.ipc)
        methods.find(this.method).check(options, ipc=this.ipc, size=images.size, per_class=images.counts("train"))


def teacher_spec(source: str, name: str, data: Folder) -> Spec:
    """What `train_teacher` will make."""
    wanted = experiment.load(source)
    compute, one = choose(wanted.device, wanted.precision), experiment.teacher_named(wanted, name)
    places = {"weights": one.weights, "sha256": pretrained.identity(one.weights) if one.weights else ""}
    config = {"teacher": teaching.training(one)} | _said(compute)
    return Spec("train_teacher", "teacher", config, {"data": Path(data)}, ("teacher",), compute, places=places)


def train_teacher(source: str, name: str, data: Folder, out: Folder, checkpoints: Checkpoints = "") -> Manifest:
    """Dataset -> `teacher` artifact: trained or given weights; raises when they do not pass the accuracy gate."""
    step = Execution(teacher_spec(source, name, data), Path(out), checkpoints)
    wanted = experiment.teacher_named(experiment.load(source), name)
    with step.running() as work:
        if work:
            net, card = teaching.make(wanted, real.load(Path(data)), step.spec.compute or choose(), step.track())
            teaching.save(step.out, net, card)
            step.meta = {"net": card.net, "accuracy": card.accuracy, "accuracy_best": card.accuracy_best}
            step.summary = f"{wanted.name}: accuracy {100 * card.accuracy:.2f} %"
    teaching.gate(wanted, teaching.read_card(Path(out)))
    return step.manifest


def teachers_spec(source: str, data: Folder, teacher_folders: Mapping[str, Folder]) -> Spec:
    """What `gather_teachers` will make."""
    wanted = experiment.load(source)
    names, asked = [one.name for one in wanted.every_teacher], experiment.statistics_of(wanted)
    if set(teacher_folders) != set(names):
        raise UserError(f"expected the teachers {choices(names)}, got {choices(teacher_folders)}; give each its folder")
    for name, folder in teacher_folders.items():
        found, meant = (
            artifact.read(Path(folder), "teacher").config,
            teaching.training(experiment.teacher_named(wanted, name)),
        )
        if found["teacher"] != meant:
            raise UserError(f"{folder}: holds another teacher than the experiment's {name!r}; give its own folder")
    compute = choose(wanted.device if asked["kinds"] else "cpu", wanted.precision)
    config: dict[str, Any] = {"teachers": names} | ({"statistics": asked} | _said(compute) if asked["kinds"] else {})
    inputs = {"data": Path(data)} | {f"teacher-{name}": Path(teacher_folders[name]) for name in names}
    modules = ("teacher", "statistics") if asked["kinds"] else ("teacher",)
    return Spec("gather_teachers", "teachers", config, inputs, modules, compute)


def gather_teachers(
    source: str, data: Folder, teacher_folders: Mapping[str, Folder], out: Folder, checkpoints: Checkpoints = ""
) -> Manifest:
    """All teachers, by name -> `teachers` artifact: a folder for each, with the statistics that methods ask for."""
    step = Execution(teachers_spec(source, data, teacher_folders), Path(out), checkpoints)
    with step.running() as work:
        if work:
            cards = {name: teaching.read_card(Path(folder)) for name, folder in teacher_folders.items()}
            teaching.agree(cards)
            for name, folder in teacher_folders.items():
                shutil.copytree(folder, step.out / name, dirs_exist_ok=True)
            if asked := step.spec.config.get("statistics"):
                members = [teaching.load(step.out / name, step.spec.compute or choose()) for name in asked["teachers"]]
                found = statistics.collect(members, real.load(Path(data)), asked["kinds"], seed=0, track=step.track())
                for name, own in zip(asked["teachers"], found, strict=True):
                    teaching.save_statistics(step.out / name, own)
            step.meta = {f"accuracy_{name}": card.accuracy for name, card in cards.items()}
            step.summary = ", ".join(f"{name} {100 * card.accuracy:.2f} %" for name, card in cards.items())
    return step.manifest


def synthetic_spec(cell: dict[str, Any], data: Folder, teachers: Folder, *, working: bool = True) -> Spec:
    """What `synthesize` will make; who only puts it together (`working` False) needs no GPU for it."""
    this = parse(Cell, cell, "cell")
    compute = _compute("synthesize", this, working)
    config = {"method": this.method, "ipc": this.ipc, "seed": this.seed, "options": this.options} | _said(compute)
    code = (methods.module_name(this.method), "teacher", "data.synthetic")
    inputs = {"data": Path(data)} | _own(this, teachers)
    if methods.find(this.method).NEEDS.statistics:
        inputs["teachers"] = Path(teachers)
    return Spec("synthesize", "synthetic", config, inputs, code, compute, this)


def synthesize(
    cell: dict[str, Any], data: Folder, teachers: Folder, out: Folder, checkpoints: Checkpoints = ""
) -> Manifest:
    """Dataset and teachers -> `synthetic` artifact: IPC images per class by the cell's method."""
    this = parse(Cell, cell, "cell")
    step = Execution(synthetic_spec(cell, data, teachers), Path(out), checkpoints)
    with step.running() as work:
        if work:
            images = real.load(Path(data))
            _keep_set(step, this, images, _make_groups(step, this, images, teachers, _groups(this, images)))
    return step.manifest


def pieces(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """The cell's shards, as JSON-able dicts; each is a part of its images that is made alone."""
    return experiment.pieces(parse(Cell, cell, "cell"))


def plan_pieces(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pieces of all cells, in order."""
    return [piece for cell in cells for piece in pieces(cell)]


def piece_spec(piece: dict[str, Any], data: Folder, teachers: Folder, *, working: bool = True) -> Spec:
    """What `synthesize_piece` will make: as `synthetic_spec`, and which piece of which cell."""
    this = parse(Piece, piece, "piece")
    cell = {name: piece[name] for name in Cell.model_fields}
    whole = synthetic_spec(cell, data, teachers, working=working)
    config = whole.config | {"cell": this.id, "shard": this.shard, "shards": this.shards}
    return replace(whole, name="synthesize_piece", kind="piece", config=config)


def synthesize_piece(
    piece: dict[str, Any], data: Folder, teachers: Folder, out: Folder, checkpoints: Checkpoints = ""
) -> Manifest:
    """Dataset and teachers -> `piece` artifact: one shard of a cell's images."""
    this = parse(Piece, piece, "piece")
    step = Execution(piece_spec(piece, data, teachers), Path(out), checkpoints)
    with step.running() as work:
        if work:
            images = real.load(Path(data))
            groups = methods.cut(this.method, _groups(this, images), this.shards)[this.shard]
            found = _make_groups(step, this, images, teachers, groups)
            found.save(step.out)
            step.meta = {"groups": [group.name for group in groups], "images": len(found.labels)}
            step.summary = f"piece {this.shard + 1} of {this.shards}: {len(found.labels)} images"
    return step.manifest


def bundle_pieces(folders: Sequence[Folder], out: Folder) -> Manifest:
    """Pieces of all cells -> `pieces` artifact, CELL/SHARD in it: KFP hands one artifact on to a loop, but no list."""
    return sharding.bundle([Path(folder) for folder in folders], Path(out))


def gather_pieces(
    cell: dict[str, Any],
    data: Folder,
    teachers: Folder,
    piece_folders: Sequence[Folder],
    out: Folder,
    checkpoints: Checkpoints = "",
) -> Manifest:
    """All pieces of a cell -> `synthetic` artifact: the one that `synthesize` makes, to the byte."""
    this, parts = parse(Cell, cell, "cell"), [Path(folder) for folder in piece_folders]
    step = Execution(synthetic_spec(cell, data, teachers, working=False), Path(out), checkpoints, parts)
    with step.running() as work:
        if work:
            images = real.load(Path(data))
            shards = methods.cut(this.method, _groups(this, images), this.shards)
            wanted = [piece_spec(piece, data, teachers, working=False) for piece in pieces(cell)]
            order = sharding.order(parts, wanted)
            places = [place for shard in order for place in methods.in_order(shards[shard])]
            found = synthetic.join([synthetic.load(part) for part in parts], places)
            _keep_set(step, this, images, found)
    return step.manifest


def labels_spec(cell: dict[str, Any], synthetic_in: Folder, teachers: Folder) -> Spec:
    """What `relabel` will make."""
    this = parse(Cell, cell, "cell")
    compute = _compute("relabel", this)
    config = {"labels": plain(this.labels), "seed": this.seed, "recipes": [plain(s.recipe) for s in this.students]}
    inputs = {"synthetic": Path(synthetic_in)} | _own(this, teachers)
    return Spec("relabel", "labels", config | _said(compute), inputs, ("labels", "teacher"), compute, this)


def relabel(
    cell: dict[str, Any], synthetic_in: Folder, teachers: Folder, out: Folder, checkpoints: Checkpoints = ""
) -> Manifest:
    """Synthetic images and teachers -> `labels` artifact: soft labels of every view, or a reference to their maker."""
    this = parse(Cell, cell, "cell")
    step = Execution(labels_spec(cell, synthetic_in, teachers), Path(out), checkpoints)
    with step.running() as work:
        if work:
            step.meta = labels.relabel(
                this.students,
                synthetic.load(Path(synthetic_in)),
                teaching.load(Path(teachers), step.spec.compute or choose(), this.teachers),
                seed=this.seed,
                config=this.labels,
                out=step.out,
                track=step.track(),
            )
            step.summary = f"{this.labels.mode}, {console.size(step.meta['label_bytes'])}"
    return step.manifest


def result_spec(cell: dict[str, Any], data: Folder, teachers: Folder, synthetic_in: Folder, labels_in: Folder) -> Spec:
    """What `evaluate_student` will make."""
    this = parse(Cell, cell, "cell")
    folders = {"data": data, "synthetic": synthetic_in, "labels": labels_in}
    compute = _compute("evaluate_student", this)
    config: dict[str, Any] = {
        "cell": this.id,
        "name": this.name,
        "dataset": this.dataset.name,
        "labels": plain(this.labels),
    }
    config |= {"method": this.method, "ipc": this.ipc, "seed": this.seed, "options": this.options}
    config |= {"students": [plain(s) for s in this.students]} | _said(compute)
    inputs = {name: Path(folder) for name, folder in folders.items()} | _own(this, teachers)
    return Spec("evaluate_student", "result", config, inputs, ("evaluate",), compute, this)


def evaluate_student(
    cell: dict[str, Any],
    data: Folder,
    teachers: Folder,
    synthetic_in: Folder,
    labels_in: Folder,
    out: Folder,
    checkpoints: Checkpoints = "",
) -> Manifest:
    """Everything of a cell -> `result` artifact: accuracy last and best of each student trained from scratch."""
    this = parse(Cell, cell, "cell")
    step = Execution(result_spec(cell, data, teachers, synthetic_in, labels_in), Path(out), checkpoints)
    with step.running() as work:
        if work:
            images, made = real.load(Path(data)), synthetic.load(Path(synthetic_in))
            result, predicted = evaluate.students(
                this,
                images,
                teaching.load(Path(teachers), step.spec.compute or choose(), this.teachers),
                made,
                Path(labels_in),
                step.track(),
            )
            evaluate.write_predictions(predicted, images.counts("val"), step.out)
            result["neighbours"] = neighbours.write(made, images, step.out)
            (step.out / "result.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
            shutil.copyfile(Path(synthetic_in) / "preview.png", step.out / "preview.png")
            found = result["students"]
            step.meta = {"cell": this.id, "acc_last": [s["acc_last"] for s in found]}
            step.meta["acc_best"] = [s["acc_best"] for s in found]
            step.meta["images_sha256"] = step.spec.sources["synthetic"].files[synthetic.FILE]["sha256"]
            step.summary = ", ".join(f"{s['net']}/{s['recipe']} {100 * s['acc_last']:.2f} %" for s in found)
    return step.manifest


def mistakes(result: Folder) -> list[tuple[list[str], list[list[int]]]]:
    """The confusion matrix of a result's first student, as classes and counts; none where a table could not hold it."""
    path = Path(result) / "result.json"
    names = json.loads(path.read_text())["classes"] if path.exists() else []
    counts = evaluate.confusion(Path(result), 0, len(names)) if len(names) <= MOST_SHOWN else None
    if len(set(names)) < len(names):
        names = [f"{index} {name}" for index, name in enumerate(names)]
    return [] if counts is None else [(names, counts.tolist())]


def report(
    source: str,
    results: list[Folder],
    out: Folder,
    code: str = "",
    history: str = "",
    schedule: str = "",
    run: str = "",
) -> list[str]:
    """Results and failures -> `report` artifact: results.csv, report.md, report.html, record.json.

    Args:
        source: see `experiment.read`.
        results: the cells' artifacts.
        out: folder of the report.
        code: version of the code; "" = this package's.
        history: folder or URI of the store whose history receives the run; "" = none. What goes wrong with it stands
            in the report and stops nothing.
        schedule: name of the recurring run that started this one; it is compared with its like only.
        run: the run's id; "" makes one.

    Returns:
        The failures, one line each.
    """
    wanted, began, folder = experiment.load(source), time.monotonic(), Path(out)
    console.emit({"event": "step", "step": "report", "status": "started"})
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    text, _ = experiment.read(source)
    ungated = [one.name for one in wanted.every_teacher if not (one.min_accuracy or one.expected_accuracy)]
    taught, folders, code = experiment.taught(wanted), [Path(r) for r in results], code or code_version()
    record = of_run.record(wanted, text, folders, code=code, run=run, schedule=schedule)
    record, before = _entered(record, history)
    summary = reports.build(wanted.name, folders, folder, code, text, taught, ungated, before)
    (folder / RECORD).write_bytes(record.json())
    seconds = time.monotonic() - began
    artifact.finish(
        folder,
        kind="report",
        step="report",
        config={"name": wanted.name},
        inputs=_finished(folders),
        meta={"failures": len(summary.failures)},
        seconds=seconds,
        hardware="",
    )
    console.emit(
        {"event": "step", "step": "report", "status": "finished", "seconds": round(seconds, 3), "path": str(folder)}
        | {"summary": f"{len(results)} cells, {len(summary.failures)} failed"}
    )
    return summary.failures


def _finished(results: Sequence[Path]) -> dict[str, Manifest]:
    """The report's inputs. What has no readable manifest is none: the report shows it as a failure."""
    found: dict[str, Manifest] = {}
    for i, folder in enumerate(results):
        with suppress(CorruptArtifact):
            found[f"result-{i:03d}"] = artifact.read(folder, verify=False)
    return found


def _entered(record: Record, place: str) -> tuple[Record, Past]:
    """The record as it stands in the history, and how the run stands beside the one before it."""
    if not place:
        return record, Past()
    try:
        record, before = enter(place, record, regress.judge)
    except (DistilleryError, OSError) as error:
        text = f"not entered into the history of {place}: {type(error).__name__}: {error}"
        console.emit({"event": "note", "step": "report", "text": f"WARNING: {text}"})
        return record, Past(unwritten=text)
    metrics = {"regressions": float(len(record.regressions))}
    metrics |= {"accuracy_drop_max": round(regress.largest_drop(before, record), 2)} if before else {}
    for found in record.regressions:
        console.emit({"event": "note", "step": "report", "text": f"WORSE than the run before: {found.text}"})
    return record, Past(record.previous, [asdict(found) for found in record.regressions], metrics)


def verdict(failures: list[str]) -> None:
    """Fail the run, after its report was written, when any cell failed.

    Raises:
        DistilleryError: the list of what failed and why.
    """
    if failures:
        raise DistilleryError(f"{len(failures)} of the cells failed:\n  " + "\n  ".join(failures))


def _groups(this: Cell, images: real.Real) -> list[methods.Group]:
    options = methods.config_of(this.method, this.options, this.dataset.name, this.ipc)
    return methods.find(this.method).groups(options, ipc=this.ipc, classes=len(images.classes))


def _make_groups(
    step: Execution, this: Cell, images: real.Real, teachers: Folder, part: Sequence[methods.Group]
) -> Synthetic:
    """Some groups of a cell's images."""
    method, compute = methods.find(this.method), step.spec.compute or choose()
    options = methods.config_of(this.method, this.options, this.dataset.name, this.ipc)
    method.check(options, ipc=this.ipc, size=images.size, per_class=images.counts("train"))
    taught = teaching.load(Path(teachers), compute, this.teachers)
    return method.synthesize(options, images, taught, ipc=this.ipc, seed=this.seed, part=part, track=step.track())


def _keep_set(step: Execution, this: Cell, images: real.Real, found: Synthetic) -> None:
    """Leave a cell's whole set in the step's folder."""
    found.save(step.out)
    write_preview(found.images_u8, found.labels, step.out / "preview.png")
    step.meta = {"method": this.method, "ipc": this.ipc, "classes": list(images.classes)}
    step.meta |= {"images": len(found.labels), "image_bytes": found.images_u8.numel()}
    step.summary = f"{len(found.labels)} images, {console.size(found.images_u8.numel())}"


def _own(this: Cell, teachers: Folder) -> dict[str, Path]:
    """The cell's own teachers as inputs: what else was gathered changes nothing for it."""
    return {f"teacher-{place}": Path(teachers) / name for place, name in enumerate(this.teachers)}


def _compute(step: str, this: Cell, working: bool = True) -> Compute:
    """Where a step of a cell computes: on the CPU if there is little to compute, so that its pod needs no GPU."""
    return choose(this.device if profiles.computes(step, this) else "cpu", this.precision, working=working)


def _said(compute: Compute) -> dict[str, str]:
    return {"device": compute.device.type, "precision": compute.precision}
