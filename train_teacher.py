"""The data owner's side: train a teacher on labelled images, and hand over nothing but the network.

Idea
    DFSS starts from a trained network. Where none exists, this program trains one: cross-entropy on
    random crops, SGD, the last weights. The BatchNorm statistics that DFSS reads are a by-product.

Use it
    python train_teacher.py --dataset camvid --data-root DIR --model resnet_small --out runs/teacher
    python distill.py --teacher runs/teacher/teacher.pt --pool DIR --dataset camvid --data-root DIR
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from evaluate import evaluate, report
from models import MODELS, build_model
from support import checkpoint, records, scenes
from support.data import Batches, Views, iterate
from support.labelled import DATASETS, IGNORE, Labels, check_labels, open_labelled
from support.options import Running, inputs, labels, one_sentence, pick_device, running, training
from support.training import Training, warmup_poly


@dataclass(frozen=True)
class Config(Labels, Running):
    eval_split: str | None = labels(None, "part to report mIoU on, if any")
    model: str = inputs("resnet_small", "network", MODELS)
    backbone: str = inputs("none", "pretrained, downloaded", ("none", "imagenet"))
    image_size: tuple[int, int] | None = inputs(None, "crop (default: by data set)")
    steps: int = training(2000, "number of updates", min=1)
    batch_size: int = training(16, "images per update", min=1)
    lr: float = training(0.1, "highest learning rate")
    out: str = running("runs/teacher", "folder for teacher.pt", metavar="FOLDER")


def cross_entropy(logits, target):
    """Return the mean over labelled pixels, or 0: (B, K, H, W), (B, H, W) -> scalar."""
    # reduction="sum" has no deterministic form on CUDA.
    losses = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none")
    return losses.sum() / (target != IGNORE).sum().clamp_min(1)


def train(model, data, cfg, out):
    """Train `model` in place; return its curve [(step, mean loss), ...]."""
    # Labels at half the size: a quarter of the loss's cost, and as good (results/notes.md).
    half = tuple(max(side // 2, 1) for side in data.size)
    views = Views(data.images, data.size, cfg.seed, labelled=data, label_size=half)
    optimizer = torch.optim.SGD(model.parameters(), cfg.lr, momentum=0.9, weight_decay=1e-4,
                                fused=True)
    scheduler = warmup_poly(optimizer, cfg.steps)
    run = Training(model, optimizer, scheduler, cfg, out)
    for _, images, _, target in run.steps(Batches(views, cfg.batch_size), "teacher"):
        with run.autocast():
            logits = F.interpolate(model(images), half, mode="bilinear")         # (B, K, H/2, W/2)
        loss = cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        run.log(loss)
    return run.curve


def train_teacher(cfg, out):
    """Train as `cfg` says, write teacher.pt to the folder `out`; return its metrics."""
    size = cfg.image_size or DATASETS[cfg.dataset]
    parts = [open_labelled(cfg.dataset, cfg.data_root, split, size, cfg.num_classes, cfg.download)
             for split in [cfg.split, *filter(None, [cfg.eval_split])]]
    for data in parts:
        check_labels(data)                         # a bad label is found before training
    data, held_out = parts[0], parts[-1]
    if cfg.eval_split and set(data.images) & set(held_out.images):
        raise ValueError("--split and --eval-split share images; name parts that do not")
    torch.manual_seed(cfg.seed)
    model = build_model(cfg.model, len(data.class_names), class_names=data.class_names,
                        weights_backbone="DEFAULT" if cfg.backbone == "imagenet" else None,
                        image_size=size).to(pick_device(cfg.device))
    curve = train(model, data, cfg, out)
    metrics = {"images": len(data), "updates": cfg.steps, "loss": curve[-1][1]}
    if cfg.eval_split:
        loader = iterate(held_out, model.mean.device, cfg.workers)
        result = evaluate(model, loader, model.num_classes)
        print(report({"teacher": result}, data.class_names))
        metrics["miou"] = result["miou"]
    checkpoint.save_model(model, out / "teacher.pt")
    checkpoint.save_json({**metrics, "config": asdict(cfg)}, out / "metrics.json")
    (out / "state.pt").unlink(missing_ok=True)
    print(f"{out}/teacher.pt written")
    return metrics


def builtin_teacher(size=None, device="auto", amp="auto"):
    """Return (folder of the drawn scenes, teacher.pt); what is missing is drawn and trained."""
    size = size or DATASETS["scenes"]
    root = f"runs/scenes-{size[0]}x{size[1]}"
    scenes.write_scenes(root, size=size)
    cfg = Config(dataset="scenes", data_root=root, eval_split="val", image_size=size, steps=300,
                 device=device, amp=amp)
    out = Path(f"runs/teacher-{records.digest(cfg)}")
    print(f"drawn scenes: {root}; their teacher: {out}/teacher.pt")
    if not (out / "teacher.pt").exists():            # an interrupted training resumes by itself
        train_teacher(cfg, out)
    return root, f"{out}/teacher.pt"


def main(argv=None):
    """Train a teacher from the command line; return its metrics."""
    return records.in_folder(train_teacher, Config, argv, __doc__.split("\n")[0])


if __name__ == "__main__":
    one_sentence(main)()
