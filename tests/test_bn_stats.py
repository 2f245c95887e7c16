"""bn_stats.py against slow loops, DeepInversion's loss, and the numbers in its own docstring."""

import gc
import math
import warnings
import weakref
from contextlib import suppress

import pytest
import torch
import torchvision
from conftest import with_random_statistics
from PIL import Image
from torch import nn
from torchvision.transforms.functional import normalize, to_tensor

import bn_stats
from bn_stats import (
    bn_distance,
    bn_layers,
    capture_bn_inputs,
    image_distances,
    run_until,
    select_layers,
    spatial_moments,
)
from models import SegmentationModel


def example():
    layer = nn.BatchNorm2d(2, eps=0.0).eval()
    layer.running_mean, layer.running_var = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 5.0])
    return layer, torch.tensor([[1.0, 1, 5, 5], [4, 4, 6, 6]]).view(1, 2, 2, 2)


@pytest.fixture(scope="module")
def deeplab():
    torch.manual_seed(0)
    return with_random_statistics(torchvision.models.get_model(
        "deeplabv3_resnet50", weights=None, weights_backbone=None, num_classes=5))


@pytest.fixture(scope="module")
def seen(deeplab):
    """Return images and, per layer, the full maps that entered it, in float64."""
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    maps = {}
    hooks = [layer.register_forward_pre_hook(
        lambda module, args, name=name: maps.__setitem__(name, args[0].double()))
        for name, layer in bn_layers(deeplab).items()]
    with torch.no_grad():
        deeplab(images)
    for hook in hooks:
        hook.remove()
    return images, maps


def slow_distance(maps, layers, metric):
    """Return (B, L) from whole float64 maps, channel by channel, in plain Python."""
    table = []
    for b in range(len(next(iter(maps.values())))):
        row = []
        for name, f in maps.items():
            layer, eps = layers[name], layers[name].eps
            if f.shape[-1] * f.shape[-2] == 1:
                continue
            first, second, divergence = 0.0, 0.0, 0.0
            for c in range(f.shape[1]):
                pixels = f[b, c].flatten()
                mu = pixels.sum().item() / len(pixels)
                var = ((pixels - mu) ** 2).sum().item() / len(pixels)
                m, v = layer.running_mean[c].item(), layer.running_var[c].item()
                first, second = first + (mu - m) ** 2, second + (var - v) ** 2
                ratio = (var + eps) / (v + eps)
                divergence += (ratio + (mu - m) ** 2 / (v + eps) - 1 - math.log(ratio)) / 2
            row.append(divergence / f.shape[1] if metric == "kl"
                       else math.sqrt(first) + math.sqrt(second))
        table.append(row)
    return torch.tensor(table)


@pytest.mark.parametrize(("metric", "expected"), [("l2", 10), ("kl", 3.656)])
def test_the_worked_example_in_the_docstring_is_right(metric, expected):
    layer, image = example()
    assert image_distances(layer, image, metric=metric).item() == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("metric", ["l2", "kl"])
def test_distances_equal_a_per_pixel_computation_in_float64(deeplab, seen, metric):
    images, maps = seen
    layers = bn_layers(deeplab)
    with torch.no_grad(), capture_bn_inputs(deeplab) as captured:
        deeplab(images[:1])
    fast = bn_distance(captured, layers, metric)
    slow = slow_distance({name: f[:1] for name, f in maps.items()}, layers, metric)
    torch.testing.assert_close(fast.double(), slow.double(), rtol=1e-4, atol=1e-6)


def test_for_one_image_l2_is_the_batch_norm_loss_of_deepinversion(deeplab, seen):
    images, maps = seen
    loss = 0.0
    for name, layer in bn_layers(deeplab).items():
        f = maps[name][:1]                                         # a batch of one image
        if f.shape[-1] > 1:
            mean, var = f.mean([0, 2, 3]), f.permute(1, 0, 2, 3).reshape(f.shape[1], -1).var(
                1, unbiased=False)
            loss += (layer.running_var.double() - var).norm(2)
            loss += (layer.running_mean.double() - mean).norm(2)
    assert image_distances(deeplab, images[:1]).item() == pytest.approx(loss.item(), rel=1e-4)


def test_a_score_does_not_depend_on_the_batch_it_comes_in(deeplab, seen):
    images, _ = seen
    whole = image_distances(deeplab, images)
    for sizes in ([1] * 8, [5, 3]):
        parts = torch.cat([image_distances(deeplab, part) for part in images.split(sizes)])
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=0)


def test_the_model_is_unchanged_to_the_bit_and_keeps_no_hook(deeplab, seen):
    before = {name: tensor.clone() for name, tensor in deeplab.state_dict().items()}
    image_distances(deeplab, seen[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in deeplab.state_dict().items())
    assert not hooks(deeplab)


def test_hooks_come_off_when_the_body_raises(deeplab):
    with pytest.raises(RuntimeError, match="halfway"), capture_bn_inputs(deeplab):
        raise RuntimeError("halfway")
    assert not hooks(deeplab)


@pytest.mark.parametrize("metric", ["l2", "kl"])
def test_constant_images_have_finite_distances_and_gradients(metric):
    network = with_random_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    images = torch.full((2, 3, 8, 8), 0.5, requires_grad=True)
    with capture_bn_inputs(network) as captured:
        network(images)
    bn_distance(captured, bn_layers(network), metric).sum().backward()
    assert torch.isfinite(images.grad).all()


def test_the_distance_is_differentiable_with_respect_to_the_images():
    network = with_random_statistics(nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2)))
    images = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def distance(x):
        with capture_bn_inputs(network) as captured:
            network(x)
        return bn_distance(captured, bn_layers(network), "kl").sum()

    x = images.clone().requires_grad_()
    distance(x).backward()
    step = torch.zeros_like(images)
    step[0, 0, 2, 2] = 1e-2
    with torch.no_grad():
        slope = (distance(images + step) - distance(images - step)) / 2e-2
    assert x.grad[0, 0, 2, 2].item() == pytest.approx(slope.item(), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_are_exact_in_every_precision_and_layout_and_leave_the_map_alone(dtype, layout):
    features = (torch.randn(3, 4, 9, 7) + 2).to(dtype, memory_format=layout)
    before = features.clone()
    mean, var = spatial_moments(features, torch.full((4,), 1.5))
    assert torch.equal(features, before) and mean.dtype == var.dtype == torch.float32
    exact = features.double()
    torch.testing.assert_close(mean.double(), exact.mean((2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(var.double(), exact.var((2, 3), correction=0), rtol=1e-5, atol=0)


def test_moments_survive_a_mean_that_is_large_against_the_spread():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.double)
    features = (1000 + 0.1 * spread).float()
    mean, var = spatial_moments(features, torch.full((3,), 1000.0))
    expected = features.double()
    torch.testing.assert_close(mean.double(), expected.mean((2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), expected.var((2, 3), unbiased=False), rtol=1e-3,
                               atol=0)


class Crossed(nn.Module):
    """Layers run in another order than they are registered in; one runs twice, one never."""

    def __init__(self):
        super().__init__()
        self.last, self.never, self.first = (nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
                                             for _ in range(3))
        self.pooled, self.tail = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        x = self.first(x)
        x = self.first(x) + self.pooled(x.mean((2, 3), keepdim=True))
        with suppress(Exception):                      # a network may do so, and must still stop
            x = self.last(x)
        return self.tail(x)


def read(network, images, layers, stop):
    """Return the statistics of the layers `layers`, and the names of the modules that ran."""
    ran = []
    handles = [module.register_forward_hook(lambda *_, name=name: ran.append(name))
               for name, module in network.named_modules()]
    with capture_bn_inputs(network, layers) as captured:
        if stop:
            run_until(network, images, bn_layers(network, layers))
        else:
            network(images)
    for handle in handles:
        handle.remove()
    return captured, ran


def hooks(network):
    return [hook for module in network.modules()
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())]


@pytest.mark.parametrize(("name", "spec", "last"), [
    ("crossed", "first", "first.0"), ("crossed", "pooled,first", "first"),
    ("crossed", "last,first", "last.0"), ("crossed", "all", ""),
    ("deeplab", "early", "backbone.layer2.2.conv2"),
    ("deeplab", "backbone.layer2", "backbone.layer2.3.conv3"),
    ("deeplab", "all", "classifier.1"),
    ("wrapped", "net.backbone.layer1", "net.backbone.layer1.2.conv3")])
def test_a_pass_that_ends_early_reads_the_same_numbers_to_the_bit(deeplab, name, spec, last):
    torch.manual_seed(0)
    network = {"crossed": with_random_statistics(Crossed()), "deeplab": deeplab,
               "wrapped": SegmentationModel(deeplab, "d", 5).eval()}[name]
    images = torch.rand(2, 3, 40, 48)
    with torch.no_grad():
        whole, all_ran = read(network, images, spec, stop=False)
        part, ran = read(network, images, spec, stop=True)
    assert list(whole) == list(part) and whole
    for layer in whole:
        assert all(map(torch.equal, whole[layer], part[layer]))
    assert ran == all_ran[:len(ran)] and (len(ran) < len(all_ran) or last == "")
    assert ran[-1] == last
    assert not hooks(network)


def test_a_pass_that_ends_early_can_be_differentiated_and_leaves_no_map_behind(deeplab):
    images = torch.rand(1, 3, 40, 48)
    gradients, maps = [], []
    hook = deeplab.backbone.layer1.register_forward_hook(
        lambda module, args, output: maps.append(weakref.ref(output)))
    for stop in (False, True):
        x = images.clone().requires_grad_()
        captured, _ = read(deeplab, x, "backbone.layer2", stop)
        bn_distance(captured, bn_layers(deeplab), "kl").sum().backward()
        gradients.append(x.grad)
    hook.remove()
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0
    del captured, x
    assert maps[1]() is None                           # no cycle waits for the garbage collector


def test_distances_leave_nothing_to_the_garbage_collector():
    network, images = with_random_statistics(Crossed()), torch.rand(2, 3, 20, 20)
    image_distances(network, images, "first")
    gc.collect()
    gc.disable()
    try:
        image_distances(network, images, "first")
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_an_error_of_the_network_comes_through_and_leaves_no_hook():
    network = with_random_statistics(Crossed())
    with pytest.raises(RuntimeError, match="channels"):
        image_distances(network, torch.rand(2, 5, 20, 20))
    assert not hooks(network)


def test_captures_may_be_nested_and_a_new_pass_replaces_the_last():
    network = with_random_statistics(Crossed())
    images = torch.rand(2, 3, 20, 20)
    with torch.no_grad():
        with capture_bn_inputs(network, "first,last") as outer:
            with capture_bn_inputs(network, "first") as inner:
                run_until(network, images / 2, bn_layers(network, "first"))
            assert list(outer) == ["first.1"]          # the pass that both saw ended early
            few = image_distances(network, images, "first")
            network(images)
        again, _ = read(network, images, "first,last", stop=False)
        half, _ = read(network, images / 2, "first", stop=False)
    assert list(inner) == ["first.1"] and list(outer) == ["first.1", "last.1"]
    for layer in again:
        assert all(map(torch.equal, outer[layer], again[layer]))
    assert all(map(torch.equal, inner["first.1"], half["first.1"]))
    assert torch.equal(few, bn_distance({"first.1": again["first.1"]}, bn_layers(network))[:, 0])


class Alternating(nn.Module):
    """Its two layers take turns: the first in even passes, the other in odd ones."""

    def __init__(self):
        super().__init__()
        self.layers, self.passes = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)]), 0

    def forward(self, x):
        self.passes += 1
        return self.layers[(self.passes - 1) % 2](x)


def test_statistics_of_an_earlier_pass_are_gone_even_if_a_layer_is_not_called_again():
    network = with_random_statistics(Alternating())
    with capture_bn_inputs(network) as captured:
        network(torch.rand(1, 3, 4, 4))
        assert list(captured) == ["layers.0"]
        network(torch.rand(1, 3, 4, 4))
    assert list(captured) == ["layers.1"]


def test_the_first_call_of_a_layer_counts_also_if_it_saw_a_single_pixel():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.other(self.bn(self.bn(x.mean((2, 3), keepdim=True)) + x))

    network = with_random_statistics(Shared())
    for stop in (False, True):
        captured, _ = read(network, torch.rand(1, 3, 4, 4), "all", stop)
        assert list(captured) == ["other"]


def test_layers_behind_global_pooling_are_left_out():
    network = with_random_statistics(nn.Sequential(
        nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)))
    with capture_bn_inputs(network) as captured:
        network(torch.rand(2, 3, 4, 4))
    assert list(captured) == ["0"]


def test_only_layers_with_a_memory_are_listed():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False),
                            nn.GroupNorm(1, 3), nn.BatchNorm1d(3), nn.SyncBatchNorm(3),
                            torchvision.ops.FrozenBatchNorm2d(3))
    assert list(bn_layers(network)) == ["0", "4", "5"]


def test_frozen_layers_score_like_ordinary_ones():
    layer, image = example()
    frozen = torchvision.ops.FrozenBatchNorm2d(2, eps=0.0)
    frozen.running_mean, frozen.running_var = layer.running_mean, layer.running_var
    assert image_distances(nn.Sequential(frozen).eval(), image).item() == pytest.approx(10)


def test_a_network_without_batchnorm_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="no 2-D BatchNorm layer"):
        bn_layers(nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)))


def test_a_layer_in_training_mode_is_refused_and_not_touched():
    network = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match=r"training mode.*eval"):
        image_distances(network, torch.rand(1, 3, 4, 4))
    assert network[0].num_batches_tracked == 0


@pytest.mark.parametrize(("spec", "expected"), [
    ("all", "a.0 a.1 b.0 b.1 b.2 c"), ("early", "a.0 a.1"), ("middle", "b.0 b.1"),
    ("late", "b.2 c"), ("b", "b.0 b.1 b.2"), ("c,a.1", "a.1 c"), ("0,-1", "a.0 c"),
    ([2, "a.0"], "a.0 b.0"), ("early,c", "a.0 a.1 c")])
def test_layers_are_selected_by_preset_name_prefix_or_index(spec, expected):
    layers = dict.fromkeys(["a.0", "a.1", "b.0", "b.1", "b.2", "c"])
    assert " ".join(select_layers(layers, spec)) == expected


def test_a_layer_that_does_not_exist_is_refused():
    for spec in ("layer9", "1", ""):
        with pytest.raises(ValueError, match=f"matches '{spec}'"):
            select_layers({"a": None}, spec)


def test_an_unknown_metric_is_refused():
    layer, image = example()
    with pytest.raises(ValueError, match=r"a metric out of .*'cosine'"):
        image_distances(layer, image, metric="cosine")


@pytest.mark.parametrize("layers", [
    "early", ["first.1", "last"], ("first.1", "0"), None, {}])
def test_layers_may_be_given_as_a_spec_where_the_model_is_at_hand(layers):
    network, images = with_random_statistics(Crossed()), torch.rand(2, 3, 20, 20)
    if layers == {}:
        with pytest.raises(ValueError, match="got 'l2' and 0 layers"):
            image_distances(network, images, layers)
        return
    chosen = bn_layers(network) if layers is None else select_layers(bn_layers(network), layers)
    assert torch.equal(image_distances(network, images, layers),
                       image_distances(network, images, chosen))
    with capture_bn_inputs(network, layers) as captured:
        network(images)
    assert set(captured) == set(chosen) - {"never.1", "pooled"}
    with pytest.raises(ValueError, match="matches 'layer9'"):
        image_distances(network, images, "layer9")


@pytest.mark.parametrize(("images", "got"), [
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"torch.uint8 \(1, 3, 8, 8\)"),
    (torch.zeros(3, 8, 8), r"torch.float32 \(3, 8, 8\)"),
    (torch.zeros(1, 3, 8, 8).numpy(), r"float32 \(1, 3, 8, 8\)"), ([1], "list")])
def test_what_is_no_batch_of_images_is_refused_with_what_is_expected(images, got):
    with pytest.raises(ValueError, match=r"expected .*\(B, 3, H, W\).*normalised.*" + got):
        image_distances(with_random_statistics(Crossed()), images)


def test_images_that_look_like_0_to_255_are_warned_of_and_others_are_not():
    network, images = with_random_statistics(Crossed()), torch.rand(2, 3, 20, 20)
    with pytest.warns(UserWarning, match="look like 0..255") as caught:
        image_distances(network, images * 255)
    assert caught[0].filename == __file__              # the line to mend, not one of bn_stats.py
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_distances(network, 60 * images - 30)
        assert image_distances(network, images[:0]).shape == (0,)


def test_the_three_lines_from_files_to_distances_run_as_printed(deeplab, pool_folder):
    text = bn_stats.__doc__.split("Use it")[1].split("Run it")[0]
    code = "\n".join(line.strip() for line in text.splitlines()[1:])
    known = {"torch": torch, "Image": Image, "to_tensor": to_tensor, "normalize": normalize,
             "MEAN": [0.5] * 3, "STD": [0.2] * 3, "teacher": deeplab, "files": sorted(
                 pool_folder.iterdir())[:4], "image_distances": image_distances}
    exec(code, known)
    assert known["distances"].shape == (4,) and known["distances"].isfinite().all()


def test_the_demo_prints_the_worked_example(capsys):
    bn_stats.demo()
    assert "l2 10.000    kl  3.656" in capsys.readouterr().out
