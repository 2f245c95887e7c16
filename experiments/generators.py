"""Folders of images to compare with, DFAD, and an oracle: `baselines.py` at work.

Idea
    Writes what `distill.py` then takes for a pool: images of DeepInversion, or the chosen
    photographs cut into tiles and shuffled (the same pixels and texture; only the layout of the
    scene is gone); or distils by DFAD, which needs no pool. The oracle asks the opposite: how much
    does choosing by running statistics lose against choosing by exact statistics of the real
    training images?

Use it
    python -m experiments.generators --method deepinversion --teacher T.pt --steps 200 \\
                                     --count 400 --out runs/inverted
    python -m experiments.generators --method tiles --teacher T.pt --images runs/001/chosen.csv \\
                                     --out runs/tiles
    python distill.py --teacher T.pt --pool runs/tiles --budget 0 --schedule uniform

    python -m experiments.generators --method dfad --teacher T.pt --steps 1500 --out runs/dfad
    python evaluate.py --checkpoint runs/dfad/student.pt --dataset camvid --data-root DIR

    python -m experiments.generators --method oracle --teacher T.pt --images DIR --out runs/measured
    python distill.py --teacher runs/measured/teacher.pt --pool DIR --dry-run --out runs/oracle
    python distill.py --teacher T.pt --pool runs/oracle/chosen.csv --budget 0 --schedule uniform
"""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.utils import save_image

import distill
from bn_stats import bn_layers, capture_bn_inputs
from evaluate import as_input
from experiments.baselines import batch_statistics, deepinversion, dfad, new_generator
from models import MODELS, freeze
from support import records
from support.checkpoint import load_model, save_json, save_model
from support.data import Pool, find_images, load_image, to_tensor, view
from support.options import Options, one_sentence, option, parse, pick_amp, pick_device
from support.progress import progress


@dataclass(frozen=True)
class Config(Options):
    method: str = option("deepinversion", "where images come from",
                         choices=("deepinversion", "tiles", "dfad", "oracle"))
    teacher: str | None = option(None, "teacher.pt of train_teacher.py", kind="FILE", required=True)
    out: str | None = option(None, "new folder for what is made", kind="FOLDER", required=True)
    images: str | None = option(None, "tiles: chosen.csv of a run; oracle: training images",
                                kind="PATH")
    grid: int = option(4, "tiles: how many a side; 1 leaves the images whole", least=1)
    count: int = option(100, "deepinversion: number of images")
    steps: int = option(1500, "dfad: student updates; deepinversion: updates of each batch")
    lr: float = option(0.1, "dfad: the student's highest learning rate")
    student_model: str = option("resnet_tiny", "dfad: student network", choices=MODELS)
    amp: str = option("auto", "dfad: mixed precision", choices=("auto", "bfloat16", "off"))
    batch_size: int = option(16, "images at a time", least=1)
    seed: int = option(0, "seed of weights and noise")
    device: str = option("auto", "cpu, cuda or auto")


@torch.no_grad()
def measured(teacher, files, size):
    """Return a copy of the teacher whose running statistics are those of these images, measured.

    As pool images are scored: centre views, eval mode. Each layer's weight and bias make up for
    the new statistics, so that the copy computes what the teacher does, beyond rounding. Raises
    ValueError for an image that cannot be read.
    """
    layers, rows, model = bn_layers(teacher), {}, copy.deepcopy(teacher)
    pool = Pool(files, size)
    for numbers, images, readable in progress(DataLoader(pool, 16), "measuring"):
        for number in numbers[~readable].tolist():
            pool.view(number)                                    # raises, and says why
        with capture_bn_inputs(teacher, layers) as captured:
            teacher(as_input(images, teacher.mean.device))
        for name, statistics in captured.items():
            rows.setdefault(name, []).append(torch.stack(statistics).double())    # (2, B, C)
    captured = {name: torch.cat(parts, dim=1).unbind() for name, parts in rows.items()}
    for name, (mean, var) in batch_statistics(captured).items():                  # (1, C) twice
        layer = model.get_submodule(name)
        scale = layer.weight / (layer.running_var.double() + layer.eps).sqrt()    # (C,)
        layer.weight.copy_(scale * (var[0] + layer.eps).sqrt())
        layer.bias.add_(scale * (mean[0] - layer.running_mean))
        layer.running_mean.copy_(mean[0])
        layer.running_var.copy_(var[0])
    return model


def shuffle_tiles(image, grid, generator):
    """Return the image with its grid x grid tiles in random order: (3, H, W) -> (3, H, W)."""
    C, H, W = image.shape
    h, w = H // grid, W // grid
    tiles = image[:, :h * grid, :w * grid].reshape(C, grid, h, grid, w)         # (C, gy, h, gx, w)
    tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)                          # (gy*gx, C, h, w)
    tiles = tiles[torch.randperm(grid * grid, generator=generator)]
    return tiles.view(grid, grid, C, h, w).permute(2, 0, 3, 1, 4).reshape(C, h * grid, w * grid)


def main(argv=None):
    """Make what `--method` names from the command line; return its record."""
    cfg, laps = parse(Config, argv, __doc__.split("\n")[0]), records.Laps()
    if cfg.method in ("oracle", "tiles") and not cfg.images:
        raise ValueError(f"--method {cfg.method} needs --images; see --help")
    out, device = Path(cfg.out), pick_device(cfg.device)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another --out")
    teacher = freeze(load_model(cfg.teacher)).to(device)
    size = teacher.image_size
    torch.manual_seed(cfg.seed)
    out.mkdir(parents=True, exist_ok=True)
    if cfg.method == "oracle":
        model = measured(teacher, find_images(cfg.images), size)
        save_model(model, out / "teacher.pt")
    elif cfg.method == "tiles":
        generator = torch.Generator().manual_seed(cfg.seed)
        for i, path in enumerate(find_images(cfg.images)):
            # Twice the working size, so that random crops of the result are not blurred.
            image = to_tensor(view(load_image(path), (2 * size[0], 2 * size[1]))) / 255
            save_image(shuffle_tiles(image, cfg.grid, generator), out / f"{i:04d}.png")
    elif cfg.method == "dfad":
        # The same student as distill.py's of this seed.
        student = distill.new_student(
            distill.Config(student_model=cfg.student_model, seed=cfg.seed), teacher)
        curve = dfad(teacher, student, new_generator(size).to(device), cfg.steps, cfg.batch_size,
                     cfg.lr, pick_amp(cfg.amp, device))
        save_model(student, out / "student.pt")
        records.write_csv(out / "curve.csv", ("step", "loss"), curve)
    else:
        for first in range(0, cfg.count, cfg.batch_size):
            noise = torch.rand(min(cfg.batch_size, cfg.count - first), 3, *size).to(device)
            images = deepinversion(teacher, noise, cfg.steps)
            for i, image in enumerate(images, first):
                save_image(image, out / f"{i:04d}.png")
    laps("making")
    seconds, processor_seconds = laps["making"]
    record = {"seconds": seconds, "processor_seconds": processor_seconds,
              "config": dataclasses.asdict(cfg),
              "environment": records.environment(device, cfg.amp)}
    save_json(record, out / "record.json")
    print(f"{cfg.method}: {seconds:.0f} s, written to {out}")
    return record


if __name__ == "__main__":
    one_sentence(main)()
