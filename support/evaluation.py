"""The command of evaluate.py: score a checkpoint, check labels, or write masks for any folder.

Use it
    from support.evaluation import write_masks
    write_masks(student, "photos", "masks", (96, 128), "cpu")     # returns how many
"""

import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from evaluate import as_input, evaluate, named_iou, predict, report
from support import plots
from support.checkpoint import atomic, load_model, save_json
from support.data import find_images, load_image, to_tensor, whole_view
from support.labelled import DATASETS, check_labels, class_colours, compare_names, open_labelled
from support.options import Options, option, parse, pick_device
from support.progress import progress

model, labelled, masks, output = (partial(option, group=g) for g in (
    "model", "score it on labelled data", "or write masks", "output"))


@dataclass(frozen=True)
class Config(Options):
    checkpoint: str | None = model(None, "student.pt or teacher.pt", kind="FILE")
    image_size: tuple[int, int] | None = model(None, "images are resized, whole, to cover this "
                                               "(default: its own)")
    device: str = model("auto", "cpu, cuda, cuda:1 ...; auto: a GPU if there is one")
    dataset: str = labelled("scenes", "labels to score on",
                            tuple(name for name in DATASETS if name != "none"))
    data_root: str | None = labelled(None, "folder of the data set", kind="FOLDER")
    split: str = labelled("val", "part of it; 'val:0016E5,0006R0' keeps those sequences")
    check_data: bool = labelled(False, "instead: say what its labels hold, and show some (PNG)")
    images: str | None = masks(None, "any folder of images", kind="FOLDER")
    overlay: bool = masks(False, "also blend each mask into its image")
    out: str | None = output(None, "file for the metrics (JSON) or for --check-data (PNG), or "
                             "folder for the masks", kind="PATH")


def mask_names(files):
    """Return a PNG name for each path: its own with .png, or, where two would clash, with both.

    Names stay some bytes below the 255 that a file system takes.
    """
    def short(path, name):
        return path.with_name(os.fsdecode(os.fsencode(name)[:230]) + ".png")

    wanted = Counter(path.with_suffix("") for path in files)
    names = {}
    for path in files:
        name = short(path, path.stem if wanted[path.with_suffix("")] == 1 else path.name)
        while name in names:
            name = name.with_name(f"{name.stem[:200]}+.png")
        names[name] = path
    return list(names)


def write_masks(model, folder, out, size, device, overlay=False):
    """Write an index PNG with a palette for every image of `folder`; return how many.

    Masks keep the image's size and relative path, with .png for a suffix; unreadable files, and
    stripes over 100 times as long as wide, are named and skipped. overlay: beside each mask a JPEG
    of it and the image, half and half, and a legend.png.
    """
    palette = np.array(class_colours(model.class_names), dtype=np.uint8).flatten().tolist()
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; --images must name one")
    files, written = find_images(folder), 0
    if Path(folder).resolve() in (Path(out).resolve(), *Path(out).resolve().parents):
        raise ValueError(f"--out {out} lies in the folder of the images, where masks could replace "
                         "them; name a folder elsewhere")
    for path, name in zip(progress(files, "masks"), mask_names(files), strict=True):
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
    if overlay:
        plots.legend_alone(model.class_names, Path(out) / "legend.png")
    return written


def check_data(cfg):
    """Print what a labelled data set holds, and write a picture of labels over their images."""
    classes = load_model(cfg.checkpoint).num_classes if cfg.checkpoint else None
    data = open_labelled(cfg.dataset, cfg.data_root, cfg.split,
                         cfg.image_size or DATASETS[cfg.dataset][1], classes)
    pixels = check_labels(data)
    print(f"{len(data)} images with labels, of which at most about 2,000 were opened")
    for name, share in zip([*data.class_names, "void"], pixels / pixels.sum(), strict=True):
        print(f"{name:20s}{100 * share:8.2f} % of the pixels")
    plots.overlays(data, cfg.out or "check.png")
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
    model = load_model(cfg.checkpoint).to(device)
    size = cfg.image_size or model.image_size
    if size is None:
        raise ValueError(f"{cfg.checkpoint} names no image size; give one with --image-size H W")
    if cfg.images:
        if not cfg.out:
            raise ValueError("--out is missing; name a folder for the masks")
        count = write_masks(model, cfg.images, cfg.out, size, device, cfg.overlay)
        print(f"{count} masks in {cfg.out}")
        return {"masks": count}
    data = open_labelled(cfg.dataset, cfg.data_root, cfg.split, size, model.num_classes)
    compare_names(data, model.class_names)
    loader = torch.utils.data.DataLoader(data, batch_size=1)
    result = evaluate(model, progress(loader, "evaluate"), model.num_classes)
    print(report({"model": result}, data.class_names))
    print(f"{'freq.-weighted IoU':20s}{100 * result['frequency_weighted_iou']:11.1f}")
    metrics = {key: result[key] for key in ("miou", "pixel_accuracy", "frequency_weighted_iou")}
    metrics |= {"iou": named_iou(result, data.class_names), "config": asdict(cfg)}
    if cfg.out:
        save_json(metrics, cfg.out)
    return metrics
