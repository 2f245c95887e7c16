"""The photographs of the tables, rebuilt from public data sets, and the street views of facades.

Idea
    results/pool.csv names what stands behind each of the 2,800 photographs: the data set, the file
    in it, the size it is reduced to (shorter side 224; a smaller one keeps its size). Here Pillow's
    Lanczos filter reduces and JPEG keeps, with Pillow's chroma subsampling, at the quality that
    the tables' photographs have. Which filter made those is not known, so that numbers may differ
    by what a filter does. results/facade.csv does the same for 772 labelled images of
    LabelMeFacade (shorter side 240, quality 90), whose labels become class numbers.

Get the data sets, below one folder
    git clone https://github.com/cvjena/labelmefacade                    # research use
    git clone https://github.com/EliSchwartz/imagenet-sample-images
    git clone https://github.com/BIDS/BSDS500
    git clone https://github.com/HaoPeiwen/multi-label-natural-scene-classification
    VOC2007: the folder VOCdevkit/VOC2007 of Pascal VOC 2007, training and test archive in one

Use it
    python -m experiments.build_pool --downloads downloads --out photos
    python -m experiments.build_pool --list results/facade.csv --quality 90 \\
                                     --downloads downloads --out facade
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from support.data import load_image
from support.options import Options, one_sentence, option, parse
from support.progress import progress
from support.records import read_csv

# Colours of LabelMeFacade's labels, in the order of the class numbers; black is void, 255.
CLASSES = {"building": 0x800000, "car": 0x800080, "door": 0x808000, "pavement": 0x808080,
           "road": 0x804000, "sky": 0x008080, "vegetation": 0x008000, "window": 0x000080}


@dataclass(frozen=True)
class Config(Options):
    list: str = option("results/pool.csv", "what to make, from which files", kind="FILE")
    downloads: str = option("downloads", "folder of the data sets", kind="FOLDER")
    out: str = option("photos", "folder of the photographs", kind="FOLDER")
    quality: int = option(85, "JPEG quality", least=1)


def class_numbers(label):
    """Return a picture of class numbers for an RGB one of class colours."""
    colours = np.asarray(label).astype(int) @ (0x10000, 0x100, 1)       # (H, W)
    numbers = np.full(colours.shape, 255, np.uint8)
    for k, colour in enumerate(CLASSES.values()):
        numbers[colours == colour] = k
    return Image.fromarray(numbers)


def build(rows, downloads, out, quality):
    """Write the listed files. ValueError if one is missing below `downloads`, or of another shape.
    """
    jobs = [(row, Path(downloads, row[1], row[2])) for row in rows]
    missing = [path for _, path in jobs if not path.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(rows)} files are missing; the first is "
                         f"{missing[0]}")
    for (file, _, _, *size), source in progress(jobs, "reducing"):
        (w, h), image, path = map(int, size), load_image(source), Path(out, file)
        if abs(image.width * h - image.height * w) > max(image.size):      # a pixel by rounding
            raise ValueError(f"{source} has {image.width}x{image.height} pixels, not the shape of "
                             f"{w}x{h}, which it is to be reduced to; is it another image?")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            class_numbers(image.resize((w, h), Image.NEAREST)).save(path)
            (Path(out) / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        else:
            image.resize((w, h), Image.LANCZOS).save(path, quality=quality)


def main(argv=None):
    """Build the pool."""
    cfg = parse(Config, argv, __doc__.split("\n")[0])
    rows = read_csv(cfg.list)[1:]
    build(rows, cfg.downloads, cfg.out, cfg.quality)
    print(f"{len(rows)} files written below {cfg.out}")


if __name__ == "__main__":
    one_sentence(main)()
