"""Images to compare with: synthetic ones (DeepInversion, DFAD) and photos cut into tiles.

Idea
    Without photos, images must be synthesised: optimised until they match the teacher's statistics
    (`deepinversion`), or made by a generator that is trained against the student (`dfad`). Tiles
    are for another question: a photo cut into tiles in random order has the same pixels and
    textures, but no scene.

Equation
    deepinversion  0.01 (d(batch) + 9 d_1(batch)) + entropy + 1e-4 TV + 1e-5 ||x||,  d as in
                   bn_stats.py ("l2"), of the statistics of a whole batch; d_1 its first layer
    dfad           student: mean |t - s| over logits; generator: -ln(mean |t - s| + 1)

Paper
    DeepInversion (Yin et al., CVPR 2020). Its images have a class label, and a scene has none: the
    teacher's mean entropy is minimised instead, so that every pixel belongs to some class.
    DFAD (Fang et al., arXiv 1912.11006): losses, 5 student updates to 1 of the generator, SGD 0.1,
    Adam 0.001 and a DCGAN; batch 64 and 75,000 updates there. Ours: both rates follow `warmup_poly`
    of support/training.py, the colours are standardised before tanh, and the generator's update
    uses the images of the student's last one.

Symbols
    B images, C channels, K classes, L layers, H W pixels, h w of the logits.

Use it
    python -m experiments.generators --method deepinversion --teacher T.pt --steps 200 \\
                                     --count 400 --out runs/inverted
    python -m experiments.generators --method tiles --teacher T.pt --images runs/001/chosen.csv \\
                                     --out runs/tiles          # with --grid 1, images stay whole
    python distill.py --teacher T.pt --pool runs/tiles --budget 0 --schedule uniform

    python -m experiments.generators --method dfad --teacher T.pt --steps 75000 --batch-size 64 \\
                                     --student-model deeplabv3_mobilenet_v2 --out runs/dfad
    python evaluate.py --checkpoint runs/dfad/student.pt --dataset camvid --data-root DIR
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

from bn_stats import bn_distance, bn_layers, capture_bn_inputs
from experiments.baselines import mean_entropy
from models import MODELS, freeze
from support import checkpoint, command, records
from support.images import find_images, load_image, resized_crop, to_tensor
from support.options import Running, one_sentence, option, pick_device
from support.progress import progress
from support.teacher_cache import comparison_size, resize
from support.training import Training, warmup_poly

NOISE = 256                 # channels of the noise that DFAD's generator maps to an image
SNAPSHOT = 5000             # DFAD writes its student every so many updates


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


def new_generator(size, width=64):
    """Return a DCGAN from noise (B, NOISE, 1, 1) to images (B, 3, H, W) in [-1, 1]."""
    layers, c_in, first = [], NOISE, [math.ceil(side / 16) for side in size]
    for c_out, kernel in ((8 * width, (first,)), (4 * width, (4, 2, 1)), (2 * width, (4, 2, 1)),
                          (width, (4, 2, 1))):                     # 1/16 of the size, 1/8, 1/4, 1/2
        layers += [nn.ConvTranspose2d(c_in, c_out, *kernel, bias=False), nn.BatchNorm2d(c_out),
                   nn.LeakyReLU(0.2)]
        c_in = c_out
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1),
                         nn.Upsample(size, mode="bilinear"), nn.BatchNorm2d(3, affine=False),
                         nn.Tanh())


def dfad(teacher, student, generator, size, cfg, out=None):
    """Train student and generator in place; return the curve [(update, mean L1 loss), ...].

    The student imitates the teacher on the generator's images. The generator looks for images on
    which the two differ. cfg: steps, batch_size, lr of the student, seed, amp, workers. out: folder
    of the run, from which it resumes (but for the moments of the generator's Adam).
    """
    student_opt = torch.optim.SGD(student.parameters(), cfg.lr, momentum=0.9, weight_decay=1e-4)
    gen_opt = torch.optim.Adam(generator.parameters())
    scheduler = warmup_poly(student_opt, cfg.steps)
    logit_size = comparison_size(teacher, student, size)
    run = Training(nn.ModuleList([student, generator]), student_opt, scheduler, cfg, out,
                   about=(teacher, size))

    def l1_gap(images):
        logits = [resize(network(images).float(), logit_size) for network in (student, teacher)]
        return F.l1_loss(*logits)                                            # of (B, K, h, w) each

    def update(optimizer, loss):
        optimizer.zero_grad()
        run.scaler.scale(loss).backward()
        run.scaler.step(optimizer)
        run.scaler.update()

    for (step,) in run.batches([()] * cfg.steps, "DFAD"):                        # there is no data
        noise = torch.randn(cfg.batch_size, NOISE, 1, 1, device=run.device)
        with run.autocast():
            images = (generator(noise) + 1) / 2                                    # (B, 3, H, W)
            loss = l1_gap(images.detach())
        update(student_opt, loss)
        if step % 5 == 4:
            gen_opt.param_groups[0]["lr"] = 1e-3 * student_opt.param_groups[0]["lr"] / cfg.lr
            with run.autocast():
                gen_loss = -(l1_gap(images) + 1).log()
            update(gen_opt, gen_loss)          # the student's next update clears its gradients
        scheduler.step()
        run.log(loss)
        if out and (step + 1) % SNAPSHOT == 0:
            checkpoint.save_model(student, out / f"student-{step + 1}.pt")
    return run.curve


def shuffle_tiles(image, grid):
    """Return an image with its grid x grid tiles in random order: (3, H, W) -> (3, H, W)."""
    h, w = (side // grid for side in image.shape[1:])
    tiles = image[:, :h * grid, :w * grid].unfold(1, h, h).unfold(2, w, w)      # (3, gy, gx, h, w)
    tiles = tiles.flatten(1, 2)[:, torch.randperm(grid * grid)].unflatten(1, (grid, grid))
    return tiles.transpose(2, 3).reshape(3, grid * h, grid * w)


@dataclass(frozen=True)
class Config(Running):
    method: str = option("deepinversion", "how to make images", ("deepinversion", "tiles", "dfad"))
    teacher: str = option("", "teacher.pt of train_teacher.py", metavar="FILE", required=True)
    images: str | None = option(None, "tiles: what to cut, a folder or a run's chosen.csv")
    grid: int = option(4, "tiles: number per side; 1 leaves the images whole", min=1)
    count: int = option(100, "deepinversion: number of images")
    steps: int = option(1500, "dfad: student updates; deepinversion: updates of each batch",
                        min=1)
    batch_size: int = option(16, "deepinversion, dfad: images at a time", min=1)
    lr: float = option(0.1, "dfad: the student's highest learning rate")
    student_model: str = option("resnet_tiny", "dfad: student network", MODELS)
    student_weights: str = option("none", "dfad: pretrained on ImageNet", ("none", "imagenet"))


def make(cfg, out):
    """Make in the folder `out` what `cfg` asks for; return its metrics."""
    timer, device = records.Timer(), pick_device(cfg.device)
    teacher = freeze(checkpoint.load_model(cfg.teacher)).to(device)
    size = teacher.image_size
    torch.manual_seed(cfg.seed)
    if cfg.method == "tiles":
        for i, path in enumerate(find_images(cfg.images)):
            # Twice the size that is used, so that random crops are not blurred.
            image = to_tensor(resized_crop(load_image(path), [2 * side for side in size])) / 255
            save_image(shuffle_tiles(image, cfg.grid), out / f"{i:04d}.png")
    elif cfg.method == "dfad":
        student = command.build_student(cfg, teacher)         # that of distill.py with this seed
        curve = dfad(teacher, student, new_generator(size).to(device), size, cfg, out)
        checkpoint.save_model(student, out / "student.pt")
        records.write_csv(out / "curve.csv", ("step", "loss"), curve)
    else:
        for first in range(0, cfg.count, cfg.batch_size):
            noise = torch.rand(min(cfg.batch_size, cfg.count - first), 3, *size).to(device)
            for i, image in enumerate(deepinversion(teacher, noise, cfg.steps), first):
                save_image(image, out / f"{i:04d}.png")
    timer("making")
    metrics = {"seconds": timer["making"][0], "processor_seconds": timer["making"][1]}
    checkpoint.save_json(metrics, out / "metrics.json")
    (out / "state.pt").unlink(missing_ok=True)
    print(f"{cfg.method}: {metrics['seconds']:.0f} s, written to {out}")
    return metrics


def main(argv=None):
    """Make images, or train by DFAD, from the command line; return the metrics."""
    return records.in_folder(make, Config, argv, __doc__.split("\n")[0])


if __name__ == "__main__":
    one_sentence(main)()
