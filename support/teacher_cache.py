"""The teacher answers each view once, and its answers are kept: step 5a.

Idea
    A chosen photograph has a fixed number of views, so that the teacher, by far the dearest part of
    a training step, need not be asked again. Its answers are kept at the resolution at which the
    two are compared, in half precision: in memory while they fit, else in a file.

Symbols
    N chosen files, V views of each, B images, K classes, H W pixels, h w of what is compared.

Use it
    ask = partial(answers_of, folded(teacher, (96, 128)), like=(24, 32))
    answers = ask(images)                                        # (B, 3, H, W) -> (B, K, h, w)
    kept = Kept(ask, views, V, device); images, answers = kept[[(slot, view), ...]]
"""

import copy
import math
import os
import tempfile
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader

from evaluate import as_input
from support import together
from support.data import loaded
from support.progress import progress

MEMORY = 4 * 2 ** 30      # bytes of views and answers that are kept in memory


def common_size(teacher, student, image):
    """Return (h, w) at which to compare logits of two sizes (h, w), for images of size (H, W).

    The student's own: finer costs more and teaches no more. But one that is coarser than a quarter
    of the image (DeepLab's) meets the teacher at the teacher's size, or at a quarter: compared at
    its own it lost 3 points (results/README.md).
    """
    return tuple(max(s, min(t, -(-side // 4)))
                 for t, s, side in zip(teacher, student, image, strict=True))


def resized(logits, size):
    """Return logits (B, K, ., .) at `size` = (h, w): as they are, else by bilinear weights."""
    if logits.shape[-2:] == torch.Size(size):
        return logits
    return F.interpolate(logits.float(), size, mode="bilinear", antialias=True)


@torch.no_grad()
def folded(teacher, size):
    """Return a copy without BatchNorm that answers as the teacher does, up to rounding, but faster.

    teacher: a `models.SegmentationModel` in eval mode. size: (H, W) of its images. A BatchNorm is
    folded into the convolution that its parent defines just before it. If the parent does not
    compute in that order, answers change, and the teacher itself is returned.
    """
    faster = copy.deepcopy(teacher)
    for parent in list(faster.modules()):
        for (name, conv), (after, bn) in pairwise(parent.named_children()):
            if (type(conv) is nn.Conv2d and type(bn) is nn.BatchNorm2d and bn.track_running_stats
                    and conv.out_channels == bn.num_features):
                setattr(parent, name, fuse_conv_bn_eval(conv, bn))
                setattr(parent, after, nn.Identity())
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    image = image.to(teacher.mean.device)
    expected, logits = teacher(image), faster(image)                           # (1, K, h, w) each
    same = (logits - expected).abs().max() <= 1e-2 * expected.abs().max()
    return faster if same else teacher


@torch.no_grad()
def answers_of(teacher, images, like, precision=None, temperature=1.0):
    """Return the teacher's logits at `like` = (h, w), float32: (B, 3, H, W) -> (B, K, h, w).

    precision: context in which it computes. temperature: what its logits are divided by; below 1
    its answers are surer (sharpening, as DINO does, arXiv 2104.14294).
    """
    with precision or nullcontext():
        return resized(teacher(images).float(), like) / temperature


def half_tensor(shape, folder):
    """Return an empty float16 tensor: in memory while it fits, else in a file of the folder.

    The file has no name, so that the system removes it whatever happens.
    """
    size = 2 * math.prod(shape)
    if size <= MEMORY:
        return torch.empty(shape, dtype=torch.float16)
    folder = folder or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):                   # a full disk shows now, not later
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_numpy(np.memmap(file, np.float16, "w+", shape=tuple(shape)))
    except OSError as error:
        raise OSError(f"no room for {size / 1e9:.0f} GB of the teacher's answers in {folder} "
                      f"({error.strerror}); lower --views or --budget, or --views 0") from error


class Kept:
    """The answers to `count` views of each file; kept[keys] -> (images, answers).

    ask: from images (B, 3, H, W) on the device to answers (B, K, h, w). keys: B of (slot, view).
    images: uint8 (B, 3, H, W); answers: (B, K, h, w) float16. Views are kept with their answers
    while both fit into memory, else they are cut again.
    """

    def __init__(self, ask, views, count, device, batch_size=16, workers=0, folder=None):
        self.views, self.count = views, count
        keys = [(slot, view) for slot in range(len(views.files)) for view in range(count)]
        batches = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
        # Of n processes each answers `each` batches in a row, so that a file is read by one of
        # them; where there are none left, the last one again.
        rank, n = together.place.get()
        each = -(-len(batches) // n)
        own = [batches[min(rank * each + i, len(batches) - 1)] for i in range(each)]
        loader = DataLoader(views, batch_sampler=own, num_workers=workers,
                            pin_memory=device.type == "cuda")
        for i, images in enumerate(progress(loaded(loader), "answering", total=each)):
            # (B, K, h, w), clamped to what float16 can hold
            answers = ask(as_input(images, device)).clamp(-6e4, 6e4).half()
            if not i:
                both = len(keys) * (images[0].numel() + 2 * answers[0].numel())
                rows = 0 if rank else len(keys)                  # the first process keeps them all
                self.answers = half_tensor((rows, *answers.shape[1:]), folder)
                self.images = None if both > MEMORY else images.new_empty(rows, *images.shape[1:])
            for kept, found in ((self.answers, answers), (self.images, images)):
                for j, x in enumerate([] if kept is None else together.gathered(found, batch_size)):
                    room = kept[(j * each + i) * batch_size:][:batch_size]
                    room.copy_(x[:len(room)])                    # less padding

    def __getitem__(self, keys):
        index = torch.tensor([slot * self.count + view for slot, view in keys])
        images = (torch.stack([self.views[key] for key in keys]) if self.images is None
                  else self.images[index])
        return images, self.answers[index]


def keep(ask, views, cfg, device, out=None):
    """Return the answers to cfg.views of each file, no more than will be seen; None for 0."""
    count = min(cfg.views, -(-cfg.steps * cfg.batch_size // len(views.files)))
    kept = Kept(ask, views, count, device, cfg.batch_size, cfg.workers, out) if count else None
    together.leave()
    return kept
