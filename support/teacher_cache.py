"""Cached teacher logits: the teacher's forward pass runs once per view.

Idea
    Each selected photo has a fixed set of augmented views. The teacher's forward pass is the most
    expensive part of a training step, so its logits are computed once and cached in float16 at the
    resolution at which they are compared: in memory if they fit, otherwise in a temporary file.

Symbols
    N selected files, V views of each, B images, K classes, H W pixels, h w of the logits.

Use it
    from support.teacher_cache import TeacherCache, resize
    cache = TeacherCache(lambda x: resize(teacher(x), (24, 32)), views, cfg, device)
    images, teacher_logits = cache[[(0, 0), (5, 2)]]      # keys: (index of the file, view number)
"""

import math
import tempfile

import numpy as np
import torch
import torch.nn.functional as F

from support.data import iterate
from support.images import as_input
from support.options import progress

MEMORY = 4 * 2 ** 30      # bytes of views, and of logits, that are kept in memory


@torch.no_grad()
def comparison_size(teacher, student, size):
    """Return (h, w) at which to compare the logits of two networks for images of size (H, W).

    The student's own size: a finer one costs more and teaches no more. But at least the teacher's
    size or a quarter of the image's, whichever is smaller: a coarser student (DeepLab's) lost 3
    points of mIoU at its own size (results/notes.md).
    """
    image = torch.zeros(1, 3, *size, device=next(teacher.parameters()).device)
    teacher_size, student_size = (net.eval()(image).shape[-2:] for net in (teacher, student))
    return tuple(max(s, min(t, math.ceil(side / 4)))
                 for t, s, side in zip(teacher_size, student_size, size, strict=True))


def resize(logits, size):
    """Return logits (B, K, ., .) at `size` = (h, w), bilinear, antialiased where they shrink."""
    if logits.shape[-2:] == torch.Size(size):
        return logits
    # Antialiasing has no deterministic backward pass on CUDA, and only matters when shrinking.
    return F.interpolate(logits.float(), size, mode="bilinear",
                         antialias=size[0] < logits.shape[-2])


def allocate(shape, folder=None):
    """Return an empty float16 tensor: in memory if it fits, otherwise in a file of the folder.

    The file is temporary: the system removes it when the program ends. OSError if the disk is full.
    """
    size = 2 * math.prod(shape)
    if size <= MEMORY:
        return torch.empty(shape, dtype=torch.float16)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(math.ceil(size / 2 ** 26)):        # a full disk shows now, not later
                file.write(bytes(2 ** 26))
            file.flush()
            return torch.from_numpy(np.memmap(file, np.float16, "r+", shape=shape))
    except OSError as error:
        raise OSError(f"no room for {size / 1e9:.0f} GB of teacher logits ({error.strerror}); "
                      "lower --views or --budget, or use --views 0") from error


class TeacherCache:
    """Views and teacher logits: cache[keys] -> (images uint8 (B, 3, H, W), logits (B, K, h, w)).

    teacher_pass: from images (B, 3, H, W) on the device to logits (B, K, h, w); they are stored in
    float16. views: a `data.Views`, of which cfg.views of each file are cached, no more than will be
    used. keys: B of (index, view number). folder: for logits that do not fit into memory; views
    that do not are cut again. ValueError names a file whose teacher logits are not finite.
    """

    def __init__(self, teacher_pass, views, cfg, device, folder=None):
        self.views, self.images = views, None
        self.count = min(cfg.views, math.ceil(cfg.steps * cfg.batch_size / len(views.files)))
        keys = [(index, view) for index in range(len(views.files)) for view in range(self.count)]
        starts = range(0, len(keys), cfg.batch_size)
        loader = iterate(views, device, cfg.workers, batch_size=cfg.batch_size, sampler=keys)
        loader = progress(loader, "teacher logits", total=len(starts))
        for start, images in zip(starts, loader, strict=True):
            logits = teacher_pass(as_input(images, device))                   # (B, K, h, w)
            bad = (~logits.isfinite().flatten(1).all(1)).nonzero()
            if len(bad):
                file = views.files[keys[start + int(bad[0])][0]]
                raise ValueError(f"the teacher's logits for {file} are infinite or NaN; use --amp "
                                 "off, or take this file out of the pool")
            logits = logits.clamp(-6e4, 6e4).half().cpu()     # float16 holds no more than 65,504
            if start == 0:
                self.logits = allocate((len(keys), *logits.shape[1:]), folder)
                if len(keys) * images[0].nbytes <= MEMORY:
                    self.images = images.new_empty(len(keys), *images.shape[1:])
            rows = slice(start, start + len(images))
            self.logits[rows] = logits
            if self.images is not None:
                self.images[rows] = images

    def __getitem__(self, keys):
        rows = torch.tensor([index * self.count + view for index, view in keys])
        if self.images is None:
            return torch.stack([self.views[key] for key in keys]), self.logits[rows]
        return self.images[rows], self.logits[rows]
