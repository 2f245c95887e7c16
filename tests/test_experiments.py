"""experiments.compare: presets, runs that are read again or resumed, and the record."""

import json
import shlex
import subprocess
from dataclasses import asdict
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import with_random_statistics
from pictures import coordinates, folder

import distill
import evaluate
from experiments import compare
from models import build_model
from support import checkpoint
from support.images import read_csv
from support.options import parse

NAMES = sorted({row[0] for row in read_csv(compare.ROWS)[1:]})


def options(words):
    return asdict(parse(distill.Config, shlex.split(words), ""))


# ---------------------------------------------------------------- presets

@pytest.mark.parametrize("preset", NAMES)
def test_every_row_is_a_line_of_distill_and_a_name_means_the_same_everywhere(preset):
    for name, words in compare.read_preset(preset).items():
        assert options(words)
        assert compare.read_preset("headline").get(name, words) == words


def test_the_ladder_goes_to_the_recipe_one_option_a_step():
    steps = [options(words) for words in compare.read_preset("ladder").values()]
    assert steps[0] == options("")
    assert steps[-1] == options(compare.read_preset("headline")["recipe"]) == options(
        "--metric kl --match-colours --channelwise 10 --teacher-temperature 0.4 --schedule uniform")
    for before, after in pairwise(steps):
        assert sum(before[name] != after[name] for name in before) == 1


def test_the_factorial_is_every_combination_of_selection_colours_and_losses():
    rows = {name: options(words) for name, words in compare.read_preset("factorial").items()}
    selections = {"random": {"sampling": "random"}, "nearest": {"metric": "kl"},
                  "whole pool": {"budget": 0}}
    colours = {"": {}, ", colours": {"match_colours": True}}
    losses = {"": {}, ", losses": {"channelwise": 10.0, "teacher_temperature": 0.4}}
    assert rows == {a + b + c: {**options("--schedule uniform"), **selections[a], **colours[b],
                                **losses[c]} for a, b, c in product(selections, colours, losses)}


@pytest.mark.parametrize("inside", ["train", "train/images"])
def test_rows_get_their_numbers_and_their_paths(tmp_path, inside):
    root, pool = tmp_path / "my data", tmp_path / "my pool"
    (root / inside).mkdir(parents=True)
    common = ["--data-root", str(root), "--pool", str(pool)]

    def last_words(preset, row, **more):
        cfg = compare.Config(preset=preset, rows=row, common=shlex.join(common), **more)
        (words,) = compare.choose_rows(cfg, tmp_path / "my runs").values()
        assert words[:4] == common
        return words[4:6]

    assert last_words("length", "^nearest .*, 600") == ["--schedule", "uniform"]
    assert last_words("headline", "original") == ["--pool", str(root / inside)]
    assert last_words("headline", "original", original="a.csv") == ["--pool", "a.csv"]
    assert last_words("street", " 25 ") == ["--pool", f"{pool}-25"]
    assert last_words("selection", "centre") == ["--pool",
                                                 f"{tmp_path}/my runs/k-centre/chosen.csv"]


@pytest.mark.parametrize("words", ["--preset none", "--rows nothing", "--seeds 11",
                                   "--common '--dataset none --pool photos'"])
def test_a_table_that_cannot_be_made_gets_one_sentence(words):
    with pytest.raises(ValueError, match="expected a preset, .* 10 seeds, and labels to score on"):
        compare.main(shlex.split(words))


# ---------------------------------------------------------------- single runs

def in_this_process(monkeypatch, program, stderr=""):
    """Let compare.py call `program` with the words of distill.py; it returns the exit code."""
    def run(words, **_):
        return subprocess.CompletedProcess(words, program(words[2:]), stderr=stderr)

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run, PIPE=-1, DEVNULL=-3))


def test_a_finished_run_is_read_again_only_for_the_same_options(tmp_path):
    words = ["--steps", "5", "--image-size", "32", "48"]
    cfg = {**options(shlex.join(words)), "out": str(tmp_path), "resume": True}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    (tmp_path / "metrics.json").write_text('{"student_miou": 0.5}')
    assert compare.run_once(words, tmp_path) == {"student_miou": 0.5}
    with pytest.raises(ValueError, match="budget: 400, now 7; steps: 5, now 6"):
        compare.run_once([*words, "--steps", "6", "--budget", "7"], tmp_path)


def test_an_interrupted_run_is_resumed_and_a_failed_one_is_quoted(tmp_path, monkeypatch):
    asked = []
    in_this_process(monkeypatch, lambda words: asked.append(words) or 2, "error: no such teacher")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"distill.py --steps 5 .* failed: error: no such te"):
            compare.run_once(["--steps", "5"], tmp_path)
        (tmp_path / "state.pt").touch()
    assert asked == [["--steps", "5", "--out", str(tmp_path)],
                     ["--steps", "5", "--out", str(tmp_path), "--resume"]]


# ---------------------------------------------------------------- the whole

@pytest.fixture
def common(tmp_path, pool_folder):
    """Return the common options of tiny runs: a teacher of 2 classes, labelled data, a pool."""
    torch.manual_seed(0)
    teacher = with_random_statistics(build_model("resnet_tiny", 2, image_size=(32, 48)))
    checkpoint.save_model(teacher, tmp_path / "teacher.pt")
    for part, i in product(("val", "test"), range(2)):
        labels = np.random.default_rng(i).integers(0, 2, (32, 48), dtype=np.uint8)
        folder(tmp_path / "data" / part, coordinates(48, 32, blue=i), labels, f"{i}_{part}.png")
    (tmp_path / "data" / "classes.txt").write_text("road\nsky\n")
    return (f"--dataset folder --data-root {tmp_path}/data --pool {pool_folder} --budget 5 "
            f"--teacher {tmp_path}/teacher.pt --steps 2 --batch-size 2 --device cpu --amp off")


def test_a_record_holds_runs_extra_splits_and_selected_images(tmp_path, pool_folder, common,
                                                              monkeypatch, capsys):
    in_this_process(monkeypatch, lambda words: 0 if distill.main(words) else 1)
    monkeypatch.setattr("support.figures.run_figure", lambda *_: None)
    (pool_folder / "metrics.json").write_text('{"processor_seconds": 7}')      # it was synthesised
    words = ["--rows", "^random", "--seeds", "2", "--common", common, "--extra-splits",
             "test test:1_", "--runs", f"{tmp_path}/runs", "--out", f"{tmp_path}/record.json"]
    compare.main(words)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["common"].startswith("--dataset folder --data-root data --pool pool --budget 5 ")
    assert [(run["row"], run["seed"]) for run in record["runs"]] == [("random", 0), ("random", 1)]
    for run in record["runs"]:
        assert run["options"] == "--sampling random --schedule uniform" and "config" not in run
        assert run["updates"] == 2
        assert run["processor_seconds"]["pool"] == 7
        student = f"{tmp_path}/runs/random-s{run['seed']}/student.pt"
        assert run["splits"] == {split: evaluate.main([
            "--checkpoint", student, "--dataset", "folder", "--data-root", f"{tmp_path}/data",
            "--split", split, "--device", "cpu"])["miou"] for split in ("test", "test:1_")}
        assert run["splits"]["test"] != run["splits"]["test:1_"]
    # All is there: a second start neither trains nor scores.
    monkeypatch.setattr(distill, "main", None)
    monkeypatch.setattr(evaluate, "main", None)
    compare.main(words)
    assert json.loads((tmp_path / "record.json").read_text()) == record
    table = capsys.readouterr().out.split("| row (seeds) |")[-1]
    compare.main(["--table", f"{tmp_path}/record.json"])
    assert capsys.readouterr().out.endswith(table)
