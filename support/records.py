"""The folder of a run: its config, its tables, and what its numbers depend on.

Use it
    metrics = in_folder(run, Config, argv, "What the program does.")      # calls run(cfg, out)
    write_csv(out / "curve.csv", ("step", "loss"), curve)
"""

import csv
import hashlib
import json
import math
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, process_time

import torch

from support import checkpoint
from support.images import read_csv
from support.options import parse, pick_amp, set_deterministic

# Options that say where or how a run is computed, not what it computes.
NEUTRAL = {"out", "resume", "dry_run", "device", "workers", "download"}


def differences(cfg, recorded):
    """Return 'name: recorded value, now value' for the options of cfg that change a result.

    recorded: {name: value}; an option that is not in it, because it is newer, had its default.
    """
    # By way of JSON, which makes a tuple a list.
    now, before = (json.loads(json.dumps(x)) for x in (asdict(cfg), asdict(type(cfg)()) | recorded))
    return [f"{name}: {before[name]!r}, now {value!r}" for name, value in now.items()
            if name not in NEUTRAL and before[name] != value]


def digest(cfg):
    """Return a short name for the content of a config."""
    content = {k: v for k, v in asdict(cfg).items() if k not in NEUTRAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


# ---------------------------------------------------------------- the folder

def started(out):
    """Return whether a folder holds more than a config.json, a skipped.csv and hidden files.

    A run that failed before its first result, over a mistyped path say, leaves no more.
    """
    return out.is_dir() and any(p.name[0] != "." and p.name not in ("config.json", "skipped.csv")
                                for p in out.iterdir())


def in_folder(run, config_class, argv, description):
    """Return run(cfg, folder) for the options in the words `argv`.

    The folder is --out, or the next number below runs/, made if need be, with its config.json.
    With --resume, options come from there. ValueError if it holds something and --resume was not
    given, or no unfinished run with these options and it was. An error that can be overcome gets
    the command that resumes the run as a note.
    """
    cfg = parse(config_class, argv, description)
    taken = [int(p.name) for p in Path("runs").glob("*") if p.name.isdigit()]
    out = Path(cfg.out or f"runs/{max(taken, default=0) + 1:03d}")
    config = out / "config.json"
    if cfg.resume:
        if not config.is_file() or (out / "metrics.json").is_file():
            raise ValueError(f"--resume: there is no unfinished run in {out}; name one by --out")
        # A dry run may be continued by a run.
        recorded = json.loads(config.read_text()) | {"dry_run": False}
        cfg = parse(config_class, argv, description, recorded)
        changed = differences(cfg, recorded)
        if changed:
            raise ValueError(f"the run in {out} has another config ({'; '.join(changed)})")
    elif started(out):
        raise ValueError(f"{out} is not empty; choose another --out, or continue with --resume")
    else:
        checkpoint.save_json(asdict(cfg), config)
    if cfg.deterministic:
        set_deterministic()
    try:
        return run(cfg, out)
    except (KeyboardInterrupt, OSError, RuntimeError) as error:
        if not isinstance(error, FileNotFoundError):          # a mistyped path is not resumed
            module = sys.modules["__main__"].__spec__                     # of python -m, else None
            words = ["-m", module.name] if module else [sys.argv[0]]
            words += ["--resume", "--out", str(out), *["--dry-run"] * getattr(cfg, "dry_run", 0)]
            error.add_note(f"resume with: python {shlex.join(words)}")
        raise


# ---------------------------------------------------------------- tables

def write_csv(path, header, rows):
    """Write a table."""
    with checkpoint.atomic(path) as temporary, open(
            temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([header, *rows])


def write_selection(out, result):
    """Write chosen.csv, and add the unusable files to skipped.csv, from distill's result.

    ValueError if training has begun here on other images, as when the pool has changed.
    """
    files = [str(path) for path in result["files"]]
    if (out / "state.pt").exists() and files != [r[0] for r in read_csv(out / "chosen.csv")[1:]]:
        raise ValueError(f"{out} began with the images in chosen.csv; restore pool and options, or "
                         "choose another folder")
    write_csv(out / "chosen.csv", ("file", "distance", "weight"), zip(
        files, result["distances"].tolist(), result["weights"].tolist(), strict=True))
    before = read_csv(out / "skipped.csv")[1:] if (out / "skipped.csv").exists() else []
    new = [[reason] for reason in result["skipped"] if [reason] not in before]
    write_csv(out / "skipped.csv", ("reason",), before + new)


def by_name(names, values):
    """Return {name: value} for a tensor; JSON has no NaN: what is absent is None."""
    return {n: None if math.isnan(x) else x for n, x in zip(names, values.tolist(), strict=False)}


# ---------------------------------------------------------------- what a number depends on

class Timer(dict):
    """{stage: (wall seconds, processor seconds)}; calling it with a stage's name ends the stage."""

    def __init__(self):
        self.last = perf_counter(), process_time()

    def __call__(self, stage):
        now = perf_counter(), process_time()
        self[stage], self.last = (now[0] - self.last[0], now[1] - self.last[1]), now


def environment(device, amp="auto"):
    """Return what a number depends on besides the config: versions, hardware, precision, commit."""
    processor = torch.cpu.get_capabilities().get("cpu_name", platform.machine()) + " CPU"
    failed, commit = subprocess.getstatusoutput(
        f'git -C "{Path(__file__).parent}" rev-parse --short HEAD')       # no git: failed, too
    return {
        "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": version("torchvision"), "pillow": version("pillow"),
        "threads": torch.get_num_threads(), "commit": None if failed else commit,
        "precision": str(pick_amp(amp, device) or torch.float32),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor}
