"""Files and single images: find them, decode them, crop and resize them.

Use it
    from support.images import find_images, load_image, resized_crop, to_tensor
    files = find_images("photos")
    x = to_tensor(resized_crop(load_image(files[0]), (96, 128)))        # uint8 (3, 96, 128)
"""

import csv
import hashlib
import math
import os
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from bn_stats import bn_layers, capture_bn_inputs
from colours import colour_target, transfer

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm",
                  ".jfif", ".avif", ".heic", ".heif", ".jp2")


def read_csv(path):
    """Return the rows of a table, as text."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return [row for row in csv.reader(file) if row]


def walk(folder, seen):
    """Yield the files below a folder, sorted, but not those whose name begins with a dot.

    Links to folders are followed, no folder twice.
    """
    if os.path.realpath(folder) not in seen:
        seen.add(os.path.realpath(folder))
        for path in sorted(Path(folder).iterdir()):
            if not path.name.startswith("."):
                yield from walk(path, seen) if path.is_dir() else [path]


def find_images(folder):
    """Return the image files anywhere below a folder, sorted.

    Instead of a folder: a CSV whose first column is `file`, such as a run's chosen.csv; its files
    are returned in its order.
    FileNotFoundError if there is no such folder or no image in it;
    ValueError if the CSV has no such column.
    """
    if str(folder).lower().endswith(".csv") and Path(folder).is_file():
        rows = read_csv(folder)
        if len(rows) < 2 or rows[0][0] != "file":
            raise ValueError(f"{folder} lists no images; expected that its first column is 'file'")
        return [Path(name) for name, *_ in rows[1:]]
    if not folder or not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; expected a folder of images")
    found = [path for path in walk(folder, set()) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise FileNotFoundError(f"no image below {folder}; expected {', '.join(IMAGE_SUFFIXES)}")
    return found


def load_image(path, at_least=None, upright=True):
    """Return a file as an RGB picture; ValueError names the path if it cannot be read.

    at_least: (H, W) that is large enough; a large JPEG is then decoded at a fraction of its size.
    upright: apply the EXIF orientation; False where a label belongs to the pixels as stored.
    """
    try:
        # Pillow warns of large and unusual pictures: too many lines for a large pool.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if at_least is not None:
                # Twice the target keeps the later reduction antialiased. The orientation is not
                # applied yet, so the longer side is asked for in both directions.
                image.draft("RGB", (2 * max(at_least), 2 * max(at_least)))
            image.load()
            if upright:
                with suppress(Exception):         # damaged EXIF: the pixels are fine
                    image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":             # convert("RGB") would clip them to white
                raise ValueError("more than 8 bits per channel; convert it to 8")
            return image.convert("RGB")
    except Exception as error:                    # decoders raise nearly anything on bad input
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def resized_crop(image, size, scale=1.0, u=0.5, v=0.5, resample=Image.BILINEAR):
    """Return a crop of a PIL picture with the aspect ratio of `size` = (H, W), resized to it.

    scale 1: the largest crop that fits; 2: half of that on each side. u, v in [0, 1]: position,
    0 is left or top, 1 is right or bottom. The default is the centre view that is scored.
    """
    H, W = size
    shrink = min(image.width / W, image.height / H) / scale
    # Rounding may carry W * (width / W) past the width, and Pillow refuses such a box.
    w, h = min(W * shrink, image.width), min(H * shrink, image.height)
    x, y = u * (image.width - w), v * (image.height - h)
    return image.resize((W, H), resample, box=(x, y, x + w, y + h))


def resize_to_cover(image, size, resample=Image.BILINEAR):
    """Return the whole picture, aspect ratio kept, at the scale at which it just covers `size`."""
    scale = max(size[0] / image.height, size[1] / image.width)
    return image.resize((round(image.width * scale), round(image.height * scale)), resample)


def to_tensor(image):
    """Return a PIL picture as uint8: (3, H, W) for RGB, (H, W) for an index mask."""
    array = torch.from_numpy(np.array(image))
    return array.permute(2, 0, 1).contiguous() if array.dim() == 3 else array


def as_input(images, device):
    """Return images on the device as float32 in [0, 1], from uint8 or from float."""
    images = images.to(device, non_blocking=True)
    return images.float() / 255 if images.dtype == torch.uint8 else images


# ---------------------------------------------------------------- --match-colours

def recolour(image, size, mean, cov):
    """Return a PIL picture in the colours `mean` (3,) and `cov` (3, 3), see `colours.transfer`.

    size: (H, W) at which its own colours are measured, that of training: fine grain is averaged
    away.
    """
    small = to_tensor(resize_to_cover(image, size)).unsqueeze(0) / 255               # (1, 3, h, w)
    matrix = transfer(small, mean, cov)[0]                                           # (3, 4)
    matrix[:, 3] *= 255
    return image.convert("RGB", matrix.flatten().tolist())


def colour_matcher(teacher, size):
    """Return a function that gives a PIL picture the colours of the teacher's training images.

    teacher: a network from RGB in [0, 1], in eval mode. size: (H, W) at which colours are measured.
    """
    name, first = next(iter(bn_layers(teacher).items()))

    def response(images):
        with torch.no_grad(), capture_bn_inputs(teacher, {name: first}) as captured:
            teacher(images)
        return captured[name][0]

    mean, cov = colour_target(response, first.running_mean, first.running_var, size)
    return partial(recolour, size=size, mean=mean.cpu(), cov=cov.cpu())


# ---------------------------------------------------------------- which files of a pool are used

def hold_out(files):
    """Return (files to learn from, files to measure agreement on): every twentieth, at most 200."""
    step = max(20, math.ceil(len(files) / 200))
    return [f for i, f in enumerate(files) if i % step], files[::step]


def drop_copies(files, others):
    """Return (the files whose content is in none of the others, one line for each of the rest).

    Of `files`, only those with the size of one of the others are read. A link to nowhere stays:
    scoring will name it.
    """
    def digest(path):
        return hashlib.sha256(Path(path).read_bytes()).digest()

    known = {digest(path): path for path in others if os.path.isfile(path)}
    sizes = {os.path.getsize(path) for path in known.values()}
    twins = {path: known.get(digest(path)) for path in files
             if os.path.isfile(path) and os.path.getsize(path) in sizes}
    reasons = [f"{path}: evaluated on, as {twin}" for path, twin in twins.items() if twin]
    return [path for path in files if not twins.get(path)], reasons
