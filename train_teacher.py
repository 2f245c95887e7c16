"""The data owner's side: train a teacher on labelled images, and hand over nothing but its weights.

Idea
    DFSS starts from a trained network. Where none exists, this makes one: cross-entropy on random
    crops, stochastic gradient descent, the last weights. BatchNorm's running statistics, the memory
    that DFSS reads, are a by-product of any such training.

Use it
    python train_teacher.py --dataset camvid --data-root DIR --model resnet_small --out runs/teacher
    python distill.py --teacher runs/teacher/teacher.pt --pool DIR --dataset camvid --data-root DIR
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from evaluate import evaluate, report
from models import MODELS, build_model
from support import checkpoint, records, scenes
from support.data import Batches
from support.device import pick_amp, pick_device
from support.labelled import DATASETS, IGNORE, check_labels, open_labelled
from support.options import one_sentence, option, parse
from support.training import OPTIMISERS, fit

NORMALISATIONS = {"imagenet": {}, "half": {"mean": (0.5,) * 3, "std": (0.5,) * 3}}
data, training, running = (partial(option, group=g) for g in ("data", "training", "running"))


@dataclass(frozen=True)
class Config:
    dataset: str = data("camvid", "labelled data", [name for name in DATASETS if name != "none"])
    data_root: str | None = data(None, "folder of the data set")
    split: str = data("train", "'train:0001TP,0016E5' keeps those sequences")
    eval_split: str | None = data(None, "part to report mIoU on, if any")
    download: bool = data(False, "let torchvision fetch Pascal VOC")
    num_classes: int | None = data(None, "for --dataset folder, if it has no classes.txt")
    model: str = training("resnet_small", "network", MODELS)
    backbone: str = training("none", "pretrained, downloaded", ("none", "imagenet"))
    normalisation: str = training("imagenet", "of the input; half: mean = std = 0.5",
                                  tuple(NORMALISATIONS))
    steps: int = training(2000, "number of updates")
    batch_size: int = training(16, "images an update", least=1)
    optimiser: str = training("sgd", "how to train", tuple(OPTIMISERS))
    lr: float = training(0.1, "highest learning rate")
    image_size: tuple[int, int] | None = training(None, "crop height and width (default: the data "
                                                  "set's)")
    min_scale: float = training(1.0, "1: a crop is as large as fits; 2: half that on each side")
    max_scale: float = training(1.6, "crops lie between these scales")
    jitter: float = training(0.2, "change of brightness and contrast")
    seed: int = running(0, "seed of weights, crops and order")
    device: str = running("auto", "cpu, cuda or auto")
    amp: str = running("auto", "mixed precision", ("auto", "bfloat16", "float16", "off"))
    workers: int = running(0, "processes that load images; a GPU wants four or more")
    out: str = running("runs/teacher", "folder for teacher.pt")
    resume: bool = running(False, "go on where an interrupted run stopped")


def cross_entropy(logits, target):
    """Return the mean over labelled pixels, or 0: (B, K, H, W), (B, H, W) -> scalar."""
    total = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp_min(1)


def train_teacher(cfg):
    """Train as `cfg` says, write <out>/teacher.pt, return (model in eval mode, metrics)."""
    out = Path(cfg.out)
    if (out / "teacher.pt").exists():
        raise ValueError(f"{out} already holds a teacher; choose another --out")
    records.open_run(cfg)
    device = pick_device(cfg.device)
    size = cfg.image_size or DATASETS[cfg.dataset][1]
    data = open_labelled(cfg.dataset, cfg.data_root, cfg.split, size, cfg.num_classes, cfg.download)
    check_labels(data)                              # a bad one is found before hours of training
    if cfg.eval_split:
        held_out = open_labelled(cfg.dataset, cfg.data_root, cfg.eval_split, size, cfg.num_classes,
                                 cfg.download)
        check_labels(held_out)
        if set(held_out.images) & set(data.images):
            raise ValueError(f"--split {cfg.split} and --eval-split {cfg.eval_split} share images, "
                             "so that the mIoU would say nothing; name parts that do not")

    torch.manual_seed(cfg.seed)
    model = build_model(cfg.model, len(data.class_names), class_names=data.class_names,
                        weights_backbone="DEFAULT" if cfg.backbone == "imagenet" else None,
                        **NORMALISATIONS[cfg.normalisation]).to(device)
    batches = Batches(data.images, size, cfg.batch_size, cfg.seed, cfg.max_scale, cfg.jitter, data,
                      min_scale=cfg.min_scale)
    curve = fit(model, lambda progress, images, slots, target: cross_entropy(model(images), target),
                batches, cfg.steps, cfg.lr, cfg.seed, pick_amp(cfg.amp, device), cfg.workers,
                out / "state.pt", "teacher", cfg.optimiser)
    metrics = {"images": len(data), "updates": cfg.steps, "loss": curve[-1][1] if curve else None}
    if cfg.eval_split:
        result = evaluate(model, DataLoader(held_out), model.num_classes)
        print(report({"teacher": result}, data.class_names))
        metrics["miou"] = result["miou"]
    checkpoint.save_model(model, out / "teacher.pt", image_size=list(size))
    checkpoint.save_json({**metrics, "config": dataclasses.asdict(cfg)}, out / "teacher.json")
    (out / "state.pt").unlink(missing_ok=True)
    return model, metrics


def builtin_teacher(size=None, device="auto", amp="auto"):
    """Return (folder of the built-in scenes, teacher.pt); draw and train what is missing.

    The teacher is kept under a name that depends on its config, and used again.
    """
    size = size or DATASETS["scenes"][1]
    root = f"runs/scenes-{size[0]}x{size[1]}"
    scenes.write_scenes(root, size=size, progress=partial(tqdm, desc="drawing scenes"))
    cfg = Config(dataset="scenes", data_root=root, eval_split="val", image_size=size, steps=400,
                 device=device, amp=amp, resume=True)
    cfg = dataclasses.replace(cfg, out=f"runs/teacher-{records.digest(cfg)}")
    path = f"{cfg.out}/teacher.pt"
    if Path(path).exists():
        print(f"reusing the built-in scenes in {root} and the teacher in {path}")
    else:
        train_teacher(cfg)
    return root, path


def main(argv=None):
    """Train a teacher from the command line; return its metrics."""
    cfg = parse(Config, argv, "Train a segmentation network on labelled images.")
    with records.resumable(cfg.out):
        metrics = train_teacher(cfg)[1]
    print(f"{cfg.out}/teacher.pt written" + (f", mIoU {100 * metrics['miou']:.1f} % on "
                                             f"{cfg.eval_split}" if "miou" in metrics else ""))
    return metrics


if __name__ == "__main__":
    one_sentence(main)()
