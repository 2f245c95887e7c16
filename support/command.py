"""What a command line needs besides the method: open the inputs, report and save the outcome.

Use it
    teacher, files, eval_data = open_inputs(cfg, out)            # see distill.run
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from bn_stats import METRICS
from models import MODELS, build_model, freeze
from priority import effective_sample_size, progressive_weights
from support import checkpoint, checks, figures, images, networks, options, records
from support.data import Pool
from support.labelled import DATASETS, Labels, check_labels, open_labelled
from support.options import Running, inputs, labels, method, output, running


@dataclass(frozen=True)
class Inputs(Labels, Running):
    """The options that scoring a pool depends on."""

    dataset: str = labels("scenes", "labels to evaluate on; none: no labels", tuple(DATASETS))
    split: str = labels("val", "part to evaluate on; 'val:A,B' keeps files that begin so")
    teacher: str | None = inputs(None, "teacher.pt, or another state dict", metavar="FILE")
    teacher_model: str | None = inputs(None, "network of a state dict, or one with its weights: "
                                       f"FILE.py:FUNCTION, or one of {', '.join(MODELS)}")
    teacher_weights: str | None = inputs(None, "DEFAULT: torchvision's weights of --teacher-model")
    pool: str | None = inputs(None, "photos: a folder, or a run's chosen.csv", metavar="PATH")
    image_size: tuple[int, int] | None = inputs(None, "crop size (default: the teacher's)")
    metric: str = method("l2", "distance to the statistics: the paper's l2, or kl", METRICS)
    layers: str = method("all", "BatchNorm layers: all, early, middle, late, names, indices")
    match_colours: bool = method(False, "match photos' colours to the teacher's training images")


@dataclass(frozen=True)
class Evaluation(Labels):
    """The options of evaluate.py."""

    checkpoint: str | None = inputs(None, "student.pt, teacher.pt or a state dict", metavar="FILE")
    model: str | None = inputs(None, "network of a state dict: a name, or FILE.py:FUNCTION")
    image_size: tuple[int, int] | None = inputs(None, "size to resize to (default: its own)")
    split: str = labels("val", "part of it; 'val:0016E5,0006R0' keeps those sequences")
    images: str | None = output(None, "write masks for these images instead", metavar="FOLDER")
    out: str | None = output(None, "file for metrics (JSON); folder for masks", metavar="PATH")
    device: str = running("auto", "cpu, cuda, cuda:1 ...; auto: a GPU if there is one")
    workers: int | None = running(None, "processes that load images (default: 4 with a GPU)")


def load_teacher(cfg):
    """Return the teacher that the options name, frozen, with the image size that is used."""
    if cfg.teacher_weights:
        if cfg.teacher or not cfg.teacher_model:
            raise ValueError("--teacher-weights needs --teacher-model, and excludes --teacher")
        model = build_model(cfg.teacher_model, weights=cfg.teacher_weights)
    else:
        model = checkpoint.load_model(cfg.teacher, cfg.teacher_model)
    if not cfg.image_size and not model.image_size:              # the statistics depend on it
        H, W = model.image_size = DATASETS[cfg.dataset]
        print(f"the teacher does not say its image size: {H}x{W} is used; see --image-size")
    model.image_size = cfg.image_size or model.image_size
    return freeze(model).to(options.pick_device(cfg.device), memory_format=torch.channels_last)


def build_student(cfg, teacher):
    """Return the student that `cfg` names, with the teacher's classes and normalisation."""
    torch.manual_seed(cfg.seed)
    if cfg.student_weights == "imagenet":                # these weights expect ImageNet's
        if ":" in cfg.student_model:
            raise ValueError(f"--student-weights: {cfg.student_model} loads its own weights")
        how = {"weights_backbone": "DEFAULT"}
    else:
        how = {"mean": teacher.mean.flatten().tolist(), "std": teacher.std.flatten().tolist()}
    names, size = teacher.class_names, teacher.image_size
    return networks.load_network(cfg.student_model, names, size, **how).to(teacher.mean.device)


def open_inputs(cfg, out=None):
    """Return (teacher, pool files, eval_data) for the options.

    eval_data: what to evaluate on, a DataLoader of (images, labels), or, without labels, a list of
    (images, None) held out from the pool. Copies of these images in the pool are left out, and
    named in out/skipped.csv.
    """
    if cfg.dataset == "scenes" and not cfg.data_root:
        raise ValueError("--dataset is missing; name the labels, none, or --data-root of scenes")
    if not cfg.pool:
        raise ValueError("--pool is missing; name a folder of unlabelled photos")
    if out and Path(cfg.pool).resolve() in out.resolve().parents:      # its figures would join it
        raise ValueError(f"--out {out} lies in the pool; name another folder")
    teacher, files = load_teacher(cfg), images.find_images(cfg.pool)
    size = teacher.image_size
    if cfg.dataset == "none":
        files, evaluated = images.hold_out(files)
        eval_data = [(x, None) for _, x, readable in DataLoader(Pool(evaluated, size)) if readable]
        if not eval_data:
            raise ValueError(f"no image held out for agreement can be read, such as {evaluated[0]}")
    else:
        labelled = open_labelled(cfg.dataset, cfg.data_root, cfg.split, size,
                                 cfg.num_classes or teacher.num_classes, cfg.download)
        check_labels(labelled, teacher.class_names)   # a bad one is found before hours of training
        evaluated = labelled.images
        workers = options.pick_workers(cfg.workers, teacher.mean.device)
        eval_data = DataLoader(labelled, num_workers=workers)      # one by one: they differ in size
    files, copies = images.drop_copies(files, evaluated)
    if copies:
        print(f"warning: {len(copies)} images of the pool are left out: they are evaluated on")
    if out:
        records.write_csv(out / "skipped.csv", ("reason",), [[reason] for reason in copies])
    return teacher, files, eval_data


def record_selection(result, cfg, out):
    """Print the outcome of steps 1 to 4 of the method; with `out`, write chosen.csv, too."""
    d, w, scores = result["distances"], result["weights"], result["scores"]
    unusable, (H, W) = len(result["skipped"]), result["pool"].size
    start, end = (effective_sample_size(progressive_weights(w, p, cfg.schedule)) for p in (0, 1))
    print(f"1 teacher   {len(result['layers'])} BatchNorm layers read\n"
          f"2 scored    {len(scores) - unusable} images at {H}x{W}, {unusable} unusable\n"
          f"3 selected  {len(w)} ({cfg.sampling}), score {d[0]:.4g} to {d[-1]:.4g}, median of the "
          f"pool {scores.nanmedian():.4g}\n4 weighted  {cfg.schedule}: effective sample size "
          f"{start:.0f} at the start, {end:.0f} at the end")
    if out:
        records.write_selection(out, result)


def report_dry_run(result, teacher, cfg, out):
    """Print and draw whether the pool fits the teacher; return the metrics of a dry run."""
    print(checks.describe_fit(teacher, result))
    figures.pool_figure(result, teacher.image_size, cfg.sampling, out / "pool.png")
    print(f"dry run: nothing was trained; see {out / 'pool.png'}")
    return {"pool_images": len(result["scores"]) - len(result["skipped"]), "out": str(out)}


def save_report(cfg, out, teacher, result, results, examples, timer):
    """Write curve.csv, figure.png and metrics.json, print the last lines; return the metrics.

    result: of distill.distill. results: {"teacher", "student", "agreement"} of evaluate.evaluate,
    the first two if there are labels. timer: of the stages before those of `result`.
    """
    result["timer"]("evaluation")
    seconds = timer | result["timer"]
    miou, count = {name: r["miou"] for name, r in results.items()}, len(result["files"])
    metrics = {
        "teacher_miou": miou.get("teacher"), "student_miou": miou.get("student"),
        "agreement_miou": miou["agreement"],
        "agreement_pixels": results["agreement"]["pixel_accuracy"],
        "iou": {k: records.by_name(teacher.class_names, r["iou"]) for k, r in results.items()},
        "pool_images": len(result["scores"]) - len(result["skipped"]),
        "skipped_images": len(result["skipped"]), "selected_images": count,
        "seen_images": min(cfg.steps * cfg.batch_size, count), "updates": cfg.steps,
        "seconds": sum(wall for wall, _ in seconds.values()),
        "stage_seconds": {name: wall for name, (wall, _) in seconds.items()},
        "processor_seconds": {name: processor for name, (_, processor) in seconds.items()},
        "config": asdict(cfg), "environment": records.environment(teacher.mean.device, cfg.amp)}
    records.write_csv(out / "curve.csv", ("step", "loss"), result["curve"])
    figures.run_figure(result, teacher, cfg, examples, out / "figure.png")
    checkpoint.save_json(metrics, out / "metrics.json")   # last: with it, a run counts as finished
    (out / "state.pt").unlink(missing_ok=True)
    times = ", ".join(f"{name} {t:.0f} s" for name, t in metrics["stage_seconds"].items())
    unseen = "" if metrics["seen_images"] == count else ", too few to see all of them"
    print(f"\n{metrics['pool_images']} pool images scored, {count} selected, {cfg.steps} updates"
          f"{unseen}\n{times}\nrecord and figure: {out}")
    summary = "agreement with the teacher {agreement_miou:.1%} (pixels {agreement_pixels:.1%})"
    if cfg.dataset != "none":
        summary = "student mIoU {student_miou:.1%}, teacher {teacher_miou:.1%}, " + summary
    print(summary.format(**metrics))
    return metrics
