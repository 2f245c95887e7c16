"""The command of evaluate.py: score a checkpoint, or write masks for any folder.

Use it
    from support.evaluation import write_masks
    write_masks(student, "photos", "masks", (96, 128), "cpu")     # returns how many
"""

import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from evaluate import as_input, evaluate, named_iou, predict, report
from support.checkpoint import atomic, load_model, save_json
from support.data import find_images, load_image, to_tensor, whole_view
from support.labelled import Labels, class_colours, compare_names, labels, open_labelled
from support.options import option, parse, pick_device
from support.progress import progress

model, masks, output = (partial(option, group=g) for g in ("model", "or write masks", "output"))


@dataclass(frozen=True)
class Config(Labels):
    checkpoint: str | None = model(None, "student.pt or teacher.pt", kind="FILE")
    image_size: tuple[int, int] | None = model(None, "size to resize to (default: its own)")
    device: str = model("auto", "cpu, cuda, cuda:1 ...; auto: a GPU if there is one")
    split: str = labels("val", "part of it; 'val:0016E5,0006R0' keeps those sequences")
    images: str | None = masks(None, "any folder of images", kind="FOLDER")
    overlay: bool = masks(False, "also blend each mask into its image")
    out: str | None = output(None, "file for metrics (JSON); folder for masks")


def mask_names(files):
    """Return a PNG name for each path: a.png for a.jpg, or, where any two would clash, a.jpg.png.
    """
    short = [path.with_suffix(".png") for path in files]
    if len(set(short)) == len(files):
        return short
    return [path.with_name(f"{path.name}.png") for path in files]


def write_masks(model, folder, out, size, device, overlay=False):
    """Write an index PNG with a palette for every image of `folder`; return how many.

    Masks keep the image's size and relative path, with .png for a suffix (see `mask_names`);
    unreadable files are named and skipped. overlay: beside each mask a JPEG of it and the image,
    half and half.
    """
    model.eval()
    palette = np.array(class_colours(model.class_names), dtype=np.uint8).flatten().tolist()
    files, written = find_images(folder), 0
    if Path(folder).resolve() in (Path(out).resolve(), *Path(out).resolve().parents):
        raise ValueError(f"--out {out} lies in the folder of the images; name one elsewhere")
    for path, name in zip(progress(files, "masks"), mask_names(files), strict=True):
        try:
            image = load_image(path)
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


def main(argv=None):
    """Score a checkpoint on labelled data, or write masks for a folder; return the metrics."""
    cfg = parse(Config, argv, "Score a checkpoint on labelled data, or write masks for a folder.")
    if cfg.checkpoint is None:
        raise ValueError("--checkpoint is missing; give the path of a student.pt or teacher.pt")
    device = pick_device(cfg.device)
    model = load_model(cfg.checkpoint).to(device)
    size = cfg.image_size or model.image_size
    if size is None:
        raise ValueError(f"{cfg.checkpoint} does not say its image size; give --image-size")
    if cfg.images:
        if Path(cfg.images).is_file():
            raise ValueError(f"--images {cfg.images} is no folder; name one of images")
        if not cfg.out:
            raise ValueError("--out is missing; name a folder for the masks")
        count = write_masks(model, cfg.images, cfg.out, size, device, cfg.overlay)
        print(f"{count} masks in {cfg.out}")
        return {"masks": count}
    data = open_labelled(cfg.dataset, cfg.data_root, cfg.split, size, model.num_classes,
                         cfg.download)
    compare_names(data, model.class_names)
    result = evaluate(model, progress(DataLoader(data), "evaluate"), model.num_classes)
    print(report({"model": result}, data.class_names))
    metrics = {"miou": result["miou"], "pixel_accuracy": result["pixel_accuracy"],
               "iou": named_iou(result, data.class_names), "config": asdict(cfg)}
    if cfg.out:
        save_json(metrics, cfg.out)
    return metrics
