"""The unlabelled pool, random views of its files, and stateless training batches.

Idea
    Batch t of a run is a pure function of (seed, t): which files, which views. A view (a crop, a
    flip, a change of light) is a pure function of (seed, file, view number), so that the teacher's
    logits for it can be cached. A run then resumes from its step number alone, the number of
    loader workers cannot change a result, and two methods that differ only in their images are
    paired view by view.

Symbols
    B images of a batch, H W pixels, N files.

Use it
    from support.data import Batches, Views
    from support.images import find_images
    batches = Batches(Views(find_images("photos"), size=(96, 128), seed=0), batch_size=16)
    images, index, _ = batches[0]             # (B, 3, H, W) uint8, (B,) indices of files
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from support.images import (colour_matcher, find_images, load_image, resize_to_cover,
                            resized_crop, to_tensor)
from support.options import pick_workers

MAX_SCALE, JITTER = 1.6, 0.2      # of crops; of brightness and contrast
SOURCES = 2 ** 30                 # bytes of decoded pictures that each process keeps


class Pool(Dataset):
    """Item i is (i, centre view of file i, uint8 (3, H, W), whether the file can be read).

    transform: applied to each picture where it is read, PIL -> PIL, if any.
    """

    def __init__(self, files, size, transform=None):
        self.files, self.size, self.transform = files, tuple(size), transform

    def __len__(self):
        return len(self.files)

    def view(self, index):
        """Return the view of file i that is scored; ValueError says why it cannot be read."""
        image = load_image(self.files[index], self.size)
        if self.transform:
            image = self.transform(image)
        return to_tensor(resized_crop(image, self.size))

    def __getitem__(self, index):
        try:
            return index, self.view(index), True
        except ValueError:
            return index, torch.zeros(3, *self.size, dtype=torch.uint8), False


def open_pool(pool, teacher, size, match_colours=False):
    """Return the `Pool` of a folder or a sequence of files, with matched colours if asked for."""
    files = find_images(pool) if isinstance(pool, str | Path) else list(pool)
    return Pool(files, size, colour_matcher(teacher, size) if match_colours else None)


def iterate(dataset, device, workers=None, **options):
    """Yield what a DataLoader does; a file that cannot be read raises OSError, in one sentence.

    workers: None for as many processes as the device needs. options: of the DataLoader.
    """
    workers = pick_workers(workers, device)
    # Forked processes share a TeacherCache with this one; others would get a copy of it.
    fork = "fork" if workers and sys.platform == "linux" else None
    try:
        yield from DataLoader(dataset, num_workers=workers, multiprocessing_context=fork,
                              pin_memory=device.type == "cuda", **options)
    except ValueError as error:                 # a worker wraps the reason in its own traceback
        reason = str(error).split("\nValueError: ")[-1].strip()
        raise OSError(f"{reason}; restore this file and resume") from error
    except (ConnectionError, EOFError) as error:                     # a worker process has died
        time.sleep(1)          # torch may say so by a signal handler: let it raise its error here
        raise RuntimeError("a DataLoader worker (pid unknown) died") from error


class Views(Dataset):
    """Item (index, view) is a random view of a file to learn from, uint8 (3, H, W).

    files: image paths; view numbers count from 0 without end. A random crop, a flip, and changes
    of brightness and contrast are drawn from (seed, index, view) alone. transform: as in `Pool`.
    labelled: a `labelled.Labelled` over the same files; each item is then (view, target (h, w)
    int64), the target at `label_size`.
    """

    def __init__(self, files, size, seed, transform=None, labelled=None, label_size=None):
        self.files, self.size, self.seed, self.transform = files, tuple(size), seed, transform
        self.labelled, self.label_size = labelled, label_size or size
        self.sources, self.bytes = {}, 0

    def source(self, index):
        """Return the picture (and mask) of a file, no larger than the crops need.

        Decoding and reducing once makes every later crop cheap.
        """
        if index in self.sources:
            return self.sources[index]
        # load_image decodes at twice self.size or more; crops are enlarged by MAX_SCALE at most.
        image = load_image(self.files[index], self.size, upright=not self.labelled)
        mask = self.labelled.mask(index) if self.labelled else None
        H, W = (round(MAX_SCALE * side) for side in self.size)
        if image.height > H and image.width > W:
            image = resize_to_cover(image, (H, W))
            mask = resize_to_cover(mask, (H, W), Image.NEAREST) if mask else None
        if self.transform:
            image = self.transform(image)
        if self.bytes < SOURCES:
            self.sources[index] = image, mask
            self.bytes += 4 * image.width * image.height
        return image, mask

    def __getitem__(self, key):
        index, number = key
        u, v, s, flip, *jitter = np.random.default_rng([self.seed, 2, index, number]).random(6)
        crop = {"scale": MAX_SCALE ** s, "u": u, "v": v}
        image, mask = self.source(index)
        x = np.asarray(resized_crop(image, self.size, **crop)).transpose(2, 0, 1)      # (3, H, W)
        # Contrast around the mean, then brightness, by a table of the 256 possible values.
        contrast, brightness = 1 + JITTER * (2 * np.array(jitter) - 1)
        mean = x.mean()
        table = ((np.arange(256) - mean) * contrast + mean) * brightness
        table = np.clip(table + 0.5, 0, 255).astype(np.uint8)
        x = torch.from_numpy(np.take(table, x[..., ::-1] if flip < 0.5 else x))
        if mask is None:
            return x
        mask = resized_crop(mask, self.label_size, **crop, resample=Image.NEAREST)
        y = self.labelled.classes(mask, index)                                         # (h, w)
        return x, y.flip(1) if flip < 0.5 else y


class Batches(Dataset):
    """Batch t is (images uint8 (B, 3, H, W), index (B,), third), a pure function of (seed, t).

    Every file is used once before any is used again, each time with its next view. third: cached
    teacher logits (B, K, h, w) if there is a `cache` (a TeacherCache, whose views are repeated),
    else the targets (B, h, w) of labelled views, else None.
    """

    def __init__(self, views, batch_size, cache=None):
        self.views, self.batch_size, self.cache = views, batch_size, cache
        self.count = cache.count if cache else 2 ** 31

    def keys(self, t):
        """Return the (index, view) of each item of batch t."""
        N = len(self.views.files)
        positions = range(t * self.batch_size, (t + 1) * self.batch_size)
        orders = {epoch: np.random.default_rng([self.views.seed, 1, epoch]).permutation(N)
                  for epoch in {position // N for position in positions}}
        return [(int(orders[p // N][p % N]), p // N % self.count) for p in positions]

    def __getitem__(self, t):
        keys = self.keys(t)
        index = torch.tensor([i for i, _ in keys])
        if self.cache:
            images, teacher_logits = self.cache[keys]
            return images, index, teacher_logits
        views = default_collate([self.views[key] for key in keys])
        images, targets = views if self.views.labelled else (views, None)
        return images, index, targets
