"""Checks before the long work begins: whatever would fail later should fail now, in one sentence.

Use it
    check_inputs(teacher, student, layers, pool, cfg)     # ValueError, or nothing
    print(describe_fit(teacher, result))                  # does the pool fit the teacher?
"""

import copy
import math

import torch
from torch.utils.data import DataLoader, Subset

from bn_stats import capture_bn_inputs, layer_eps
from support.images import as_input
from support.options import pick_amp


def rehearse(student, images, amp):
    """Return the number of classes of a student after one training step with a copy of it.

    amp: the dtype of autocast, or None. ValueError for a student that cannot be trained on such a
    batch; what torch raises where the memory does not suffice.
    """
    try:
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            logits = copy.deepcopy(student).train()(images)                      # (B, K, h, w)
        torch.autograd.backward(logits.float().square().mean())
    except Exception as error:
        if "memory" in str(error):                   # one_sentence says what to lower
            raise
        raise ValueError(f"the student failed in a rehearsed training step: {error}") from error
    return logits.shape[1]


def check_inputs(teacher, student, layers, pool, cfg):
    """Raise ValueError for what would otherwise show after the pool has been scored."""
    if cfg.budget > len(pool):
        raise ValueError(f"the budget is {cfg.budget}, but the pool has {len(pool)} files (0: all)")
    if {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}:
        raise ValueError("teacher and student share weights; give the student a network of its own")
    device = next(teacher.parameters()).device
    images = torch.rand(max(2, cfg.batch_size), 3, *pool.size, device=device)
    logits = teacher(images[:2])                                                 # (2, K, h, w)
    if not logits.isfinite().all():
        raise ValueError("the teacher's logits are infinite or NaN; is its checkpoint damaged?")
    untouched = all((layer.running_var == 1).all() for layer in layers.values())
    if untouched or torch.equal(logits[0], logits[1]):
        raise ValueError("the teacher looks untrained: were its weights loaded?")
    if logits.min() >= 0 and logits.max() <= 1:
        print("warning: the teacher's outputs look like probabilities (softmax or sigmoid)")
    K = rehearse(student, images[:cfg.batch_size], pick_amp(cfg.amp, device))
    if logits.shape[1] != K:
        raise ValueError(f"the teacher has {logits.shape[1]} classes, but the student {K}")


# ---------------------------------------------------------------- does the pool fit the teacher?

@torch.no_grad()
def mean_shift(teacher, result, indices, most=200):
    """Return how far images lie from the teacher's channel means, in standard deviations: a number.

    The root mean square of (mu - mu_bn) / sqrt(var_bn + eps) over images, layers and channels. The
    running variance is that of all pixels: the variance of mu over the training images plus that
    within them. Over the training images the result is therefore at most 1.
    indices: (n,) into the pool; at most `most` of them are used, evenly spread.
    """
    device, squares = next(teacher.parameters()).device, []
    some = Subset(result["pool"], indices[::math.ceil(len(indices) / most)].tolist())
    for _, images, _ in DataLoader(some, 16):
        with capture_bn_inputs(teacher, result["layers"]) as captured:
            teacher(as_input(images, device))
        for name, (mean, _) in captured.items():                                 # (B, C)
            layer = result["layers"][name]
            s2 = layer.running_var + layer_eps(layer)
            squares.append(((mean - layer.running_mean).square() / s2).mean(dim=1))     # (B,)
    return torch.cat(squares).mean().sqrt().item()


def describe_fit(teacher, result):
    """Return a sentence on whether the pool fits, from images of the selection and the whole pool.

    A rule of thumb from one teacher (results/pool_check.csv): CamVid's own training images lie at
    0.2, those selected from a mixed pool at 0.3, from landscapes only at 0.5, any photos at 1.1.
    """
    usable = result["scores"].isfinite().nonzero().flatten()
    selected, whole = (mean_shift(teacher, result, i) for i in (result["selected"], usable))
    fit = "fits well" if selected < 0.4 else "fits in part" if selected < 0.7 else "hardly fits"
    return (f"This pool {fit}: the selected images lie {selected:.2f} standard deviations from the "
            f"teacher's\nchannel means, the whole pool {whole:.2f}. Look at the images, too.")
