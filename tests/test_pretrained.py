"""Weights: what is written comes back bit for bit, and what does not fit is refused with its cause."""

from __future__ import annotations

import pickle
import re
import resource
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from benchmarks import convert_resnet20
from distillery import nets
from distillery.errors import StoreError, UserError
from distillery.nets import pretrained

State = dict[str, torch.Tensor]


def small(seed: int = 0, name: str = "convnet2", classes: int = 4, size: int = 8, **options: object) -> nn.Module:
    """A small net with weights of its own."""
    torch.manual_seed(seed)
    return nets.build(name, classes, size, **({"width": 8} | options if name.startswith("convnet") else options))


def write(path: Path, state: State) -> str:
    """A safetensors file with these tensors."""
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    return str(path)


def equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two nets hold the same numbers under the same names."""
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)


def refusal(net: nn.Module, source: str, name: str = "convnet2", rows: tuple[int, ...] = ()) -> str:
    """The message with which these weights are refused; the net must come out as it went in."""
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError) as caught:
        pretrained.load(net, source, name, rows)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("name", ["convnet2", "resnet20", "mnasnet0_5"])
def test_saved_weights_come_back(name: str, tmp_path: Path) -> None:
    size = 32 if name == "mnasnet0_5" else 8
    net, other = small(0, name, size=size), small(1, name, size=size)
    net(torch.randn(4, 3, size, size))  # statistics and counters of batch norm move
    pretrained.save(net, tmp_path / "new" / "w.safetensors")
    pretrained.load(other, str(tmp_path / "new" / "w.safetensors"), name)
    assert equal(net, other)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["w.safetensors"]


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    net = small()
    pretrained.save(net, tmp_path / "a")
    pretrained.save(net.to(memory_format=torch.channels_last), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_weights_of_a_uri(tmp_path: Path) -> None:
    pretrained.save(small(0), tmp_path / "w.safetensors")
    other = small(1)
    pretrained.load(other, (tmp_path / "w.safetensors").as_uri(), "convnet2")
    assert equal(small(0), other)
    missing = (tmp_path / "v.safetensors").as_uri()
    assert missing in refusal(other, missing)
    assert "'ftp://host' is not a place" in refusal(other, "ftp://host/w.safetensors")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str, tmp_path: Path) -> None:
    source = write(tmp_path / "w", {prefix + k: v for k, v in small(0).state_dict().items()})
    other = small(1)
    pretrained.load(other, source, "convnet2")
    assert equal(small(0), other)


def test_old_files_without_batch_norm_counters_and_half_precision_fit(tmp_path: Path) -> None:
    state = {k: v.half() for k, v in small(0).state_dict().items() if not k.endswith("num_batches_tracked")}
    other = small(1)
    other(torch.randn(2, 3, 8, 8))
    pretrained.load(other, write(tmp_path / "w", state), "convnet2")
    assert torch.equal(other.features[0].weight, small(0).features[0].weight.half().float())
    assert int(other.features[1].num_batches_tracked) == 0


def test_missing_and_unexpected_names_are_listed(tmp_path: Path) -> None:
    state = {k.replace("features", "body"): v for k, v in small(0).state_dict().items()}
    message = refusal(small(1), write(tmp_path / "w", state))
    for words in (
        "w' do not fit the declared net convnet2",
        "missing: features.0.weight",
        "unexpected: body.",
        " more",
    ):
        assert words in message
    assert "teacher.net" in message


def test_one_absent_tensor_is_refused(tmp_path: Path) -> None:
    state = small(0).state_dict()
    del state["features.1.running_var"]
    assert "1 missing: features.1.running_var." in refusal(small(1), write(tmp_path / "w", state))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"classes": 7}, ("classifier.weight (7, 32) in the file, (4, 32) in the net", "7 classes", "this net 4")),
        ({"size": 16}, ("(4, 128) in the file, (4, 32) in the net", "128 features", "another image size")),
        ({"width": 16}, ("features.0.weight (16, 3, 3, 3) in the file, (8, 3, 3, 3) in the net", "net_options")),
        ({"norm": "instance"}, ("missing: features.1.running_mean", "net_options")),
    ],
)
def test_shapes_that_differ_are_shown_with_the_cause(
    given: dict[str, object], words: tuple[str, ...], tmp_path: Path
) -> None:
    message = refusal(small(1), write(tmp_path / "w", small(0, **given).state_dict()))
    assert [word for word in words if word not in message] == [], message


def test_the_other_stem_is_named() -> None:
    with torch.device("meta"):
        given, net = nets.build("resnet18", 4, 32), nets.build("resnet18_modified", 4, 32)
    with pytest.raises(UserError, match=r"conv1.weight \(64, 3, 7, 7\) in the file.*resnet18_modified and so on"):
        pretrained.fill(net, given.state_dict(), "w", "resnet18_modified")
    with pytest.raises(UserError, match=r"conv1.weight \(16, 3, 3, 3\) in the file.*Declare the net, options"):
        pretrained.fill(net, small(0, "resnet20").state_dict(), "w", "resnet18_modified")


def test_numbers_of_another_kind_and_nan_are_refused(tmp_path: Path) -> None:
    state = small(0).state_dict()
    quantised = state | {"classifier.weight": torch.ones(4, 32, dtype=torch.int8)}
    assert "classifier.weight torch.int8" in refusal(small(1), write(tmp_path / "q", quantised))
    broken = state | {"features.0.bias": torch.full((8,), float("nan"))}
    assert "NaN or infinite numbers in 1 tensors: features.0.bias" in refusal(small(1), write(tmp_path / "n", broken))


def test_rows_choose_and_order_outputs(tmp_path: Path) -> None:
    big, net = small(0, classes=9), small(1, classes=3)
    source = write(tmp_path / "w", {"module." + k: v for k, v in big.state_dict().items()})
    pretrained.load(net, source, "convnet2", rows=(7, 0, 2))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net.eval()(x), big.eval()(x)[:, [7, 0, 2]])
    assert "outputs 0 to 8, and output 9 is asked for" in refusal(net, source, rows=(9, 0, 1))


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)

    (tmp_path / "w.pth").write_bytes(pickle.dumps(Trap()))
    torch.save(small(0).state_dict(), tmp_path / "v.pt")
    for name in ("w.pth", "v.pt"):
        message = refusal(small(1), str(tmp_path / name))
        assert name in message
        assert "safetensors.torch.save_file" in message
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_cut_absent_or_folders_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "weights.safetensors"
    pretrained.save(small(0), whole)
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "empty").write_bytes(b"")
    for name in ("cut", "empty"):
        assert f"{name}': not a readable safetensors file" in refusal(small(1), str(tmp_path / name))
    message = refusal(small(1), str(tmp_path / "weight.safetensors"))
    assert "no such file; did you mean 'weights.safetensors'?" in message
    assert "no such file" in refusal(small(1), str(tmp_path / "nowhere" / "w"))
    assert "are a folder; name one file in it: weights.safetensors" in refusal(small(1), str(tmp_path))


def test_a_disk_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/w\.safetensors cannot be written"):
        pretrained.save(small(), tmp_path / "file" / "w.safetensors")


def test_a_full_disk_leaves_the_old_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    pretrained.save(small(0), path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StoreError, match="free space"):
            pretrained.save(small(1, width=32), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def cached(net_name: str, state: State, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put tensors where torchvision's downloader keeps the official weights of a net."""
    url = torchvision.models.get_model_weights(net_name)["IMAGENET1K_V1"].url
    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(OrderedDict(state), home / "hub" / "checkpoints" / url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(home))


def test_torchvision_weights_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = small(0, "shufflenet_v2_x0_5", classes=1000, size=32)
    cached("shufflenet_v2_x0_5", given.state_dict(), tmp_path, monkeypatch)
    net = small(1, "shufflenet_v2_x0_5", classes=1000, size=32)
    pretrained.load(net, "torchvision:IMAGENET1K_V1", "shufflenet_v2_x0_5")
    assert equal(given, net)
    ten = small(1, "shufflenet_v2_x0_5", classes=10, size=32)
    assert "1000 classes" in refusal(ten, "torchvision:IMAGENET1K_V1", "shufflenet_v2_x0_5")
    order = pretrained.class_names("torchvision:IMAGENET1K_V1", "shufflenet_v2_x0_5")
    assert len(order) == 1000
    pretrained.load(ten, "torchvision:IMAGENET1K_V1", "shufflenet_v2_x0_5", rows=range(10))
    assert torch.equal(ten.fc.weight, given.fc.weight[:10])


def test_densenet_files_use_older_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, net = (small(seed, "densenet121", classes=1000, size=32) for seed in (0, 1))
    old = {re.sub(r"(denselayer\d+\.)(norm|conv)(\d)", r"\1\2.\3", k): v for k, v in given.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    cached("densenet121", {k: v for k, v in old.items() if "num_batches" not in k}, tmp_path, monkeypatch)
    pretrained.load(net, "torchvision:IMAGENET1K_V1", "densenet121")
    assert equal(given, net)


def test_torchvision_weights_that_do_not_exist_are_named() -> None:
    net = small(0, "shufflenet_v2_x0_5", size=32)
    message = refusal(net, "torchvision:IMAGENET1K_V7", "shufflenet_v2_x0_5")
    assert "no 'IMAGENET1K_V7' for shufflenet_v2_x0_5; did you mean 'IMAGENET1K_V1'?; it has IMAGENET1K_V1" in message
    assert "net 'convnet2' is not one of them" in refusal(small(), "torchvision:IMAGENET1K_V1")
    assert pretrained.class_names("w.safetensors", "convnet2") == ()


def test_googlenet_weights_ask_for_their_input_transform() -> None:
    with torch.device("meta"):
        net = nets.build("googlenet", 1000, 64)
    with pytest.raises(UserError, match="transform_input: true"):
        pretrained.load(net, "torchvision:IMAGENET1K_V1", "googlenet")


def test_auxiliary_heads_in_a_file_are_left_out(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = nets.build("googlenet", 5, 64)
    state = net.state_dict() | {"aux1.fc1.weight": torch.ones(2, 2), "aux2.fc1.weight": torch.ones(2, 2)}
    state = {k: torch.ones(v.shape, dtype=v.dtype) for k, v in state.items()}
    net.to_empty(device="cpu")
    pretrained.load(net, write(tmp_path / "w", state), "googlenet")
    assert all(bool((v == 1).all()) for v in net.state_dict().values())


def test_no_network_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(StoreError, match=r"could not be fetched .* put the file into .*checkpoints"):
        pretrained.load(small(0, "shufflenet_v2_x0_5", size=32), "torchvision:IMAGENET1K_V1", "shufflenet_v2_x0_5")


def arrays(net: nn.Module) -> dict[str, np.ndarray]:
    """What the published .npz files hold: everything but the counters."""
    return {k: v.numpy() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}


def test_convert_resnet20(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, net = small(0, "resnet20", classes=10), small(1, "resnet20", classes=10)
    np.savez(tmp_path / "r.npz", **arrays(given))
    assert convert_resnet20.main([str(tmp_path / "r.npz"), str(tmp_path / "r.safetensors")]) == 0
    assert "269,722" in capsys.readouterr().out
    pretrained.load(net, str(tmp_path / "r.safetensors"), "resnet20")
    assert equal(given, net)


def test_convert_refuses_pickles_and_other_nets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "objects.npz", w=np.array([{}], dtype=object))
    np.savez(tmp_path / "other.npz", **arrays(small()))
    (tmp_path / "text.npz").write_text("not an archive")
    for name, words in (
        ("objects", "plain arrays"),
        ("other", "net resnet20"),
        ("text", "plain arrays"),
        ("no", "plain"),
    ):
        assert convert_resnet20.main([str(tmp_path / f"{name}.npz"), str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
