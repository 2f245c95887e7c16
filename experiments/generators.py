"""What DFSS is compared with, beyond choosing: made-up images, and an oracle that saw real ones.

Idea
    Without a pool, images must be invented: noise, images optimised until the teacher finds its own
    statistics in them (DeepInversion), or a generator that plays against the student (DFAD). The
    oracle asks the opposite: how much does choosing by running statistics lose against choosing
    by exact statistics of the real training images?

Equation
    deepinversion  0.01 (d(batch) + 9 d_1(batch)) + entropy + 1e-4 TV + 1e-5 ||x||,  d as in
                   bn_stats.py ("l2"), of the statistics of a whole batch; d_1 its first layer
    dfad           student: mean |t - s| over logits; generator: -log(mean |t - s| + 1)

Paper
    DeepInversion (Yin et al., CVPR 2020). Its images have a class label, a scene has not: in the
    label's place stands the teacher's entropy, averaged over pixels, so that each pixel shall be
    of some class. Classes drawn for the cells of a grid were tried: more classes appear, but the
    student learned no better (one seed, 25 images).
    DFAD (Fang et al., arXiv 1912.11006): losses, 5 student updates to 1 of the generator, SGD 0.1,
    Adam 0.001 and a DCGAN; batch 64 and 75,000 updates there. Ours: the two rates warm up and fall
    as in training.py, and the colours are standardised before tanh.

Use it
    python -m experiments.generators --method noise --teacher T.pt --count 400 --out runs/noise
    python -m experiments.generators --method deepinversion --teacher T.pt --steps 200 \\
                                     --count 400 --out runs/inverted
    python distill.py --teacher T.pt --pool runs/noise --budget 0 --schedule uniform

    python -m experiments.generators --method dfad --teacher T.pt --steps 1500 --out runs/dfad
    python evaluate.py --checkpoint runs/dfad/student.pt --dataset camvid --data-root DIR

    python -m experiments.generators --method oracle --teacher T.pt --images DIR --out runs/measured
    python distill.py --teacher runs/measured/teacher.pt --pool DIR --dry-run --out runs/oracle
    python distill.py --teacher T.pt --pool runs/oracle/chosen.csv --budget 0 --schedule uniform
"""

import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.utils import save_image
from tqdm import tqdm

import distill
import records
from baselines import prediction_scores
from bn_stats import bn_distance, bn_layers, capture_bn_inputs
from checkpoint import load_model, save_json, save_model
from data import Pool, find_images
from evaluate import as_input
from models import MODELS, freeze, segmentation_logits
from options import one_sentence, option, parse
from training import OPTIMISERS, learning_rate, pick_amp, pick_device

NZ = 256                    # numbers that DFAD's generator makes an image from


@dataclass(frozen=True)
class Config:
    method: str = option("noise", "where images come from",
                         choices=("noise", "deepinversion", "dfad", "oracle"))
    teacher: str | None = option(None, "teacher.pt of train_teacher.py (required)")
    out: str | None = option(None, "new folder for what is made (required)")
    images: str | None = option(None, "oracle: folder, or CSV, of the real training images")
    count: int = option(100, "noise, deepinversion: number of images")
    steps: int = option(1500, "dfad: student updates; deepinversion: updates of each batch")
    lr: float = option(0.1, "dfad: the student's highest learning rate")
    student_model: str = option("resnet_tiny", "dfad: student network", choices=MODELS)
    amp: str = option("auto", "dfad: mixed precision", choices=("auto", "bfloat16", "off"))
    batch_size: int = option(16, "images at a time")
    seed: int = option(0, "seed of weights and noise")
    device: str = option("auto", "cpu, cuda or auto")


def update(optimiser, lr, loss, inputs=None):
    """Take one step down the gradient of a loss, at this learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.zero_grad()
    loss.backward(inputs=inputs)
    optimiser.step()


def batch_statistics(captured):
    """Return mean and biased variance over images and pixels: {name: (B, C) twice -> (1, C) twice}.

    Exact, because all images have the same number of pixels: the variance of a batch is the mean
    variance within its images plus the variance between their means.
    """
    return {name: (mean.mean(dim=0, keepdim=True),
                   var.mean(dim=0, keepdim=True) + mean.var(dim=0, correction=0, keepdim=True))
            for name, (mean, var) in captured.items()}


def bn_loss(captured, layers):
    """Return how far a batch as a whole is from the running statistics, first layer x10: scalar."""
    d = bn_distance(batch_statistics(captured), layers)[0]                        # (L,)
    return d.sum() + 9 * d[0]


def deepinversion(teacher, images, steps):
    """Return images (B, 3, H, W) in [0, 1] changed to match the teacher's statistics as a batch."""
    layers, (H, W) = bn_layers(teacher), images.shape[-2:]
    images = images.clone().requires_grad_()
    optimiser = torch.optim.Adam([images])
    for step in tqdm(range(steps), desc="inverting", mininterval=1):
        # No pixel may learn its place by heart: shift by up to an eighth, and flip half the time.
        dy, dx = ((torch.rand(2) - 0.5) * torch.tensor([H, W]) / 4).round().int().tolist()
        x = images.roll((dy, dx), (2, 3))
        x = x.flip(3) if torch.rand(()) < 0.5 else x
        with capture_bn_inputs(teacher, layers) as captured:
            logits = segmentation_logits(teacher, x)
        x = (x - teacher.mean) / teacher.std
        loss = 0.01 * bn_loss(captured, layers) + prediction_scores(logits, "entropy").mean()
        loss = loss + 1e-4 * (x.diff(dim=2).norm() + x.diff(dim=3).norm()) + 1e-5 * x.norm()
        update(optimiser, 0.05 * (1 - step / steps), loss)
        images.data.clamp_(0, 1)
    return images.detach()


def new_generator(size, width=64):
    """Return a DCGAN from noise (B, NZ, 1, 1) to images in [-1, 1], (B, 3, H, W)."""
    channels, layers = [NZ, 8 * width, 4 * width, 2 * width, width], []
    for i, (c_in, c_out) in enumerate(pairwise(channels)):
        # First to 1/16 of the size, rounded up; then three times, and below once more, doubled.
        kernel = (4, 2, 1) if i else ((-(-size[0] // 16), -(-size[1] // 16)),)
        layers += [nn.ConvTranspose2d(c_in, c_out, *kernel, bias=False), nn.BatchNorm2d(c_out),
                   nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1),
                         nn.Upsample(size, mode="bilinear"), nn.BatchNorm2d(3, affine=False),
                         nn.Tanh())


def dfad(teacher, student, generator, cfg):
    """Train student and generator in place; return [(update, the student's L1 loss), ...].

    The student imitates the teacher on what the generator makes, the generator looks for images on
    which they differ. Raises ValueError when the loss is not finite.
    """
    device = next(student.parameters()).device
    amp = pick_amp(cfg.amp, device)
    mixed = partial(torch.autocast, device.type, amp or torch.bfloat16, enabled=amp is not None)
    learn = OPTIMISERS["sgd"](student.parameters(), cfg.lr)
    seek, curve = torch.optim.Adam(generator.parameters()), []

    def imagine():
        with mixed():
            noise = torch.randn(cfg.batch_size, NZ, 1, 1, device=device)
            return (generator(noise).float() + 1) / 2

    def gap(images):
        with mixed():
            output = segmentation_logits(student, images)
            return F.l1_loss(output.float(), segmentation_logits(teacher, images).float())

    student.train()
    for step in tqdm(range(cfg.steps), desc="dfad", mininterval=1):
        with torch.no_grad():
            images = imagine()
        loss = gap(images)
        update(learn, learning_rate(step, cfg.steps, cfg.lr), loss)
        if step % 5 == 4:
            update(seek, learning_rate(step, cfg.steps, 1e-3), -(gap(imagine()) + 1).log(),
                   list(generator.parameters()))           # not the student's
            curve.append((step + 1, loss.item()))
            if not math.isfinite(curve[-1][1]):
                raise ValueError(f"the L1 loss became {curve[-1][1]} by update {step + 1}; lower "
                                 "--lr, or use --amp off. Nothing was saved")
    student.eval()
    return curve


@torch.no_grad()
def measured(teacher, files, size):
    """Return a copy of the teacher whose running statistics are those of these images, measured.

    As pool images are scored: centre views, eval mode. Each layer's weight and bias make up for
    the new statistics, so that the copy computes what the teacher does, beyond rounding. Raises
    ValueError for an image that cannot be read.
    """
    layers, rows, model = bn_layers(teacher), {}, copy.deepcopy(teacher)
    for images, errors in tqdm(DataLoader(Pool(files, size), 16), desc="measuring", mininterval=1):
        if any(errors):
            raise ValueError(f"a training image cannot be read: {max(errors)}")
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


def main(argv=None):
    """Make what `--method` names from the command line; return its record."""
    cfg, start = parse(Config, argv, __doc__.split("\n")[0]), time.perf_counter()
    if not (cfg.teacher and cfg.out) or (cfg.method == "oracle" and not cfg.images):
        raise ValueError("--teacher FILE and --out FOLDER are required; --method oracle also needs "
                         "--images DIR, the real training images")
    out, device = Path(cfg.out), pick_device(cfg.device)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose another --out")
    teacher, state = load_model(cfg.teacher)
    size = tuple(state["image_size"])
    freeze(teacher).to(device)
    torch.manual_seed(cfg.seed)
    out.mkdir(parents=True, exist_ok=True)
    if cfg.method == "oracle":
        model = measured(teacher, find_images(cfg.images), size)
        save_model(model, out / "teacher.pt", image_size=list(size))
    elif cfg.method == "dfad":
        # The same student as distill.py's of this seed.
        student = distill.new_student(
            distill.Config(student_model=cfg.student_model, seed=cfg.seed), teacher)
        curve = dfad(teacher, student, new_generator(size).to(device), cfg)
        save_model(student, out / "student.pt", image_size=list(size))
        records.write_csv(out / "curve.csv", ("step", "loss"), curve)
    else:
        for first in range(0, cfg.count, cfg.batch_size):
            images = torch.rand(min(cfg.batch_size, cfg.count - first), 3, *size).to(device)
            if cfg.method == "deepinversion":
                images = deepinversion(teacher, images, cfg.steps)
            for i, image in enumerate(images, first):
                save_image(image, out / f"{i:04d}.png")
    record = {"seconds": time.perf_counter() - start, "config": dataclasses.asdict(cfg),
              "environment": records.environment(device)}
    save_json(record, out / "record.json")
    print(f"{cfg.method}: {record['seconds']:.0f} s, written to {out}")
    return record


if __name__ == "__main__":
    one_sentence(main)()
