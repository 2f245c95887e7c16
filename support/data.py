"""Photographs in, tensors out: files, views, the unlabelled pool, and stateless batches.

Idea
    Batch t of a run is a pure function of (seed, t): which images, which crops, which jitter. A run
    then resumes from its step alone, the number of loader workers cannot change a result, and two
    methods that differ only in their images are paired crop by crop.

Symbols
    B images of a batch, H W pixels, N images.

Use it
    from support.data import Batches, Pool, find_images
    batches = Batches(files, size=(96, 128), batch_size=16, seed=0)
    images, slots = batches[t]                # (B, 3, H, W) float in [0, 1], (B,) indices of files
"""

import csv
import hashlib
import os
import signal
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}


# ---------------------------------------------------------------- files and single images

def find_images(folder):
    """Return the image files anywhere below a folder, sorted. Links to folders are not followed.

    Instead of a folder: a CSV whose first column is `file`, such as a run's chosen.csv; its files
    are returned in its order. Raises FileNotFoundError if there is no such folder or no image in
    it, or if a listed file is missing; ValueError if the CSV has no such column.
    """
    if str(folder).lower().endswith(".csv") and Path(folder).is_file():
        return listed_images(folder)
    if not folder or not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; expected a folder of images")
    found = sorted(Path(root) / name for root, _, names in os.walk(folder) for name in names
                   if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."))
    if not found:
        raise FileNotFoundError(f"no image below {folder}; expected files that end in "
                                f"{', '.join(sorted(IMAGE_SUFFIXES))}")
    return found


def listed_images(path):
    """Return the files that the first column, `file`, of a CSV lists; see `find_images`."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2 or rows[0][0] != "file":
        raise ValueError(f"{path} lists no images; expected a CSV whose first column is headed "
                         "'file', such as a run's chosen.csv")
    for name, *_ in rows[1:]:
        if not Path(name).is_file():
            raise FileNotFoundError(f"{path} lists {name}, which is not there; a relative path "
                                    "counts from the working folder")
    return [Path(name) for name, *_ in rows[1:]]


def load_image(path, at_least=None):
    """Return a file as an upright RGB picture; ValueError names the path if it cannot be read.

    at_least: (H, W) that will do; a large JPEG is then decoded at a fraction of its size.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("not a regular file")                     # a pipe would be waited for
        # Pillow warns of large and of odd pictures, which would be a flood over a wild pool.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if at_least is not None:
                # Twice the target keeps the later reduction antialiased. Orientation is not
                # applied yet, so ask for the longer side both ways.
                image.draft("RGB", (2 * max(at_least), 2 * max(at_least)))
            ImageOps.exif_transpose(image, in_place=True)           # a copy of a large one is dear
            if image.mode.startswith("I;16"):       # convert("RGB") would clip 16 bits to white
                image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
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
        raise ValueError(f"the pool has {len(files)} images; --dataset none needs at least {step}, "
                         "because it holds some out to measure agreement on")
    return [f for i, f in enumerate(files) if i % step], files[::step]


def leave_out(files, others):
    """Return (the files that are none of the others by content, the rest as lines of skipped.csv).

    Only files whose sizes agree are read. One that cannot be read stays: the scan will name it.
    """
    def each(read, paths):
        found = {}
        for path in paths:
            with suppress(OSError):
                found[path] = read(path)
        return found

    def digest(path):
        return hashlib.sha256(Path(path).read_bytes()).digest()

    sizes = set(each(os.path.getsize, others).values())
    alike = [path for path, size in each(os.path.getsize, files).items() if size in sizes]
    known = {key: path for path, key in each(digest, others if alike else []).items()}
    twins = {path: known[key] for path, key in each(digest, alike).items() if key in known}
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

def deaf(worker):
    """Let a loading process ignore Ctrl-C, which all processes get: the main one decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loaded(loader):
    """Yield what a DataLoader does; a file that cannot be read raises OSError, in one sentence."""
    try:
        yield from loader
    except ValueError as error:                 # a worker wraps the reason in its own traceback
        reason = str(error).split("\nValueError: ")[-1].strip()
        raise OSError(f"{reason}; put this file right and resume") from error
    except (ConnectionError, EOFError) as error:             # one of the ways to notice its death
        raise RuntimeError("a DataLoader worker died") from error


# ---------------------------------------------------------------- stateless training batches

class Batches(Dataset):
    """Batch t is (images (B, 3, H, W) float in [0, 1], slots (B,)), a pure function of (seed, t).

    files: image paths; slots are indices into them. Every file is used once before any is used
    again. A random crop (scale 1 to max_scale), a flip, and brightness and contrast changed
    by up to `jitter` are drawn from (seed, t, place in the batch), not from the file. labelled: a
    `labelled.Labelled` over the same files adds targets (B, H, W). prepare: as in `Pool`.
    """

    def __init__(self, files, size, batch_size, seed, max_scale=1.6, jitter=0.2, labelled=None,
                 prepare=None):
        self.files, self.size, self.batch_size, self.seed = files, tuple(size), batch_size, seed
        self.max_scale, self.jitter, self.labelled = max_scale, jitter, labelled
        self.prepare, self.cache, self.cached_bytes = prepare, {}, 0

    def __len__(self):
        return 2 ** 31                                   # as many as anyone asks for

    def slots(self, t):
        """Return the file indices of batch t: (B,), int64."""
        places = np.arange(t * self.batch_size, (t + 1) * self.batch_size)
        epochs, offsets = np.divmod(places, len(self.files))
        orders = {epoch: np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.files))
                  for epoch in np.unique(epochs)}
        return torch.tensor([orders[e][o] for e, o in zip(epochs, offsets, strict=True)])

    def source(self, slot):
        """Return the picture (and mask) of a file, no larger than the crops need, kept in memory.

        Reducing once makes every later crop cheap. Each process keeps at most 1 GB and reads the
        rest anew.
        """
        if slot in self.cache:
            return self.cache[slot]
        need = [round(side * self.max_scale) for side in self.size]
        image = load_image(self.files[slot], need)
        mask = self.labelled.mask(slot) if self.labelled else None
        scale = max(need[0] / image.height, need[1] / image.width)
        if scale < 1:
            small = (round(image.width * scale), round(image.height * scale))
            image = image.resize(small, Image.BILINEAR)
            mask = mask and mask.resize(small, Image.NEAREST)
        image = self.prepare(image) if self.prepare else image
        if self.cached_bytes < 2 ** 30:
            self.cache[slot] = image, mask
            self.cached_bytes += 4 * image.width * image.height
        return image, mask

    def __getitem__(self, t):
        slots = self.slots(t)
        images, targets = [], []
        for place, slot in enumerate(slots.tolist()):
            rng = np.random.default_rng([self.seed, 2, t, place])
            u, v, s, brightness, contrast = rng.random(5)
            flip = rng.random() < 0.5
            crop = {"scale": self.max_scale ** s, "u": u, "v": v}
            image, mask = self.source(slot)
            x = to_tensor(view(image, self.size, **crop)).float() / 255             # (3, H, W)
            contrast, brightness = 1 + self.jitter * (2 * np.array([contrast, brightness]) - 1)
            x = (((x - x.mean()) * contrast + x.mean()) * brightness).clamp(0, 1)
            images.append(x.flip(2) if flip else x)
            if mask is not None:
                y = view(mask, self.size, **crop, resample=Image.NEAREST)
                y = self.labelled.classes(y, slot)                                  # (H, W)
                targets.append(y.flip(1) if flip else y)
        batch = (torch.stack(images), slots)
        return (*batch, torch.stack(targets)) if targets else batch
