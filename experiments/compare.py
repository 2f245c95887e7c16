"""A results table as a loop over distill.py's own command lines: methods x seeds, resumable.

Idea
    Every row of a table is one line that a reader can copy. This program runs the lines of a
    preset for several seeds, skips what is already there, and writes one JSON from which the
    README's tables are made. Seeds pair the rows: same student, same crops, other images.

Use it
    python -m experiments.compare --preset scenes --seeds 3 --out results/scenes.json
    python -m experiments.compare --preset metrics --seeds 3 --out results/metrics.json \\
        --common "--dataset camvid --data-root DIR --pool DIR --teacher T.pt --split val"
    python -m experiments.compare --table results/scenes.json    # the table again
"""

import json
import re
import shlex
import statistics
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import distill
from support import plots
from support.checkpoint import save_json
from support.options import Options, one_sentence, option, parse
from support.records import begun, differences, read_csv
from train_teacher import builtin_teacher

UNIFORM = "--schedule uniform"
RANDOM, CONFIDENCE = f"--sampling random {UNIFORM}", f"--sampling confidence {UNIFORM}"
CHANNELS = "--kd pixelwise+10*channelwise"
RECIPE = f"--metric kl --align transfer-first {CHANNELS} {UNIFORM}"
# The first row of a preset is the one that the others are compared with. {data_root} is the
# folder that the common options name.
PRESETS = {
    "headline": {"random": RANDOM,
                 "confidence": CONFIDENCE,
                 "confidence, progressive weights": "--sampling confidence",
                 "nearest (ADS)": UNIFORM,
                 "nearest, fixed weights": "--schedule fixed",
                 "nearest, progressive weights (DFSS)": "",
                 "the whole pool": f"--budget 0 {UNIFORM}",
                 "original images": f"--pool {{data_root}}/train --budget 0 {UNIFORM}"},
    "recipe": {"random": RANDOM,
               "nearest (ADS)": UNIFORM,
               "best recipe": RECIPE,
               "best recipe from 100 files": f"{RECIPE} --budget 100",
               "original images": f"--pool {{data_root}}/train --budget 0 {UNIFORM}",
               "original images, same loss":
                   f"--pool {{data_root}}/train --budget 0 {CHANNELS} {UNIFORM}"},
    "length": {f"{name}, {steps} updates": f"{words} --steps {steps}"
               for steps in (600, 1800, 3600) for name, words in
               (("original images", f"--pool {{data_root}}/train --budget 0 {UNIFORM}"),
                ("nearest (ADS)", UNIFORM),
                ("best recipe", RECIPE),
                ("best recipe from 100 files", f"{RECIPE} --budget 100"),
                ("DeepInversion, 100 images", f"--pool runs/inverted --budget 0 {UNIFORM}"))},
    "scenes": {"random": RANDOM,
               "nearest, progressive weights (DFSS)": "",
               "the same by kl distance": "--metric kl"},
    "metrics": {"random": RANDOM,
                "confidence": CONFIDENCE,
                "l2, all layers (ADS)": UNIFORM,
                "kl, all layers": f"--metric kl {UNIFORM}",
                "l2, early layers": f"--layers early {UNIFORM}",
                "l2, late layers": f"--layers late {UNIFORM}"},
    # These pools are written by experiments.generators.
    "structure": {"whole scenes": f"--pool runs/whole --budget 0 {UNIFORM}",
                  "4x4 tiles, shuffled": f"--pool runs/tiles --budget 0 {UNIFORM}"},
    "others": {"nearest (ADS)": UNIFORM,
               "nearest to the exact statistics":
                   f"--pool runs/oracle/chosen.csv --budget 0 {UNIFORM}",
               "DeepInversion, 100 images": f"--pool runs/inverted --budget 0 {UNIFORM}",
               "noise": f"--pool runs/noise --budget 0 {UNIFORM}"},
    "budget": {**{f"{name}, {budget} files": f"{words} --budget {budget}"
                  for budget in (50, 100, 200, 400, 800)
                  for name, words in (("random", RANDOM), ("nearest (ADS)", UNIFORM))},
               "the whole pool": f"--budget 0 {UNIFORM}"},
    "timing": {f"{name}, {steps} updates": f"{words} --steps {steps}"
               for steps in (150, 300, 450, 600) for name, words in
               (("uniform weights", UNIFORM), ("fixed weights", "--schedule fixed"),
                ("progressive weights", ""), ("progressive by rank", "--weighting rank"))},
    "ablation": {"nearest (ADS)": UNIFORM,
                 "pixel-wise KD alone": f"--kd pixelwise {UNIFORM}",
                 "channel-wise KD alone": f"--kd channelwise {UNIFORM}",
                 "ten times channel-wise": f"{CHANNELS} {UNIFORM}"},
}
# Two-sided 95 % quantiles of Student's t for n paired differences (n - 1 degrees of freedom).
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


@dataclass(frozen=True)
class Config(Options):
    preset: str = option("scenes", "rows of the table", choices=tuple(PRESETS))
    rows: str = option("", "only rows that this regular expression is found in")
    common: str = option("", "options of distill.py that all rows share, in quotes")
    seeds: int = option(3, "number of seeds, from 0 on")
    jobs: int = option(1, "runs at a time", least=1)
    runs: str | None = option(None, "folder of the single runs (default: named after --out)")
    out: str = option("results/compare.json", "the record that the table is made from")
    table: str | None = option(None, "instead: print the table of this record")
    figure: str | None = option(None, "and draw its series, rows that end in a number of files or "
                                "updates, here (PNG)", kind="FILE")


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


def collect(cfg):
    """Run all rows and seeds; return the record."""
    common = shlex.split(cfg.common)
    root = common[common.index("--data-root") + 1] if "--data-root" in common else ""
    try:
        wanted = re.compile(cfg.rows)
    except re.error as error:
        raise ValueError(f"--rows {cfg.rows!r} is no regular expression: {error}") from error
    rows = {name: common + shlex.split(words.replace("{data_root}", root))
            for name, words in PRESETS[cfg.preset].items() if wanted.search(name)}
    if not rows or not 1 <= cfg.seeds <= max(T95):
        raise ValueError(f"nothing to run: expected 1 to {max(T95)} --seeds and --rows that match "
                         f"some of {', '.join(PRESETS[cfg.preset])}; got {cfg.seeds} and "
                         f"{cfg.rows!r}")
    shared = parse(distill.Config, common, "")
    if shared.dataset == "none":
        raise ValueError("a table of mIoU needs labels; give another --dataset than none")
    if shared.dataset == "scenes":                   # once, not by several runs at the same time
        builtin_teacher(shared.image_size, shared.device, shared.amp)
    jobs = [(name, seed) for seed in range(cfg.seeds) for name in rows]

    def work(job):
        name, seed = job
        folder = runs_folder / "".join(c if c.isalnum() else "-" for c in f"{name} s{seed}")
        metrics = run_once([*rows[name], "--seed", str(seed)], folder)
        print(f"{name:40s} seed {seed}   mIoU {100 * metrics['student_miou']:.1f} %", flush=True)
        counts = picks(folder, metrics["config"]["pool"])
        return {"row": name, "seed": seed, "options": PRESETS[cfg.preset][name],
                **{k: metrics[k] for k in ("student_miou", "teacher_miou", "agreement_miou", "iou",
                                           "pool_images", "selected_images", "updates", "seconds",
                                           "stage_seconds", "environment")}, "picks": counts}

    runs, runs_folder = [], Path(cfg.runs or f"runs/{Path(cfg.out).stem}")
    # Folders differ from machine to machine; their last part says what they hold.
    said = " ".join(Path(word).name if "/" in word else word for word in common)
    with ThreadPoolExecutor(cfg.jobs) as pool:
        for run in pool.map(work, jobs):
            runs.append(run)
            record = {"common": said, "runs": runs}
            save_json(record, cfg.out)                      # what is done is not lost
    return record


def paired(by_seed, reference):
    """Return 'mean ± half of the 95 % interval' of the differences between paired seeds."""
    both = [by_seed[seed] - reference[seed] for seed in by_seed if seed in reference]
    if by_seed is reference or len(both) < 2:
        return ""
    half = T95[len(both)] * statistics.stdev(both) / len(both) ** 0.5
    return f"{statistics.mean(both):+.1f} ± {half:.1f}"


def size_of(row):
    """Return (name, number, unit) of a row "name, 50 files" of a series; else (row, None, "")."""
    found = re.fullmatch(r"(.+), (\d+) (files|updates)", row)
    return (found[1], int(found[2]), found[3]) if found else (row, None, "")


def like(name, names, other=None):
    """Return the row that `name` is compared with: the first of its size, "..., 50 files".

    other: a row's name without its size; the row of that name and of this size, or None.
    """
    return next((n for n in names if size_of(n)[1:] == size_of(name)[1:]
                 and other in (None, size_of(n)[0])), None)


def table(record):
    """Return the record as a Markdown table: a line per row, seeds averaged."""
    scores = {}
    for run in record["runs"]:
        scores.setdefault(run["row"], {})[run["seed"]] = 100 * run["student_miou"]
    first = next(iter(scores.values()))
    originals = {name: scores.get(like(name, scores, "original images")) for name in scores}
    sizes = "" if like(list(scores)[-1], scores) == next(iter(scores)) else " of its size"
    others = [name for name in ("confidence", "the whole pool") if name in scores]
    header = [f"row (seeds: {len(first)})", "mIoU %",
              f"difference to the first row{sizes}, 95 % interval"]
    header += [f"to {name}" for name in others] + ["of original, %"] * any(originals.values())
    lines = []
    for name, by_seed in scores.items():
        values = list(by_seed.values())
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells = [name, f"{statistics.mean(values):.1f}{spread}",
                 paired(by_seed, scores[like(name, scores)])]
        cells += [paired(by_seed, scores[other]) for other in others]
        if any(originals.values()):
            original = originals[name] or {}
            kept = [100 * by_seed[seed] / original[seed] for seed in by_seed if seed in original]
            cells.append(f"{statistics.mean(kept):.0f}" if kept else "")
        kinds = next(run["picks"] for run in record["runs"] if run["row"] == name)
        cells.append(", ".join(f"{kind} {n}" for kind, n in Counter(kinds).most_common(5)))
        lines.append("| " + " | ".join(cells) + " |")
    header.append("chosen")
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *lines])


def draw(record, path):
    """Write the figure of a record: mIoU over the sizes of its rows, a line per name."""
    scores, lines = {}, {}
    for run in record["runs"]:
        scores.setdefault(run["row"], []).append(100 * run["student_miou"])
    for row, values in scores.items():
        name, number, unit = size_of(row)
        deviation = np.std(values, ddof=1) if len(values) > 1 else 0
        lines.setdefault(name, []).append((number, np.mean(values), deviation, unit))
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    ticks = sorted({number for points in lines.values() for number, *_ in points if number})
    for k, (name, points) in enumerate(lines.items()):
        number, mean, deviation, unit = zip(*points, strict=True)
        if number[0] is None:
            axes.axhline(mean[0], color=plots.GREY, ls="--", label=name)
            continue
        axes.errorbar(number, mean, deviation, color=f"C{k}", marker="o", ms=4, capsize=3,
                      label=name)
        axes.set_xlabel(unit[0])
    axes.set_xscale("log")
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_ylabel("student mIoU % (bars: deviation over seeds)")
    axes.legend(frameon=False, fontsize=8)
    plots.write(figure, path)


def main(argv=None):
    """Run a preset, write its record, print its table; return the record."""
    cfg = parse(Config, argv, "Compare methods over seeds; every row is a line of distill.py.")
    record = json.loads(Path(cfg.table).read_text()) if cfg.table else collect(cfg)
    print(table(record))
    if cfg.figure:
        draw(record, cfg.figure)
    return record


if __name__ == "__main__":
    one_sentence(main)()
