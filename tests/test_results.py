"""experiments/tables.py by hand; every table and every claim of a page follows from a record."""

import csv
import json
import math
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

from experiments import tables
from experiments.tables import ORIGINAL, T95, by_row, table, values

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "results"
PAGE = (RESULTS / "README.md").read_text()
GENERATED = r"<!-- (table|teachers|teachers transposed): ([^>]*?) -->\n((?:\|.*\n)+)"
CLAIMS = list(csv.DictReader((RESULTS / "claims.csv").open()))


def read(path):
    return json.loads(Path(path).read_text())


def runs(row, numbers):
    return [{"row": row, "seed": seed, "student_miou": number / 100}
            for seed, number in enumerate(numbers)]


def cells(text):
    return [line[2:-2].split(" | ") for line in text.split("\n")]


def test_an_interval_has_the_quantiles_of_students_t_and_one_number_has_none():
    for n, t in T95.items():
        nu, step = n - 1, t / 2000
        scale = math.gamma((nu + 1) / 2) / math.gamma(nu / 2) / math.sqrt(nu * math.pi)
        inside = sum(scale * (1 + ((i + 0.5) * step) ** 2 / nu) ** (-(nu + 1) / 2) * step
                     for i in range(2000))
        assert inside == pytest.approx(0.475, abs=2e-5)
    assert tables.interval([3, 4, 5]) == "+4.0 ± 2.5"                    # 4.303 x 1 / sqrt(3)
    assert tables.interval([62, 70], "") == "66.0 ± 50.8"                # 12.706 x 5.657 / sqrt(2)
    assert tables.interval([-1.5]) == "-1.5"


def test_rows_are_paired_by_seed_and_only_where_both_have_it():
    rows = by_row({"runs": runs("a b", [30, 32, 36]) + runs("c", [40, 50])})
    assert values(rows, "a b") == pytest.approx([30, 32, 36])
    assert values(rows, "a b - c") == pytest.approx([-10, -18])
    assert values(rows, "a b / c") == pytest.approx([75, 64])
    with pytest.raises(ValueError, match="no row 'd'; the record has a b, c"):
        values(rows, "a b - d")


def test_a_table_compares_rows_with_the_first_and_with_the_original_images():
    record = {"runs": runs("random", [30, 32, 34]) + runs("nearest", [33, 36, 39])
              + [run | {"agreement_miou": 0.5} for run in runs(ORIGINAL, [44, 48, 52])]}
    header, _, *lines = cells(table(record))
    assert header == ["row (seeds)", "mIoU, %", "minus the first row", "retention, %",
                      "agreement, %"]
    # Differences 3, 4, 5; retention 75 % with each seed.
    assert lines == [["random (3)", "32.0 ± 5.0", "", "67", ""],
                     ["nearest (3)", "36.0 ± 7.5", "+4.0 ± 2.5", "75", ""],
                     [f"{ORIGINAL} (3)", "48.0 ± 9.9", "+16.0 ± 5.0", "100", "50"]]
    assert cells(table({"runs": runs("a", [1])}))[0] == ["row (seeds)", "mIoU, %"]


def test_each_teacher_counts_once(tmp_path):
    paths = [tmp_path / "t0.json", tmp_path / "t1.json"]
    for path, *numbers in zip(paths, ([20, 22], [22, 24]), ([30, 34], [34, 38]), strict=True):
        path.write_text(json.dumps({"runs": runs("random", numbers[0]) + runs("n", numbers[1])}))
    expressions = ("random", "gain = n - random")
    expected = [["teacher (seeds)", "random", "gain"], ["---"] * 3,
                ["t0 (2)", "21.0 ± 12.7", "+11.0 ± 12.7"],                    # gains 10, 12
                ["t1 (2)", "23.0 ± 12.7", "+13.0 ± 12.7"],                    # gains 12, 14
                ["mean of 2 teachers", "22.0 ± 12.7", "+12.0 ± 12.7"]]        # gains 11, 13
    assert cells(tables.teachers(paths, expressions)) == expected
    turned = cells(tables.teachers(paths, expressions, transposed=True))
    assert turned[3] == ["gain", *(line[2] for line in expected[2:])]
    with pytest.raises(ValueError, match="expected 2 to 10 records, one per teacher; got 1"):
        tables.teachers(paths[:1], expressions)


def prose(path):
    """Return the text of a page without its generated tables, in one line."""
    return " ".join(re.sub(GENERATED, "", path.read_text()).split())


PROSE = prose(RESULTS / "README.md")


def load(names):
    """Return the rows of records of results/, joined by "+"; a CSV has a run per line."""
    every = []
    for name in names.split("+"):
        if name.endswith(".csv"):
            lines = list(csv.reader((RESULTS / name).open()))[1:]
            every += [{"row": f"{group}: {row}", "seed": int(seed), "student_miou": float(x) / 100}
                      for group, row, seed, x, *_ in lines]
        else:
            every += read(RESULTS / name)["runs"]
    return by_row({"runs": every})


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim["name"])
def test_a_claim_follows_from_its_records_and_stands_on_its_pages(claim):
    numbers = [values(load(names), claim["rows"]) for names in claim["records"].split()]
    if claim["over"].endswith("teachers"):
        numbers = [[mean(of_seeds) for of_seeds in numbers]]
    flat = [number for of_teacher in numbers for number in of_teacher]
    n, half = len(flat), ""
    if claim["unit"] == "pairs":
        number = f"{sum(x > 0 for x in flat)} of {n}"
    else:
        number = f"{mean(flat):{'+' if claim['number'].startswith('+') else ''}.1f}"
        if n > 1:
            spread = 1 + 1 / n if "prediction" in claim["unit"] else 1 / n
            half = f"{T95[n] * stdev(flat) * spread ** 0.5:.1f}"
    assert (number, half) == (claim["number"], claim["half_width"])
    assert n == int(claim["over"].split()[0])
    printed = f"{number} ± {half}" if half else number
    for page in claim["page"].split():
        alone = rf"(?<![\d.]){re.escape(printed)}(?! ±|\d)"
        assert re.search(alone, prose(REPOSITORY / page)), f"{page} does not say {printed}"


def test_every_interval_outside_a_generated_table_is_a_claim():
    claimed = {f"{claim['number'].lstrip('+-')} ± {claim['half_width']}" for claim in CLAIMS}
    readme = (REPOSITORY / "README.md").read_text()
    printed = re.findall(r"\d[\d.]* ± [\d.]*\d", PROSE + readme)
    assert len(printed) >= 40 and set(printed) <= claimed


def test_every_generated_table_follows_from_its_records():
    found = re.findall(GENERATED, PAGE)
    assert len(found) >= 4
    for kind, words, text in found:
        names, *options = (word.strip() for word in words.split(";"))
        paths = [REPOSITORY / name for name in names.split()]
        expected = (table(read(paths[0]), *options) if kind == "table"
                    else tables.teachers(paths, options, kind.endswith("transposed")))
        assert text == expected + "\n", names


def teacher_miou(name):
    """Return the mIoU of a record's teacher in percent."""
    return 100 * read(RESULTS / f"{name}.json")["runs"][0]["teacher_miou"]


def test_the_teachers_table_has_the_records_numbers():
    lines = re.findall(r"^\| `(\w+)`.* \| [^|]*\((\d+)\) \| ([\d., ]+) \|$", PAGE, re.MULTILINE)
    trained = json.loads((RESULTS / "teachers.json").read_text())
    assert len(lines) == 5
    for name, images, mious in lines:
        names = [f"camvid_seed{i}" for i in range(3)] if name == "camvid_seed0" else [name]
        assert all(trained[each]["images"] == int(images) for each in names)
        assert mious == ", ".join(f"{teacher_miou(each):.1f}" for each in names), name
    assert f"DeepLabV3-ResNet50 ({teacher_miou('gpu/camvid_full'):.1f} % on val)" in PAGE


def test_the_pools_have_the_sizes_that_the_page_prints():
    rows = list(csv.DictReader((RESULTS / "pool.csv").open()))
    assert len({(row["data set"], row["name there"]) for row in rows}) == len(rows)
    kinds = [row["file"].split("/")[0] for row in rows]
    counts = [kinds.count(kind) for kind in ("street", "photos", "imagenet", "berkeley", "nature")]
    assert [f"{n:,}" for n in (len(kinds), *counts)] == re.findall(r"[\d,]+\d", PAGE[PAGE.index(
        "The pool has"):])[:6]
    for name, size in (("facades", "2,667"), ("gpu/camvid_full", "1,728")):
        runs_of = read(RESULTS / f"{name}.json")["runs"]
        assert f"{runs_of[0]['pool_images']:,}" == size and size in PAGE


def test_synthetic_images_cost_as_many_times_as_the_page_says():
    rows = load("camvid_generators.json")
    scoring = max(run["processor_seconds"]["scoring"]
                  for run in load("camvid_seed0.json")["nearest (ADS)"].values())
    synthetic, nearest = (
        mean(run["processor_seconds"]["distillation"] + run["processor_seconds"].get("pool", 0)
             for run in rows[f"{row}, 2400 updates"].values())
        for row in ("DeepInversion", "nearest (ADS)"))
    assert f"{synthetic / (nearest + scoring):.0f} times the CPU time" in PROSE


README_COLUMNS = (("test_seed0", "test_seed1", "test_seed2"), ("test_espnet",),
                  ("gpu/camvid_full",), ("facades",))
README_ROWS = {"random": "random", "nearest (ADS)": "nearest (ADS)",
               "nearest with WDPD (DFSS)": "nearest, progressive weights (DFSS)",
               "recipe (ours)": "recipe", "original images": ORIGINAL}


def test_the_table_of_the_readme_follows_from_its_records():
    text = (REPOSITORY / "README.md").read_text()
    columns = [[load(f"{name}.json") for name in names] for names in README_COLUMNS]
    for label, row in README_ROWS.items():
        cells = []
        for teachers in columns:
            miou, retention = ([mean(values(rows, expression)) for rows in teachers if row in rows]
                               for expression in (row, f"{row} / {ORIGINAL}"))
            cells.append(f"{mean(miou):.1f} ({mean(retention):.0f})"
                         if len(miou) == len(teachers) else "not run")
        assert f"| {label} | {' | '.join(cells)} |" in text
    means = [f"{mean(map(teacher_miou, names)):.1f}" for names in README_COLUMNS]
    assert f"| the teacher itself | {' | '.join(means)} |" in text
