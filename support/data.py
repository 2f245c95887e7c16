"""Photographs in, tensors out: files, views, the unlabelled pool, and stateless batches.

Idea
    Batch t of a run is a pure function of (seed, t): which images, which views. A view (a crop, a
    flip, a change of light) is one of (seed, slot, number), so that the teacher's answer to it can
    be kept. A run then resumes from its step alone, the number of loader workers cannot change a
    result, and two methods that differ only in their images are paired view by view.

Symbols
    B images of a batch, H W pixels, N images.

Use it
    from support.data import Batches, Pool, Views, find_images
    batches = Batches(Views(files, size=(96, 128), seed=0), batch_size=16)
    images, slots, _ = batches[t]             # (B, 3, H, W) uint8, (B,) indices of files
"""

import csv
import hashlib
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm",
                  ".jfif", ".avif", ".heic", ".heif", ".jp2")


# ---------------------------------------------------------------- files and single images

def read_csv(path):
    """Return the rows of a table, as text."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return list(csv.reader(file))


def find_images(folder):
    """Return the image files anywhere below a folder, sorted. Links to folders are not followed.

    Instead of a folder: a CSV whose first column is `file`, such as a run's chosen.csv; its files
    are returned in its order. Raises FileNotFoundError if there is no such folder or no image in
    it; ValueError if the CSV has no such column.
    """
    if str(folder).lower().endswith(".csv") and Path(folder).is_file():
        rows = [row for row in read_csv(folder) if row]
        if len(rows) < 2 or rows[0][0] != "file":
            raise ValueError(f"{folder} lists no images; expected that its first column is 'file'")
        return [Path(name) for name, *_ in rows[1:]]
    if not folder or not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; expected a folder of images")
    found = sorted(path for path in Path(folder).rglob("*")
                   if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))
    if not found:
        raise FileNotFoundError(f"no image below {folder}; expected {', '.join(IMAGE_SUFFIXES)}")
    return found


def load_image(path, at_least=None, upright=True):
    """Return a file as an RGB picture; ValueError names the path if it cannot be read.

    at_least: (H, W) that will do; a large JPEG is then decoded at a fraction of its size. upright:
    turned as its camera was held; False where a label goes with the pixels as they are stored.
    """
    try:
        # Pillow warns of large and of odd pictures, which would be a flood over a wild pool.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if at_least is not None:
                # Twice the target keeps the later reduction antialiased. Orientation is not
                # applied yet, so ask for the longer side both ways.
                image.draft("RGB", (2 * max(at_least), 2 * max(at_least)))
            if upright:
                ImageOps.exif_transpose(image, in_place=True)       # a copy of a large one is dear
            if image.mode[0] in "IF":             # convert("RGB") would clip them to white
                raise ValueError("more than 8 bits a pixel; convert it to 8")
            return image.convert("RGB")
    except Exception as error:                      # decoders raise nearly anything on bad input
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def view(image, size, scale=1.0, u=0.5, v=0.5, resample=Image.BILINEAR):
    """Return a crop of a PIL picture with the shape of `size` = (H, W), resized to it.

    At scale 1 the crop is as large as fits, at scale 2 half that on each side. u, v in [0, 1] place
    it: 0 left or top, 1 right or bottom. The default is the view in which pool images are scored.
    """
    H, W = size
    shrink = min(image.width / W, image.height / H) / scale
    # Rounding may carry W * (width / W) past the width, and Pillow refuses such a box.
    w, h = min(W * shrink, image.width), min(H * shrink, image.height)
    x, y = u * (image.width - w), v * (image.height - h)
    return image.resize((W, H), resample, box=(x, y, x + w, y + h))


def whole_view(image, size, resample=Image.BILINEAR):
    """Return the whole picture, its shape kept, at the scale at which it just covers `size`."""
    scale = max(size[0] / image.height, size[1] / image.width)
    return image.resize((round(image.width * scale), round(image.height * scale)), resample)


def to_tensor(image):
    """Return a PIL picture as uint8: (3, H, W) for RGB, (H, W) for an index mask."""
    array = torch.from_numpy(np.array(image))
    return array.permute(2, 0, 1).contiguous() if array.dim() == 3 else array


def hold_out(files):
    """Return (files to learn from, files to measure agreement on): every twentieth, at most 200."""
    step = max(20, -(-len(files) // 200))
    if len(files) < step:
        raise ValueError(f"the pool has {len(files)} images; --dataset none needs at least {step}")
    return [f for i, f in enumerate(files) if i % step], files[::step]


def leave_out(files, others):
    """Return (the files that are none of the others by content, the rest as lines of skipped.csv).

    Only files whose sizes agree are read. A link to nowhere stays: the scan will name it.
    """
    def digest(path):
        return hashlib.sha256(Path(path).read_bytes()).digest()

    others = [path for path in others if os.path.isfile(path)]
    sizes = set(map(os.path.getsize, others))
    alike = [path for path in files if os.path.isfile(path) and os.path.getsize(path) in sizes]
    known = {digest(path): path for path in others} if alike else {}
    twins = {path: known[key] for path, key in zip(alike, map(digest, alike), strict=True)
             if key in known}
    return ([path for path in files if path not in twins],
            [f"{path}: the same image as {other}, which is evaluated on"
             for path, other in twins.items()])


class Pool(Dataset):
    """Item i is (i, centre view of file i, uint8 (3, H, W), whether the file can be read).

    prepare: what is done to each picture where it is read, PIL -> PIL, if anything.
    """

    def __init__(self, files, size, prepare=None):
        self.files, self.size, self.prepare = files, tuple(size), prepare

    def __len__(self):
        return len(self.files)

    def view(self, index):
        """Return the view in which file i is scored; ValueError says why it cannot be read."""
        image = load_image(self.files[index], self.size)
        return to_tensor(view(self.prepare(image) if self.prepare else image, self.size))

    def __getitem__(self, index):
        try:
            return index, self.view(index), True
        except ValueError:
            return index, torch.zeros(3, *self.size, dtype=torch.uint8), False


# ---------------------------------------------------------------- loading

def loaded(loader):
    """Yield what a DataLoader does; a file that cannot be read raises OSError, in one sentence."""
    try:
        yield from loader
    except ValueError as error:                 # a worker wraps the reason in its own traceback
        reason = str(error).split("\nValueError: ")[-1].strip()
        raise OSError(f"{reason}; put this file right and resume") from error
    except (ConnectionError, EOFError) as error:             # one of the ways to notice its death
        time.sleep(1)                    # torch's own is a signal, which would strike anywhere else
        raise RuntimeError("a DataLoader worker died") from error


# ---------------------------------------------------------------- stateless training batches

class Views(Dataset):
    """Item (slot, view) is a view of a file to learn from, uint8 (3, H, W).

    files: image paths; slots are indices into them, views count from 0 without end. A random crop
    (scale 1 to max_scale), a flip, and brightness and contrast changed by up to `jitter` are drawn
    from (seed, slot, view), nothing else. labelled: a `labelled.Labelled` over the same files makes
    it (view, target (h, w) int64), the target at `label_size`. prepare: as in `Pool`.
    """

    def __init__(self, files, size, seed, max_scale=1.6, jitter=0.2, prepare=None, labelled=None,
                 label_size=None):
        self.files, self.size, self.seed, self.prepare = files, tuple(size), seed, prepare
        self.max_scale, self.jitter = max_scale, jitter
        self.labelled, self.label_size = labelled, label_size or size
        self.sources, self.bytes = {}, 0

    def source(self, slot):
        """Return the picture (and mask) of a file, no larger than the crops need, kept in memory.

        Reducing once makes every later crop cheap. Each process keeps at most 1 GB and reads the
        rest anew.
        """
        if slot in self.sources:
            return self.sources[slot]
        need = [round(side * self.max_scale) for side in self.size]
        # Decoded at twice this size or more, which max_scale stays below.
        image = load_image(self.files[slot], self.size, upright=not self.labelled)
        mask = self.labelled.mask(slot) if self.labelled else None
        scale = max(need[0] / image.height, need[1] / image.width)
        if scale < 1:
            small = (round(image.width * scale), round(image.height * scale))
            image = image.resize(small, Image.BILINEAR)
            mask = mask and mask.resize(small, Image.NEAREST)
        image = self.prepare(image) if self.prepare else image
        if self.bytes < 2 ** 30:
            self.sources[slot] = image, mask
            self.bytes += 4 * image.width * image.height
        return image, mask

    def __getitem__(self, key):
        slot, number = key
        u, v, s, flip, *jitter = np.random.default_rng([self.seed, 2, slot, number]).random(6)
        crop = {"scale": self.max_scale ** s, "u": u, "v": v}
        image, mask = self.source(slot)
        x = np.asarray(view(image, self.size, **crop)).transpose(2, 0, 1)           # (3, H, W)
        # Contrast around the mean, then brightness, looked up for the 256 values that there are.
        contrast, brightness = 1 + self.jitter * (2 * np.array(jitter) - 1)
        mean = x.mean()
        table = ((np.arange(256) - mean) * contrast + mean) * brightness
        table = np.clip(table + 0.5, 0, 255).astype(np.uint8)
        x = torch.from_numpy(np.take(table, x[..., ::-1] if flip < 0.5 else x))
        if mask is None:
            return x
        y = self.labelled.classes(view(mask, self.label_size, **crop, resample=Image.NEAREST), slot)
        return x, y.flip(1) if flip < 0.5 else y


class Batches(Dataset):
    """Batch t is (images (B, 3, H, W), uint8, slots (B,), ...), a pure function of (seed, t).

    Every file is used once before any is used again, and each time with its next view: one of
    those in `kept`, an `teacher_cache.Kept`, or without end. Behind the slots come the teacher's answers
    (B, K, h, w) that were kept, the targets (B, h, w) of labelled views, or None.
    """

    def __init__(self, views, batch_size, kept=None):
        self.views, self.batch_size, self.kept = views, batch_size, kept
        self.count = kept.count if kept else 2 ** 31

    def __len__(self):
        return 2 ** 31                                   # as many as anyone asks for

    def keys(self, t):
        """Return the (slot, view) of each place in batch t."""
        N, places = len(self.views.files), range(t * self.batch_size, (t + 1) * self.batch_size)
        orders = {epoch: np.random.default_rng([self.views.seed, 1, epoch]).permutation(N)
                  for epoch in {place // N for place in places}}
        return [(int(orders[place // N][place % N]), place // N % self.count) for place in places]

    def __getitem__(self, t):
        keys = self.keys(t)
        slots = torch.tensor([slot for slot, _ in keys])
        if self.kept:
            images, answers = self.kept[keys]
            return images, slots, answers
        views = [self.views[key] for key in keys]
        if not self.views.labelled:
            return torch.stack(views), slots, None
        images, targets = zip(*views, strict=True)
        return torch.stack(images), slots, torch.stack(targets)
