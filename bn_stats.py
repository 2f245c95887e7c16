"""How far is an image from the data that a network was trained on? Ask its BatchNorm layers.

Idea
    Every BatchNorm layer of a trained network (the "teacher") keeps, per channel, a running mean
    and variance of the maps it saw in training. Take the same two numbers of one new image: the
    nearer, the more it resembles the training data. No label and no training image is needed.

Equation
    d(x) = sum over layers of || mu(x) - mu_bn ||_2 + || var(x) - var_bn ||_2

Paper
    DFSS (Sun & Wu, arXiv 2512.13175) gives the distance of one layer ("l2" below). Which layers
    enter is not public; to add up all is our choice, as are "standardised" and "kl".

Symbols
    B images, C channels, H W pixels, L layers.
    mu(x), var(x)   (B, C)  mean and biased variance over the pixels of the map entering a layer
    mu_bn, var_bn   (C,)    its running_mean and running_var;  s2 = var_bn + eps,  s = sqrt(s2)

Worked example (two channels, 2x2 pixels, eps = 0; the demo prints it, a test asserts it)
    channel 0 = 1 1 5 5:  mu 3, var 4    against running mean 0, running variance 1
    channel 1 = 4 4 6 6:  mu 5, var 1    against running mean 1, running variance 5
    l2           = ||(3 - 0, 5 - 1)|| + ||(4 - 1, 1 - 5)|| = 5 + 5         = 10
    standardised = ||(3, 4/sqrt 5)|| + ||(3, -0.8)||       = 3.493 + 3.105 = 6.598
    kl           = mean of (4 + 9 - 1 - ln 4) / 2  and  (0.2 + 3.2 - 1 - ln 0.2) / 2  = 3.656

Use it
    from bn_stats import image_distances
    distances = image_distances(teacher.eval(), images)         # (B, 3, H, W) -> (B,)

Run it
    python bn_stats.py          (CPU, a second: these numbers, and why variances fall short)
"""

from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import nn

METRICS = ("l2", "standardised", "kl")
PRESETS = {"all": (0, 1), "early": (0, 1 / 3), "middle": (1 / 3, 2 / 3), "late": (2 / 3, 1)}


def bn_layers(model):
    """Return {name: module} of the BatchNorm layers that remember, in `named_modules()` order.

    Also SyncBatchNorm and frozen ones (torchvision's, detectron2's). ValueError if there are none.
    """
    layers = {name: m for name, m in model.named_modules()
              if getattr(m, "running_mean", None) is not None
              and (isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)
                   or type(m).__name__.startswith("FrozenBatchNorm"))}
    if not layers:
        raise ValueError("no 2-D BatchNorm layer tracks running statistics; take another teacher")
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
def capture_bn_inputs(model, layers=None, stop=False):
    """Collect, while the body runs `model`, the statistics of what enters its BatchNorm layers.

        with capture_bn_inputs(teacher, few, stop=True) as captured:
            teacher(images)                            # as far as the last of these layers
        captured["layer1.0.bn1"]                       # (mean (B, C), variance (B, C)), float32

    Differentiable. Only these small tensors are kept, of the last pass and a layer's first call in
    it. A 1x1 map (behind a global pooling) is left out: it has no variance. layers: a sub-dict of
    `bn_layers(model)`; None means all. stop: leave the body once each was called, with the same
    statistics and gradients in less time, but no output. The hooks come off on exit, also when the
    body raises. ValueError if a layer is in training mode: a pass would overwrite its memory.
    """
    layers = bn_layers(model) if layers is None else layers
    if any(layer.training for layer in layers.values()):
        raise ValueError("a BatchNorm layer is in training mode; call model.eval() first")
    captured, unseen = {}, set(layers)

    class AllSeen(BaseException):
        """This capture's own way out of a pass: a network may catch an Exception."""

    def watch(module, args, name):
        if name in unseen:
            unseen.remove(name)
            captured.pop(name, None)                   # of an earlier pass
            if args[0].shape[-2:].numel() > 1:
                captured[name] = spatial_moments(args[0], module.running_mean)
        if stop and not unseen:
            raise AllSeen

    handles = [model.register_forward_pre_hook(lambda *_: unseen.update(layers))] + [
        layer.register_forward_pre_hook(partial(watch, name=k)) for k, layer in layers.items()]
    try:
        with suppress(AllSeen):
            yield captured
    finally:
        for handle in handles:
            handle.remove()


def bn_distance(captured, layers, metric="l2"):
    """Return how far each image is from the running statistics, layer by layer: (B, L).

    captured: of `capture_bn_inputs`, a column for each layer in it. layers: {name: module}.
    Differentiable; >= 0. ValueError for an unknown metric or when nothing was captured.
      l2            ||mu - mu_bn|| + ||var - var_bn||              the paper's; large channels rule
      standardised  ||(mu - mu_bn) / s|| + ||var / s2 - 1||        ours; every channel counts alike
      kl            mean of (v + (mu - mu_bn)^2 / s2 - 1 - ln v) / 2,  v = (var + eps) / s2   ours
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

    images: normalised as in training. Whatever else is in the batch only matters by rounding.
    """
    layers = bn_layers(model) if layers is None else layers
    with capture_bn_inputs(model, layers, stop=True) as captured:
        model(images)
    return bn_distance(captured, layers, metric).sum(dim=1)


def demo():
    """Print the worked example, then why the variance of one image lies below running_var."""
    example = nn.BatchNorm2d(2, eps=0.0).eval()
    example.running_mean, example.running_var = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 5.0])
    image = torch.tensor([[1.0, 1, 5, 5], [4, 4, 6, 6]]).view(1, 2, 2, 2)
    torch.manual_seed(0)      # 2,000 "images": noise of variance 1 on brightnesses of variance 1
    noise, layer = torch.randn(2000, 8, 16, 16), nn.BatchNorm2d(8, momentum=1.0)
    layer(train := noise + torch.randn(2000, 8, 1, 1))             # fills the running statistics
    mean, var = spatial_moments(train, layer.eval().running_mean)              # (N, C) twice
    print(f"running_var {layer.running_var.mean():.1f} = {var.mean():.1f} (variance within an "
          f"image) + {mean.var(dim=0).mean():.1f} (between images): one image falls short\n")
    print(f"{'':40s}" + "".join(f"{metric:>14s}" for metric in METRICS))
    for what, network, images in (
            ("(the worked example)", example, image),
            ("a training image (median of 2,000)", layer, train),
            ("average brightness, contrast x 1", layer, noise[:1]),
            ("average brightness, contrast x 1.41", layer, noise[:1] * 2 ** 0.5),
            ("average brightness, contrast x 0 (flat)", layer, noise[:1] * 0),
            ("foreign: 3 units too bright", layer, noise[:1] + 3)):
        row = [image_distances(network, images, None, m).median().item() for m in METRICS]
        print(f"{what:40s}" + "".join(f"{d:14.3f}" for d in row))
    print("\nThe nearest has more contrast than any training image, and all but kl put a flat card "
          "beside\nthe training images: the price of asking one image for the variance of many.")


if __name__ == "__main__":
    demo()
