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
    python evaluate.py --dataset camvid --data-root DIR --check-data       (what do labels hold?)
"""

import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from models import segmentation_logits
from support.checkpoint import atomic, load_model, save_json
from support.data import find_images, load_image, to_tensor, whole_view
from support.device import pick_device
from support.labelled import (
    DATASETS,
    check_labels,
    class_colours,
    compare_names,
    open_labelled,
    overlay,
)
from support.options import one_sentence, option, parse


def confusion_matrix(prediction, target, num_classes, ignore_index=255):
    """Return the (K, K) int64 matrix of pixel counts; rows are truth, columns predictions.

    prediction, target: integer tensors of one shape. Pixels whose target is `ignore_index` do not
    count. Raises ValueError if shapes differ or a value lies outside 0..K-1.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} "
                         "must have the same shape")
    keep = target != ignore_index
    truth, guess = target[keep].long(), prediction[keep].long()                    # (n,) each
    for name, values in (("target", truth), ("prediction", guess)):
        if len(values) and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(f"{name} values must lie in 0..{num_classes - 1} (or be the ignored "
                             f"{ignore_index}); got {values.min()}..{values.max()}; labels must "
                             "have the classes of the network")
    pairs = truth * num_classes + guess
    return pairs.bincount(minlength=num_classes ** 2).view(num_classes, num_classes)


def mean_iou(matrix):
    """Return (mean IoU, IoU per class (K,)), float64 in [0, 1], from a confusion matrix.

    A class absent from truth and prediction is NaN and left out of the mean.
    """
    matrix = matrix.double()
    hit = matrix.diagonal()
    iou = hit / (matrix.sum(dim=0) + matrix.sum(dim=1) - hit)          # 0/0 = NaN where absent
    return iou.nanmean(), iou


def summary(matrix):
    """Return the dict of metrics of a confusion matrix; frequencies are those in the truth."""
    miou, iou = mean_iou(matrix)
    total = max(matrix.sum().item(), 1)
    return {"miou": miou.item(), "iou": iou, "matrix": matrix,
            "pixel_accuracy": matrix.diagonal().sum().item() / total,
            "frequency_weighted_iou": (matrix.sum(dim=1) / total * iou).nansum().item()}


@torch.inference_mode()
def evaluate(model, loader, num_classes, reference=None, device=None, ignore_index=255):
    """Return the `summary` of a model over labelled images: `miou`, `iou` (K,), `matrix` and more.

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


model, labelled, masks, output = (partial(option, group=g) for g in (
    "model", "score it on labelled data", "or write masks", "output"))


@dataclass(frozen=True)
class Config:
    checkpoint: str | None = model(None, "student.pt or teacher.pt (required)")
    image_size: tuple[int, int] | None = model(None, "images are resized, whole, to cover this "
                                               "(default: its own)")
    device: str = model("auto", "cpu, cuda or auto")
    dataset: str = labelled("scenes", "", tuple(name for name in DATASETS if name != "none"))
    data_root: str | None = labelled(None, "folder of the data set")
    split: str = labelled("val", "part of it; 'val:0016E5,0006R0' keeps those sequences")
    resize_labels: bool = labelled(False, "score at the working size, not at the labels' own")
    check_data: bool = labelled(False, "instead: say what its labels hold, and show some (PNG)")
    images: str | None = masks(None, "any folder of images")
    overlay: bool = masks(False, "also blend each mask into its image")
    out: str | None = output(None, "file for the metrics (JSON) or for --check-data (PNG), or "
                               "folder for the masks")


def mask_names(files):
    """Return a PNG name for each path: its own with .png, or, where two would clash, with both."""
    taken = Counter(path.with_suffix(".png") for path in files)
    return [path.with_suffix(".png") if taken[path.with_suffix(".png")] == 1
            else path.with_name(f"{path.name}.png") for path in files]


def write_masks(model, folder, out, size, device, overlay=False):
    """Write an index PNG with a palette for every image of `folder`; return how many.

    Masks keep the image's size and relative path, with .png for a suffix; unreadable files, and
    stripes over 100 times as long as wide, are named and skipped. overlay: beside each mask a JPEG
    of it and the image, half and half.
    """
    palette = np.array(class_colours(model.class_names), dtype=np.uint8).flatten().tolist()
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; --images must name one")
    files, written = find_images(folder), 0
    if Path(folder).resolve() in (Path(out).resolve(), *Path(out).resolve().parents):
        raise ValueError(f"--out {out} lies in the folder of the images, where masks could replace "
                         "them; name a folder elsewhere")
    for path, name in zip(tqdm(files, desc="masks"), mask_names(files), strict=True):
        try:
            image = load_image(path)
            if max(image.size) > 100 * min(image.size):      # its working view would be enormous
                raise ValueError(f"{path}: {image.width}x{image.height} is a stripe, not a scene")
        except ValueError as error:
            tqdm.write(f"skipped {error}", file=sys.stderr)      # takes any file name
            continue
        images = as_input(to_tensor(whole_view(image, size)).unsqueeze(0), device)
        with torch.inference_mode():
            mask = predict(model, images, image.size[::-1])[0]
        png = Image.fromarray(mask.byte().cpu().numpy())
        png.putpalette(palette)
        target = Path(out) / name.relative_to(folder)
        with atomic(target) as temporary:
            png.save(temporary, format="PNG")
        if overlay:
            with atomic(target.with_suffix(".overlay.jpg")) as temporary:
                Image.blend(image, png.convert("RGB"), 0.5).save(temporary, format="JPEG")
        written += 1
    return written


def check_data(cfg):
    """Print what a labelled data set holds, and write a picture of labels over their images."""
    classes = load_model(cfg.checkpoint)[0].num_classes if cfg.checkpoint else None
    data = open_labelled(cfg.dataset, cfg.data_root, cfg.split,
                         cfg.image_size or DATASETS[cfg.dataset][1], classes)
    pixels, sizes = check_labels(data)
    print(f"{len(data)} images with labels, {sum(sizes.values())} of them opened; sizes "
          + ", ".join(f"{n} of {h}x{w}" for (h, w), n in sizes.most_common(5)))
    for name, share in zip([*data.class_names, "void"], pixels / pixels.sum(), strict=True):
        print(f"{name:20s}{100 * share:8.2f} % of the pixels")
    with atomic(cfg.out or "check.png") as temporary:
        overlay(data).save(temporary, format="PNG")
    print(f"some labels over their images: {cfg.out or 'check.png'}")
    return {"images": len(data), "pixels": pixels.tolist()}


def main(argv=None):
    """Score a checkpoint on labelled data, or write masks for a folder; return the metrics."""
    cfg = parse(Config, argv, "Score a checkpoint on labelled data, or write masks for a folder.")
    if cfg.check_data:
        return check_data(cfg)
    if cfg.checkpoint is None:
        raise ValueError("--checkpoint is missing; give the path of a student.pt or teacher.pt")
    device = pick_device(cfg.device)
    model, state = load_model(cfg.checkpoint)
    model.eval().to(device)
    size = cfg.image_size or tuple(state["image_size"])
    if cfg.images:
        if not cfg.out:
            raise ValueError("--out is missing; name a folder for the masks")
        count = write_masks(model, cfg.images, cfg.out, size, device, cfg.overlay)
        print(f"{count} masks in {cfg.out}")
        return {"masks": count}
    data = open_labelled(cfg.dataset, cfg.data_root, cfg.split, size, model.num_classes,
                         resize_labels=cfg.resize_labels)
    compare_names(data, model.class_names)
    loader = torch.utils.data.DataLoader(data, batch_size=1)
    result = evaluate(model, tqdm(loader, desc="evaluate"), model.num_classes)
    print(report({"model": result}, data.class_names))
    print(f"{'freq.-weighted IoU':20s}{100 * result['frequency_weighted_iou']:11.1f}")
    metrics = {key: result[key] for key in ("miou", "pixel_accuracy", "frequency_weighted_iou")}
    metrics |= {"iou": named_iou(result, data.class_names), "config": asdict(cfg)}
    if cfg.out:
        save_json(metrics, cfg.out)
    return metrics


if __name__ == "__main__":
    one_sentence(main)()
