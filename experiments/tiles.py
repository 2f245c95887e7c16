"""Photos cut into tiles: does a student need whole scenes, or only their textures?

Idea
    A photo that is cut into tiles, which are put together in random order, has the same pixels and
    textures, but no scene. A student of such photos shows what layout adds.

Use it
    python -m experiments.tiles --images runs/001/chosen.csv --out runs/tiles   # grid 1: whole ones
    python distill.py --teacher T.pt --pool runs/tiles --budget 0 --schedule uniform
"""

from dataclasses import dataclass

import torch
from torchvision.utils import save_image

from support import records
from support.images import find_images, load_image, resized_crop, to_tensor
from support.options import Running, one_sentence, option


def shuffle_tiles(image, grid):
    """Return an image with its grid x grid tiles in random order: (3, H, W) -> (3, H, W)."""
    h, w = (side // grid for side in image.shape[1:])
    tiles = image[:, :h * grid, :w * grid].unfold(1, h, h).unfold(2, w, w)      # (3, gy, gx, h, w)
    tiles = tiles.flatten(1, 2)[:, torch.randperm(grid * grid)].unflatten(1, (grid, grid))
    return tiles.transpose(2, 3).reshape(3, grid * h, grid * w)


@dataclass(frozen=True)
class Config(Running):
    images: str | None = option(None, "photos to cut: a folder, or a run's chosen.csv")
    grid: int = option(4, "number of tiles per side; 1 leaves the photos whole", min=1)
    image_size: tuple[int, int] | None = option((192, 256), "size of the images that are written")


def make(cfg, out):
    """Write a PNG of each photo's centre crop, cut into shuffled tiles, to the folder `out`."""
    torch.manual_seed(cfg.seed)
    for i, path in enumerate(find_images(cfg.images)):
        image = to_tensor(resized_crop(load_image(path), cfg.image_size)) / 255         # (3, H, W)
        save_image(shuffle_tiles(image, cfg.grid), out / f"{i:04d}.png")
    print(f"photos in {cfg.grid}x{cfg.grid} tiles: {out}")


def main(argv=None):
    """Cut photos from the command line."""
    return records.in_folder(make, Config, argv, __doc__.split("\n")[0])


if __name__ == "__main__":
    one_sentence(main)()
