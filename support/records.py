"""The folder of a run: what was asked, with what, what came out, so that a row has a record.

Use it
    metrics = in_folder(run, Config, argv, "What the program does.")      # calls run(cfg, out)
    write_csv(out / "curve.csv", ("step", "loss"), curve)
"""

import csv
import hashlib
import json
import platform
import shlex
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter, process_time

import PIL
import torch
import torchvision

from evaluate import named_iou
from support import checkpoint, together
from support.data import read_csv
from support.options import parse, pick_amp

# Options that say where or how a run is computed, not what it computes.
NEUTRAL = {"out", "resume", "dry_run", "device", "workers", "download"}


def differences(options, recorded):
    """Return 'name: recorded value, now value' for options, a dict, that change a result."""
    now = json.loads(json.dumps(options))                        # as JSON has it: a tuple is a list
    return [f"{name}: {recorded.get(name)!r}, now {value!r}" for name, value in now.items()
            if name not in NEUTRAL and recorded.get(name) != value]


def digest(cfg):
    """Return a short name for the content of a config."""
    content = {k: v for k, v in asdict(cfg).items() if k not in NEUTRAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def about(cfg, teacher):
    """Return what tells the state of a run from those of others: options and teacher."""
    return f"{digest(cfg)} {checkpoint.fingerprint(teacher)}"


# ---------------------------------------------------------------- the folder

def begun(out):
    """Say whether a folder holds more than a config.json, a skipped.csv and hidden files.

    A run that failed before its first result, over a mistyped path say, leaves no more.
    """
    return out.is_dir() and any(p.name not in ("config.json", "skipped.csv") and p.name[0] != "."
                                for p in out.iterdir())


@contextmanager
def locked(out):
    """Keep other programs out of a folder, which is made if need be, while the body runs."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another program is at work in {out}; wait for it") from error
        except (ImportError, OSError):          # Windows has none, nor have some shared folders
            pass
        yield


def configured(config_class, argv, description):
    """Return the config that the words `argv` give; with --resume, the one in the folder --out.

    Raises ValueError if there is no run to go on with there, or one that had other options.
    """
    cfg = parse(config_class, argv, description)
    if not cfg.resume:
        return cfg
    out = Path(str(cfg.out))
    if not (out / "config.json").is_file():
        raise ValueError(f"--resume: there is no run in {out}; name the folder of one by --out")
    if (out / "metrics.json").is_file():
        raise ValueError(f"the run in {out} is finished; its result is in metrics.json")
    kept = json.loads((out / "config.json").read_text())
    cfg = parse(config_class, argv, description, {**kept, "resume": True})
    changed = differences(asdict(cfg), asdict(config_class()) | kept)
    if changed:
        raise ValueError(f"the run in {out} has another config ({'; '.join(changed)}); resume it "
                         "with its own options, or choose another --out")
    return cfg


def next_folder(root=Path("runs")):
    """Return the folder of the next free number."""
    taken = [int(p.name) for p in root.glob("[0-9]*") if p.name.isdigit()]
    return root / f"{max(taken, default=0) + 1:03d}"


@contextmanager
def open_run(cfg):
    """Yield the folder of this run, made if need be, with its config.json; nobody else may use it.

    It is --out, or the next number below runs/. Raises ValueError if it holds something and
    --resume was not given. An interruption, a full disk and the like get the command that goes on
    from there.
    """
    out = Path(cfg.out or next_folder())
    with locked(out):
        if begun(out) and not cfg.resume:
            raise ValueError(f"{out} is not empty; choose another --out, or go on by --resume")
        if not cfg.resume:
            checkpoint.save_json(asdict(cfg), out / "config.json")
        try:
            yield out
        except (KeyboardInterrupt, OSError, RuntimeError) as error:
            if not isinstance(error, FileNotFoundError | torch.OutOfMemoryError):
                words = ["python", sys.argv[0], "--resume", "--out", str(out)]
                error.__notes__ = [f"go on with: {shlex.join(words)}"]   # the outer of two runs
            raise


def in_folder(run, config_class, argv, description):
    """Return run(cfg, folder) for the options in the words `argv`.

    Under torchrun this is what the first process does, and the others get both from it.
    """
    with together.joined() as rank:
        if rank:
            return run(None, None)
        cfg = configured(config_class, argv, description)
        with open_run(cfg) as out:
            return run(cfg, out)


# ---------------------------------------------------------------- tables

def write_csv(path, header, rows):
    """Write a table."""
    with checkpoint.atomic(path) as temporary, open(
            temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([header, *rows])


def write_choice(out, found):
    """Write chosen.csv, and add the unreadable files to skipped.csv, from what was found.

    Raises ValueError if training has begun here on other images, as when the pool has changed.
    """
    files = [str(path) for path in found["files"]]
    if (out / "state.pt").exists() and files != [r[0] for r in read_csv(out / "chosen.csv")[1:]]:
        raise ValueError(f"the run in {out} began with other images of the pool, those in its "
                         "chosen.csv (or where numbers round in another way); put these back "
                         "and resume, or choose another --out")
    write_csv(out / "chosen.csv", ("file", "distance", "weight"), zip(
        files, found["distances"].tolist(), found["weights"].tolist(), strict=True))
    before = read_csv(out / "skipped.csv")[1:] if (out / "skipped.csv").exists() else []
    rows = before + [[why] for why in found["skipped"]]
    write_csv(out / "skipped.csv", ("reason",), dict.fromkeys(map(tuple, rows)))


# ---------------------------------------------------------------- the result

class Laps(dict):
    """{stage: (wall seconds, processor seconds)}; calling it with a stage's name ends the stage."""

    def __init__(self):
        super().__init__()
        self.last = perf_counter(), process_time()

    def __call__(self, stage):
        now = perf_counter(), process_time()
        self[stage], self.last = (now[0] - self.last[0], now[1] - self.last[1]), now


def environment(device, amp="auto"):
    """Return what a number depends on beside the config: versions, hardware, precision, commit."""
    processor = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    failed, commit = subprocess.getstatusoutput(
        f'git -C "{Path(__file__).parent}" rev-parse --short HEAD')       # no git: failed, too
    return {"python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "pillow": PIL.__version__,
            "threads": torch.get_num_threads(), "commit": None if failed else commit,
            "precision": str(pick_amp(amp, device) or torch.float32),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"{processor} CPU"}


def metrics(cfg, results, teacher, found, laps):
    """Return metrics.json: what was reached, from how many images, in how long, with what.

    results: {"teacher", "student", "agreement"} of evaluate.evaluate, the first two only where
    there are labels. found: of distill.distill. laps: of all stages.
    """
    miou = {name: result["miou"] for name, result in results.items()}
    count = len(found["files"])
    return {
        "teacher_miou": miou.get("teacher"), "student_miou": miou.get("student"),
        "agreement_miou": miou["agreement"],
        "agreement_pixels": results["agreement"]["pixel_accuracy"],
        "iou": {name: named_iou(result, teacher.class_names) for name, result in results.items()},
        "pool_images": len(found["scores"]) - len(found["skipped"]),
        "skipped_images": len(found["skipped"]), "selected_images": count,
        "seen_images": min(cfg.steps * cfg.batch_size, count), "updates": cfg.steps,
        "seconds": sum(wall for wall, _ in laps.values()),
        "stage_seconds": {name: wall for name, (wall, _) in laps.items()},
        "processor_seconds": {name: processor for name, (_, processor) in laps.items()},
        "config": asdict(cfg), "environment": environment(teacher.mean.device, cfg.amp)}


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
