"""Images made without a pool, to compare with: DeepInversion and DFAD.

Idea
    Without photographs, images must be made up: optimised until the teacher finds its own
    statistics in them (`deepinversion`), or by a generator that plays against the student (`dfad`).

Equation
    deepinversion  0.01 (d(batch) + 9 d_1(batch)) + entropy + 1e-4 TV + 1e-5 ||x||,  d as in
                   bn_stats.py ("l2"), of the statistics of a whole batch; d_1 its first layer
    entropy        mean over pixels of - sum over classes of p log p
    dfad           student: mean |t - s| over logits; generator: -log(mean |t - s| + 1)

Paper
    DeepInversion (Yin et al., CVPR 2020). Its images have a class label, a scene has not: in the
    label's place stands the teacher's entropy, so that each pixel shall be of some class. Classes
    drawn for the cells of a grid were tried: more classes appear, but the student learned no better
    (one seed, 25 images).
    DFAD (Fang et al., arXiv 1912.11006): losses, 5 student updates to 1 of the generator, SGD 0.1,
    Adam 0.001 and a DCGAN; batch 64 and 75,000 updates there. Ours: the two rates warm up and fall
    as in support/training.py, and the colours are standardised before tanh.

Symbols
    B images, C channels, K classes, H W pixels, h w of the logits.

Use it
    from experiments.baselines import deepinversion
    images = deepinversion(teacher, torch.rand(25, 3, 96, 128), steps=60)
    (experiments/generators.py writes folders of such images, and runs dfad.)
"""

import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from bn_stats import bn_distance, bn_layers, capture_bn_inputs
from support.progress import progress
from support.training import OPTIMISERS, learning_rate

NZ = 256                    # numbers that DFAD's generator makes an image from


def entropy(logits):
    """Return how unsure a teacher is, averaged over images and pixels: (B, K, h, w) -> scalar."""
    log_p = logits.log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


def update(optimiser, lr, loss, inputs=None):
    """Take one step down the gradient of a loss, at this learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.zero_grad()
    loss.backward(inputs=inputs)
    optimiser.step()


def batch_statistics(captured):
    """Return mean and biased variance over images and pixels: {name: (B, C) twice -> (1, C) twice}.

    Exact, because all images have the same number of pixels: the variance of a batch is the mean
    variance within its images plus the variance between their means.
    """
    return {name: (mean.mean(dim=0, keepdim=True),
                   var.mean(dim=0, keepdim=True) + mean.var(dim=0, correction=0, keepdim=True))
            for name, (mean, var) in captured.items()}


def bn_loss(captured, layers):
    """Return how far a batch as a whole is from the running statistics, first layer x10: scalar."""
    d = bn_distance(batch_statistics(captured), layers)[0]                        # (L,)
    return d.sum() + 9 * d[0]


def deepinversion(teacher, images, steps):
    """Return images (B, 3, H, W) in [0, 1] changed to match the teacher's statistics as a batch."""
    layers, (H, W) = bn_layers(teacher), images.shape[-2:]
    images = images.clone().requires_grad_()
    optimiser = torch.optim.Adam([images])
    for step in progress(range(steps), "inverting"):
        # No pixel may learn its place by heart: shift by up to an eighth, and flip half the time.
        dy, dx = ((torch.rand(2) - 0.5) * torch.tensor([H, W]) / 4).round().int().tolist()
        x = images.roll((dy, dx), (2, 3))
        x = x.flip(3) if torch.rand(()) < 0.5 else x
        with capture_bn_inputs(teacher, layers) as captured:
            logits = teacher(x)
        x = (x - teacher.mean) / teacher.std
        loss = 0.01 * bn_loss(captured, layers) + entropy(logits)
        loss = loss + 1e-4 * (x.diff(dim=2).norm() + x.diff(dim=3).norm()) + 1e-5 * x.norm()
        update(optimiser, 0.05 * (1 - step / steps), loss)
        images.data.clamp_(0, 1)
    return images.detach()


def new_generator(size, width=64):
    """Return a DCGAN from noise (B, NZ, 1, 1) to images in [-1, 1], (B, 3, H, W)."""
    channels, layers = [NZ, 8 * width, 4 * width, 2 * width, width], []
    for i, (c_in, c_out) in enumerate(pairwise(channels)):
        # First to 1/16 of the size, rounded up; then three times, and below once more, doubled.
        kernel = (4, 2, 1) if i else ((-(-size[0] // 16), -(-size[1] // 16)),)
        layers += [nn.ConvTranspose2d(c_in, c_out, *kernel, bias=False), nn.BatchNorm2d(c_out),
                   nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1),
                         nn.Upsample(size, mode="bilinear"), nn.BatchNorm2d(3, affine=False),
                         nn.Tanh())


def dfad(teacher, student, generator, steps, batch_size=16, lr=0.1, amp=None):
    """Train student and generator in place; return [(update, the student's L1 loss), ...].

    The student imitates the teacher on what the generator makes, the generator looks for images on
    which they differ. Both have logits of one stride. lr: the student's highest learning rate; amp:
    autocast dtype or None. Raises ValueError when the loss is not finite.
    """
    device = next(student.parameters()).device
    mixed = partial(torch.autocast, device.type, amp or torch.bfloat16, enabled=amp is not None)
    learn = OPTIMISERS["sgd"](student.parameters(), lr)
    seek, curve = torch.optim.Adam(generator.parameters()), []

    def imagine():
        with mixed():
            noise = torch.randn(batch_size, NZ, 1, 1, device=device)
            return (generator(noise).float() + 1) / 2

    def gap(images):
        with mixed():
            output, target = student(images), teacher(images)
        return F.l1_loss(output.float(), target.float())

    student.train()
    for step in progress(range(steps), "dfad"):
        with torch.no_grad():
            images = imagine()
        loss = gap(images)
        update(learn, learning_rate(step, steps, lr), loss)
        if step % 5 == 4:
            update(seek, learning_rate(step, steps, 1e-3), -(gap(imagine()) + 1).log(),
                   list(generator.parameters()))           # not the student's
            curve.append((step + 1, loss.item()))
            if not math.isfinite(curve[-1][1]):
                raise ValueError(f"the loss is {curve[-1][1]} by update {step + 1}; lower --lr")
    student.eval()
    return curve
