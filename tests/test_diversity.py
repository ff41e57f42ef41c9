"""The diversity benchmark: similarities of known features, and a toy run from its folders to a result."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import diversity
from distillery import artifact, run
from distillery.data.real import Real
from distillery.device import choose
from distillery.errors import UserError
from distillery.rng import generator
from distillery.teacher import Card, Frozen

TEXT = """
name: toy
dataset: {name: digits, per_class: 10}
teachers:
  - {net: convnet2, net_options: {width: 8}, epochs: 1, batch: 50, flip: 0.0, lr: 0.05}
  - {name: small, net: convnet1, net_options: {width: 4}, epochs: 1, batch: 50, flip: 0.0, lr: 0.05}
methods:
  - {method: random, ipc: [2], seeds: [0, 1]}
  - {method: cda, ipc: [2], options: {iterations: 4}}
  - {method: delt, ipc: [2], options: {iterations: 4, round_iterations: 2}}
  - {method: delt, ipc: [2], options: {iterations: 4, round_iterations: 4}}
students:
  - {net: convnet1, net_options: {width: 4}, recipe: {preset: fair-hard, epochs: 1}}
"""


def test_known_features_give_the_known_cosines() -> None:
    features = torch.tensor([[3.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    centroid, pairwise = diversity.likeness(features)
    assert centroid == pytest.approx(0.5**0.5)
    assert pairwise == pytest.approx(0.0)
    assert diversity.likeness(features[:1] * torch.tensor([[1.0, 2.0]])) == (pytest.approx(1.0), None)
    longer = torch.tensor([[4.0, 0.0], [0.0, 3.0]], dtype=torch.float64)  # the centroid (2, 1.5) is nearer the longer
    assert diversity.likeness(longer)[0] == pytest.approx((0.8 + 0.6) / 2)
    dead = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)  # like nothing, nor like itself
    assert diversity.likeness(dead) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_pairwise_is_the_mean_over_all_pairs() -> None:
    features = torch.randn(5, 3, generator=generator("diversity"), dtype=torch.float64)
    cosines = [
        torch.cosine_similarity(features[i], features[j], dim=0).item() for i in range(5) for j in range(5) if i != j
    ]
    assert diversity.likeness(features)[1] == pytest.approx(sum(cosines) / len(cosines))


def test_grain_tells_noise_from_pictures() -> None:
    noise = torch.randint(0, 256, (20, 3, 32, 32), generator=generator("grain"), dtype=torch.uint8)
    slope = torch.arange(32, dtype=torch.uint8).expand(2, 3, 32, 32)
    assert diversity.grain(noise) == pytest.approx(1.0, abs=0.02)
    assert diversity.grain(noise // 4 + 100) == pytest.approx(1.0, abs=0.02), "of contrast and brightness alike"
    # Half of the neighbours differ by 1, and the variance of 0 ... 31 is (32^2 - 1) / 12.
    assert diversity.grain(slope) == pytest.approx((0.5 / (2 * (32**2 - 1) / 12)) ** 0.5)
    assert diversity.grain(slope.mT) == pytest.approx(diversity.grain(slope))
    assert diversity.grain(torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)) == 0.0
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    board = ((rows + columns) % 2 * 255).to(torch.uint8).expand(1, 3, 8, 8)
    assert diversity.grain(board) == pytest.approx(2**0.5)


def test_the_order_of_images_does_not_matter_but_their_classes_do() -> None:
    features = torch.randn(12, 6, generator=generator("order"), dtype=torch.float64)
    labels = torch.arange(3).repeat_interleave(4)
    other = torch.randperm(12, generator=generator("permutation"))
    found, again = diversity.measured(features, labels), diversity.measured(features[other], labels[other])
    assert found["centroid"] == pytest.approx(again["centroid"], abs=1e-12)
    assert found["pairwise"] == pytest.approx(again["pairwise"], abs=1e-12)
    assert found["per_class"] == again["per_class"]
    assert found["centroid"] != pytest.approx(diversity.measured(features[other], labels)["centroid"], abs=1e-3)


def grey(levels: list[int]) -> torch.Tensor:
    """Images [N, 3, 4, 4] that are one grey each; photos' way, with a black rim around the central 2 x 2."""
    images = torch.zeros(len(levels), 3, 4, 4, dtype=torch.uint8)
    images[:, :, 1:3, 1:3] = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1)
    return images


def looker() -> Frozen:
    """A net whose features are the pixels of the evaluation view."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    card = Card("looker", {}, ["a", "b"], 2, [0.5] * 3, [0.5] * 3, 0.5, 0.5, [], [])
    return Frozen(net, card, choose("cpu", "fp32"))


def test_features_are_what_enters_the_last_layer_in_the_evaluation_view() -> None:
    found = diversity.features(looker(), grey([0, 255] * 200))  # more than a batch
    assert found.dtype == torch.float64
    assert torch.equal(found, torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(200)[:, None].expand(400, 12))


def test_recognised_is_the_share_of_images_in_their_class() -> None:
    dark = nn.Linear(12, 2)
    with torch.no_grad():
        dark.weight.copy_(torch.stack([-torch.ones(12), torch.ones(12)]))
        dark.bias.zero_()
    judge = looker()
    judge.net = nn.Sequential(nn.Flatten(), dark)
    images, labels = grey([0, 0, 255, 255]), torch.tensor([0, 1, 1, 1])
    assert diversity.recognised([judge, judge], images, labels) == {"recognised": 0.75, "recognised_1": 0.75}


def test_real_images_are_drawn_by_class_and_differ_from_draw_to_draw() -> None:
    images, labels = grey([*range(10), *range(245, 255)]), torch.arange(2).repeat_interleave(10)
    real = Real.of(images, labels, val=(images, labels))
    one, two = diversity.baseline([looker()], real, ipc=3, draws=2)
    assert [one[key] for key in ("method", "ipc", "seed")] == [diversity.REAL, 3, 0]
    assert one["centroid"] == pytest.approx(1.0)  # a class is dark or light, so its images point one way
    assert one["pairwise"] == pytest.approx(1.0)
    assert diversity.baseline([looker()], real, ipc=11, draws=2) == []
    noise = torch.randint(0, 256, (20, 3, 4, 4), generator=generator("noise"), dtype=torch.uint8)
    one, two = diversity.baseline([looker()], Real.of(noise, labels, val=(noise, labels)), ipc=3, draws=2)
    assert abs(one["pairwise"] - two["pairwise"]) > 1e-3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two teachers, of which one made the sets."""
    out = tmp_path_factory.mktemp("diversity") / "run"
    assert run.run(TEXT, str(out)).failures == []
    return out


def test_a_run_leaves_a_result(finished: Path, tmp_path: Path) -> None:
    command = ["--draws", "3", "--device", "cpu", "--out", str(tmp_path / "out")]
    diversity.main([str(finished), str(finished), *command])  # twice the same: its sets count once
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    groups = {group["name"]: group for group in found["groups"]}
    assert found["teacher"]["net"] == "convnet2"
    assert list(groups) == [diversity.REAL, "cda", "delt round_iterations=2", "delt round_iterations=4", "random"]
    assert [group["sets"] for group in groups.values()] == [3, 1, 1, 1, 2]
    assert all(0 < group["pairwise"] < group["centroid"] < 1 for group in groups.values())
    early, whole, cda = (groups[name] for name in ("delt round_iterations=2", "delt round_iterations=4", "cda"))
    assert (cda["image_steps"], cda["forwards"], cda["iterations"]) == (10 * 2 * 4, 10 * 2 * 4, 4)
    assert early["image_steps_of_cda"] == 0.75  # one image of two joins half-way
    assert whole["image_steps_of_cda"] == 1
    assert early["forwards"] == early["image_steps"] + 100  # every real image is scored once
    assert early["seconds_of_cda"] == pytest.approx(early["seconds"] / cda["seconds"])
    assert "seconds_of_cda" not in groups["random"]
    (made,) = (finished / "3-synthetic").glob("cda-*")
    assert cda["seconds"] == artifact.read(made).run["seconds"]
    with (tmp_path / "out" / "sets.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == [diversity.REAL] * 3 + ["cda", "delt", "delt", "random", "random"]
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"| delt round_iterations=2 | 2 | 1 | {early['centroid']:.4f} |" in report
    assert "| 75.00 % |" in report
    assert json.loads((tmp_path / "out" / "environment.json").read_text())["hardware"]


def test_another_teacher_judges_otherwise(finished: Path) -> None:
    (small,) = (finished / "2-teachers").glob("small-*")
    (gathered,) = (finished / "2-teachers").glob("all-*")
    own, other = (diversity.measure([finished], teacher, 1, "cpu", "fp32") for teacher in (None, small))
    assert other["teacher"]["net"] == "convnet1"
    assert own["sets"][-1]["set"] == other["sets"][-1]["set"]
    assert own["sets"][-1]["centroid"] != pytest.approx(other["sets"][-1]["centroid"], abs=1e-6)
    both = diversity.measure([finished], None, 1, "cpu", "fp32", [small])
    assert [row["recognised"] for row in both["sets"]] == [row["recognised"] for row in own["sets"]]
    assert [row["recognised_1"] for row in both["sets"]] == [row["recognised"] for row in other["sets"]]
    assert "| by convnet2 | by convnet1 |" in diversity.report(both)
    inside = diversity.measure([finished], gathered / "small", 1, "cpu", "fp32")
    assert inside["sets"] == other["sets"]
    with pytest.raises(UserError, match="teachers artifact"):
        diversity.measure([finished], gathered, 1, "cpu", "fp32")


def test_seconds_are_compared_on_one_machine_only() -> None:
    facts = {"data": "d", "dataset": "toy", "options": "{}", "ipc": 2, "seed": 0, "centroid": 0.9, "pairwise": 0.8}
    facts |= {"iterations": 4, "forwards": 8, "image_steps": 8, "seconds": 2.0}
    rows = [facts | {"method": "cda", "hardware": "x"}, facts | {"method": "dwa", "hardware": "y", "image_steps": 12}]
    _, dwa = diversity.grouped(rows)
    assert dwa["image_steps_of_cda"] == 1.5
    assert "seconds_of_cda" not in dwa


@pytest.mark.parametrize("part", ["1-data", "2-teachers", "3-synthetic"])
def test_a_missing_folder_is_named(finished: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / part)
    with pytest.raises(UserError, match=f"no folder {part}"):
        diversity.measure([tmp_path / "run"], None, 1, "cpu", "fp32")
    (tmp_path / "run" / part).mkdir()
    with pytest.raises(UserError, match=f"{part}: has no finished"):
        diversity.measure([tmp_path / "run"], None, 1, "cpu", "fp32")


def test_several_teachers_are_listed_not_guessed(finished: Path) -> None:
    sets = diversity.finished(finished, "3-synthetic", "synthetic")
    (small,) = (finished / "2-teachers").glob("small-*")
    other = artifact.read(small).fingerprint
    sets[0].manifest.inputs["teacher-0"] = other
    with pytest.raises(UserError, match=r"2 teachers.*convnet2-.*small-"):
        diversity.the_teacher([finished], sets)
