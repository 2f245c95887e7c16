"""What the command line adds to the method: what it needs before, what it tells and reports after.

Use it
    cfg, teacher, files, held_out, laps = opened(cfg, out, DEFAULTS)   # see distill.run
"""

import dataclasses
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from evaluate import evaluate, report
from models import build_model, freeze
from priority import effective_sample_size, progressive_weights
from support import checkpoint, figures, records, together
from support.data import Pool, find_images, hold_out, leave_out
from support.labelled import DATASETS, check_labels, open_labelled
from support.options import filled, parse_losses, pick_device
from support.scoring import verdict
from train_teacher import builtin_teacher


def load_teacher(cfg):
    """Return the teacher that the options name, with the image size that counts."""
    classes = cfg.num_classes or len(DATASETS[cfg.dataset][0] or ()) or None
    if cfg.teacher:
        model = checkpoint.load_model(cfg.teacher, cfg.teacher_model, classes)
    elif cfg.teacher_model and cfg.teacher_weights:
        model = build_model(cfg.teacher_model, classes, weights=cfg.teacher_weights)
    else:
        raise ValueError("no teacher: give --teacher, or --teacher-model and --teacher-weights")
    model.image_size = cfg.image_size or model.image_size or DATASETS[cfg.dataset][1]
    return freeze(model).to(pick_device(cfg.device), memory_format=torch.channels_last)


def opened(cfg, out, defaults):
    """Return (cfg, teacher, pool files, what to evaluate on, times) for the options.

    Draws the built-in scenes and trains their teacher where nothing else is named. To evaluate on:
    a loader of (images, labels), or, without labels, a list of (images held out, None). Copies of
    those images in the pool are left out and named in skipped.csv.
    """
    laps = records.Laps()
    if out is None:                             # a process beside the first: it helps, no more
        cfg, files = together.told(None)
        return cfg, load_teacher(cfg), files, None, laps
    parse_losses(cfg.kd)                        # a typing error is found before anything is read
    if cfg.dataset == "scenes" and not cfg.data_root:
        if cfg.pool or cfg.teacher or cfg.teacher_model:
            raise ValueError("--dataset is missing; say which labels there are, or none")
        root, teacher = builtin_teacher(cfg.image_size, cfg.device, cfg.amp)
        cfg = filled(dataclasses.replace(cfg, data_root=root, pool=f"{root}/pool", teacher=teacher),
                     steps=500, views=8)
    cfg = filled(cfg, **defaults)
    if not cfg.pool:
        raise ValueError("--pool is missing; name a folder of unlabelled photographs")
    laps("scenes and teacher")
    if Path(cfg.pool).resolve() in Path(out).resolve().parents and cfg.dataset != "scenes":
        raise ValueError(f"--out {out} lies in the pool; name a folder elsewhere")
    teacher, files = load_teacher(cfg), find_images(cfg.pool)
    size = teacher.image_size
    if cfg.dataset == "none":
        files, others = hold_out(files)
        held_out = [(x, None) for _, x, readable in DataLoader(Pool(others, size)) if readable]
        print(f"{len(others)} photographs are held out, to measure agreement with the teacher on")
        if not held_out:
            raise ValueError(f"no image held out for agreement is readable: {others[0]}, for one")
    else:
        labelled = open_labelled(cfg.dataset, cfg.data_root, cfg.split, size, teacher.num_classes,
                                 cfg.download)
        check_labels(labelled, teacher.class_names)   # a bad one is found before hours of training
        others = labelled.images
        # Only the built-in scenes are sure to have one size, and a batch needs one.
        held_out = DataLoader(labelled, 16 if cfg.dataset == "scenes" else 1)
    files, twins = leave_out(files, others)
    records.write_csv(out / "skipped.csv", ("reason",), [[why] for why in twins])
    if twins:
        print(f"warning: {len(twins)} images of the pool, also evaluated on, are left out; "
              "skipped.csv names them")
    together.told((cfg, files))
    return cfg, teacher, files, held_out, laps


def tell_choice(found, cfg, out=None):
    """Print what the paragraphs 1 to 4 of the method found; with `out`, write it there, too."""
    distances, weights = found["distances"], found["weights"]
    n = [effective_sample_size(progressive_weights(weights, p, cfg.schedule)) for p in (0, 1)]
    skipped, kind = len(found["skipped"]), "distance" if cfg.sampling == "nearest" else "score"
    print(f"1 teacher   {len(found['layers'])} BatchNorm layers read\n"
          f"2 scored    {len(found['scores']) - skipped} images, {skipped} unreadable\n"
          f"3 chosen    {len(weights)} ({cfg.sampling}), {kind} {distances[0]:.4g} to "
          f"{distances[-1]:.4g}, median of the pool {found['scores'].nanmedian():.4g}\n"
          f"4 weighted  {cfg.schedule}; as many as {n[0]:.0f} equally weighted images at the "
          f"start, {n[1]:.0f} at the end")
    if out:
        records.write_choice(out, found)


def shown(found, teacher, out, sampling):
    """Say and draw whether the pool of a dry run fits the teacher; return its metrics."""
    together.leave()
    print(verdict(teacher, found))
    figures.pool_check(found, teacher.image_size, teacher, out / "pool.png", sampling)
    print(f"dry run: nothing was trained; see {out / 'pool.png'}")
    return {"pool_images": len(found["scores"]) - len(found["skipped"]), "out": str(out)}


def reported(cfg, out, teacher, student, found, held_out, laps):
    """Evaluate, write metrics.json and figure.png, print the result; return the metrics."""
    results = {}
    if cfg.dataset != "none":
        results["teacher"] = evaluate(teacher, held_out, teacher.num_classes)
        results["student"] = evaluate(student, held_out, teacher.num_classes)
    results["agreement"] = evaluate(student, held_out, teacher.num_classes, reference=teacher)
    print("6 evaluated\n" + report(results, teacher.class_names))
    found["laps"]("evaluation")
    metrics = records.metrics(cfg, results, teacher, found, {**laps, **found["laps"]})
    figures.story(found, teacher.image_size, cfg.schedule, teacher, student, held_out,
                Path(out) / "figure.png", cfg.sampling)
    checkpoint.save_json(metrics, out / "metrics.json")   # last: with it, a run counts as finished
    (out / "state.pt").unlink(missing_ok=True)
    print(records.closing(metrics, out))
    return metrics
