"""How good is a segmentation network? Confusion matrix, mean IoU, and masks for any folder.

Idea
    Everything is read off one matrix: entry (i, j) counts the pixels of class i that the network
    called j. The logits are resized to each label's own size, so that the score does not depend on
    the resolution the network works at.

Equation
    IoU_k = M_kk / (sum_j M_kj + sum_i M_ik - M_kk),     mIoU = mean of IoU_k over present classes

Symbols
    B images, K classes, H W pixels.  M (K, K): rows are truth, columns are predictions.

Use it
    from evaluate import confusion_matrix, mean_iou
    miou, iou = mean_iou(confusion_matrix(prediction, target, num_classes=21))

Run it
    python evaluate.py --checkpoint runs/NAME/student.pt --dataset camvid --data-root DIR
    python evaluate.py --checkpoint runs/NAME/student.pt --images DIR --out masks/
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from checkpoint import atomic, load_model, save_json
from data import (DATASETS, class_colours, find_images, load_image, open_labelled, to_tensor,
                  whole_view)
from models import segmentation_logits
from options import one_sentence, option, parse
from training import pick_device


def confusion_matrix(prediction, target, num_classes, ignore_index=255):
    """Return the (K, K) int64 matrix of pixel counts; rows are truth, columns predictions.

    prediction, target: integer tensors of one shape. Pixels whose target is `ignore_index` do not
    count. Raises ValueError if shapes differ or a value lies outside 0..K-1.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} "
                         "must have the same shape")
    valid = target != ignore_index
    truth, guess = target[valid].long(), prediction[valid].long()
    for name, values in (("target", truth), ("prediction", guess)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
            raise ValueError(f"{name} values must lie in 0..{num_classes - 1} (or be the ignored "
                             f"{ignore_index}); got {int(values.min())}..{int(values.max())}")
    pairs = torch.bincount(truth * num_classes + guess, minlength=num_classes ** 2)
    return pairs.view(num_classes, num_classes)


def mean_iou(matrix):
    """Return (mean IoU, IoU per class (K,)), float64 in [0, 1], from a confusion matrix.

    A class absent from truth and prediction is NaN and left out of the mean.
    """
    matrix = matrix.double()
    hit = matrix.diagonal()
    iou = hit / (matrix.sum(dim=0) + matrix.sum(dim=1) - hit)          # 0/0 = NaN where absent
    return iou.nanmean(), iou


def summary(matrix):
    """Return the dict of metrics of a confusion matrix."""
    miou, iou = mean_iou(matrix)
    accuracy = matrix.diagonal().sum().item() / max(matrix.sum().item(), 1)
    return {"miou": miou.item(), "iou": iou, "pixel_accuracy": accuracy, "matrix": matrix}


@torch.inference_mode()
def evaluate(model, loader, num_classes, reference=None, device=None, ignore_index=255):
    """Return `miou`, `iou` (K,), `pixel_accuracy` and `matrix` of a model over labelled images.

    loader: yields (images (B, 3, H, W) float in [0, 1] or uint8, targets (B, h, w)); logits are
    resized to the targets. reference: a second model that takes the place of the targets; the
    loader's are then only read where they say `ignore_index`, and may be None.
    """
    device = device or next(model.parameters()).device
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for images, targets in loader:
        images = as_input(images, device)
        size = images.shape[-2:] if targets is None else targets.shape[-2:]
        prediction = predict(model, images, size)
        if reference is not None:
            agreed = predict(reference, images, size)
            if targets is not None:
                agreed[targets.to(device) == ignore_index] = ignore_index
            targets = agreed
        matrix += confusion_matrix(prediction, targets.to(device), num_classes, ignore_index)
    return summary(matrix.cpu())


def as_input(images, device):
    """Return images on the device as float32 in [0, 1], from uint8 or from float."""
    images = images.to(device, non_blocking=True)
    return images.float() / 255 if images.dtype == torch.uint8 else images


def predict(model, images, size):
    """Return the class of each pixel at `size` = (h, w): (B, 3, H, W) -> (B, h, w), int64."""
    logits = segmentation_logits(model, images)
    return F.interpolate(logits.float(), tuple(size), mode="bilinear").argmax(dim=1)


def named_iou(result, class_names):
    """Return {class: IoU}, None where a class is absent: JSON knows no NaN."""
    return {name: None if iou != iou else iou
            for name, iou in zip(class_names, result["iou"].tolist(), strict=True)}


def report(results, class_names):
    """Return a table as text: a line per class, a column per named result of `evaluate`."""
    rows = {name: [r["iou"][k] for r in results.values()] for k, name in enumerate(class_names)}
    rows["mean IoU"] = [r["miou"] for r in results.values()]
    rows["pixel accuracy"] = [r["pixel_accuracy"] for r in results.values()]
    lines = [f"{'IoU %':20s}" + "".join(f"{name:>11s}" for name in results)]
    lines += [f"{name:20s}" + "".join(f"{'-':>11s}" if value != value else f"{100 * value:11.1f}"
                                      for value in values) for name, values in rows.items()]
    return "\n".join(lines)


@dataclass(frozen=True)
class Config:
    checkpoint: str | None = option(None, "the model: student.pt or teacher.pt (required)")
    dataset: str = option("scenes", "labelled data to score on",
                          choices=tuple(name for name in DATASETS if name != "none"))
    data_root: str | None = option(None, "folder of the data set")
    split: str = option("val", "which part of it; 'val:0016E5,0006R0' keeps those sequences")
    images: str | None = option(None, "instead: any folder of images, to write masks for")
    out: str | None = option(None, "folder for the masks, or file for the metrics (JSON)")
    image_size: tuple[int, int] | None = option(None, "working size (default: the checkpoint's)")
    device: str = option("auto", "cpu, cuda or auto")


def write_masks(model, folder, out, size, device):
    """Write an index PNG with a palette for every image of `folder`; return how many.

    Masks keep the image's size and relative path, with .png for a suffix; unreadable files are
    named and skipped.
    """
    palette = np.array(class_colours(model.class_names), dtype=np.uint8).flatten().tolist()
    written = 0
    for path in tqdm(find_images(folder), desc="masks"):
        try:
            image = load_image(path)
        except ValueError as error:
            tqdm.write(f"skipped {error}")
            continue
        images = as_input(to_tensor(whole_view(image, size)).unsqueeze(0), device)
        with torch.inference_mode():
            mask = predict(model, images, image.size[::-1])[0]
        png = Image.fromarray(mask.byte().cpu().numpy())
        png.putpalette(palette)
        target = (Path(out) / path.relative_to(folder)).with_suffix(".png")
        with atomic(target) as temporary:
            png.save(temporary, format="PNG")
        written += 1
    return written


def main(argv=None):
    """Score a checkpoint on labelled data, or write masks for a folder; return the metrics."""
    cfg = parse(Config, argv, "Score a checkpoint on labelled data, or write masks for a folder.")
    if cfg.checkpoint is None:
        raise ValueError("--checkpoint is missing; give the path of a student.pt or teacher.pt")
    device = pick_device(cfg.device)
    model, state = load_model(cfg.checkpoint)
    model.eval().to(device)
    size = cfg.image_size or tuple(state["image_size"])
    if cfg.images:
        if not cfg.out:
            raise ValueError("--out is missing; name a folder for the masks")
        count = write_masks(model, cfg.images, cfg.out, size, device)
        print(f"{count} masks in {cfg.out}")
        return {"masks": count}
    data = open_labelled(cfg.dataset, cfg.data_root, cfg.split, size, model.num_classes)
    loader = torch.utils.data.DataLoader(data, batch_size=1)
    result = evaluate(model, tqdm(loader, desc="evaluate"), model.num_classes)
    print(report({"model": result}, data.class_names))
    metrics = {key: result[key] for key in ("miou", "pixel_accuracy")}
    metrics["iou"] = named_iou(result, data.class_names)
    if cfg.out:
        save_json(metrics, cfg.out)
    return metrics


if __name__ == "__main__":
    one_sentence(main)()
