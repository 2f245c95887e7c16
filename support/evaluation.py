"""What the command evaluate.py needs: its options, and predicted masks as files.

Use it
    save_mask(mask, image, Path("masks/a.png"), colours, overlay=True)     # mask (H, W) of classes
"""

from dataclasses import dataclass

from PIL import Image

from support.checkpoint import atomic
from support.labelled import Labels
from support.options import inputs, labels, output, running


@dataclass(frozen=True)
class Config(Labels):
    """The options of evaluate.py."""

    checkpoint: str | None = inputs(None, "student.pt, teacher.pt or a state dict", metavar="FILE")
    model: str | None = inputs(None, "network of a state dict: a name, or FILE.py:FUNCTION")
    image_size: tuple[int, int] | None = inputs(None, "size to resize to (default: its own)")
    split: str = labels("val", "part of it; 'val:0016E5,0006R0' keeps those sequences")
    images: str | None = output(None, "write masks for these images instead", metavar="FOLDER")
    overlay: bool = output(False, "also blend each mask into its image")
    out: str | None = output(None, "file for metrics (JSON); folder for masks", metavar="PATH")
    device: str = running("auto", "cpu, cuda, cuda:1 ...; auto: a GPU if there is one")
    workers: int | None = running(None, "processes that load images (default: 4 with a GPU)")


def save_mask(mask, image, path, colours, overlay=False):
    """Write classes (H, W) as an index PNG with a palette of RGB colours.

    overlay: also write a JPEG of mask and PIL image, blended half and half.
    """
    png = Image.fromarray(mask.byte().cpu().numpy())
    png.putpalette([value for colour in colours for value in colour])
    with atomic(path) as temporary:
        png.save(temporary, format="PNG")
    if overlay:
        with atomic(path.with_suffix(".overlay.jpg")) as temporary:
            Image.blend(image, png.convert("RGB"), 0.5).save(temporary, format="JPEG")
