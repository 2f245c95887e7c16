"""Does a student need whole scenes? Cut the chosen images into tiles and shuffle them.

Idea
    The same files, the same pixels, the same local texture; only the layout of the scene is gone.
    If a student learns as much from these, structure does not matter.

Use it
    python -m experiments.shuffle_tiles --chosen runs/001/chosen.csv --size 96 128 --out tiles
    python distill.py --pool tiles --budget 0 --schedule uniform ...
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.data import find_images, load_image, to_tensor, view
from support.options import Options, one_sentence, option, parse


@dataclass(frozen=True)
class Config(Options):
    chosen: str | None = option(None, "chosen.csv of a run", kind="FILE", required=True)
    size: tuple[int, int] | None = option(None, "height and width of the view to cut",
                                         required=True)
    grid: int = option(4, "tiles a side; 1 leaves the images whole")
    seed: int = option(0, "seed of the order")
    out: str = option("tiles", "folder for the images", kind="FOLDER")


def shuffle_tiles(image, grid, generator):
    """Return the image with its grid x grid tiles in random order: (3, H, W) -> (3, H, W)."""
    C, H, W = image.shape
    h, w = H // grid, W // grid
    tiles = image[:, :h * grid, :w * grid].reshape(C, grid, h, grid, w)         # (C, gy, h, gx, w)
    tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)                          # (gy*gx, C, h, w)
    tiles = tiles[torch.randperm(grid * grid, generator=generator)]
    return tiles.view(grid, grid, C, h, w).permute(2, 0, 3, 1, 4).reshape(C, h * grid, w * grid)


def main(argv=None):
    """Write the shuffled views of the chosen files; return how many."""
    cfg = parse(Config, argv, "Write the chosen images of a run with their tiles shuffled.")
    files = find_images(cfg.chosen)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(cfg.seed)
    for i, name in enumerate(files):
        # Twice the working size, so that random crops of the result are not blurred.
        image = to_tensor(view(load_image(name), (2 * cfg.size[0], 2 * cfg.size[1])))
        image = shuffle_tiles(image, cfg.grid, generator)
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(
            Path(cfg.out) / f"{i:04d}.png")
    print(f"{len(files)} images in {cfg.out}")
    return len(files)


if __name__ == "__main__":
    one_sentence(main)()
