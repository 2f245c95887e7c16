"""regions.py: the map of what is foreign, by hand, beside a plain loop, and nothing left behind."""

import math

import pytest
import torch
from torch import nn

from regions import foreign_map, pixel_distance


@pytest.fixture
def network():
    """Return a small trained-looking network with a global pooling, and its BatchNorm layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(),
                        nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1),
                        nn.BatchNorm2d(8)).eval()
    layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for layer in layers.values():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return net, layers


def test_the_worked_example():
    layer = nn.BatchNorm2d(2, eps=0.0).eval()
    layer.running_mean, layer.running_var = torch.tensor([[0.0, 2], [1, 4]])
    image = torch.tensor([[1.0, 3], [4, 8]]).view(1, 2, 1, 2)
    torch.testing.assert_close(foreign_map(layer, image, {"": layer}),
                               torch.tensor([[[0, math.log(10 / 2)]]]))


def test_it_is_the_mean_over_layers_of_log_distances(network):
    net, layers = network
    images = 3 * torch.rand(2, 3, 8, 12)
    first = net[0](images)
    second = net[3](net[2](net[1](first)))                            # (2, 8, 4, 6)
    z = [torch.stack([(f[:, c] - m.running_mean[c]) ** 2 / (m.running_var[c] + m.eps)
                      for c in range(f.shape[1])]).mean(dim=0)
         for f, m in ((first, layers["1"]), (second, layers["4"]))]
    small = nn.functional.avg_pool2d(z[0].log1p(), 2)            # exact where sizes divide by two
    whole = foreign_map(net, images, {"4": layers["4"]}, (4, 6))
    torch.testing.assert_close(whole, (z[1].log1p() - math.log(2)).clamp_min(0))
    torch.testing.assert_close(pixel_distance(first, layers["1"]), z[0])
    both = foreign_map(net, images, layers, (4, 6))
    assert both.shape == (2, 4, 6) and both.dtype == torch.float32
    centre = ((small + z[1].log1p()) / 2 - math.log(2)).clamp_min(0)
    assert torch.corrcoef(torch.stack([both.flatten(), centre.flatten()]))[0, 1] > 0.9


def test_an_image_has_the_same_map_in_any_batch_and_none_is_negative(network):
    net, layers = network
    images = torch.rand(3, 3, 8, 12)
    maps = foreign_map(net, images, layers)
    assert maps.shape == (3, 8, 12) and (maps >= 0).all()
    torch.testing.assert_close(foreign_map(net, images[1:2], layers), maps[1:2])


def test_a_foreign_region_stands_out_where_it_is(network):
    net, layers = network
    image = torch.full((1, 3, 16, 16), 0.5)
    for layer in layers.values():                                # a memory of grey images alone
        layer.running_var.fill_(0.01)
    with torch.no_grad():
        layers["1"].running_mean.copy_(net[0](image)[0, :, 8, 8])
    image[:, :, :, 10:] = 3
    values = foreign_map(net, image, {"1": layers["1"]})[0]
    assert values[2:-2, 2:8].max() < 0.1 < 1 < values[2:-2, 12:-2].min()


def test_nothing_stays_behind_and_small_maps_are_left_out(network):
    net, layers = network
    before = {k: v.clone() for k, v in net.state_dict().items()}
    foreign_map(net, torch.rand(1, 3, 8, 8), layers)
    with pytest.raises(ValueError, match="larger than 1x1"):
        foreign_map(net, torch.rand(1, 3, 8, 8), {"6": layers["6"]})
    with pytest.raises(RuntimeError):
        foreign_map(net, torch.rand(1, 4, 8, 8), layers)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in net.modules())
