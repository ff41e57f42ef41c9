"""Nets: published sizes and costs to the digit, every entry trains, and mistakes are named."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from distillery import nets
from distillery.errors import UserError
from distillery.nets import resnet, zoo


@dataclass(frozen=True)
class Cost:
    """What one forward pass of one image takes."""

    macs: int  # of convolutions and linear layers
    conv_elements: int
    batch_norms: int
    parameters: int


def on_meta(name: str, classes: int, size: int, **options: object) -> nn.Module:
    """A net of shapes without numbers: the large ones cost nothing."""
    with torch.device("meta"):
        return nets.build(name, classes, size, **options).eval()


def cost(name: str, classes: int, size: int) -> Cost:
    """Count one image's forward pass from the layers that run."""
    net, macs, elements = on_meta(name, classes, size), [], []

    def count(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        per_output = layer.weight[0].numel()  # a filter, or a row of the matrix
        macs.append(out.numel() * per_output)
        if isinstance(layer, nn.Conv2d):
            elements.append(out.numel())

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    net(torch.empty(1, 3, size, size, device="meta"))
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in net.modules())
    return Cost(sum(macs), sum(elements), norms, sum(p.numel() for p in net.parameters()))


@pytest.mark.parametrize(
    ("name", "classes", "size", "gmacs", "digits", "mega_elements", "norms"),
    [
        ("resnet18", 1000, 224, 1.814, 3, 2.484, 20),
        ("resnet50", 1000, 224, 4.089, 3, 11.11, 53),
        ("resnet101", 1000, 224, 7.80, 2, 16.2, 104),
        ("resnet18_modified", 10, 32, 0.555, 3, 0.614, 20),
        ("resnet18_modified", 200, 64, 2.222, 3, 2.458, 20),
        ("resnet101_modified", 10, 32, 2.51, 2, 0.0, 104),
        ("convnet3", 10, 32, 0.051, 3, 0.172, 3),
        ("convnet4", 200, 64, 0.213, 3, 0.0, 4),
        ("convnet5", 10, 128, 0.859, 3, 0.0, 5),
        ("convnet6", 100, 128, 0.861, 3, 0.0, 6),
    ],
)
def test_costs_are_the_published_ones(
    name: str, classes: int, size: int, gmacs: float, digits: int, mega_elements: float, norms: int
) -> None:
    found = cost(name, classes, size)
    assert round(found.macs / 1e9, digits) == gmacs
    if mega_elements:
        assert round(found.conv_elements / 1e6, len(str(mega_elements).split(".")[1])) == mega_elements
    assert found.batch_norms == norms


@pytest.mark.parametrize(
    ("name", "classes", "size", "parameters"),
    [
        ("convnet3", 10, 32, 320_010),
        ("convnet3", 100, 32, 504_420),
        ("convnet4", 200, 64, 857_160),
        ("convnet5", 10, 128, 615_690),
        ("resnet20", 10, 32, 269_722),
        ("resnet18_modified", 10, 32, 11_173_962),
        ("resnet34_modified", 10, 32, 21_282_122),
        ("resnet50_modified", 10, 32, 23_520_842),
        ("resnet101_modified", 10, 32, 42_512_970),
        ("resnet18", 1000, 224, 11_689_512),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, classes: int, size: int, parameters: int) -> None:
    assert cost(name, classes, size).parameters == parameters


def test_convnet_costs_by_hand() -> None:
    first, second, third = 32 * 32 * 128 * 27, 16 * 16 * 128 * 128 * 9, 8 * 8 * 128 * 128 * 9
    found = cost("convnet3", 10, 32)
    assert found.macs == first + second + third + 2048 * 10
    assert found.conv_elements == 128 * (32**2 + 16**2 + 8**2)


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [
        ("convnet3", 32, 2048),
        ("convnet4", 64, 2048),
        ("convnet5", 128, 2048),
        ("convnet6", 128, 512),
        ("convnet3", 28, 1152),
        ("resnet20", 32, 64),
        ("resnet18_modified", 32, 512),
        ("resnet50_modified", 64, 2048),
        ("resnet18", 64, 512),
        ("squeezenet1_1", 64, 512),
        ("mobilenet_v2", 64, 1280),
        ("vit_b_32", 64, 768),
        ("swin_t", 64, 768),
    ],
)
def test_penultimate_features(name: str, size: int, width: int) -> None:
    net = on_meta(name, 7, size)
    assert nets.features(net, torch.empty(2, 3, size, size, device="meta")).shape == (2, width)
    assert nets.classifier(net).weight.shape[:2] == (7, width)
    assert not any(layer._forward_pre_hooks for layer in net.modules()), "the hook stayed behind"


@pytest.mark.parametrize(("name", "size"), [("convnet3", 8), ("resnet20", 8), ("shufflenet_v2_x0_5", 32)])
def test_classifier_maps_features_to_logits(name: str, size: int) -> None:
    torch.manual_seed(0)
    net, x = nets.build(name, 5, size).eval(), torch.randn(3, 3, size, size)
    torch.testing.assert_close(nets.classifier(net)(nets.features(net, x)), net(x))
    assert nets.features(net, x).requires_grad


@pytest.mark.parametrize("name", nets.NETS)
def test_every_net_trains(name: str) -> None:
    torch.manual_seed(0)
    size = {"convnet4": 16, "convnet5": 32, "convnet6": 64}.get(name, 8)
    net = nets.build(name, 4, size).eval()  # batch statistics would cancel the biases before them
    x, weights = torch.randn(2, 3, size, size), torch.randn(2, 4)
    logits = net(x)
    assert logits.shape == (2, 4)
    assert logits.isfinite().all()
    (logits * weights).sum().backward()
    bad = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not bad, f"no useful gradient: {bad}"


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "layer", "none"])
def test_convnet_norms_and_width(norm: str) -> None:
    torch.manual_seed(0)
    net = nets.build("convnet2", 3, 8, width=12, norm=norm)
    kinds = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d, "group": nn.GroupNorm, "layer": nn.LayerNorm}
    found = [layer for layer in net.modules() if isinstance(layer, tuple(kinds.values()))]
    assert [type(layer) for layer in found] == ([kinds[norm]] * 2 if norm in kinds else [])
    assert nets.classifier(net).in_features == 12 * 2 * 2
    x = torch.randn(4, 3, 8, 8)
    net(x).sum().backward()
    maps: list[torch.Tensor] = []
    for layer in found:
        layer.register_forward_hook(lambda _, __, out: maps.append(out.clone()))  # the ReLU after it works in place
    net(3 * x + 1)
    axes = {"batch": (0, 2, 3), "instance": (2, 3), "group": (2, 3), "layer": (1, 2, 3)}
    for out in maps:
        parts = out.unflatten(1, (4, 3)).flatten(2, 3) if norm == "group" else out
        mean = parts.mean(axes[norm])
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)


def test_convnet_is_conv_norm_relu_pool() -> None:
    torch.manual_seed(0)
    net, x = nets.build("convnet1", 3, 6, width=5), torch.randn(4, 3, 6, 6)
    conv, norm = net.features[0], net.features[1]
    maps = functional.conv2d(x, conv.weight, conv.bias, padding=1)
    maps = functional.batch_norm(maps, None, None, norm.weight, norm.bias, training=True)
    wanted = functional.linear(
        functional.avg_pool2d(maps.relu(), 2).flatten(1), net.classifier.weight, net.classifier.bias
    )
    torch.testing.assert_close(net(x), wanted)


def test_option_a_shortcut_subsamples_and_pads_both_sides() -> None:
    torch.manual_seed(0)
    block, x = resnet.Block(16, 32, stride=2), torch.rand(2, 16, 6, 6)
    nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_modified_stem_keeps_the_resolution() -> None:
    net = on_meta("resnet18_modified", 10, 32)
    assert (net.conv1.kernel_size, net.conv1.stride, net.conv1.padding, net.conv1.bias) == (
        (3, 3),
        (1, 1),
        (1, 1),
        None,
    )
    sides: list[int] = []
    net.layer1.register_forward_hook(lambda _, __, out: sides.append(out.shape[-1]))
    net(torch.empty(1, 3, 32, 32, device="meta"))
    assert sides == [32]


@pytest.mark.parametrize("name", ["convnet3", "resnet20", "resnet18_modified"])
def test_channels_last_gives_the_same_logits(name: str) -> None:
    torch.manual_seed(0)
    net, x = nets.build(name, 4, 16).eval(), torch.randn(2, 3, 16, 16)
    wanted = net(x)
    found = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"), [("resnet20", {}), *(("convnet3", {"norm": norm}) for norm in ("batch", "instance", "layer"))]
)
def test_bf16_autocast_in_channels_last(name: str, options: dict[str, str]) -> None:
    torch.manual_seed(0)
    net = nets.build(name, 4, 16, **options).to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last)
    wanted = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().max() < 0.1 * wanted.abs().max()
    functional.cross_entropy(found.float(), torch.zeros(8, dtype=torch.long)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("alexnet", 64),
        ("densenet121", 32),
        ("googlenet", 32),
        ("inception_v3", 80),
        ("regnet_x_400mf", 32),
        ("maxvit_t", 224),
    ],
)
def test_torchvision_models_give_one_tensor_when_training(name: str, size: int) -> None:
    if name.startswith("regnet"):  # computes its widths with tensors, so it cannot be built without numbers
        net = nets.build(name, 6, size).to("meta")
    else:
        net = on_meta(name, 6, size)
    assert net.train()(torch.empty(2, 3, size, size, device="meta")).shape == (2, 6)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_torchvision_model_by_name() -> None:
    x = torch.empty(2, 3, 224, 224, device="meta")
    for name in zoo.names():
        if name.startswith("regnet"):  # computes its widths with tensors, so it cannot be built without numbers
            continue
        net = on_meta(name, 6, 224)
        assert net(x).shape == (2, 6), name
        assert nets.features(net, x).shape == (2, nets.classifier(net).weight.shape[1]), name


def test_build_draws_from_the_seed_and_leaves_the_net_in_training_mode() -> None:
    built = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        built.append(nets.build("mobilenet_v3_small", 3, 32))
    first, same, other = (net.classifier[3].weight for net in built)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert all(layer.training for layer in built[0].modules())


@pytest.mark.parametrize("name", [*nets.NETS, "convnet1", "convnet12", "vit_b_16"])
def test_check_net_accepts_what_build_knows(name: str) -> None:
    nets.check_net(name, {})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("convnt3", {}, ("'convnt3'", "did you mean 'convnet3'?")),
        ("convnet", {}, ("'convnet'", "did you mean 'convnet")),
        ("convnet0", {}, ("'convnet0'", "convnet<depth>")),
        ("resnet18_modifed", {}, ("did you mean 'resnet18_modified'?",)),
        ("reznet50", {}, ("did you mean 'resnet50'?",)),
        ("", {}, ("''", "resnet20")),
        ("convnet3", {"widht": 64}, ("options of net convnet3", "widht", "did you mean 'width'?")),
        ("convnet3", {"norm": "bach"}, ("norm", "'batch'", "'bach'")),
        ("convnet3", {"width": 0}, ("width", "got 0")),
        ("convnet3", {"width": "128"}, ("width", "'128'")),
        ("convnet3", {"width": 6, "norm": "group"}, ("width 6", "4 groups")),
        ("resnet20", {"width": 64}, ("options of net resnet20", "width: unknown key")),
        ("resnet18", {"transform_input": True}, ("transform_input: unknown key",)),
        ("googlenet", {"transform": True}, ("did you mean 'transform_input'?",)),
    ],
)
def test_mistakes_are_named_with_the_nearest(name: str, options: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as checked:
        nets.check_net(name, options)
    with pytest.raises(UserError) as built:
        nets.build(name, 10, 32, **options)
    assert str(checked.value) == str(built.value)
    assert [word for word in words if word not in str(checked.value)] == [], str(checked.value)


@pytest.mark.parametrize(
    ("name", "classes", "size", "words"),
    [
        ("convnet6", 10, 32, ("net convnet6", "32 px", "convnet5")),
        ("convnet3", 10, 7, ("7 px", "convnet2")),
        ("convnet3", 10, 1, ("1 px", "too small")),
        ("convnet3", 0, 32, ("classes is 0",)),
        ("resnet20", 10, 0, ("size is 0",)),
        ("alexnet", 10, 32, ("net alexnet cannot take 32 px", "too small", "resnet18_modified")),
        ("inception_v3", 10, 64, ("net inception_v3 cannot take 64 px",)),
        ("maxvit_t", 10, 32, ("net maxvit_t cannot take 32 px", "divisible")),
        ("vit_b_16", 10, 40, ("net vit_b_16 cannot take 40 px", "patch size")),
    ],
)
def test_sizes_that_do_not_fit_are_named(name: str, classes: int, size: int, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        on_meta(name, classes, size)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_deepest_convnet_that_fits_is_built() -> None:
    for size, depth in ((2, 1), (7, 2), (8, 3), (28, 4), (33, 5)):
        assert nets.classifier(on_meta(f"convnet{depth}", 2, size)).in_features == 128


def test_transform_input_is_passed_on() -> None:
    assert on_meta("googlenet", 4, 64, transform_input=True).transform_input is True
    assert on_meta("googlenet", 4, 64).transform_input is False
