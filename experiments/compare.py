"""A results table as a loop over distill.py's own command lines: methods x seeds, resumable.

Idea
    Every row of a table is one line that a reader can copy. This program runs the lines of a
    preset for several seeds, skips what is already there, and writes one JSON from which the
    README's tables are made. Seeds pair the rows: same student, same crops, other images. A claim
    about a method needs several teachers: their records are points of one paired test.

Use it
    python -m experiments.compare --preset scenes --seeds 3 --out results/scenes.json
    python -m experiments.compare --preset headline --seeds 5 --out results/headline.json \\
        --common "--dataset camvid --data-root DIR --pool DIR --teacher T.pt --steps 2400"
    python -m experiments.compare --table results/scenes.json    # the table again
    python -m experiments.compare --table "results/length.json results/generators.json" \\
        --figure results/seconds.png                             # two records as one
    python -m experiments.compare --teachers "results/headline.json results/headline2.json"
"""

import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path

import distill
from experiments.tables import T95, draw, read, table, teachers
from support.checkpoint import save_json
from support.options import Options, one_sentence, option, parse
from support.records import begun, differences, read_csv

UNIFORM, KL, COLOURS = "--schedule uniform", "--metric kl", "--align transfer-first"
LOSS = "--kd pixelwise+10*channelwise"
RECIPE = f"{KL} {COLOURS} {LOSS}@0.4 {UNIFORM}"
STEPS = (600, 2400, 7200, 14400)
# The first row of a preset is the one that the others are compared with. {pool} is the folder that
# the common options name ({pool}-25: a copy with 25 of its street views, say), {original} the
# training images below their --data-root.
HEADLINE = {"random": f"--sampling random {UNIFORM}",
            "confidence": f"--sampling confidence {UNIFORM}",
            "the whole pool": f"--budget 0 {UNIFORM}",
            "nearest (ADS)": UNIFORM,
            "nearest, fixed weights": "--schedule fixed",
            "nearest, progressive weights (DFSS)": "",
            "recipe": RECIPE,
            "original images": f"--pool {{original}} --budget 0 {UNIFORM}"}
WEIGHTS = {"uniform": UNIFORM, "fixed": "--schedule fixed", "progressive": "",
           "fixed by rank": "--schedule fixed --weighting rank",
           "progressive by rank": "--weighting rank"}
MADE_UP = f"--pool runs/inverted --budget 0 {UNIFORM}"          # written by experiments.generators


def some(*names):
    """Return these rows of the headline."""
    return {name: HEADLINE[name] for name in names}


def series(rows, numbers, flag="--steps", unit="updates"):
    """Return the rows "name, 600 updates" that give each of `rows` each of the numbers."""
    return {f"{name}, {n} {unit}": f"{words} {flag} {n}"
            for n in numbers for name, words in rows.items()}


PRESETS = {
    "headline": HEADLINE,
    "ladder": {"nearest, progressive weights (DFSS)": "",
               "without weights": UNIFORM,
               "+ kl distance": f"{KL} {UNIFORM}",
               "+ private colours": f"{KL} {COLOURS} {UNIFORM}",
               "+ channel-wise loss ten times": f"{KL} {COLOURS} {LOSS} {UNIFORM}",
               "+ surer answers (recipe)": RECIPE},
    "weights": series({f"{name}, {files} files": f"{words} --budget {budget}"
                       for files, budget in (("all", 0), ("800", 800), ("400", 400))
                       for name, words in WEIGHTS.items()}, (600, 1200, 2400)),
    "length": series(some("original images", "nearest (ADS)", "recipe", "random"), STEPS),
    "budget": series(some("random", "nearest (ADS)"), (50, 100, 200, 400, 800, 1600),
                     "--budget", "files") | some("the whole pool"),
    "found": {"nearest (ADS)": UNIFORM, "first layer alone": f"--layers 0 {UNIFORM}"}
             | {f"layer {n} alone, of 0 to 20": f"--layers {n} {UNIFORM}" for n in (5, 10, 15)}
             | {f"{third} third of the layers": f"--layers {third} {UNIFORM}"
                for third in ("early", "middle", "late")}
             | {"kl distance": f"{KL} {UNIFORM}",
                "random, street views only": f"--pool {{pool}}/street --sampling random {UNIFORM}",
                "nearest, street views only": f"--pool {{pool}}/street {UNIFORM}"}
             | {f"nearest, {n} street views": f"--pool {{pool}}-{n} {UNIFORM}"
                for n in (0, 25, 100)},
    "generators": series(some("random", "nearest (ADS)", "recipe", "original images")
                         | {"DeepInversion": MADE_UP,
                            "DeepInversion, ten times channel-wise": f"{MADE_UP} {LOSS}"}, STEPS),
    "structure": {"whole scenes": f"--pool {{pool}}/whole --budget 0 {UNIFORM}",
                  "4x4 tiles, shuffled": f"--pool {{pool}}/tiles --budget 0 {UNIFORM}"},
    "scenes": some("random", "nearest, progressive weights (DFSS)")
              | {"the same by kl distance": KL},
}


@dataclass(frozen=True)
class Config(Options):
    preset: str = option("scenes", "rows of the table", choices=tuple(PRESETS))
    rows: str = option("", "only rows that this regular expression is found in")
    common: str = option("", "options of distill.py that all rows share, in quotes")
    seeds: int = option(3, "number of seeds, from 0 on")
    runs: str | None = option(None, "folder of the single runs (default: named after --out)")
    out: str = option("results/compare.json", "the record that the table is made from")
    table: str | None = option(None, "instead: print the table of this record, or of these, in "
                               "quotes", kind="FILES")
    teachers: str | None = option(None, "instead: print the paired test over these records of the "
                                  "headline, each of another teacher, in quotes", kind="FILES")
    figure: str | None = option(None, "and draw what its rows keep of the original images' result, "
                                "over processor seconds (PNG)", kind="FILE")


def run_once(words, folder):
    """Run distill.py with these words unless its metrics are there already; return them."""
    if (folder / "config.json").exists():        # a run of the same name may have other options
        changed = differences(asdict(parse(distill.Config, words, "")),
                              json.loads((folder / "config.json").read_text()))
        if changed:
            raise ValueError(f"the run in {folder} has another config ({'; '.join(changed)}); "
                             "choose another --runs, or delete it")
    if not (folder / "metrics.json").exists():
        resume = ["--resume"] if begun(folder) else []
        done = subprocess.run([sys.executable, "distill.py", *words, "--out", str(folder), *resume],
                              capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"distill.py {' '.join(words)} failed: {done.stderr[-500:]}")
    return json.loads((folder / "metrics.json").read_text())


def picks(folder, pool):
    """Return {kind: number chosen}; the kind is the file's folder, or as drawn."""
    files = [Path(row[0]) for row in read_csv(folder / "chosen.csv")[1:]]
    kinds = Path(pool).parent / "pool_kinds.csv"
    if kinds.exists():
        kind = dict(read_csv(kinds))
        return Counter(kind[file.name] for file in files)
    return Counter(file.parts[-2] for file in files)


def making(pool):
    """Return {"pool": processor seconds} of a pool that experiments.generators made, else {}."""
    record = Path(pool, "record.json")
    return {"pool": json.loads(record.read_text())["processor_seconds"]} if record.exists() else {}


def collect(cfg):
    """Run all rows and seeds; return the record."""
    try:
        wanted = re.compile(cfg.rows)
    except re.error as error:
        raise ValueError(f"--rows {cfg.rows!r} is no regular expression: {error}") from error
    common = shlex.split(cfg.common)
    named = dict(pairwise(common))
    train = Path(named.get("--data-root", ""), "train")
    places = {"pool": named.get("--pool", ""),
              "original": train / "images" if (train / "images").is_dir() else train}
    rows = {name: common + [word.format(**places) for word in shlex.split(words)]
            for name, words in PRESETS[cfg.preset].items() if wanted.search(name)}
    if not rows or not 1 <= cfg.seeds <= max(T95):
        raise ValueError(f"nothing to run: expected 1 to {max(T95)} --seeds and --rows that match "
                         f"some of {', '.join(PRESETS[cfg.preset])}; got {cfg.seeds} and "
                         f"{cfg.rows!r}")
    if parse(distill.Config, common, "").dataset == "none":
        raise ValueError("a table of mIoU needs labels; give another --dataset than none")
    runs_folder = Path(cfg.runs or f"runs/{Path(cfg.out).stem}")
    # Folders differ from machine to machine; their last part says what they hold.
    said = " ".join(Path(word).name if "/" in word else word for word in common)
    record = {"common": said, "runs": []}
    for seed, name in product(range(cfg.seeds), rows):
        folder = runs_folder / "".join(c if c.isalnum() else "-" for c in f"{name} s{seed}")
        metrics = run_once([*rows[name], "--seed", str(seed)], folder)
        print(f"{name:40s} seed {seed}   mIoU {100 * metrics['student_miou']:.1f} %", flush=True)
        pool = metrics.pop("config")["pool"]                # the rest of it is in the options
        metrics["processor_seconds"] |= making(pool)
        record["runs"].append({"row": name, "seed": seed, "options": PRESETS[cfg.preset][name],
                               **metrics, "picks": picks(folder, pool)})
        save_json(record, cfg.out)                          # what is done is not lost
    return record


def main(argv=None):
    """Run a preset and write its record, or read one; print its table, draw its figure."""
    cfg = parse(Config, argv, "Compare methods over seeds; every row is a line of distill.py.")
    if cfg.teachers:
        print(teachers(shlex.split(cfg.teachers)))
        return
    record = read(*shlex.split(cfg.table)) if cfg.table else collect(cfg)
    print(table(record))
    if cfg.figure:
        draw(record, cfg.figure)


if __name__ == "__main__":
    one_sentence(main)()
