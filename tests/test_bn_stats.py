"""bn_stats.py against slow loops, DeepInversion's loss, and the numbers in its own docstring."""

import warnings

import pytest
import torch
import torchvision
from conftest import with_random_statistics
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import bn_stats
from bn_stats import bn_distance, bn_layers, capture_bn_inputs, image_distances, select_layers


def slow_distances(network, images, metric):
    """Return (B, L) from the whole maps that enter the layers, in float64, channel by channel."""
    maps, columns = {}, []
    with register_module_forward_pre_hook(
            lambda module, args: maps.update({module: args[0].double()})):
        network(images)
    for layer in (module for module in maps if isinstance(module, nn.BatchNorm2d)):
        f, first, second, divergence = maps[layer], 0, 0, 0            # f (B, C, H, W)
        for c in range(f.shape[1]):
            mu = f[:, c].mean(dim=(1, 2))                              # (B,)
            var = ((f[:, c] - mu[:, None, None]) ** 2).mean(dim=(1, 2))
            m, v = layer.running_mean[c].double(), layer.running_var[c].double()
            first, second = first + (mu - m) ** 2, second + (var - v) ** 2
            ratio = (var + layer.eps) / (v + layer.eps)
            divergence += (ratio + (mu - m) ** 2 / (v + layer.eps) - 1 - ratio.log()) / 2
        if f.shape[-2:].numel() > 1:
            columns.append(divergence / f.shape[1] if metric == "kl"
                           else first.sqrt() + second.sqrt())
    return torch.stack(columns, dim=1).float()


@pytest.mark.parametrize("metric", ["l2", "kl"])
def test_distances_equal_slow_loops_in_float64(metric):
    """For one image, l2 is the BatchNorm loss of DeepInversion: norms over channels, summed."""
    torch.manual_seed(0)
    images = torch.randn(3, 3, 64, 64)                     # maps from 32x32 to a single pixel
    network = with_random_statistics(torchvision.models.get_model(
        "deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=5))
    layers = bn_layers(network)
    for layer in layers.values():
        layer.eps = 0.1                                    # an eps that is left out is noticed
    with torch.no_grad(), capture_bn_inputs(network) as captured:
        slow = slow_distances(network, images, metric)
    torch.testing.assert_close(bn_distance(captured, layers, metric), slow, rtol=1e-3, atol=0)
    total = image_distances(network, images, metric=metric)
    torch.testing.assert_close(total, slow.sum(dim=1), rtol=1e-3, atol=0)
    assert not total.requires_grad


@pytest.mark.parametrize("metric", ["l2", "kl"])
def test_distances_are_differentiable_and_finite_even_for_constant_images(metric):
    torch.manual_seed(0)
    network = with_random_statistics(nn.Sequential(nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2))).double()

    def distances(x):
        with capture_bn_inputs(network) as captured:
            network(x)
        return bn_distance(captured, bn_layers(network), metric)

    x = torch.randn(1, 3, 4, 4, dtype=torch.double, requires_grad=True)
    torch.autograd.gradcheck(distances, x, eps=1e-2, atol=1e-2, rtol=1e-2)
    # Large values: E[f^2] - E[f]^2 is rounded below 0.
    x = (300 * torch.rand(2, 3, 1, 1)).expand(2, 3, 8, 8).double().requires_grad_()
    assert distances(x).isfinite().all()
    assert torch.autograd.grad(distances(x).sum(), x)[0].isfinite().all()


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU, and so takes the other form of spatial_moments."""
    is_cuda = True


@pytest.mark.parametrize("kind", [torch.Tensor, OnCuda])
@pytest.mark.parametrize(("dtype", "centre", "spread", "rtol"), [
    (torch.bfloat16, 2, 1, 1e-5), (torch.float16, 2, 1, 1e-5), (torch.float32, 1000, 0.1, 1e-3)])
def test_moments_are_exact_in_every_precision(kind, dtype, centre, spread, rtol):
    features = (centre + spread * torch.randn(3, 4, 9, 7)).to(dtype)
    features = features.to(memory_format=torch.channels_last)
    before, exact = features.clone(), features.double()
    mean, var = (moment.as_subclass(torch.Tensor) for moment in bn_stats.spatial_moments(
        features.as_subclass(kind), torch.full((4,), centre - 0.1)))
    assert torch.equal(features, before) and mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact.mean((2, 3)), rtol=rtol, atol=0)
    torch.testing.assert_close(var.double(), exact.var((2, 3), correction=0), rtol=rtol, atol=0)


def look_alike(**eps):
    """Return a frozen BatchNorm as in other libraries: buffers, eps under any name or none."""
    layer = nn.Identity()
    layer.running_mean, layer.running_var = nn.Buffer(torch.zeros(3)), nn.Buffer(torch.ones(3))
    layer.__dict__.update(eps)
    return layer


def test_layers_are_recognised_by_what_they_hold_and_a_network_without_any_is_refused():
    others = [nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3), nn.BatchNorm1d(3),
              nn.BatchNorm3d(3), nn.InstanceNorm2d(3, track_running_stats=True)]
    network = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3), look_alike(),
                            torchvision.ops.FrozenBatchNorm2d(3), *others)
    assert list(bn_layers(network)) == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match=r"no 2-D BatchNorm layer .*\['2', '3', '4'\]"):
        bn_layers(nn.Sequential(*others))


@pytest.mark.parametrize("eps", [{"eps": 1e-3}, {"epsilon": 1e-3}, {}])
def test_frozen_look_alikes_score_like_ordinary_layers_and_in_training_mode_are_refused(eps):
    frozen, layer = look_alike(**eps), nn.BatchNorm2d(3, eps=next(iter(eps.values()), 1e-5))
    for module in (frozen, layer):
        module.running_var.fill_(1e-4)                                 # so that eps matters
    images = 0.01 * torch.randn(2, 3, 8, 8)
    dropout = nn.Sequential(look_alike(**eps).eval(), nn.Dropout())    # its distances are random
    for network in (frozen, nn.Sequential(layer, nn.BatchNorm2d(3).eval()), dropout):
        with pytest.raises(ValueError, match=r"training mode.*eval"):
            image_distances(network, images)
    assert layer.num_batches_tracked == 0
    torch.testing.assert_close(image_distances(frozen.eval(), images, metric="kl"),
                               image_distances(layer.eval(), images, metric="kl"))


@pytest.mark.parametrize(("spec", "expected"), [
    ("all", "a.0 a.1 b.0 b.1 b.2 c"), ("early", "a.0 a.1"), ("middle", "b.0 b.1"),
    ("b", "b.0 b.1 b.2"), ("c,a.1", "a.1 c"), ("0,-1", "a.0 c"), ([2, "late"], "b.0 b.2 c"),
    (0, "a.0"), ("early, c", "a.0 a.1 c"), ([], ""), (None, "a.0 a.1 b.0 b.1 b.2 c")])
def test_layers_are_selected_by_preset_name_prefix_or_index(spec, expected):
    layers = dict.fromkeys(["a.0", "a.1", "b.0", "b.1", "b.2", "c"])
    assert " ".join(select_layers(layers, spec)) == expected


@pytest.mark.parametrize("spec", ["layer9", "1", ""])
def test_a_layer_that_does_not_exist_is_refused(spec):
    with pytest.raises(ValueError, match=f"matches '{spec}'"):
        select_layers({"layer99": None}, spec)


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


@pytest.mark.parametrize(("layers", "names"), [
    (None, "first.1 pooled last.1"), ("first,last", "first.1 last.1"),
    (["first.1", "last"], "first.1 last.1"), ("pooled,first", "first.1 pooled")])
def test_the_first_input_of_a_layer_with_more_than_one_pixel_counts(layers, names):
    crossed, images = with_random_statistics(Crossed()), torch.rand(2, 3, 20, 20)
    with torch.no_grad(), capture_bn_inputs(crossed, layers) as captured:
        crossed(images)
        x = crossed.first[0](images)
        crossed.first[1](x)                                            # a call that comes later
    torch.testing.assert_close(captured["first.1"][0], x.mean((2, 3)))
    if "pooled" in names:                                  # its first input is a 1x1 map
        torch.testing.assert_close(captured["pooled"][0], images[..., 4:, 4:].mean((2, 3)))
    assert list(captured) == names.split()
    expected = bn_distance(captured, bn_layers(crossed)).sum(dim=1)
    for same in (layers, select_layers(bn_layers(crossed), layers)):
        assert torch.equal(image_distances(crossed, images, same), expected)


def test_each_pass_starts_from_empty_and_no_hook_stays_after_an_error():
    network = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)]).eval()
    network.forward = lambda i: network[i](torch.rand(1, 3, 4, 4))
    with capture_bn_inputs(network) as captured:
        for i in (0, 1, 0):
            network(i)
            assert list(captured) == [str(i)]
    with pytest.raises(IndexError), capture_bn_inputs(network):
        network(2)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())


@pytest.mark.parametrize(("images", "how", "message"), [
    (torch.zeros(1, 3, 20, 20), {"metric": "cosine"}, "a metric out of .*'cosine'"),
    (torch.zeros(1, 3, 20, 20), {"layers": "never"}, "got 'l2' and 0 layers"),
    *((images, {}, r"expected .*\(B, C, H, W\).*normalised.*" + got) for images, got in (
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"torch.uint8 .*\[1, 3, 8, 8\]"),
        (torch.zeros(3, 8, 8), r"torch.float32 .*\[3, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8).numpy(), r"float32 \(1, 3, 8, 8\)"), ([1], "list")))])
def test_all_but_floats_with_a_known_metric_and_a_layer_is_refused(images, how, message):
    with pytest.raises(ValueError, match=message):
        image_distances(with_random_statistics(Crossed()), images, **how)


def test_images_that_look_like_0_to_255_cause_a_warning_and_others_do_not():
    crossed, images = with_random_statistics(Crossed()), torch.rand(2, 3, 20, 20)
    with pytest.warns(UserWarning, match="look like 0..255") as caught:
        image_distances(crossed, images * 255)
    assert caught[0].filename == __file__              # the caller's line, not one of bn_stats.py
    with warnings.catch_warnings(action="error"):
        image_distances(crossed, 60 * images - 30)
        assert image_distances(crossed, images[:0]).shape == (0,)


def test_the_demo_prints_the_idea_then_the_caveat(capsys):
    """Its first line, the worked example, is tested in test_readme.py."""
    bn_stats.demo()
    lines = capsys.readouterr().out.splitlines()
    (l2, kl), far, blank = ((float(line.split()[-3]), float(line.split()[-1]))
                            for line in lines[1:4])
    assert far[0] > 2 * l2 and far[1] > 5 * kl                         # the idea
    assert blank[0] < 1.1 * l2 and blank[1] > 5 * kl                   # the caveat
