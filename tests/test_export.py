"""Exported sets: equal pixels and labels for every reader, the student's own views, and nothing overwritten."""

import errno
import json
import os
import re
import runpy
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from _servers import available, running
from PIL import Image
from torchvision.datasets import ImageFolder
from typer.testing import CliRunner

import distillery
from distillery import __main__, artifact, export, labels, run, student, teacher
from distillery.config import parse
from distillery.data import synthetic
from distillery.data.batches import Batches
from distillery.device import choose
from distillery.distilled import DistilledSet
from distillery.errors import CorruptArtifact, StoreError, UserError
from distillery.export import Wanted, card, formats, views

ROOT = Path(__file__).resolve().parent.parent
NET = "{net: convnet2, net_options: {width: 8}, recipe: {preset: %s}}"
# Together these use every array of `views`, every loss, hard labels and stored ones.
RECIPES = (
    "fair-soft, epochs: 4, batch: 8",
    "rded, epochs: 3, views: {crop: rrc, flip: 0.5, shuffle_patches: 2}",
    "fair-hard, epochs: 3",
    "gvbsm, epochs: 2, batch: 7, views: {crop: pad, mix: mixup, randaugment_n: 2, randaugment_m: 9.0}",
    "sre2lpp, epochs: 2, batch: 8, ema: 0.9",
)
TEXT = """
name: toy
dataset: {name: digits, per_class: 30}
teacher: {net: convnet2, net_options: {width: 8}, epochs: 2, batch: 50, flip: 0.0, lr: 0.05}
methods:
  - {method: random, ipc: [2], seeds: [0, 1]}
students: [%s]
labels: %s
"""
CELL = "random-ipc2-seed1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every kind of recipe."""
    folder = tmp_path_factory.mktemp("run")
    students = ", ".join(NET % recipe for recipe in RECIPES)
    assert run.run(TEXT % (students, "{mode: on_the_fly}"), str(folder / "fly")).failures == []
    return folder / "fly"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stored the three largest logits."""
    folder = tmp_path_factory.mktemp("run")
    assert run.run(TEXT % (NET % RECIPES[0], "{mode: stored, top_k: 3}"), str(folder)).failures == []
    return folder


def origin_of(place: Path) -> tuple[Any, Any, Any, Path]:
    """The cell's config, its images, its teacher and its labels, out of a run."""
    found = export.source.find(str(place), CELL)
    assert found.result is not None
    assert found.labels is not None
    images, taught = synthetic.load(found.images), teacher.load(found.teachers[0], choose("cpu"))
    return found.result[0].config, images, taught, found.labels


@pytest.mark.parametrize("place", range(len(RECIPES)))
def test_the_loader_gives_the_views_labels_and_losses_of_the_students_own_training(
    made: Path, tmp_path: Path, place: int
) -> None:
    export.export(str(made), str(tmp_path / "set"), Wanted(cell=CELL, student=place))
    config, images, taught, _ = origin_of(made)
    recipe = parse(export.Student, config["students"][place], "student").recipe
    batches = Batches(images.images_u8, images.labels, recipe, 1, (taught.mean, taught.std), choose("cpu"))
    source, dataset = labels.on_the_fly(taught, recipe.teacher_mode), distillery.load(tmp_path / "set")
    assert dataset.recipe == recipe
    loader, seen = dataset.loader(), 0
    for epoch in range(recipe.epochs):
        for step, (x_norm, target) in enumerate(loader):
            batch = batches.get(epoch, step)
            assert torch.equal(x_norm, batch.x_norm)
            soft = source(epoch, batch) if recipe.regime == "soft" else None
            assert soft is None or torch.equal(target.logits, soft)
            outputs = torch.randn(len(x_norm), 10, generator=torch.Generator().manual_seed(step))
            wanted = student.loss_of(recipe, outputs, soft, batch)
            assert float(dataset.loss(outputs, target)) == pytest.approx(float(wanted), rel=1e-6)
            seen += len(x_norm)
    assert seen == recipe.epochs * len(images.labels)


def test_the_recipes_here_use_every_recorded_array(made: Path, tmp_path: Path) -> None:
    found: set[str] = set()
    for place in range(len(RECIPES)):
        export.export(str(made), str(tmp_path / str(place)), Wanted(cell=CELL, student=place))
        files = sorted(path.name for path in (tmp_path / str(place) / "views").iterdir())
        assert files == [f"{name}.npy" for name in distillery.load(tmp_path / str(place)).facts["recorded"]]
        found |= set(files)
    named = set(re.findall(r"(\w+\.npy)", views.__doc__ or ""))
    assert found == named - {"places.npy"}
    assert {f"{name}.npy" for name in views.NAMES} == named
    facts = json.loads((tmp_path / "0" / "set.json").read_text())
    (tmp_path / "0" / "set.json").write_text(json.dumps(facts | {"recorded": ["../../secret"]}))
    with pytest.raises(CorruptArtifact, match="secret"):
        DistilledSet(tmp_path / "0")


def test_stored_labels_are_taken_over_as_they_are(stored: Path, tmp_path: Path) -> None:
    export.export(str(stored), str(tmp_path / "set"), Wanted(cell=CELL))
    config, images, taught, folder = origin_of(stored)
    recipe = parse(export.Student, config["students"][0], "student").recipe
    source = labels.open_source(folder, 0, recipe, images, taught, 1)
    batches = Batches(images.images_u8, images.labels, recipe, 1, (taught.mean, taught.std), choose("cpu"))
    dataset = distillery.load(tmp_path / "set")
    assert "places" in dataset.facts["recorded"]
    for step, (_, target) in enumerate(dataset.loader(epoch=2)):
        assert torch.equal(target.logits, source(2, batches.get(2, step)))


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_keeps_pixels_labels_and_soft_labels(made: Path, tmp_path: Path, name: str) -> None:
    manifest = export.export(str(made), str(tmp_path / "set"), Wanted(name, CELL))
    assert artifact.read(tmp_path / "set", "set").fingerprint == manifest.fingerprint
    _, images, taught, _ = origin_of(made)
    dataset = distillery.load(tmp_path / "set")
    assert torch.equal(dataset.images_u8, images.images_u8)
    assert torch.equal(dataset.labels, images.labels)
    image, soft = dataset[7]
    x_norm = dataset.normalise(images.images_u8[7:8])
    assert torch.equal(image, x_norm[0])
    assert torch.allclose(soft, taught.logits(x_norm).softmax(1)[0], atol=1e-3)
    again = export.export(str(made), str(tmp_path / "again"), Wanted(name, CELL))
    assert again.fingerprint == manifest.fingerprint


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_torchvision_webdataset_datasets_and_numpy_read_equal_pixels_and_labels(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, images, _, _ = origin_of(made)
    for name in formats.FORMATS:
        export.export(str(made), str(tmp_path / name), Wanted(name, CELL))
    soft = np.load(tmp_path / "folder" / "soft.npy")

    photos = ImageFolder(str(tmp_path / "imagefolder" / "train"))
    assert photos.classes == [str(digit) for digit in range(10)]
    check(images, [(np.array(image), label) for image, label in photos])

    tars = webdataset.WebDataset(str(tmp_path / "webdataset" / "train-000000.tar"), shardshuffle=False)
    samples = list(tars.decode("rgb8"))
    check(images, [(sample["png"], sample["cls"]) for sample in samples])
    assert np.array_equal(np.stack([sample["soft.npy"] for sample in samples]), soft)

    with np.load(tmp_path / "npz" / "set.npz") as found:
        check(images, list(zip(found["images"].transpose(0, 2, 3, 1), found["labels"], strict=True)))

    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    rows = huggingface(tmp_path / "huggingface", tmp_path / "cache")
    check(images, [(np.array(row["image"]), row["label"]) for row in rows])
    assert np.array_equal(np.array([row["soft_label"] for row in rows], np.float16), soft)
    assert [row["class"] for row in rows] == [str(label) for label in images.labels.tolist()]


def huggingface(folder: Path, cache: Path) -> Any:
    """The set as the `datasets` package opens it."""
    import datasets  # here, because the import takes seconds

    return datasets.load_dataset(str(folder), split="train", cache_dir=str(cache))


def check(images: synthetic.Synthetic, found: list[tuple[Any, Any]]) -> None:
    """The same pixels [S, S, 3] and labels in the same order."""
    assert [int(label) for _, label in found] == images.labels.tolist()
    assert np.array_equal(np.stack([image for image, _ in found]), images.images_u8.permute(0, 2, 3, 1).numpy())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_the_three_lines_of_each_card_load_the_set(made: Path, tmp_path: Path) -> None:
    _, images, _, _ = origin_of(made)
    for name in formats.FORMATS:
        export.export(str(made), str(tmp_path / name), Wanted(name, CELL))
        text = (tmp_path / name / "README.md").read_text()
        plain, ours = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(plain.splitlines()) <= 3
        space: dict[str, Any] = {}
        if name != "huggingface":  # the test above opens it, with its own cache
            exec(plain.replace("SET", str(tmp_path / name)), space)  # noqa: S102 - what a reader of the card types
        if name == "folder":
            assert torch.equal(space["images"], images.images_u8)
            assert torch.equal(space["labels"], images.labels)
        exec(ours.replace("SET", str(tmp_path / name)), space)  # noqa: S102 - the same
        assert tuple(space["image"].shape) == (3, 16, 16)


def test_a_card_tells_what_the_run_knows(made: Path, tmp_path: Path) -> None:
    export.export(str(made), str(tmp_path / "set"), Wanted("huggingface", CELL))
    text = (tmp_path / "set" / "README.md").read_text()
    reached = export.source.find(str(made), CELL).result
    assert reached is not None
    for said in (
        "license: cc-by-4.0",
        "size_categories:\n- n<1K",
        f"{100 * reached[1]['students'][0]['acc_last']:.2f} % (convnet2",
        f"teacher reaches {100 * reached[1]['teacher']['accuracy']:.2f} %",
        "Fewer than three seeds",
        "random is a baseline without a paper",
        f"`{reached[0].fingerprint}`",
    ):
        assert said in text
    assert "arXiv 2312.03526" in card.paper("rded")
    assert all(card.paper(name) for name in distillery.methods.METHODS if name != "random")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # torch's, where there is one core only
def test_workers_forked_or_spawned_give_the_same_batches(made: Path, tmp_path: Path) -> None:
    export.export(str(made), str(tmp_path / "set"), Wanted(cell=CELL))
    dataset = distillery.load(tmp_path / "set")
    alone = list(dataset.loader(epoch=1))
    assert dataset.images_u8 is dataset.images_u8  # read once, and not carried to the workers
    for way, workers in (("fork", 2), ("spawn", 1)):
        loader = dataset.loader(workers=workers, multiprocessing_context=way, persistent_workers=True)
        list(loader)
        for (x_norm, target), (other, wanted) in zip(loader, alone, strict=True):
            assert torch.equal(x_norm, other)
            assert all(torch.equal(a, b) for a, b in zip(target, wanted, strict=True))
        del loader


@pytest.mark.gpu
def test_views_made_on_a_gpu_are_those_of_the_cpu(made: Path, tmp_path: Path) -> None:
    export.export(str(made), str(tmp_path / "set"), Wanted(cell=CELL))
    dataset = distillery.load(tmp_path / "set")
    for (x_norm, target), (other, wanted) in zip(dataset.loader(device="cuda"), dataset.loader(), strict=True):
        assert x_norm.device.type == "cuda"
        assert torch.allclose(x_norm.cpu(), other, atol=1e-4)  # resampling is summed in another order
        assert all(torch.allclose(a.cpu(), b, atol=1e-4) for a, b in zip(target, wanted, strict=True))


def test_a_lightning_style_loop_trains(made: Path, tmp_path: Path) -> None:
    export.export(str(made), str(tmp_path / "set"), Wanted(cell=CELL))
    dataset = distillery.load(tmp_path / "set")

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = distillery.nets.build("convnet2", len(dataset.classes), dataset.facts["size"], width=8)

        def training_step(self, batch: tuple[torch.Tensor, Any], _: int) -> torch.Tensor:
            images, target = batch
            return dataset.loss(self.net(images), target)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    module, loader = Module(), dataset.loader()
    optimizer, losses = module.configure_optimizers(), []
    for epoch in range(dataset.recipe.epochs):
        loader.sampler.set_epoch(epoch)  # what its trainer does
        for index, batch in enumerate(loader):
            moved = (batch[0].to("cpu"), batch[1].to("cpu", non_blocking=True))
            loss = module.training_step(moved, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert len(losses) == dataset.recipe.epochs * len(loader)
    assert losses[-1] < losses[0]


def test_a_timm_style_loop_over_images_and_soft_labels_trains(made: Path, tmp_path: Path) -> None:
    export.export(str(made), str(tmp_path / "set"), Wanted(cell=CELL))
    dataset = distillery.load(tmp_path / "set", temperature=4.0)
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    net = distillery.nets.build("convnet2", 10, 16, width=8)
    optimizer, means = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), []
    for _ in range(6):
        total = 0.0
        for images, target in loader:
            loss = torch.sum(-target * net(images).log_softmax(1), dim=1).mean()  # its SoftTargetCrossEntropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        means.append(total / len(loader))
    assert means[-1] < means[0]


@pytest.mark.slow
def test_the_plain_script_reaches_the_reported_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TEXT % (NET % "fair-soft, epochs: 120, views: {crop: rrc, crop_scale: [0.5, 1.0], flip: 0.1}", "{}")
    run.run(
        text.replace("ipc: [2], seeds: [0, 1]", "ipc: [10]").replace("epochs: 2", "epochs: 6"), str(tmp_path / "run")
    )
    export.export(str(tmp_path / "run"), str(tmp_path / "set"), Wanted(with_test=True))
    script = ROOT / "docs" / "train_on_it.py"
    source = script.read_text()
    assert len(source.splitlines()) <= 40
    assert "import distillery" not in source
    asked = [str(script), str(tmp_path / "set"), str(tmp_path / "set" / "test.npz")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", asked)
        torch.manual_seed(0)
        runpy.run_path(str(script), run_name="__main__")
    found, said = map(float, re.findall(r"(\d+\.\d+) %", capsys.readouterr().out))
    # 355 validation images at 80 % have a deviation of 2 points; two initial weights differ by about as much.
    assert said > 60
    assert abs(found - said) < 6


def test_the_plain_script_refuses_a_recipe_it_cannot_follow(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, able in enumerate((True, False, False, False, False)):
        export.export(str(made), str(tmp_path / str(place)), Wanted(cell=CELL, student=place, with_test=True))
        assert distillery.load(tmp_path / str(place)).facts["plain"] is able
    monkeypatch.setattr(sys, "argv", ["train_on_it.py", str(tmp_path / "1"), str(tmp_path / "1" / "test.npz")])
    with pytest.raises(AssertionError, match=r"distillery\.load"):
        runpy.run_path(str(ROOT / "docs" / "train_on_it.py"))


def test_a_synthetic_artifact_knows_its_run_and_alone_it_says_what_is_missing(made: Path, tmp_path: Path) -> None:
    (inside,) = (made / "3-synthetic").glob(f"{CELL}-*")
    whole = export.export(str(made), str(tmp_path / "run"), Wanted(cell=CELL))
    assert export.export(str(inside), str(tmp_path / "inside")).fingerprint == whole.fingerprint
    shutil.copytree(inside, tmp_path / "elsewhere" / "x")
    export.export((tmp_path / "elsewhere" / "x").as_uri(), (tmp_path / "alone").as_uri())
    dataset = distillery.load((tmp_path / "alone").as_uri())
    assert dataset.recipe is None
    assert float(dataset[0][1].max()) == 1.0
    assert 0 <= float(dataset[0][0].min()) <= float(dataset[0][0].max()) <= 1
    text = (tmp_path / "alone" / "README.md").read_text()
    for said in ("license: unknown", "no soft labels", "Not known: the images were exported without the run"):
        assert said in text
    with pytest.raises(UserError, match="no recorded views"):
        dataset.loader()
    with pytest.raises(UserError, match="--with-test"):
        export.export(str(tmp_path / "elsewhere" / "x"), str(tmp_path / "test"), Wanted(with_test=True))


def test_single_artifacts_of_a_cluster_give_the_same_set(made: Path, stored: Path, tmp_path: Path) -> None:
    whole = export.export(str(made), str(tmp_path / "run"), Wanted(cell=CELL, with_test=True))
    places = {"result": "5-students/random-ipc2-seed1", "labels": "4-labels/random-ipc2-seed1"}
    places |= {"synthetic": "3-synthetic/random-ipc2-seed1", "teachers": "2-teachers/all", "data": "1-data/digits"}
    for kind, place in places.items():  # as Kubeflow keeps them: each in a folder of its own
        shutil.copytree(next(made.glob(f"{place}-*")), tmp_path / kind / "x")
    at = {kind: str(tmp_path / kind / "x") for kind in places}
    given = [f"{kind}={at[kind]}" for kind in ("result", "labels", "teachers", "data")]
    asked = ["export", at["synthetic"], "--out", str(tmp_path / "set"), "--with-test"]
    asked += [part for each in given for part in ("--beside", each)]
    done = CliRunner().invoke(__main__.app, asked, catch_exceptions=False)
    assert done.exit_code == 0
    files, wanted = artifact.read(tmp_path / "set").files, whole.files
    assert {name for name in wanted if files[name] != wanted[name]} == {"README.md"}  # no other cells to compare with
    for bad, said in (
        (["result=" + at["labels"]], "'labels' artifact"),
        (["result=" + str(next(stored.glob("5-students/random-ipc2-seed0*")))], "other images"),
        ([given[0], "labels=" + str(next(made.glob("4-labels/random-ipc2-seed0*")))], "not what the result"),
        ([given[0], "teachers=" + str(next(made.glob("2-teachers/convnet2-*")))], "'teacher' artifact"),
        (["results=x"], "did you mean 'result'"),
    ):
        with pytest.raises(UserError, match=said):
            export.export(at["synthetic"], str(tmp_path / "bad"), Wanted(beside=export.source.beside(bad)))


def test_what_is_there_stays_unless_it_is_an_export_and_overwrite_was_said(made: Path, tmp_path: Path) -> None:
    place, wanted = tmp_path / "set", Wanted(cell=CELL)
    first = export.export(str(made), str(place), wanted)
    with pytest.raises(UserError, match="--overwrite"):
        export.export(str(made), str(place), wanted)
    other = export.export(str(made), str(place), replace(wanted, format="npz"), overwrite=True)
    assert other.fingerprint != first.fingerprint
    assert not (place / "images.npy").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="something else than an exported set"):
            export.export(str(made), str(tmp_path / "mine"), wanted, overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert not list(tmp_path.glob(".distillery-export-*"))


def test_a_full_disk_leaves_the_old_export_and_nothing_half(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = export.export(str(made), str(tmp_path / "set"), Wanted(cell=CELL)).fingerprint

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="full"):
        export.export(str(made), str(tmp_path / "set"), Wanted(cell=CELL), overwrite=True)
    with pytest.raises(StoreError, match="full"):
        export.export(str(made), str(tmp_path / "new"), Wanted(cell=CELL))
    assert artifact.read(tmp_path / "set", "set").fingerprint == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Wanted("imagefoldr", CELL), "'imagefolder'"),
        (Wanted(), "2 cells; choose one with --cell: random-ipc2-seed0, random-ipc2-seed1"),
        (Wanted(cell="random"), "may be any of"),
        (Wanted(cell="random-ipc2-seed7"), "is not in"),
        (Wanted(cell=CELL, student=5), "--student 5: the cell has 5"),
    ],
)
def test_what_cannot_be_exported_is_said(made: Path, tmp_path: Path, wanted: Wanted, said: str) -> None:
    with pytest.raises(UserError, match=said):
        export.export(str(made), str(tmp_path / "set"), wanted)
    assert not list(tmp_path.iterdir())


def test_no_run_a_failed_cell_and_damage_are_said(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run nor"):
        export.export(str(tmp_path / "nowhere"), str(tmp_path / "set"))
    (report,) = made.glob("6-report")
    with pytest.raises(UserError, match="'report' artifact"):
        export.export(str(report), str(tmp_path / "set"))
    shutil.copytree(made, tmp_path / "run")
    (images,) = (tmp_path / "run" / "3-synthetic").glob(f"{CELL}-*")
    data = bytearray((images / "images.safetensors").read_bytes())
    data[-1] ^= 1
    (images / "images.safetensors").write_bytes(bytes(data))
    with pytest.raises(CorruptArtifact, match=r"images\.safetensors"):
        export.export(str(tmp_path / "run"), str(tmp_path / "set"), Wanted(cell=CELL))
    shutil.rmtree(images)
    with pytest.raises(CorruptArtifact, match="deleted or changed"):
        export.export(str(tmp_path / "run"), str(tmp_path / "set"), Wanted(cell=CELL))
    text = (TEXT % (NET % RECIPES[0], "{}")).replace("epochs: 4", "epochs: 4, lr: 1.0e+30, optimizer: sgd")
    run.run(text, str(tmp_path / "failing"))
    with pytest.raises(UserError, match="has nothing to export: it failed in evaluate_student"):
        export.export(str(tmp_path / "failing"), str(tmp_path / "set"), Wanted(cell=CELL))
    assert not (tmp_path / "set").exists()


def test_a_file_for_each_of_too_many_images_is_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "MAX_FILES", export.OTHERS + 19)  # the cell has 20 images
    with pytest.raises(UserError, match="would write 20 files"):
        export.export(str(made), str(tmp_path / "set"), Wanted("imagefolder", CELL))
    export.export(str(made), str(tmp_path / "set"), Wanted("webdataset", CELL))


def test_class_names_never_leave_the_folder(made: Path, tmp_path: Path) -> None:
    found = export.source.find(str(made), CELL)
    shutil.copytree(found.images, tmp_path / "hostile" / "x")
    manifest = json.loads((tmp_path / "hostile" / "x" / "manifest.json").read_text())
    names = ["../../evil", "/etc/passwd", "..", "a/b", "a\\b", "<script>|", "", "A", "a", "x" * 300]
    manifest["meta"]["classes"] = names
    (tmp_path / "hostile" / "x" / "manifest.json").write_text(json.dumps(manifest))
    place = tmp_path / "deep" / "set"
    for name in formats.FORMATS:
        export.export(str(tmp_path / "hostile" / "x"), str(place), Wanted(name), overwrite=True)
        assert sorted(path.name for path in place.parent.iterdir()) == ["set"]
        dataset = distillery.load(place)
        assert dataset.classes == names
        assert torch.equal(dataset.images_u8, synthetic.load(found.images).images_u8)
        if name == "imagefolder":
            folders = sorted(path.name for path in (place / "train").iterdir())
            assert folders == formats.folder_names(names)
            assert [int(folder.split("_")[0]) for folder in folders] == list(range(10))
    assert not (tmp_path / "evil").exists()


def test_publishing_adds_versions_and_moves_latest(made: Path, tmp_path: Path) -> None:
    shop, wanted = tmp_path / "shop", Wanted(cell=CELL)
    first, manifest = export.publish(str(made), str(shop), wanted)
    assert first == "v1"
    assert distillery.load(shop).folder == shop / "v1"
    assert export.publish(str(made), str(shop), wanted)[0] == "v1"  # nothing has changed
    second, _ = export.publish(str(made), str(shop), replace(wanted, format="npz"))
    assert second == "v2"
    assert export.publish(str(made), str(shop), wanted, version="1.0.0")[0] == "1.0.0"
    assert json.loads((shop / "latest.json").read_text())["fingerprint"] == manifest.fingerprint
    assert distillery.load(shop / "v2").facts["format"] == "npz"
    with pytest.raises(UserError, match="published already"):
        export.publish(str(made), str(shop), wanted, version="v2")
    for bad in ("../v3", "a/b", "", ".hold"):
        if bad:
            with pytest.raises(UserError, match="version"):
                export.publish(str(made), str(shop), wanted, version=bad)
    (shop / "latest.json").write_text('{"version": "../../elsewhere"}')
    with pytest.raises(CorruptArtifact, match="latest"):
        distillery.load(shop)


def test_a_killed_publication_is_no_version(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop, write = tmp_path / "shop", export.open_store(tmp_path / "shop").write
    export.publish(str(made), str(shop), Wanted(cell=CELL))
    pointer = (shop / "latest.json").read_bytes()

    def killed(self: Any, key: str, data: bytes) -> None:
        if key.endswith("v2/manifest.json"):
            raise KeyboardInterrupt
        write(key, data)

    with monkeypatch.context() as patch:
        patch.setattr("distillery.store.local.LocalStore.write", killed)
        with pytest.raises(KeyboardInterrupt):
            export.publish(str(made), str(shop), Wanted("imagefolder", CELL))
    assert (shop / "v2").exists()
    assert (shop / "latest.json").read_bytes() == pointer
    assert distillery.load(shop).folder.name == "v1"
    version, _ = export.publish(str(made), str(shop), Wanted("npz", CELL))
    assert version == "v2"
    assert not (shop / "v2" / "train").exists()
    artifact.read(shop / "v2", "set")


def test_a_changed_file_is_noticed_when_a_set_is_loaded(made: Path, tmp_path: Path) -> None:
    export.export(str(made), str(tmp_path / "set"), Wanted(cell=CELL))
    with (tmp_path / "set" / "soft.npy").open("r+b") as file:
        file.seek(130)
        file.write(b"\0\0\0")
    with pytest.raises(CorruptArtifact, match=r"soft\.npy"):
        distillery.load(tmp_path / "set")
    with pytest.raises(UserError, match="no exported set there"):
        distillery.load(tmp_path / "nothing")
    with pytest.raises(CorruptArtifact, match="'result'"):
        distillery.load(next((made / "5-students").glob(f"{CELL}-*")))


def test_the_commands(made: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    asked = [
        "export",
        str(made),
        "--cell",
        CELL,
        "--format",
        "imagefolder",
        "--out",
        str(tmp_path / "set"),
        "--no-views",
    ]
    done = runner.invoke(__main__.app, asked, catch_exceptions=False)
    assert done.exit_code == 0
    assert "20 images" in done.output
    assert not (tmp_path / "set" / "views").exists()
    with Image.open(next((tmp_path / "set" / "train" / "3").glob("*.png"))) as picture:
        assert picture.size == (16, 16)
    asked = ["publish", str(made), "--cell", CELL, "--to", str(tmp_path / "shop"), "--version", "2026-11"]
    assert "/shop/2026-11: 20 images" in runner.invoke(__main__.app, asked, catch_exceptions=False).output


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real S3 server."""
    with running(available()[-1], tmp_path_factory.mktemp("server")) as found:
        yield found


def test_from_a_store_to_a_store(server: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DISTILLERY_CACHE", str(tmp_path / "cache"))
    bucket = f"b-{uuid.uuid4().hex}"
    server.make_bucket(bucket)
    there = export.open_store(f"s3://{bucket}/runs/toy")
    for path in sorted(path for path in made.rglob("*") if path.is_file()):
        there.put(path.relative_to(made).as_posix(), path)
    local = export.export(str(made), str(tmp_path / "local"), Wanted(cell=CELL))
    place = f"s3://{bucket}/sets/one"
    assert export.export(there.uri, place, Wanted(cell=CELL)).fingerprint == local.fingerprint
    with pytest.raises(UserError, match="--overwrite"):
        export.export(there.uri, place, Wanted(cell=CELL))
    export.export(there.uri, place, Wanted("imagefolder", CELL), overwrite=True)
    assert not export.open_store(place).exists("images.npy")
    (inside,) = (made / "3-synthetic").glob(f"{CELL}-*")
    shop = f"s3://{bucket}/sets/shop"
    found, _ = export.publish(f"{there.uri}/3-synthetic/{inside.name}", shop, Wanted())
    assert found == "v1"
    dataset = distillery.load(shop)
    assert torch.equal(dataset.images_u8, distillery.load(tmp_path / "local").images_u8)
    assert len(next(iter(dataset.loader()))[0]) == 6
    assert not list((tmp_path / "cache" / "export").glob(".distillery-export-*"))
