"""experiments.compare: the table's arithmetic by hand, and runs that are used again."""

import json
import shlex
from dataclasses import asdict

import pytest
from PIL import Image

import distill
from experiments import compare
from experiments.compare import PRESETS, run_once, table
from support import plots
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


def test_the_table_compares_with_confidence_and_with_the_original_images():
    record = {"runs": runs("random", [30, 32]) + runs("confidence", [29, 33])
              + runs("nearest", [33, 36]) + runs("original images", [44, 48])}
    header, _, _, confidence, nearest, original = table(record).split("\n")
    assert header.split(" | ")[3:5] == ["to confidence", "of original, %"]
    assert confidence.split(" | ")[3:5] == ["", "67"]                 # 29/44 and 33/48
    # To confidence: 4 and 3, mean 3.5, half-width 12.706 * 0.7071 / sqrt(2) = 6.35.
    assert nearest.split(" | ")[3:5] == ["+3.5 ± 6.4", "75"]
    assert original.split(" | ")[4] == "100"


def test_a_row_of_a_series_is_compared_with_the_first_of_its_size():
    record = {"runs": runs("random, 50 files", [30, 32]) + runs("nearest, 50 files", [33, 36])
              + runs("random, 100 files", [31, 33]) + runs("nearest, 100 files", [34, 37])
              + runs("the whole pool", [34, 36])}
    header, _, *lines = table(record).split("\n")
    assert "to the first row of its size" in header and "to the whole pool" in header
    cells = [line.split(" | ")[2:4] for line in lines]
    assert cells == [["", "-4.0 ± 0.0"], ["+3.5 ± 6.4", "-0.5 ± 6.4"],
                     ["", "-3.0 ± 0.0"], ["+3.5 ± 6.4", "+0.5 ± 6.4"], ["", ""]]


def test_a_row_of_a_series_is_measured_against_the_original_images_of_its_size():
    record = {"runs": runs("original images, 10 updates", [40, 50])
              + runs("x, 10 updates", [30, 40]) + runs("original images, 20 updates", [50, 50])
              + runs("x, 20 updates", [45, 45]) + runs("x, 30 updates", [9, 9])}
    header, _, *lines = table(record).split("\n")
    assert header.split(" | ")[3] == "of original, %"
    assert [line.split(" | ")[3] for line in lines] == ["100", "78", "100", "90", ""]


def test_a_series_is_drawn_over_its_sizes(monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "write", lambda figure, path: drawn.update({path: figure.axes[0]}))
    record = {"runs": runs("random, 50 files", [30, 32]) + runs("random, 400 files", [33, 36])
              + runs("the whole pool", [34, 36])}
    compare.draw(record, "b.png")
    bars, level = drawn["b.png"].containers[0].lines[0], drawn["b.png"].lines[-1]
    assert level.get_ydata()[0] == 35 and drawn["b.png"].get_xlabel() == "files"
    assert bars.get_xdata().tolist() == [50, 400] and bars.get_ydata().tolist() == [31, 34.5]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_series_of_one_seed_is_drawn_without_a_warning(tmp_path):
    record = {"runs": runs("random, 50 files", [30]) + runs("random, 400 files", [33])}
    compare.draw(record, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width > 400


def test_every_row_of_every_preset_is_a_line_of_distill():
    for rows in PRESETS.values():
        for words in rows.values():
            parse(distill.Config, shlex.split(words), "")


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
    with pytest.raises(ValueError, match="nothing to run: expected 1 to 8 --seeds and --rows"):
        compare.main(words)


def test_a_table_needs_labels():
    with pytest.raises(ValueError, match="needs labels"):
        compare.main(["--common", "--dataset none --pool photos"])


def test_a_pattern_that_is_none_gets_a_sentence():
    with pytest.raises(ValueError, match=r"--rows '\(' is no regular expression: missing"):
        compare.main(["--rows", "("])
