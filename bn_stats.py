"""How far is an image from the data that a network was trained on? Ask its BatchNorm layers.

Idea
    Every BatchNorm layer of a trained network keeps, per channel, the mean and the variance of all
    the feature maps it saw in training. Run one new image through the network, take the same two
    numbers per channel, and compare: the nearer, the more the image resembles the training data.
    No label, no training image and no prediction of the network is needed.

Equation
    d(x) = sum over layers of || mu(x) - mu_bn ||_2 + || var(x) - var_bn ||_2

Paper
    DFSS (Sun & Wu, arXiv 2512.13175) gives the distance of one layer ("l2" below). Which layers
    enter is not public; to add up all is our choice. "standardised" and "kl" are ours.

Symbols
    B images, C channels, H W pixels, L layers.
    mu(x), var(x)   (B, C)  mean and biased variance over the pixels of the map entering a layer
    mu_bn, var_bn   (C,)    its running_mean and running_var;  s2 = var_bn + eps,  s = sqrt(s2)

Worked example (two channels, 2x2 pixels, eps = 0; the demo prints it, a test asserts it)
    channel 0 = 1 1 5 5:  mu 3, var 4    against running mean 0, running variance 1
    channel 1 = 4 4 6 6:  mu 5, var 1    against running mean 1, running variance 5
    l2           = ||(3, 4)|| + ||(3, -4)||                = 5 + 5         = 10
    standardised = ||(3, 4/sqrt 5)|| + ||(3, -0.8)||       = 3.493 + 3.105 = 6.598
    kl           = mean of (4 + 9 - 1 - ln 4) / 2  and  (0.2 + 3.2 - 1 - ln 0.2) / 2  = 3.656

Use it
    from bn_stats import image_distances
    distances = image_distances(teacher.eval(), images)         # (B, 3, H, W) -> (B,)

Run it
    python bn_stats.py          (CPU, a second: these numbers, and why variances fall short)
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

METRICS = ("l2", "standardised", "kl")
PRESETS = {"all": (0, 1), "early": (0, 1 / 3), "middle": (1 / 3, 2 / 3), "late": (2 / 3, 1)}


def bn_layers(model):
    """Return {name: module} of the BatchNorm layers that remember; ValueError if there are none.

    Counted are BatchNorm2d, SyncBatchNorm and frozen variants (torchvision's, detectron2's) that
    track running statistics, in the order of `model.named_modules()`.
    """
    layers = {name: m for name, m in model.named_modules()
              if (isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)
                  or type(m).__name__.startswith("FrozenBatchNorm"))
              and getattr(m, "running_mean", None) is not None}
    if not layers:
        raise ValueError("the network has no 2-D BatchNorm layer with running statistics; DFSS "
                         "needs a teacher with BatchNorm that tracks them")
    return layers


def select_layers(layers, spec="all"):
    """Return the sub-dict of `layers` that `spec` names, in the order of `layers`.

    spec: a comma-separated string or a sequence of "all", "early", "middle", "late" (thirds),
    indices, names and name prefixes ("layer1" means all below it). ValueError if one finds none.
    """
    names, chosen = list(layers), set()
    for part in spec.split(",") if isinstance(spec, str) else map(str, spec):
        if part in PRESETS:
            low, high = PRESETS[part]
            found = names[round(len(names) * low):round(len(names) * high)]
        elif part.lstrip("-").isdigit():
            found = [names[i] for i in [int(part)] if -len(names) <= i < len(names)]
        else:
            found = [name for name in names if f"{name}.".startswith(f"{part}.")]
        if not found:
            raise ValueError(f"no BatchNorm layer matches {part!r}; expected an index, one of "
                             f"{', '.join(PRESETS)}, or a name or prefix like {names[0]!r}")
        chosen.update(found)
    return {name: layers[name] for name in names if name in chosen}


def spatial_moments(features, centre):
    """Return mean and biased variance over the pixels: (B, C, H, W), (C,) -> (B, C), (B, C).

    E[f^2] - E[f]^2 is cheaper than var_mean but cancels badly when the mean is large against the
    spread. Around a centre near the mean, such as the running mean, it does not.
    """
    # One copy, then in place: on a CPU fresh memory costs more than the arithmetic.
    f = features.to(torch.float32, copy=True).sub_(centre.view(1, -1, 1, 1))       # (B, C, H, W)
    mean = f.mean(dim=(2, 3))                                                      # (B, C)
    var = f.square_().mean(dim=(2, 3)) - mean.square()                             # (B, C)
    return mean + centre, var.clamp_min(0)


@contextmanager
def capture_bn_inputs(model, layers=None):
    """Collect, while the body runs `model`, the statistics of what enters its BatchNorm layers.

        with capture_bn_inputs(teacher) as captured:
            teacher(images)
        captured["layer1.0.bn1"]        # -> (mean (B, C), variance (B, C)), float32

    Differentiable. Only these small tensors are kept, never a feature map; of a layer called twice
    the last call. Layers that saw 1x1 maps (behind a global pooling) are left out: one pixel has
    no variance. layers: a sub-dict of `bn_layers(model)`; None means all. The hooks come off on
    exit, also when the body raises. ValueError if a watched layer is in training mode: a forward
    pass would overwrite the memory we came to read.
    """
    layers = bn_layers(model) if layers is None else layers
    if any(layer.training for layer in layers.values()):
        raise ValueError("a BatchNorm layer is in training mode; call model.eval() first")
    captured = {}

    def watch(module, args, name):
        captured.pop(name, None)
        if args[0].shape[-2:].numel() > 1:
            captured[name] = spatial_moments(args[0], module.running_mean)

    handles = [layers[name].register_forward_pre_hook(partial(watch, name=name)) for name in layers]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def bn_distance(captured, layers, metric="l2"):
    """Return how far each image is from the running statistics, layer by layer: (B, L).

    captured: what `capture_bn_inputs` collected, a column per layer in it, in that order. layers:
    {name: BatchNorm module}. Differentiable; >= 0, and 0 for the same statistics.
      l2            ||mu - mu_bn|| + ||var - var_bn||              the paper's; large channels rule
      standardised  ||(mu - mu_bn) / s|| + ||var / s2 - 1||        ours; every channel counts alike
      kl            mean over channels of KL( N(mu, var + eps) || N(mu_bn, s2) )              ours
    Raises ValueError for an unknown metric or when nothing was captured.
    """
    if metric not in METRICS or not captured:
        raise ValueError(f"expected a metric out of {METRICS}, and at least one layer that saw a "
                         f"map larger than 1x1; got {metric!r} and {len(captured)} layers")
    columns = []
    for name, (mean, var) in captured.items():                                    # (B, C), (B, C)
        mean_bn, var_bn = layers[name].running_mean, layers[name].running_var     # (C,), (C,)
        eps, s2 = layers[name].eps, var_bn + layers[name].eps
        if metric == "l2":
            d = (mean - mean_bn).norm(dim=1) + (var - var_bn).norm(dim=1)
        elif metric == "standardised":
            d = ((mean - mean_bn) / s2.sqrt()).norm(dim=1) + (var / s2 - 1).norm(dim=1)
        else:
            ratio = (var + eps) / s2                                              # (B, C)
            d = ((ratio + (mean - mean_bn).square() / s2 - 1 - ratio.log()) / 2).mean(dim=1)
        columns.append(d)                                                         # (B,)
    return torch.stack(columns, dim=1)                                            # (B, L)


@torch.no_grad()
def image_distances(model, images, layers=None, metric="l2"):
    """Return d(x) of each image, the sum over layers: (B, 3, H, W) -> (B,), no gradient.

    images: normalised exactly as in the model's training, or the comparison is void. The score of
    an image does not depend on the rest of the batch, beyond rounding. The model stays as it is.
    """
    layers = bn_layers(model) if layers is None else layers
    with capture_bn_inputs(model, layers) as captured:
        model(images)
    return bn_distance(captured, layers, metric).sum(dim=1)


def demo():
    """Print the worked example, then why the variance of one image lies below running_var."""
    layer = nn.BatchNorm2d(2, eps=0.0).eval()
    layer.running_mean, layer.running_var = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 5.0])
    image = torch.tensor([[1.0, 1, 5, 5], [4, 4, 6, 6]]).view(1, 2, 2, 2)
    rows = {"(the worked example)": [image_distances(layer, image, None, m) for m in METRICS]}

    # 2,000 training "images": pixels scatter with variance 1 around the brightness of their
    # image, and the brightnesses scatter with variance 1 around 0.
    torch.manual_seed(0)
    noise = torch.randn(2000, 8, 16, 16)
    train, layer = noise + torch.randn(2000, 8, 1, 1), nn.BatchNorm2d(8, momentum=1.0)
    layer(train)                                                   # fills the running statistics
    mean, var = spatial_moments(train, layer.eval().running_mean)              # (N, C) twice
    print(f"running_var {layer.running_var.mean():.2f} = {var.mean():.2f} (variance within an "
          f"image) + {mean.var(dim=0).mean():.2f} (between images): one image falls short\n")
    probes = {"a training image (median of 2,000)": train,
              "average brightness, contrast x 1": noise[:1],
              "average brightness, contrast x 1.41": noise[:1] * 2 ** 0.5,
              "average brightness, contrast x 0 (flat)": noise[:1] * 0,
              "foreign: 3 units too bright": noise[:1] + 3}
    for what, images in probes.items():
        rows[what] = [image_distances(layer, images, None, m).median() for m in METRICS]
    print(f"{'':40s}" + "".join(f"{metric:>14s}" for metric in METRICS))
    for what, row in rows.items():
        print(f"{what:40s}" + "".join(f"{d.item():14.3f}" for d in row))
    print("\nThe nearest has more contrast than any training image, and all but kl put a flat card "
          "beside\nthe training images: the price of asking one image for the variance of many.")


if __name__ == "__main__":
    demo()
