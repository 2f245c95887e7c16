"""Images to compare with: synthetic ones (DeepInversion) and photos cut into tiles.

Idea
    Without photos, images must be synthesised: noise is optimised until it matches the teacher's
    statistics (`deepinversion`). Tiles are for another question: a photo cut into tiles in random
    order has the same pixels and textures, but no scene.

Equation
    deepinversion  0.01 (d(batch) + 9 d_1(batch)) + entropy + 1e-4 TV + 1e-5 ||x||,  d as in
                   bn_stats.py ("l2"), of the statistics of a whole batch; d_1 its first layer

Paper
    DeepInversion (Yin et al., CVPR 2020). Its images have a class label, and a scene has none: the
    teacher's mean entropy is minimised instead, so that every pixel belongs to some class.

Symbols
    B images, C channels, L layers, H W pixels.

Use it
    python -m experiments.generators --method deepinversion --teacher T.pt --steps 200 \\
                                     --count 400 --out runs/inverted
    python -m experiments.generators --method tiles --teacher T.pt --images runs/001/chosen.csv \\
                                     --out runs/tiles          # with --grid 1, images stay whole
    python distill.py --teacher T.pt --pool runs/tiles --budget 0 --schedule uniform
"""

from dataclasses import dataclass

import torch
from torchvision.utils import save_image

from bn_stats import bn_distance, bn_layers, capture_bn_inputs
from experiments.baselines import mean_entropy
from models import freeze
from support import checkpoint, records
from support.images import find_images, load_image, resized_crop, to_tensor
from support.options import Running, one_sentence, option, pick_device
from support.progress import progress


def bn_loss(captured, layers):
    """Return how far a batch as a whole is from the running statistics, first layer x10: scalar.

    Of images of one size, the variance of a batch is exactly the mean variance within its images
    plus the variance between their means.
    """
    batch = {name: (mean.mean(dim=0, keepdim=True),                               # (1, C)
                    var.mean(dim=0, keepdim=True) + mean.var(dim=0, correction=0, keepdim=True))
             for name, (mean, var) in captured.items()}
    d = bn_distance(batch, layers)[0]                                             # (L,)
    return d.sum() + 9 * d[0]


def deepinversion(teacher, images, steps):
    """Return images (B, 3, H, W) in [0, 1] changed to match the teacher's statistics as a batch."""
    layers, (H, W) = bn_layers(teacher), images.shape[-2:]
    images = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.05)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps)           # linear to 0
    for _ in progress(range(steps), "DeepInversion"):
        # Shifted by up to an eighth and flipped: no pixel can adapt to its position.
        dy, dx = (torch.randint(-(side // 8), side // 8 + 1, ()).item() for side in (H, W))
        x = images.roll((dy, dx), (2, 3))
        x = x.flip(3) if torch.rand(()) < 0.5 else x
        with capture_bn_inputs(teacher, layers) as captured:
            entropy = mean_entropy(teacher(x)).mean()
        x = (x - teacher.mean) / teacher.std
        variation = x.diff(dim=2).norm() + x.diff(dim=3).norm()
        loss = 0.01 * bn_loss(captured, layers) + entropy + 1e-4 * variation + 1e-5 * x.norm()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        images.data.clamp_(0, 1)
    return images.detach()


def shuffle_tiles(image, grid):
    """Return an image with its grid x grid tiles in random order: (3, H, W) -> (3, H, W)."""
    h, w = (side // grid for side in image.shape[1:])
    tiles = image[:, :h * grid, :w * grid].unfold(1, h, h).unfold(2, w, w)      # (3, gy, gx, h, w)
    tiles = tiles.flatten(1, 2)[:, torch.randperm(grid * grid)].unflatten(1, (grid, grid))
    return tiles.transpose(2, 3).reshape(3, grid * h, grid * w)


@dataclass(frozen=True)
class Config(Running):
    method: str = option("deepinversion", "how to make images", ("deepinversion", "tiles"))
    teacher: str | None = option(None, "teacher.pt of train_teacher.py", metavar="FILE")
    images: str | None = option(None, "tiles: what to cut, a folder or a run's chosen.csv")
    grid: int = option(4, "tiles: number per side; 1 leaves the images whole", min=1)
    count: int = option(100, "deepinversion: number of images")
    steps: int = option(1500, "deepinversion: updates of each batch", min=1)
    batch_size: int = option(16, "deepinversion: images at a time", min=1)


def make(cfg, out):
    """Make in the folder `out` the images that `cfg` asks for; return the metrics."""
    timer = records.Timer()
    teacher = freeze(checkpoint.load_model(cfg.teacher)).to(pick_device(cfg.device))
    size = teacher.image_size
    torch.manual_seed(cfg.seed)
    if cfg.method == "tiles":
        for i, path in enumerate(find_images(cfg.images)):
            # Twice the size that is used, so that random crops are not blurred.
            image = to_tensor(resized_crop(load_image(path), [2 * side for side in size])) / 255
            save_image(shuffle_tiles(image, cfg.grid), out / f"{i:04d}.png")
    else:
        for first in range(0, cfg.count, cfg.batch_size):
            noise = torch.rand(min(cfg.batch_size, cfg.count - first), 3, *size)
            images = deepinversion(teacher, noise.to(teacher.mean.device), cfg.steps)
            for i, image in enumerate(images, first):
                save_image(image, out / f"{i:04d}.png")
    timer("making")
    metrics = {"seconds": timer["making"][0], "processor_seconds": timer["making"][1]}
    checkpoint.save_json(metrics, out / "metrics.json")
    print(f"{cfg.method}: {metrics['seconds']:.0f} s, written to {out}")
    return metrics


def main(argv=None):
    """Make images from the command line; return the metrics."""
    return records.in_folder(make, Config, argv, __doc__.split("\n")[0])


if __name__ == "__main__":
    one_sentence(main)()
