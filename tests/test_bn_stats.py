"""bn_stats.py against slow loops, DeepInversion's loss, and the numbers in its own docstring."""

import math
import warnings

import pytest
import torch
import torchvision
from conftest import with_random_statistics
from torch import nn

import bn_stats
from bn_stats import (
    bn_distance,
    bn_layers,
    capture_bn_inputs,
    image_distances,
    select_layers,
    spatial_moments,
)


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
    handles = [layer.register_forward_pre_hook(
        lambda module, args, name=name: maps.__setitem__(name, args[0].double()))
        for name, layer in bn_layers(deeplab).items()]
    with torch.no_grad():
        deeplab(images)
    for handle in handles:
        handle.remove()
    return images, maps


def hooks(network):
    return [hook for module in network.modules()
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())]


# ---------------------------------------------------------------- the formula

def slow_distance(maps, layers, metric):
    """Return (L,) of the first image from whole float64 maps, channel by channel."""
    row = []
    for name, f in maps.items():
        layer, eps = layers[name], layers[name].eps
        if f.shape[-1] * f.shape[-2] == 1:
            continue
        first, second, divergence = 0.0, 0.0, 0.0
        for c in range(f.shape[1]):
            pixels = f[0, c].flatten()
            mu = pixels.sum().item() / len(pixels)
            var = ((pixels - mu) ** 2).sum().item() / len(pixels)
            m, v = layer.running_mean[c].item(), layer.running_var[c].item()
            first, second = first + (mu - m) ** 2, second + (var - v) ** 2
            ratio = (var + eps) / (v + eps)
            divergence += (ratio + (mu - m) ** 2 / (v + eps) - 1 - math.log(ratio)) / 2
        row.append(divergence / f.shape[1] if metric == "kl"
                   else math.sqrt(first) + math.sqrt(second))
    return torch.tensor(row)


@pytest.mark.parametrize("metric", ["l2", "kl"])
def test_distances_equal_slow_loops_in_float64(deeplab, seen, metric):
    images, maps = seen
    with torch.no_grad(), capture_bn_inputs(deeplab) as captured:
        deeplab(images[:1])
    fast = bn_distance(captured, bn_layers(deeplab), metric)
    slow = slow_distance(maps, bn_layers(deeplab), metric)
    torch.testing.assert_close(fast[0], slow, rtol=1e-4, atol=1e-6)
    total = image_distances(deeplab, images[:1], metric=metric)
    torch.testing.assert_close(total, slow.sum(0, keepdim=True), rtol=1e-4, atol=0)


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


def test_a_distance_does_not_depend_on_the_rest_of_the_batch(deeplab, seen):
    images, _ = seen
    whole = image_distances(deeplab, images)
    parts = torch.cat([image_distances(deeplab, part) for part in images.split([1, 4, 3])])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=0)
    assert not whole.requires_grad


@pytest.mark.parametrize("metric", ["l2", "kl"])
def test_constant_images_have_finite_distances_and_gradients(metric):
    network = with_random_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    torch.manual_seed(0)                       # large values: E[f^2] - E[f]^2 is rounded below 0
    images = (300 * torch.rand(2, 3, 1, 1)).expand(2, 3, 8, 8).clone().requires_grad_()
    with capture_bn_inputs(network) as captured:
        network(images)
    distances = bn_distance(captured, bn_layers(network), metric)
    distances.sum().backward()
    assert distances.isfinite().all() and images.grad.isfinite().all()


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


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU, and so takes the other form of spatial_moments."""
    is_cuda = True


@pytest.mark.parametrize("kind", [torch.Tensor, OnCuda])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_are_exact_on_every_device_precision_and_layout(kind, dtype, layout):
    features = (torch.randn(3, 4, 9, 7) + 2).to(dtype, memory_format=layout)
    before, exact = features.clone(), features.double()
    mean, var = spatial_moments(features.as_subclass(kind), torch.full((4,), 1.5))
    assert torch.equal(features, before) and mean.dtype == var.dtype == torch.float32
    for moment, expected in ((mean, exact.mean((2, 3))), (var, exact.var((2, 3), correction=0))):
        torch.testing.assert_close(moment.as_subclass(torch.Tensor).double(), expected,
                                   rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [torch.Tensor, OnCuda])
def test_moments_are_exact_if_the_mean_is_large_compared_with_the_spread(kind):
    spread = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = 1000 + 0.1 * spread
    _, var = spatial_moments(features.as_subclass(kind), torch.full((3,), 1000.0))
    torch.testing.assert_close(var.as_subclass(torch.Tensor).double(),
                               features.double().var((2, 3), correction=0), rtol=1e-3, atol=0)


# ---------------------------------------------------------------- which layers count

class LookAlike(nn.Module):
    """Frozen BatchNorm as other libraries write it: buffers, and eps under any name or none."""

    def __init__(self, channels, **eps):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        for name, value in eps.items():
            setattr(self, name, value)

    def forward(self, x):
        return x


class OwnBatchNorm(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input):
        pass


def test_layers_are_recognised_by_what_they_hold():
    network = nn.Sequential(
        nn.BatchNorm2d(3), nn.SyncBatchNorm(3), torchvision.ops.FrozenBatchNorm2d(3),
        LookAlike(3), OwnBatchNorm(3),
        nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3), nn.BatchNorm1d(3),
        nn.BatchNorm3d(3), nn.InstanceNorm2d(3, track_running_stats=True))
    assert list(bn_layers(network)) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("eps", [{"eps": 1e-3}, {"epsilon": 1e-3}, {}])
def test_frozen_look_alikes_score_like_ordinary_layers(eps):
    frozen, layer = LookAlike(3, **eps), nn.BatchNorm2d(3, eps=next(iter(eps.values()), 1e-5))
    for module in (frozen, layer):
        module.running_mean.fill_(0.3)
        module.running_var.fill_(1e-4)                                 # so that eps matters
    images = 0.01 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"training mode.*eval"):
        image_distances(frozen.train(), images)
    torch.testing.assert_close(image_distances(frozen.eval(), images, metric="kl"),
                               image_distances(layer.eval(), images, metric="kl"))


def test_a_network_without_2d_batchnorm_is_refused_and_other_layers_are_named():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"no 2-D BatchNorm layer.*\['2'\]"):
        bn_layers(network)


def test_a_layer_in_training_mode_is_refused_and_left_unchanged():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval())
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


@pytest.mark.parametrize("spec", ["layer9", "1", ""])
def test_a_layer_that_does_not_exist_is_refused(spec):
    with pytest.raises(ValueError, match=f"matches '{spec}'"):
        select_layers({"a": None}, spec)


# ---------------------------------------------------------------- what is captured

class Crossed(nn.Module):
    """Layers run in another order than they are registered; one runs twice, one never."""

    def __init__(self):
        super().__init__()
        self.last, self.never, self.first = (nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
                                             for _ in range(3))
        self.pooled = nn.BatchNorm2d(3)

    def forward(self, x):
        pooled = self.pooled(x.mean((2, 3), keepdim=True))             # a 1x1 map
        return self.last(self.first(self.first(x)) + self.pooled(x[..., 4:, 4:]) + pooled)


@pytest.mark.parametrize("layers", [None, "first,last", ["first.1", "last"], "pooled,first"])
def test_the_first_call_of_each_layer_counts_but_not_if_it_saw_a_single_pixel(layers):
    network, images = with_random_statistics(Crossed()), torch.rand(2, 3, 20, 20)
    with torch.no_grad(), capture_bn_inputs(network, layers) as captured:
        network(images)
        x = network.first[0](images)
        network.first[1](x)                                            # a call that comes later
    torch.testing.assert_close(captured["first.1"][0], x.mean((2, 3)))
    assert list(captured) == (["first.1"] if layers == "pooled,first" else ["first.1", "last.1"])
    expected = bn_distance(captured, bn_layers(network)).sum(dim=1)
    assert torch.equal(image_distances(network, images, layers), expected)
    chosen = select_layers(bn_layers(network), layers)
    assert torch.equal(image_distances(network, images, chosen), expected)


class Alternating(nn.Module):
    """Its two layers take turns: the first in even passes, the other in odd ones."""

    def __init__(self):
        super().__init__()
        self.layers, self.passes = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)]), 0

    def forward(self, x):
        self.passes += 1
        return self.layers[(self.passes - 1) % 2](x)


def test_each_pass_starts_from_empty_even_if_a_layer_is_not_called_again():
    network = with_random_statistics(Alternating())
    with capture_bn_inputs(network) as captured:
        network(torch.rand(1, 3, 4, 4))
        assert list(captured) == ["layers.0"]
        network(torch.rand(1, 3, 4, 4))
        assert list(captured) == ["layers.1"]
        network(torch.rand(1, 3, 4, 4))
        assert list(captured) == ["layers.0"]


def test_the_model_is_unchanged_to_the_bit_and_keeps_no_hook(deeplab, seen):
    before = {name: tensor.clone() for name, tensor in deeplab.state_dict().items()}
    image_distances(deeplab, seen[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in deeplab.state_dict().items())
    assert not hooks(deeplab)


def test_an_error_of_the_network_comes_through_and_no_hook_stays():
    network = with_random_statistics(Crossed())
    with pytest.raises(RuntimeError, match="running_mean"):
        image_distances(network, torch.rand(2, 5, 20, 20))
    assert not hooks(network)


# ---------------------------------------------------------------- errors and the demo

def test_an_unknown_metric_and_a_capture_without_layers_are_refused():
    network, images = with_random_statistics(Crossed()), torch.rand(2, 3, 20, 20)
    with pytest.raises(ValueError, match=r"a metric out of .*'cosine'"):
        image_distances(network, images, metric="cosine")
    with pytest.raises(ValueError, match="got 'l2' and 0 layers"):
        image_distances(network, images, "never")


@pytest.mark.parametrize(("images", "got"), [
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"torch.uint8 .*\[1, 3, 8, 8\]"),
    (torch.zeros(3, 8, 8), r"torch.float32 .*\[3, 8, 8\]"),
    (torch.zeros(1, 3, 8, 8).numpy(), r"float32 \(1, 3, 8, 8\)"), ([1], "list")])
def test_anything_but_a_batch_of_float_images_is_refused(images, got):
    with pytest.raises(ValueError, match=r"expected .*\(B, 3, H, W\).*normalised.*" + got):
        image_distances(with_random_statistics(Crossed()), images)


def test_images_that_look_like_0_to_255_cause_a_warning_and_others_do_not():
    network, images = with_random_statistics(Crossed()), torch.rand(2, 3, 20, 20)
    with pytest.warns(UserWarning, match="look like 0..255") as caught:
        image_distances(network, images * 255)
    assert caught[0].filename == __file__              # the caller's line, not one of bn_stats.py
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_distances(network, 60 * images - 30)
        assert image_distances(network, images[:0]).shape == (0,)


def test_the_demo_prints_the_worked_example_then_the_idea_then_the_caveat(capsys):
    bn_stats.demo()
    lines = capsys.readouterr().out.splitlines()
    assert "l2 10.000    kl  3.656" in lines[0]
    (l2, kl), far, blank = ((float(line.split()[-3]), float(line.split()[-1]))
                            for line in lines[1:4])
    assert far[0] > 2 * l2 and far[1] > 5 * kl                         # the idea
    assert blank[0] < 1.1 * l2 and blank[1] > 5 * kl                   # the caveat
