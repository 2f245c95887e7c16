"""experiments.compare: the table's arithmetic by hand, and runs that are used again."""

import json
import shlex
from dataclasses import asdict
from itertools import pairwise

import pytest

import distill
from experiments import compare, tables
from experiments.compare import PRESETS, run_once, table
from support import figures
from support.options import parse


def runs(row, values):
    return [{"row": row, "seed": seed, "student_miou": value / 100, "picks": {"sea": 3, "hills": 1}}
            for seed, value in enumerate(values)]


def test_the_table_gives_mean_deviation_and_the_paired_interval():
    record = {"runs": runs("random", [30, 32, 34]) + runs("nearest", [33, 36, 39])}
    lines = table(record).split("\n")
    assert lines[2] == "| random | 32.0 ± 2.0 |  | sea 3, hills 1 |"
    # Differences 3, 4, 5: mean 4, deviation 1, half-width 4.303 / sqrt(3) = 2.48.
    assert lines[3] == "| nearest | 36.0 ± 3.0 | +4.0 ± 2.5 | sea 3, hills 1 |"


def test_the_table_compares_with_a_second_row_and_with_the_original_images():
    record = {"runs": runs("random", [30, 32]) + runs("nearest (ADS)", [33, 36])
              + runs("recipe", [36, 40]) + runs("original images", [44, 48])}
    header, _, random, nearest, recipe, original = table(record).split("\n")
    assert header.split(" | ")[3:5] == ["to nearest (ADS)", "of original, %"]
    assert nearest.split(" | ")[3:5] == ["", "75"]                    # 33/44 and 36/48
    # To the nearest: 3 and 4, mean 3.5, half-width 12.706 * 0.7071 / sqrt(2) = 6.35.
    assert recipe.split(" | ")[3] == "+3.5 ± 6.4" and random.split(" | ")[3] == "-3.5 ± 6.4"
    assert original.split(" | ")[4] == "100"


def test_a_column_that_would_be_empty_is_left_out():
    record = {"runs": runs("nearest (ADS)", [33]) + runs("random", [30])}
    assert table(record).split("\n")[0] == "| row (seeds: 1) | mIoU % | chosen |"


def test_rows_of_unequal_seeds_say_how_many():
    header, _, *lines = table({"runs": runs("x", [30, 32]) + runs("y", [31])}).split("\n")
    assert header.startswith("| row (seeds) |")
    assert [line.split(" | ")[0] for line in lines] == ["| x (2)", "| y (1)"]


def test_the_table_gives_agreement_and_the_seconds_of_making_and_training():
    record = {"runs": [run | {"agreement_miou": 0.5, "processor_seconds": {
        "scoring": 100, "distillation": 10 + run["seed"], "pool": 5, "evaluation": 100}}
        for run in runs("x", [30, 32])] + runs("y", [31, 33])}
    header, _, x, y = table(record).split("\n")
    assert header.split(" | ")[3:5] == ["agreement, %", "processor s"]
    assert x.split(" | ")[3:5] == ["50", "16"] and y.split(" | ")[3:5] == ["", ""]


def test_a_row_of_a_series_is_compared_with_the_first_of_its_size():
    record = {"runs": runs("random, 50 files", [30, 32]) + runs("nearest, 50 files", [33, 36])
              + runs("random, 100 files", [31, 33]) + runs("nearest, 100 files", [34, 37])
              + runs("nearest (ADS)", [34, 36])}
    header, _, *lines = table(record).split("\n")
    assert "to the first row of its size" in header and "to nearest (ADS)" in header
    cells = [line.split(" | ")[2:4] for line in lines]
    assert cells == [["", "-4.0 ± 0.0"], ["+3.5 ± 6.4", "-0.5 ± 6.4"],
                     ["", "-3.0 ± 0.0"], ["+3.5 ± 6.4", "+0.5 ± 6.4"], ["", ""]]


def test_a_row_of_two_sizes_is_compared_with_the_first_of_both():
    record = {"runs": runs("uniform, all files, 5 updates", [30, 32])
              + runs("uniform, 50 files, 5 updates", [40, 42])
              + runs("fixed, 50 files, 5 updates", [41, 43])
              + runs("fixed, 50 files, 9 updates", [51, 53])}
    cells = [line.split(" | ")[2] for line in table(record).split("\n")[2:]]
    assert cells == ["", "", "+1.0 ± 0.0", ""]


def test_teachers_are_the_points_of_a_paired_test(tmp_path):
    for i, (random, nearest, recipe) in enumerate(((20, 30, 35), (22, 34, 36))):
        record = {"runs": runs("random", [random, random + 2]) + runs("recipe", [recipe])
                  + runs("nearest (ADS)", [nearest, nearest + 2])
                  + runs("original images", [50, 50])}
        (tmp_path / f"t{i}.json").write_text(json.dumps(record))
    paths = [str(tmp_path / f"t{i}.json") for i in range(2)]
    header, _, first, second, last = (line[2:-2].split(" | ")
                                      for line in tables.teachers(paths).split("\n"))
    assert header[5:7] == ["nearest - random", "recipe - nearest"]
    # The recipe has seed 0 only: 35 - 30, where the nearest has 30 and 32.
    assert first == ["t0 (2)", "21.0", "31.0", "35.0", "50.0", "+10.0", "+5.0", "62.0", "70.0"]
    assert second[5:] == ["+12.0", "+2.0", "70.0", "72.0"]
    # 10 and 12: mean 11, half-width 12.706 * 1.414 / sqrt(2) = 12.706.
    assert last == ["mean of 2, 95 % interval", "", "", "", "", "+11.0 ± 12.7", "+3.5 ± 19.1",
                    "66.0 ± 50.8", "71.0 ± 12.7"]


def test_teachers_need_two_records_or_more_of_the_headline(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"runs": runs("random", [30])}))
    with pytest.raises(ValueError, match="takes 2 to 10 records; got 1"):
        compare.main(["--teachers", str(tmp_path / "a.json")])
    with pytest.raises(ValueError, match=r"a.json has no row nearest \(ADS\); expected a record"):
        compare.main(["--teachers", f"{tmp_path}/a.json {tmp_path}/a.json"])


def test_a_row_of_a_series_is_measured_against_the_original_images_of_its_size():
    record = {"runs": runs("original images, 10 updates", [40, 50])
              + runs("x, 10 updates", [30, 40]) + runs("original images, 20 updates", [50, 50])
              + runs("x, 20 updates", [45, 45]) + runs("x, 30 updates", [9, 9])}
    header, _, *lines = table(record).split("\n")
    assert header.split(" | ")[3] == "of original, %"
    assert [line.split(" | ")[3] for line in lines] == ["100", "78", "100", "90", ""]


def test_retention_is_drawn_over_seconds_from_several_records(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "write", lambda figure, path: drawn.extend(figure.axes))
    for name, rows in (("a", {"original images": 50, "x": 40}), ("b", {"y": 30})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"runs": [
            {**run, "processor_seconds": {"distillation": steps / 10}} for steps in (10, 20)
            for row, value in rows.items()
            for run in runs(f"{row}, {steps} updates", [value, value])]}))
    compare.main(["--table", f"{tmp_path}/a.json {tmp_path}/b.json", "--figure", "f.png"])
    lines = {line.get_label(): line for line in drawn[0].lines}
    assert list(lines) == ["original images", "x", "y"]
    assert lines["y"].get_xdata().tolist() == [1, 2]
    assert lines["y"].get_ydata().tolist() == [60, 60]


def test_a_figure_needs_original_images():
    with pytest.raises(ValueError, match="has no row 'original images'"):
        tables.draw({"runs": runs("x", [30, 32])}, "")


def test_every_row_of_every_preset_is_a_line_of_distill():
    for rows in PRESETS.values():
        for words in rows.values():
            parse(distill.Config, shlex.split(words), "")


def test_the_ladder_ends_with_the_recipe_and_changes_one_option_a_step():
    steps = [asdict(parse(distill.Config, shlex.split(words), ""))
             for words in PRESETS["ladder"].values()]
    assert steps[-1] == asdict(parse(distill.Config, shlex.split(compare.RECIPE), ""))
    for before, after in pairwise(steps):
        assert sum(before[name] != after[name] for name in before) == 1


@pytest.mark.parametrize("inside", ["train", "train/images"])
def test_rows_name_the_pool_and_the_training_images_of_the_common_options(tmp_path, monkeypatch,
                                                                          inside):
    """And the record holds what the table needs, with the cost of a pool that was made."""
    asked, root, pool = {}, tmp_path / "my data", tmp_path / "my pool"
    (root / inside).mkdir(parents=True)
    pool.mkdir()
    (pool / "record.json").write_text('{"processor_seconds": 7}')
    metrics = {"student_miou": 0.5, "config": {"pool": str(pool)},
               "processor_seconds": {"distillation": 3}}

    def ran(words, folder):
        asked[folder.name] = words
        return json.loads(json.dumps(metrics))

    monkeypatch.setattr(compare, "run_once", ran)
    monkeypatch.setattr(compare, "picks", lambda folder, pool: {"sea": 3})
    common = f"--dataset camvid --data-root '{root}' --pool '{pool}'"
    for preset, row in (("headline", "original"), ("found", "nearest, street")):
        compare.main(["--preset", preset, "--rows", row, "--seeds", "1", "--common", common,
                      "--out", str(tmp_path / "record.json")])
    original, street = asked.values()
    assert original[original.index("--pool", 6) + 1] == str(root / inside)
    assert street[street.index("--pool", 6) + 1] == f"{pool}/street"
    record = json.loads((tmp_path / "record.json").read_text())
    (run,) = record["runs"]
    assert record["common"] == "--dataset camvid --data-root my data --pool my pool"
    assert "config" not in run
    assert run["processor_seconds"] == {"distillation": 3, "pool": 7}


def test_a_finished_run_is_used_again_only_for_the_same_options(tmp_path):
    words = ["--steps", "5", "--image-size", "32", "48"]
    cfg = {**asdict(parse(distill.Config, words, "")), "out": str(tmp_path), "resume": True}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    (tmp_path / "metrics.json").write_text('{"student_miou": 0.5}')
    assert run_once(words, tmp_path) == {"student_miou": 0.5}
    with pytest.raises(ValueError, match="budget: 400, now 7; steps: 5, now 6"):
        run_once([*words, "--steps", "6", "--budget", "7"], tmp_path)


@pytest.mark.parametrize("words", [["--rows", "no such row"], ["--seeds", "0"], ["--seeds", "99"]])
def test_nothing_to_run_is_said(words):
    with pytest.raises(ValueError, match="nothing to run: expected 1 to 10 --seeds and --rows"):
        compare.main(words)


def test_a_table_needs_labels():
    with pytest.raises(ValueError, match="needs labels"):
        compare.main(["--common", "--dataset none --pool photos"])


def test_a_pattern_that_is_none_gets_a_sentence():
    with pytest.raises(ValueError, match=r"--rows '\(' is no regular expression: missing"):
        compare.main(["--rows", "("])
