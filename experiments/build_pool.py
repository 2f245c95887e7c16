"""Rebuild the photos of the tables, and the labelled facades, from public data sets.

Idea
    results/pool.csv lists the source of each of the 2,800 photos: data set, file, and the size to
    reduce it to (shorter side 224; smaller photos keep their size). They are reduced with Pillow's
    Lanczos filter and saved as JPEG with the tables' quality. The filter that the tables' photos
    were made with is not known, so results may differ slightly. results/facade.csv does the same
    for 772 labelled images of LabelMeFacade (shorter side 240, quality 90).

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

from support.images import load_image, read_csv
from support.options import Options, one_sentence, option, parse
from support.progress import progress

# Colours of LabelMeFacade's labels, in the order of the classes; black is void, 255.
CLASSES = {"building": 0x800000, "car": 0x800080, "door": 0x808000, "pavement": 0x808080,
           "road": 0x804000, "sky": 0x008080, "vegetation": 0x008000, "window": 0x000080}


@dataclass(frozen=True)
class Config(Options):
    list: str = option("results/pool.csv", "which files to make, from which", metavar="FILE")
    downloads: str = option("downloads", "folder of the data sets", metavar="FOLDER")
    out: str = option("photos", "folder for the photos", metavar="FOLDER")
    quality: int = option(85, "JPEG quality", min=1)


def index_mask(label):
    """Return the index mask of an RGB picture of class colours, a PIL picture."""
    colours = np.asarray(label).astype(int) @ (0x10000, 0x100, 1)                        # (H, W)
    mask = np.full(colours.shape, 255, np.uint8)
    for k, colour in enumerate(CLASSES.values()):
        mask[colours == colour] = k
    return Image.fromarray(mask)


def main(argv=None):
    """Write the listed files; ValueError if a source is missing or has another aspect ratio."""
    cfg = parse(Config, argv, __doc__.split("\n")[0])
    rows = read_csv(cfg.list)[1:]
    missing = [row for row in rows if not Path(cfg.downloads, *row[1:3]).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {len(rows)} files are missing below {cfg.downloads}, "
                         f"the first is {'/'.join(missing[0][1:3])}; see experiments/build_pool.py")
    for name, data_set, source, *size in progress(rows, "reducing"):
        w, h = map(int, size)
        image, path = load_image(Path(cfg.downloads, data_set, source)), Path(cfg.out, name)
        if abs(image.width * h - image.height * w) > max(image.size):      # a pixel by rounding
            raise ValueError(f"{source} has {image.width}x{image.height} pixels, which is not the "
                             f"aspect ratio of {w}x{h}; is it another image?")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            index_mask(image.resize((w, h), Image.NEAREST)).save(path)
            Path(cfg.out, "classes.txt").write_text("\n".join(CLASSES) + "\n")
        else:
            image.resize((w, h), Image.LANCZOS).save(path, quality=cfg.quality)
    print(f"{len(rows)} files written below {cfg.out}")


if __name__ == "__main__":
    one_sentence(main)()
