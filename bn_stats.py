"""How far is an image from the data that a network was trained on? Ask its BatchNorm layers.

Picture
    One channel of a network answers to upright edges. Over all the streets of its training the
    mean answer was 0.4, and BatchNorm still keeps it. A street gives 0.5: near. A curtain 0.1: far.

Idea
    A trained network, the teacher, keeps in its BatchNorm layers the mean and variance of every
    channel. Measure both on a new image: the nearer, the more it looks like the training data.

Equation
    d(x) = sum over layers of one of
    l2   || mu(x) - mu_bn ||_2 + || var(x) - var_bn ||_2              channels of large values rule
    kl   mean over channels of (v + (mu(x) - mu_bn)^2 / s2 - 1 - ln v) / 2       all count the same

Paper
    DFSS (Sun & Wu, arXiv 2512.13175) gives l2 of one layer. Which layers count is not public: to
    add up all is ours, and so is kl, the KL divergence of two normal distributions per channel.

Symbols (B images, C channels, H W pixels, L layers)
    mu(x), var(x)   (B, C)  mean and biased variance over the pixels of the map entering a layer
    mu_bn, var_bn   (C,)    its running mean and variance;  s2 = var_bn + eps, v = (var + eps) / s2

Worked example (two channels, four pixels, eps = 0; the demo prints it, a test asserts it)
    channel 0 = 1 1 5 5:  mu 3, var 4    against running mean 0, running variance 1
    channel 1 = 4 4 6 6:  mu 5, var 1    against running mean 1, running variance 5
    l2 = ||(3 - 0, 5 - 1)|| + ||(4 - 1, 1 - 5)|| = 5 + 5                     = 10
    kl = mean of (4 + 9 - 1 - ln 4) / 2  and  (0.2 + 3.2 - 1 - ln 0.2) / 2   = 3.656

Use it (from bn_stats import image_distances; the rest: PIL, torchvision.transforms.functional)
    photos = [to_tensor(Image.open(file).convert("RGB").resize((128, 96))) for file in files]
    images = normalize(torch.stack(photos), MEAN, STD)              # (B, 3, H, W), as in training
    distances = image_distances(teacher.eval(), images)             # (B,), small: it looks alike

Run it
    python bn_stats.py          (CPU, a second: these numbers, and where one image falls short)
"""

import warnings
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
from torch import nn

METRICS = ("l2", "kl")


def bn_layers(model, spec=None):
    """Return {name: module} of the BatchNorm layers with running statistics; ValueError if none."""
    layers = {name: m for name, m in model.named_modules()
              if getattr(m, "running_mean", None) is not None
              and (isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)
                   or type(m).__name__.startswith("FrozenBatchNorm"))}
    if not layers:
        raise ValueError("no 2-D BatchNorm layer tracks running statistics; take another teacher")
    return layers if spec is None else select_layers(layers, spec)


def spatial_moments(features, centre):
    """Return mean and biased variance over the pixels: (B, C, H, W), (C,) -> (B, C), (B, C).

    E[f^2] - E[f]^2, in place on one copy: fast, and exact as long as `centre` is near the mean.
    """
    f = features.to(torch.float32, copy=True).sub_(centre.view(1, -1, 1, 1))       # (B, C, H, W)
    mean = f.mean(dim=(2, 3))                                                      # (B, C)
    var = f.square_().mean(dim=(2, 3)) - mean.square()                             # (B, C)
    return mean + centre, var.clamp_min(0)


@contextmanager
def capture_bn_inputs(model, layers=None):
    """Collect the statistics of what enters the BatchNorm layers while the body runs `model`.

        with capture_bn_inputs(teacher, "early") as captured:
            teacher(images)
        mean, var = captured["layer1.0.bn1"]           # (B, C) twice, float32, differentiable

    layers: None (all), a spec of `select_layers`, or {name: module}; ValueError in training mode.
    Each pass starts afresh, a layer's first call counts, and 1x1 maps (no variance) are left out.
    """
    layers = layers if isinstance(layers, dict) else bn_layers(model, layers)
    if any(layer.training for layer in layers.values()):
        raise ValueError("a BatchNorm layer is in training mode; call model.eval() first")
    captured, called = {}, set()

    def start(*_):
        captured.clear()
        called.clear()

    def watch(layer, args, name):                      # args[0] (B, C, H, W) enters the layer
        if name not in called and args[0].shape[-2:].numel() > 1:
            captured[name] = spatial_moments(args[0], layer.running_mean)
        called.add(name)

    with ExitStack() as hooks:                         # takes the hooks off, also after an error
        hooks.enter_context(model.register_forward_pre_hook(start))
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(watch, name=name)))
        yield captured


def bn_distance(captured, layers, metric="l2"):
    """Return how far each image is from the running statistics, layer by layer: (B, L), >= 0.

    captured: of `capture_bn_inputs`, a column for each layer in it. layers: {name: module}.
    Differentiable. ValueError for another metric, or when nothing was captured.
    """
    if metric not in METRICS or not captured:
        raise ValueError(f"expected a metric out of {METRICS}, and at least one layer that saw a "
                         f"map larger than 1x1; got {metric!r} and {len(captured)} layers")
    columns = []
    for name, (mean, var) in captured.items():                                    # (B, C), (B, C)
        mean_bn, var_bn = layers[name].running_mean, layers[name].running_var     # (C,), (C,)
        eps, s2 = layers[name].eps, var_bn + layers[name].eps
        if metric == "l2":
            d = (mean - mean_bn).norm(dim=1) + (var - var_bn).norm(dim=1)         # (B,)
        else:
            v = (var + eps) / s2                                                  # (B, C)
            d = ((v + (mean - mean_bn).square() / s2 - 1 - v.log()) / 2).mean(dim=1)
        columns.append(d)
    return torch.stack(columns, dim=1)                                            # (B, L)


def select_layers(layers, spec="all"):
    """Return the part of {name: module} that `spec` names, in the same order.

    spec: a comma-separated string or a sequence of "all", "early", "middle", "late" (thirds),
    indices, names and name prefixes ("layer1" means all below it). ValueError if one finds none.
    """
    names, n, chosen = list(layers), len(layers), set()
    a, b = round(n / 3), round(2 * n / 3)
    known = {"all": names, "early": names[:a], "middle": names[a:b], "late": names[b:],
             **{str(i): [names[i]] for i in range(-n, n)}}
    for part in spec.split(",") if isinstance(spec, str) else map(str, spec):
        found = known.get(part) or [k for k in names if f"{k}.".startswith(f"{part}.")]
        if not found:
            raise ValueError(f"no BatchNorm layer matches {part!r}; expected all, early, middle, "
                             f"late, an index, or a name or prefix like {names[0]!r}")
        chosen.update(found)
    return {name: layers[name] for name in names if name in chosen}


class Stopped(BaseException):
    """Ends a pass early. Not an Exception: a network may catch those."""


def run_until(model, images, layers):
    """Run `model` until each of {name: module} is called: the rest of the pass is time saved."""
    waiting = set(layers.values())

    def watch(layer, *_):
        waiting.discard(layer)
        if not waiting:
            raise Stopped

    with suppress(Stopped), ExitStack() as hooks:
        for layer in layers.values():
            hooks.enter_context(layer.register_forward_pre_hook(watch))
        model(images)


def image_distances(model, images, layers=None, metric="l2"):
    """Return d(x) of each image, the sum over layers: (B, 3, H, W) -> (B,), no gradient.

    images: floating point, normalised as in training, else ValueError, or a warning for 0..255.
    layers: as in `capture_bn_inputs`. The rest of the batch matters by rounding only.
    """
    if not torch.is_tensor(images) or images.dim() != 4 or not images.is_floating_point():
        got = getattr(images, "dtype", type(images)), tuple(getattr(images, "shape", ()))
        raise ValueError("expected floating-point (B, 3, H, W), normalised as in training; "
                         f"got {got[0]} {got[1]}: stack images, divide bytes by 255, normalise")
    if (images.abs() > 30).any():
        warnings.warn("values beyond 30 look like 0..255: divide by 255, normalise", stacklevel=2)
    layers = layers if isinstance(layers, dict) else bn_layers(model, layers)
    with torch.no_grad(), capture_bn_inputs(model, layers) as captured:
        run_until(model, images, layers)
    return bn_distance(captured, layers, metric).sum(dim=1)


def demo():
    """Print the worked example, then where the variance of one image falls short."""
    example, layer = nn.BatchNorm2d(2, eps=0.0).eval(), nn.BatchNorm2d(8, momentum=1.0)
    example.running_mean, example.running_var = torch.tensor([[0.0, 1], [1, 5]])
    torch.manual_seed(0)      # 2,000 "images": noise of variance 1 on brightnesses of variance 1
    noise = torch.randn(2000, 8, 16, 16)
    layer(train := noise + torch.randn(2000, 8, 1, 1))             # fills the running statistics
    for what, network, images in (
            ("the worked example", example, torch.tensor([[[[1.0, 1, 5, 5]], [[4, 4, 6, 6]]]])),
            ("a training image (median of 2,000)", layer.eval(), train),
            ("average brightness, contrast x 1.41", layer, noise[:1] * 2 ** 0.5),
            ("average brightness, no contrast", layer, noise[:1] * 0),
            ("foreign: 3 units too bright", layer, noise[:1] + 3)):
        row = [f"{m} {image_distances(network, images, None, m).median():6.3f}" for m in METRICS]
        print(f"{what:40s}" + "    ".join(row))
    print("running_var holds the variance inside images and between them; one image has the first.")


if __name__ == "__main__":
    demo()
