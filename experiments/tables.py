"""What a record says: its table, the paired test over teachers, its figure.

Idea
    A record holds every run of a table, with its seed. Rows are compared seed by seed, as these
    share the student's initialisation and every crop; teachers are compared record by record. A
    row "name, 50 files, 600 updates" belongs to a series and is compared with rows of its size.

Use it
    record = read("results/scenes.json")
    print(table(record))
    print(teachers(["results/headline.json", "results/headline_teacher2.json"]))
    draw(record, "scenes.png")
"""

import json
import re
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from support import figures

# Two-sided 95 % quantiles of Student's t for n values (n - 1 degrees of freedom).
T95 = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), 2))
NEAREST, ORIGINAL = "nearest (ADS)", "original images"


def read(*paths):
    """Return one record with the runs of all these files."""
    records = [json.loads(Path(path).read_text()) for path in paths]
    return {**records[0], "runs": [run for record in records for run in record["runs"]]}


def by_row(record):
    """Return {row: {seed: run}}."""
    rows = {}
    for run in record["runs"]:
        rows.setdefault(run["row"], {})[run["seed"]] = run
    return rows


def parts(row):
    """Return ("name", "50 files, 600 updates") of a row of a series, (row, "") of another one."""
    name, sizes = re.fullmatch(r"(.+?)((?:, (?:\d+|all) (?:files|updates))*)", row).groups()
    return name, sizes.removeprefix(", ")


def beside(row, rows, name):
    """Return the runs of the row of this name and of the same size, or of no size; else none."""
    return rows.get(f"{name}, {parts(row)[1]}") or rows.get(name, {})


# ---------------------------------------------------------------- numbers, one for each seed

def percent(runs, key="student_miou"):
    """Return this result of each run in %, of those that have it."""
    return [100 * run[key] for run in runs.values() if key in run]


def paired(runs, others):
    """Return the mIoU in % of two rows for each seed that both have: a list of pairs."""
    return [(100 * run["student_miou"], 100 * others[seed]["student_miou"])
            for seed, run in runs.items() if seed in others]


def gain(runs, others):
    """Return the differences of paired seeds, in points of mIoU."""
    return [a - b for a, b in paired(runs, others)]


def kept(runs, originals):
    """Return what is kept of the result of the original images, in %, for each paired seed."""
    return [100 * a / b for a, b in paired(runs, originals)]


def trained(runs):
    """Return the processor seconds of distillation, and of making the pool where it is made up.

    Scoring is left out: it costs nothing where an earlier run has kept the scores.
    """
    spent = [run["processor_seconds"] for run in runs.values() if run.get("processor_seconds")]
    return [stages["distillation"] + stages.get("pool", 0) for stages in spent]


def interval(values, sign="+"):
    """Return 'mean ± half of the 95 % interval' of two or more values, else ''."""
    if len(values) < 2:
        return ""
    half = T95[len(values)] * stdev(values) / len(values) ** 0.5
    return f"{mean(values):{sign}.1f} ± {half:.1f}"


# ---------------------------------------------------------------- tables

def markdown(header, lines):
    """Return lines of cells as a Markdown table without the columns that are empty."""
    lines = [header, ["---"] * len(header), *lines]
    columns = [column for column in zip(*lines, strict=True) if any(column[2:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns, strict=True))


def table(record):
    """Return the record as a Markdown table: a line per row, seeds averaged."""
    rows, lines = by_row(record), []
    counts = {len(runs) for runs in rows.values()}
    seeds = f": {max(counts)}" if len(counts) == 1 else ""
    of_size = " of its size" if len({parts(row)[1] for row in rows}) > 1 else ""
    for row, runs in rows.items():
        first = next(others for other, others in rows.items() if parts(other)[1] == parts(row)[1])
        second, miou = beside(row, rows, NEAREST), percent(runs)
        more = (kept(runs, beside(row, rows, ORIGINAL)), percent(runs, "agreement_miou"),
                trained(runs))
        picks = Counter(next(iter(runs.values()))["picks"])
        lines.append([
            row if seeds else f"{row} ({len(runs)})",
            f"{mean(miou):.1f}" + (f" ± {stdev(miou):.1f}" if len(miou) > 1 else ""),
            interval(gain(runs, first)) if runs is not first else "",
            interval(gain(runs, second)) if second not in (runs, first) else "",
            *(f"{mean(values):.0f}" if values else "" for values in more),
            ", ".join(f"{kind} {n}" for kind, n in picks.most_common(5))])
    return markdown([f"row (seeds{seeds})", "mIoU %",
                     f"difference to the first row{of_size}, 95 % interval", f"to {NEAREST}",
                     "of original, %", "agreement, %", "processor s", "chosen"], lines)


def teachers(paths):
    """Return a table of records of the headline, each with another teacher, and of their mean.

    Its intervals are over teachers, each of which counts as one, with the mean over its seeds.
    """
    names, signs, points, lines = ("random", NEAREST, "recipe", ORIGINAL), "++--", [], []
    if not 2 <= len(paths) <= max(T95):
        raise ValueError(f"--teachers takes 2 to {max(T95)} records; got {len(paths)}")
    for path in paths:
        rows = by_row(read(path))
        missing = [name for name in names if name not in rows]
        if missing:
            raise ValueError(f"{path} has no row {missing[0]}; expected a record of --preset "
                             "headline")
        random, nearest, recipe, original = runs = [rows[name] for name in names]
        points.append([mean(values) for values in (
            gain(nearest, random), gain(recipe, nearest), kept(nearest, original),
            kept(recipe, original))])
        lines.append([f"{Path(path).stem} ({len(nearest)})",
                      *(f"{mean(percent(x)):.1f}" for x in runs),
                      *(f"{x:{sign}.1f}" for x, sign in zip(points[-1], signs, strict=True))])
    means = [interval(x, sign) for x, sign in zip(zip(*points, strict=True), signs, strict=True)]
    lines.append([f"mean of {len(paths)}, 95 % interval", "", "", "", "", *means])
    return markdown(["teacher (seeds)", *names, "nearest - random", "recipe - nearest",
                     "nearest, of original, %", "recipe, of original, %"], lines)


# ---------------------------------------------------------------- figure

def draw(record, path):
    """Write a figure: what each row keeps of the original images' result, over processor seconds.

    Rows that differ in their sizes alone are one line. Raises ValueError if the record lacks these.
    """
    rows, lines = by_row(record), {}
    for row, runs in rows.items():
        x, y = trained(runs), kept(runs, beside(row, rows, ORIGINAL))
        if x and y:
            lines.setdefault(parts(row)[0], []).append((mean(x), mean(y)))
    if not lines:
        raise ValueError("the record has no row 'original images', or no processor seconds, to "
                         "draw; add a record that has")
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    ax = figure.subplots()
    for name, points in lines.items():
        ax.plot(*zip(*points, strict=True), "o-", label=name)
    ax.set(xscale="log", xlabel="processor seconds of training, and of making images",
           ylabel="kept, %")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.minorticks_off()
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figures.write(figure, path)
