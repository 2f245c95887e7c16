"""Which parts of an image are foreign to a network? Ask its BatchNorm layers pixel by pixel.

Picture
    A street under a deep blue sky, and a network that was trained where skies are pale. As a whole
    the photograph is near. But in its upper third every layer gives answers that training never
    saw, and what the network says about the sky there is worth little.

Idea
    `bn_stats.py` compares a whole image with the running statistics. The same comparison at one
    pixel: how many variances does the answer lie from its mean? This draws a map of the image.

Equation
    z(p)   = mean over channels of (f(p) - mu_bn)^2 / s2       1 on average over the training data
    map(p) = max(0, mean over layers of ln(1 + z(p)) - ln 2)   0 where all is as in training

    The logarithm keeps one wild layer from ruling the sum. Maps of deep layers are smaller; all are
    brought to one size before they are averaged.

Paper
    Ours. DFSS (Sun & Wu, arXiv 2512.13175) compares whole images; this is its idea inside one.

Symbols (B images, C channels, H W pixels, h w of the map)
    f  (B, C, H', W')  what enters a BatchNorm layer;  mu_bn, s2 = var_bn + eps  (C,)  its memory

Worked example (one layer, two channels, two pixels, eps = 0; the demo prints it, a test asserts it)
    running mean 0 and 2, running variance 1 and 4
    pixel 0: 1 4    z = mean of 1 / 1 and 4 / 4    = 1     map = ln 2 - ln 2  = 0
    pixel 1: 3 8    z = mean of 9 / 1 and 36 / 4   = 9     map = ln 10 - ln 2 = 1.609

Use it
    from regions import foreign_map
    layers = {name: m for name, m in teacher.named_modules() if isinstance(m, nn.BatchNorm2d)}
    foreign = foreign_map(teacher.eval(), images, layers)           # (B, 3, H, W) -> (B, H, W)

Run it
    python regions.py           (CPU, a second: a foreign disc in a familiar picture, in digits)
"""

import math
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import nn


def pixel_distance(features, layer):
    """Return z at each pixel of what enters a BatchNorm layer: (B, C, H, W) -> (B, H, W), >= 0."""
    mean = layer.running_mean.view(1, -1, 1, 1)
    s2 = layer.running_var.view(1, -1, 1, 1) + layer.eps
    return ((features.float() - mean).square() / s2).mean(dim=1)


@torch.no_grad()
def foreign_map(model, images, layers, size=None):
    """Return how foreign each pixel is to `model`: (B, 3, H, W) -> (B, h, w), float32, >= 0.

    layers: {name: BatchNorm module in eval mode}. size: (h, w) of the map, the images' by default.
    Layers that see 1x1 maps are left out. ValueError if that leaves none.
    """
    size, maps = size or images.shape[-2:], []

    def watch(layer, args):
        if args[0].shape[-2:].numel() > 1:
            z = pixel_distance(args[0], layer).log1p().unsqueeze(1)                 # (B, 1, H', W')
            maps.append(F.interpolate(z, size, mode="bilinear", antialias=True))    # (B, 1, h, w)

    with ExitStack() as hooks:                         # takes the hooks off, also after an error
        for layer in layers.values():
            hooks.enter_context(layer.register_forward_pre_hook(watch))
        model(images)
    if not maps:
        raise ValueError("no layer saw a map larger than 1x1; take other layers")
    return (torch.cat(maps, dim=1).mean(dim=1) - math.log(2)).clamp_min(0)          # (B, h, w)


def demo():
    """Print the worked example, then the map of a picture with a foreign disc."""
    layer = nn.BatchNorm2d(2, eps=0.0).eval()
    layer.running_mean, layer.running_var = torch.tensor([[0.0, 2], [1, 4]])
    image = torch.tensor([[1.0, 3], [4, 8]]).view(1, 2, 1, 2)
    values = foreign_map(layer, image, {"": layer})[0, 0].tolist()
    print("Worked example:", *(f"{v:.3f}" for v in values))

    # A network of random filters, and training images of soft noise that fill its memory.
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, padding_mode="replicate"), nn.BatchNorm2d(16, momentum=1.0),
        nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1, padding_mode="replicate"),
        nn.BatchNorm2d(32, momentum=1.0))
    with torch.no_grad():
        network(0.5 + 0.1 * torch.randn(64, 3, 48, 96))
    network.eval()
    image = 0.5 + 0.1 * torch.randn(1, 3, 48, 96)
    y, x = torch.meshgrid(torch.arange(48), torch.arange(96), indexing="ij")
    image[0, 2, (y - 24) ** 2 + (x - 60) ** 2 < 14 ** 2] = 1.0                      # a blue disc
    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    tenths = (10 * foreign_map(network, image, layers, (12, 48))[0]).round().long()
    print("\nThe map, in tenths (. is 0): noise as in training, with a blue disc in it")
    for row in tenths.tolist():
        print("    " + "".join("." if v == 0 else str(min(v, 9)) for v in row))


if __name__ == "__main__":
    demo()
