"""A results table: methods x seeds, each run a command line of distill.py.

Idea
    experiments/rows.csv lists the presets: per row a name and options of distill.py. This program
    runs each row of a preset with each seed and writes one JSON record, from which the tables are
    made. It is resumable: finished runs are read, interrupted ones resume. Runs of one seed share
    the student's initial weights and all augmentations, so rows are compared seed by seed.

Use it
    python -m experiments.compare --preset scenes --seeds 3 --out results/scenes.json
    python -m experiments.compare --preset headline --seeds 5 --out results/headline.json \\
        --common "--dataset camvid --data-root DIR --pool DIR --teacher T.pt --steps 2400"
    python -m experiments.compare --table results/scenes.json    # print the table of a record
"""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import distill
from experiments.tables import T95, table
from support import checkpoint, images, records
from support.options import Options, one_sentence, option, parse

ROWS = Path(__file__).with_name("rows.csv")


@dataclass(frozen=True)
class Config(Options):
    preset: str = option("scenes", "rows of the table: a preset of experiments/rows.csv")
    rows: str = option("", "only these rows: 'A; B'")
    common: str = option("", "options of distill.py that all rows share, in quotes")
    original: str = option("", "the teacher's training images (default: train of --data-root)")
    seeds: int = option(3, "number of seeds, from 0 on", min=1)
    runs: str = option("", "folder of the single runs (default: named after --out)")
    out: str = option("results/compare.json", "the record (JSON)")
    table: str = option("", "instead: print the table of this record", metavar="FILE")


def read_preset(preset):
    """Return {row: options} of a preset; a row with several values of {n} becomes several rows."""
    return {name.replace("{n}", n): words.replace("{n}", n)
            for named, name, words, numbers in images.read_csv(ROWS)[1:] if named == preset
            for n in numbers.split() or [""]}


def choose_rows(cfg, runs):
    """Return {row: options of distill.py, common ones first}, with paths for the words in braces.

    {pool}: the common --pool ({pool}-0: a copy without its street views). {original}: the
    teacher's training images. {runs}: the folder `runs`, where other programs write pools.
    """
    common, preset = shlex.split(cfg.common), read_preset(cfg.preset)
    named = parse(distill.Config, common, "")
    train = Path(named.data_root or "", "train")
    train = train / "images" if (train / "images").is_dir() else train
    paths = {"pool": Path(named.pool or ""), "original": cfg.original or train, "runs": runs}
    rows = {row: common + [word.format(**paths) for word in shlex.split(words)]
            for row, words in preset.items() if not cfg.rows or row in cfg.rows.split("; ")}
    if not rows or cfg.seeds > max(T95) or named.dataset == "none":
        raise ValueError(f"expected a preset, --rows that match some of it ({'; '.join(preset)}), "
                         f"at most {max(T95)} seeds, and labels to score on")
    return rows


def run_once(words, folder):
    """Run distill.py with these options unless its metrics are there already; return them."""
    config, metrics = folder / "config.json", folder / "metrics.json"
    if config.exists():                          # a run of the same name may have other options
        cfg = parse(distill.Config, words, "")
        changed = "; ".join(records.differences(cfg, json.loads(config.read_text())))
        if changed:
            raise ValueError(f"{folder} has other options ({changed}); choose another --runs")
    if not metrics.exists():
        words = [*words, "--out", str(folder), *(["--resume"] if records.started(folder) else [])]
        done = subprocess.run([sys.executable, "distill.py", *words], stderr=subprocess.PIPE,
                              stdout=subprocess.DEVNULL, text=True, check=False)
        if done.returncode:
            raise ValueError(f"distill.py {shlex.join(words)} failed: {done.stderr[-500:]}")
    return json.loads(metrics.read_text())


def collect(cfg):
    """Run all rows with all seeds; return the record."""
    runs = Path(cfg.runs or f"runs/{Path(cfg.out).stem}")
    rows, preset = choose_rows(cfg, runs), read_preset(cfg.preset)
    # Folders differ from machine to machine; their last part says what they hold.
    words = [Path(word).name if "/" in word else word for word in shlex.split(cfg.common)]
    record = {"common": " ".join(words), "runs": []}
    for seed, row in product(range(cfg.seeds), rows):
        folder = runs / re.sub(r"\W", "-", f"{row} s{seed}")
        metrics = run_once([*rows[row], "--seed", str(seed)], folder)
        del metrics["config"]                                      # `options` and `common` say it
        print(f"{row:40s} seed {seed}   mIoU {100 * metrics['student_miou']:.1f} %", flush=True)
        record["runs"].append({"row": row, "seed": seed, "options": preset[row], **metrics})
        checkpoint.save_json(record, cfg.out)                      # what is done is not lost
    return record


def main(argv=None):
    """Run a preset and write its record, or read a record; print its table."""
    cfg = parse(Config, argv, "Compare methods over seeds; every row is a line of distill.py.")
    record = json.loads(Path(cfg.table).read_text()) if cfg.table else collect(cfg)
    print(table(record))


if __name__ == "__main__":
    one_sentence(main)()
