"""What records say: a table of rows, and a comparison over several teachers.

Idea
    A record holds every run of a table with its seed. Two rows are compared seed by seed, because
    runs of one seed share the student's initialisation and every crop. Teachers are compared
    record by record: each counts once, with the mean over its seeds. A ± is always half of a 95 %
    interval (Student's t), over seeds in a table of one record, over teachers in the last line of
    several.

Use it
    import json
    from experiments.tables import by_row, interval, table, teachers, values
    record = json.load(open("results/camvid_seed0.json"))
    rows = by_row(record)
    print(interval(values(rows, "recipe - nearest (ADS)")))            # points of mIoU, per seed
    print(table(record))
    print(teachers(["results/camvid_seed0.json", "results/camvid_seed1.json"],
                   ["random", "recipe", "gain = recipe - random"]))
"""

import json
import re
from pathlib import Path
from statistics import mean, stdev

# Two-sided 95 % quantiles of Student's t for n values (n - 1 degrees of freedom).
T95 = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), 2))
ORIGINAL = "original images"


def by_row(record):
    """Return {row: {seed: run}}."""
    rows = {}
    for run in record["runs"]:
        rows.setdefault(run["row"], {})[run["seed"]] = run
    return rows


def values(rows, expression, key="student_miou"):
    """Return one number per seed of "row" (%), "row - other" (points) or "row / other" (%).

    "recipe / original images" is the retention. Raises ValueError if a row is missing.
    """
    row, operator, other = re.fullmatch(r"(.+?)(?: ([-/]) (.+))?", expression).groups()
    missing = [name for name in (row, other or row) if name not in rows]
    if missing:
        raise ValueError(f"no row {missing[0]!r}; the record has {', '.join(rows)}")
    pairs = [(100 * run[key], 100 * rows[other or row][seed][key])
             for seed, run in rows[row].items() if key in run and seed in rows[other or row]]
    if operator is None:
        return [a for a, _ in pairs]
    return [a - b if operator == "-" else 100 * a / b for a, b in pairs]


def interval(numbers, sign="+"):
    """Return "mean ± half-width" of the 95 % interval (Student's t); one number has no interval."""
    if len(numbers) < 2:
        return f"{numbers[0]:{sign}.1f}"
    half = T95[len(numbers)] * stdev(numbers) / len(numbers) ** 0.5
    return f"{mean(numbers):{sign}.1f} ± {half:.1f}"


# ---------------------------------------------------------------- tables

def markdown(header, lines):
    """Return lines of cells as a Markdown table, without empty columns."""
    columns = zip(header, ["---"] * len(header), *lines, strict=True)
    listed = [column for column in columns if any(column[2:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*listed, strict=True))


def table(record):
    """Return a Markdown table with one line per row, averaged over seeds."""
    rows, lines = by_row(record), []
    first = next(iter(rows))
    for row in rows:
        averages = (values(rows, f"{row} / {ORIGINAL}") if ORIGINAL in rows else [],
                    values(rows, row, "agreement_miou"))
        lines.append([f"{row} ({len(rows[row])})", interval(values(rows, row), ""),
                      interval(values(rows, f"{row} - {first}")) if row != first else "",
                      *(f"{mean(numbers):.0f}" if numbers else "" for numbers in averages)])
    header = ["row (seeds)", "mIoU, %", "minus the first row", "retention, %", "agreement, %"]
    return markdown(header, lines)


def teachers(paths, expressions, transposed=False):
    """Return a Markdown table with one line per record, each of another teacher, and their mean.

    An expression is as in `values`, optionally after a title: "gain = recipe - random". Intervals
    of a record are over its seeds. Those of the last line are over teachers.
    """
    if not 2 <= len(paths) <= max(T95):
        raise ValueError(f"expected 2 to {max(T95)} records, one per teacher; got {len(paths)}")
    titles = [text.split(" = ")[0] for text in expressions]
    formulas = [text.split(" = ")[-1] for text in expressions]
    signs = ["+" if " - " in formula else "" for formula in formulas]
    rows = [by_row(json.loads(Path(path).read_text())) for path in paths]
    numbers = [[values(each, formula) for formula in formulas] for each in rows]
    lines = [["teacher (seeds)", *titles]]
    for path, cells in zip(paths, numbers, strict=True):
        seeds = min(len(cell) for cell in cells)
        lines.append([f"{Path(path).stem} ({seeds})", *map(interval, cells, signs)])
    means = [[mean(cell) for cell in column] for column in zip(*numbers, strict=True)]
    lines.append([f"mean of {len(paths)} teachers", *map(interval, means, signs)])
    # lines[0] is the header, in either direction.
    header, *lines = zip(*lines, strict=True) if transposed else lines
    return markdown(header, lines)
