"""What the command evaluate.py needs: its options, and predicted masks as files.

Use it
    save_mask(mask, image, Path("masks/a.png"), colours, overlay=True)     # mask (H, W) of classes
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from support.checkpoint import atomic
from support.labelled import Labels
from support.options import option

inputs, output = partial(option, group="inputs"), partial(option, group="output")


@dataclass(frozen=True)
class Config(Labels):
    """The options of evaluate.py."""

    checkpoint: str | None = inputs(None, "student.pt, teacher.pt or another state dict",
                                    metavar="FILE")
    model: str | None = inputs(None, "network of a state dict: a name, or FILE.py:FUNCTION",
                               metavar="NAME")
    image_size: tuple[int, int] | None = inputs(None, "size to resize to (default: its own)")
    split: str = option("val", "part of it; 'val:0016E5,0006R0' keeps those sequences",
                        group="labels")
    images: str | None = output(None, "instead of scoring: write masks for this folder of images",
                                metavar="FOLDER")
    overlay: bool = output(False, "also blend each mask into its image")
    out: str | None = output(None, "file for metrics (JSON); folder for masks", metavar="PATH")
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto: a GPU if there is one",
                         group="running")
    workers: int | None = option(None, "processes that load images (default: 4 with a GPU, else "
                                 "0)", group="running")


def mask_names(files):
    """Return a PNG name for each path: a.png for a.jpg, or, if any two would clash, a.jpg.png."""
    short = [path.with_suffix(".png") for path in files]
    if len(set(short)) == len(files):
        return short
    return [path.with_name(f"{path.name}.png") for path in files]


def save_mask(mask, image, path, colours, overlay=False):
    """Write classes (H, W) as an index PNG with a palette of RGB colours.

    overlay: also write a JPEG of mask and PIL image, blended half and half.
    """
    png = Image.fromarray(mask.byte().cpu().numpy())
    png.putpalette(np.array(colours, dtype=np.uint8).flatten().tolist())
    with atomic(path) as temporary:
        png.save(temporary, format="PNG")
    if overlay:
        with atomic(path.with_suffix(".overlay.jpg")) as temporary:
            Image.blend(image, png.convert("RGB"), 0.5).save(temporary, format="JPEG")
