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


@torch.no_grad()
def check_teacher(teacher, layers, images):
    """Return the logits of a teacher; ValueError if not finite, or if it was never trained."""
    logits = teacher(images)                                                     # (B, K, h, w)
    if not logits.isfinite().all():
        raise ValueError("the teacher's logits are infinite or NaN; is its checkpoint damaged?")
    untouched = all((m.running_mean == 0).all() and (m.running_var == 1).all()
                    for m in layers.values())
    if untouched or torch.equal(logits[0], logits[1]):
        raise ValueError("the teacher looks untrained: were its weights loaded?")
    if logits.min() >= 0 and logits.max() <= 1:
        print("warning: the teacher's outputs look like probabilities (softmax or sigmoid); "
              "expected logits")
    return logits


def rehearse(student, images, amp=None):
    """Return a student's logits in one training step, rehearsed with a copy of it.

    amp: the dtype of autocast, if any. ValueError for a student that cannot be trained on such a
    batch; what torch raises where the memory does not suffice.
    """
    try:
        rehearsed = copy.deepcopy(student).train()
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            logits = rehearsed(images)                                           # (B, K, h, w)
        weights = [p for p in rehearsed.parameters() if p.requires_grad]
        torch.autograd.grad(logits.float().square().mean(), weights, allow_unused=True)
    except Exception as error:
        if "memory" in str(error):                   # one_sentence says what to lower
            raise
        raise ValueError(f"the student failed in a rehearsed training step: {error}") from error
    return logits.detach()


def check_inputs(teacher, student, layers, pool, cfg):
    """Raise ValueError for what would otherwise show after the pool has been scored."""
    if cfg.budget > len(pool):
        raise ValueError(f"the budget is {cfg.budget}, but the pool has {len(pool)} files; "
                         "--budget 0 takes all")
    if {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}:
        raise ValueError("teacher and student share weights; give the student a network of its own")
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError("all weights of the student are frozen; set requires_grad on them")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(max(2, cfg.batch_size), 3, *pool.size, generator=generator)
    images = images.to(next(teacher.parameters()).device)
    theirs = check_teacher(teacher, layers, images[:2]).shape[1]
    ours = rehearse(student, images[:cfg.batch_size], pick_amp(cfg.amp, images.device)).shape[1]
    if ours != theirs:
        raise ValueError(f"the teacher has {theirs} output channels and the student {ours}; "
                         "expected one per class in both, background included")


# ---------------------------------------------------------------- does the pool fit the teacher?

@torch.no_grad()
def mean_shift(teacher, layers, pool, indices):
    """Return how far images lie from the teacher's channel means, in standard deviations: a number.

    The root mean square of (mu - mu_bn) / sqrt(var_bn + eps) over images, layers and channels. Over
    the training images its square is the share of the running variance that lies between images,
    so at most 1.
    """
    device, squares = next(teacher.parameters()).device, []
    for _, images, _ in DataLoader(Subset(pool, indices), 16):
        with capture_bn_inputs(teacher, layers) as captured:
            teacher(as_input(images, device))
        for name, (mean, _) in captured.items():                                 # (B, C)
            layer = layers[name]
            s2 = layer.running_var + layer_eps(layer)
            squares.append(((mean - layer.running_mean).square() / s2).mean(dim=1))     # (B,)
    return torch.cat(squares).mean().sqrt().item()


def describe_fit(teacher, result, most=200):
    """Return a sentence on whether the pool fits, from at most `most` of selected and pool images.

    A rule of thumb from one teacher (results/pool_check.csv): CamVid's own training images lie at
    0.2, those selected from a mixed pool at 0.3, from landscapes only at 0.5, any photos at 1.1.
    """
    def shift(indices):
        step = math.ceil(len(indices) / most)
        return mean_shift(teacher, result["layers"], result["pool"], indices[::step].tolist())

    selected = shift(result["selected"])
    usable = shift(result["scores"].isfinite().nonzero().flatten())
    fit = "fits well" if selected < 0.4 else "fits in part" if selected < 0.7 else "hardly fits"
    return (f"This pool {fit}: the selected images lie {selected:.2f} standard deviations from the "
            f"teacher's\nchannel means, the whole pool {usable:.2f}. Look at the images, too.")
