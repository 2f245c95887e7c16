"""The folder of a run: what was asked, with what, what came out, so that a row has a record.

Use it
    out = open_run(cfg)                    # a new or an empty folder, or, with cfg.resume, this one
    write_csv(out / "curve.csv", ("step", "loss"), curve)
"""

import csv
import dataclasses
import hashlib
import json
import platform
import shlex
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import PIL
import torch
import torchvision

from evaluate import named_iou
from support import checkpoint

# Options that say where or how a run is computed, not what it computes.
NEUTRAL = {"out", "resume", "dry_run", "device", "workers", "download"}
TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}      # file names that are not UTF-8, too


def differences(cfg, recorded):
    """Return 'name: recorded value, now value' for options of a dataclass that changed a result."""
    now = json.loads(json.dumps(dataclasses.asdict(cfg)))
    return [f"{name}: {recorded.get(name)!r}, now {value!r}" for name, value in now.items()
            if name not in NEUTRAL and recorded.get(name) != value]


def digest(cfg):
    """Return a short name for the content of a config."""
    content = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NEUTRAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def open_run(cfg):
    """Return the folder of this run, made if need be, with its config.json.

    Without --out it is the next free number below runs/. Raises ValueError if the folder holds
    something and --resume was not given, or if it holds a run of another config.
    """
    if cfg.out is None and cfg.resume:
        raise ValueError("--resume needs --out, the folder of the run to go on with")
    if cfg.out is None:
        taken = [int(p.name) for p in Path("runs").glob("[0-9]*") if p.name.isdigit()]
        out = Path("runs") / f"{max(taken, default=0) + 1:03d}"
    else:
        out = Path(cfg.out)
    # A run that failed before its first result, over a mistyped path say, leaves config.json only.
    # What begins with a dot is what a killed program was about to write.
    if out.is_dir() and any(p.name != "config.json" and p.name[0] != "." for p in out.iterdir()):
        if not cfg.resume:
            raise ValueError(f"{out} is not empty; choose another --out, or add --resume to go on "
                             "with the run in it")
        if not (out / "config.json").is_file():
            raise ValueError(f"{out} holds no run to resume (no config.json)")
        if (out / "metrics.json").is_file():
            raise ValueError(f"the run in {out} is finished; its result is in metrics.json")
        changed = differences(cfg, json.loads((out / "config.json").read_text()))
        if changed:
            raise ValueError(f"the run in {out} has another config ({'; '.join(changed)}); resume "
                             "it with its own options, or choose another --out")
    checkpoint.save_json(dataclasses.asdict(cfg), out / "config.json")
    return out


@contextmanager
def resumable(out):
    """Add to an interruption, a full disk and the like the command that goes on from there."""
    try:
        yield
    except (KeyboardInterrupt, OSError, RuntimeError) as error:
        if not isinstance(error, FileNotFoundError | torch.OutOfMemoryError):
            more = [word for option, words in (("--resume", ()), ("--out", (str(out),)))
                    if option not in sys.argv for word in (option, *words)]
            error.add_note(f"go on with: {shlex.join(['python', *sys.argv, *more])}")
        raise


def in_folder(run, cfg):
    """Return run(cfg, the folder of this run); if it is interrupted, the error says how to go on.
    """
    out = open_run(cfg)
    with resumable(out):
        return run(cfg, out)


def read_csv(path):
    """Return the rows of a table, as text."""
    with open(path, newline="", **TEXT) as file:
        return list(csv.reader(file))


def write_csv(path, header, rows):
    """Write a table."""
    with checkpoint.atomic(path) as temporary, open(temporary, "w", newline="", **TEXT) as file:
        csv.writer(file).writerows([header, *rows])


def write_choice(out, chosen, left_out=()):
    """Write chosen.csv and skipped.csv: what distill.select returned, data.leave_out left out.

    Raises ValueError if training has begun here on other images, as when the pool has changed.
    """
    files = [str(path) for path in chosen["files"]]
    if (out / "state.pt").exists() and files != [r[0] for r in read_csv(out / "chosen.csv")[1:]]:
        raise ValueError(f"the run in {out} began with other images of the pool, those in its "
                         "chosen.csv; put these back and resume, or choose another --out")
    write_csv(out / "chosen.csv", ("file", "distance", "weight"), zip(
        files, chosen["distances"].tolist(), chosen["weights"].tolist(), strict=True))
    write_csv(out / "skipped.csv", ("reason",), [[why] for why in (*chosen["skipped"], *left_out)])
    if left_out:
        print(f"            warning: {len(left_out)} images of the pool are also among those to "
              "evaluate on; they were left out (skipped.csv)")


def environment(device):
    """Return what a number depends on beside the config: versions, hardware, commit."""
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                                text=True, cwd=Path(__file__).parent, check=False).stdout.strip()
    except FileNotFoundError:                       # no git here, as in many containers
        commit = ""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "pillow": PIL.__version__,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"{platform.machine()} CPU", "commit": commit or None}


def metrics(cfg, results, teacher, chosen, laps):
    """Return metrics.json: what was reached, from how many images, in how long, with what.

    results: {"teacher", "student", "agreement"} of evaluate.evaluate, the first two only where
    there are labels. chosen: of distill.select. laps: [(stage, time at its end), ...].
    """
    miou = {name: result["miou"] for name, result in results.items()}
    count = len(chosen["files"])
    return {
        "teacher_miou": miou.get("teacher"), "student_miou": miou.get("student"),
        "agreement_miou": miou["agreement"],
        "agreement_pixels": results["agreement"]["pixel_accuracy"],
        "iou": {name: named_iou(result, teacher.class_names) for name, result in results.items()},
        "pool_images": len(chosen["pool"]) - len(chosen["skipped"]),
        "skipped_images": len(chosen["skipped"]), "selected_images": count,
        "seen_images": min(cfg.steps * cfg.batch_size, count), "updates": cfg.steps,
        "seconds": laps[-1][1] - laps[0][1],
        "stage_seconds": {name: end - start for (_, start), (name, end) in pairwise(laps)},
        "config": dataclasses.asdict(cfg), "environment": environment(teacher.mean.device)}


def closing(metrics, out):
    """Return the last lines of a run: how long each step took, and the result."""
    percent = "{:.1%}".format
    times = ", ".join(f"{name} {t:.0f} s" for name, t in metrics["stage_seconds"].items())
    student = "" if metrics["student_miou"] is None else (
        f"student mIoU {percent(metrics['student_miou'])}, teacher "
        f"{percent(metrics['teacher_miou'])}, ")
    return (f"\n{metrics['pool_images']} pool images scored, {metrics['selected_images']} chosen, "
            f"{metrics['seen_images']} seen in {metrics['updates']} updates\n{times}\n"
            f"record and figure: {out}\n{student}agreement with the teacher "
            f"{percent(metrics['agreement_miou'])} (pixels {percent(metrics['agreement_pixels'])})")
