"""Put a student to work: one file that runs with torch alone, and what it costs beside its teacher.

Idea
    `torch.export` records what the network computes, normalisation included. The file needs torch
    but not this repository, and takes any batch and any size from 32x32 on. It is loaded again here
    and must give the same masks as the network it was made from.

Use it, anywhere
    student = torch.export.load("student.pt2").module()
    masks = student(images).argmax(dim=1)   # (B, 3, H, W) RGB in [0, 1] -> logits -> (B, H, W)

Run it
    python export.py --checkpoint runs/001/student.pt --out student.pt2
    python export.py --checkpoint runs/001/student.pt --teacher runs/teacher/teacher.pt
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer

from models import cost
from support.checkpoint import load_model, save
from support.options import Options, one_sentence, option, parse, pick_device


@dataclass(frozen=True)
class Config(Options):
    checkpoint: str | None = option(None, "student.pt or teacher.pt", metavar="FILE", required=True)
    out: str | None = option(None, "file to write; without it: costs only", metavar="FILE")
    teacher: str | None = option(None, "teacher.pt to compare the cost with", metavar="FILE")
    image_size: tuple[int, int] | None = option(None, "size to measure at (default: its own)")
    device: str = option("auto", "where to measure: cpu, cuda ...; auto: a GPU if there is one")


class AtImageSize(nn.Module):
    """A network whose logits are resized to the image: (B, 3, H, W) -> (B, K, H, W)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return F.interpolate(self.model(images), images.shape[-2:], mode="bilinear")


@torch.no_grad()
def export(model, path, size):
    """Write a copy of `model`, on the CPU and in eval mode, to `path`, for any B, H and W from 32.

    Raises ValueError if the file, loaded again, gives other masks at `size` = (H, W) or beside it.
    """
    if min(size) < 32:
        raise ValueError(f"an image size of {size} is too small to export; use 32 32 or more")
    model = AtImageSize(copy.deepcopy(model).cpu().eval())
    auto = torch.export.Dim.AUTO                        # but a batch of one would stay one
    program = torch.export.export(model, (torch.rand(2, 3, 128, 160),),
                                  dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)              # names folders of this machine
    save(program, path, torch.export.save)
    loaded = torch.export.load(path).module()
    for shape in ((1, 3, *size), (3, 3, size[0] + 33, size[1] + 18)):
        images = torch.rand(shape)
        other = loaded(images).argmax(dim=1) != model(images).argmax(dim=1)       # (B, H, W)
        if other.float().mean() > 1e-4:                 # rounding may decide where classes tie
            raise ValueError(f"{path} gives other masks than the checkpoint, in "
                             f"{other.float().mean():.2%} of the pixels of {shape}; do not use it")


@torch.inference_mode()
def latency(model, size, device):
    """Return the median time of one image in ms, of as many as fit into a second."""
    timer = Timer("model(images)", num_threads=torch.get_num_threads(), globals={
        "model": model, "images": torch.rand(1, 3, *size, device=device)})
    return 1000 * timer.blocked_autorange(min_run_time=1).median


def main(argv=None):
    """Export a checkpoint, print what it costs; return {name: (parameters, MACs, ms)}."""
    cfg = parse(Config, argv, "Write a student that runs without this repository; say its cost.")
    device, models, rows = pick_device(cfg.device), {}, {}
    if cfg.teacher:
        models["teacher"] = load_model(cfg.teacher)
    models["student"] = student = load_model(cfg.checkpoint)
    size = cfg.image_size or student.image_size
    if size is None:
        raise ValueError(f"{cfg.checkpoint} does not say its image size; give --image-size")
    if cfg.out:
        export(student, cfg.out, size)
        print(f"{cfg.out} gives the same masks as {cfg.checkpoint}, for any batch and size")
    print(f"one image of {size[0]}x{size[1]} on {device.type}, {torch.get_num_threads()} threads\n"
          f"{'':10s}{'parameters':>12s}{'multiply-adds':>15s}{'latency':>12s}")
    for name, model in models.items():
        rows[name] = (*cost(model.to(device), size), latency(model, size, device))
        parameters, macs, ms = rows[name]
        print(f"{name:10s}{parameters / 1e6:10.2f} M{macs / 1e6:13.0f} M{ms:9.1f} ms")
    return rows


if __name__ == "__main__":
    one_sentence(main)()
