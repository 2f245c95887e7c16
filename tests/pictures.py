"""Small pictures and folders of labelled ones, that several test files write."""

import numpy as np
from PIL import Image


def coordinates(width, height, blue=0):
    """Return a picture whose red is x and whose green is y."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, blue)], 2).astype(np.uint8))


def write(path, picture, **how):
    """Save a picture, or an array as greyscale; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(path, **how)
    return path


def mask(*rows):
    return np.array(rows, dtype=np.uint8)


def folder(root, picture, labels, name="a.png"):
    """Write images/a.png and labels/a.png; return the root."""
    write(root / "images" / name, picture)
    write(root / "labels" / name, labels)
    return root
