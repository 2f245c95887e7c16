"""experiments.compare: presets, runs that are read again or resumed, and the record."""

import json
import shlex
import subprocess
from dataclasses import asdict
from itertools import pairwise, product
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

import distill
import evaluate
from experiments import compare
from support.images import read_csv
from support.options import parse


def options(words):
    return asdict(parse(distill.Config, shlex.split(words), ""))


@pytest.mark.parametrize("preset", sorted({row[0] for row in read_csv(compare.ROWS)[1:]}))
def test_every_row_is_a_line_of_distill_and_a_name_means_the_same_everywhere(preset):
    for name, words in compare.read_preset(preset).items():
        assert options(words) and compare.read_preset("headline").get(name, words) == words


def test_the_ladder_goes_to_the_recipe_one_option_a_step():
    steps = [options(words) for words in compare.read_preset("ladder").values()]
    assert steps[0] == options("")
    assert steps[-1] == options(compare.read_preset("headline")["recipe"]) == options(
        "--metric kl --match-colours --channelwise 10 --teacher-temperature 0.4 --schedule uniform")
    for before, after in pairwise(steps):
        assert sum(before[name] != after[name] for name in before) == 1


def test_the_factorial_is_every_combination_of_selection_colours_and_losses():
    selections = {"random": "--sampling random", "nearest": "--metric kl",
                  "whole pool": "--budget 0"}
    colours = {"": "", ", colours": "--match-colours"}
    losses = {"": "", ", losses": "--channelwise 10 --teacher-temperature 0.4"}
    rows = {name: options(words) for name, words in compare.read_preset("factorial").items()}
    # And the paper's own distance, which is that of nearest (ADS) in the other presets.
    assert rows.pop("nearest (ADS), colours") == options("--schedule uniform --match-colours")
    assert rows == {
        a + b + c: options(f"--schedule uniform {selections[a]} {colours[b]} {losses[c]}")
        for a, b, c in product(selections, colours, losses)}


@pytest.mark.parametrize("inside", ["train", "train/images"])
def test_rows_get_their_numbers_and_their_paths(tmp_path, inside):
    root = tmp_path / "my data"
    (root / inside).mkdir(parents=True)
    common = ["--data-root", str(root), "--pool=my pool/"]
    for preset, row, original, words in (
            ("length", "nearest (ADS), 600 updates", "",
             ["--schedule", "uniform", "--steps", "600"]),
            ("headline", "original images", "", ["--pool", str(root / inside)]),
            ("headline", "original images", "a.csv", ["--pool", "a.csv"]),
            ("street", "nearest, 0 street views", "", ["--pool", "my pool-0"]),
            ("length", "nothing; recipe, 600 updates", "", ["--metric", "kl", "--match-colours"]),
            ("selection", "k-centre", "", ["--pool", "my runs/k-centre/chosen.csv"])):
        cfg = compare.Config(preset=preset, rows=row, common=shlex.join(common), original=original)
        (found,) = compare.choose_rows(cfg, "my runs").values()
        assert found[:len(common + words)] == common + words


@pytest.mark.parametrize("words", ["--preset none", "--rows nothing", "--seeds 11",
                                   "--common '--dataset none --pool photos'"])
def test_a_table_that_cannot_be_made_gets_one_sentence(words):
    with pytest.raises(ValueError, match="expected a preset, .* 10 seeds, and labels to score on"):
        compare.main(shlex.split(words))


def in_this_process(monkeypatch, program, stderr=""):
    """Let compare.py call `program` with the words of distill.py; it returns the exit code."""
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(
        PIPE=-1, DEVNULL=-3, run=lambda words, **_: subprocess.CompletedProcess(
            words, program(words[2:]), stderr=stderr)))


def test_a_finished_run_is_read_again_only_for_the_same_options(tmp_path):
    words = ["--steps", "5", "--image-size", "32", "48"]
    cfg = {**options(shlex.join(words)), "out": str(tmp_path), "resume": True}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    (tmp_path / "metrics.json").write_text('{"student_miou": 0.5}')
    assert compare.run_once(words, tmp_path) == {"student_miou": 0.5}
    with pytest.raises(ValueError, match="budget: 400, now 7; steps: 5, now 6"):
        compare.run_once([*words, "--steps", "6", "--budget", "7"], tmp_path)


def test_an_interrupted_run_is_resumed_and_a_failed_one_is_quoted(tmp_path, monkeypatch):
    program = Mock(return_value=2)
    in_this_process(monkeypatch, program, "error: no such teacher")
    for resume in ([], ["--resume"]):
        with pytest.raises(ValueError, match=r"distill.py --steps 5 .* failed: error: no such te"):
            compare.run_once(["--steps", "5"], tmp_path)
        program.assert_called_with(["--steps", "5", "--out", str(tmp_path), *resume])
        (tmp_path / "state.pt").touch()


def test_a_record_is_complete_and_made_once(world, tmp_path, pool_folder, monkeypatch, capsys):
    in_this_process(monkeypatch, lambda words: 0 if distill.main(words) else 1)
    monkeypatch.setattr("support.figures.run_figure", lambda *_: None)
    data = f"--dataset folder --data-root {world} --num-classes 8 --device cpu"
    common = (f"{data} --teacher {world}/teacher.pt --pool {pool_folder} --budget 5 --steps 2 "
              "--batch-size 2 --amp off")
    words = ["--rows", "random", "--seeds", "2", "--common", common,
             "--runs", f"{tmp_path}/runs", "--out", f"{tmp_path}/record.json"]
    compare.main(words)
    text = (tmp_path / "record.json").read_text()
    record = json.loads(text)
    assert " --pool pool --budget 5 " in record["common"] and "/" not in record["common"]
    for seed, run in zip((0, 1), record["runs"], strict=True):
        assert (run["row"], run["seed"], run["updates"]) == ("random", seed, 2)
        assert run["options"] == "--sampling random --schedule uniform" and "config" not in run
        student = f"--checkpoint {tmp_path}/runs/random-s{seed}/student.pt"
        assert run["student_miou"] == evaluate.main(f"{data} {student}".split())["miou"]
    monkeypatch.setattr(distill, "main", None)            # all is there: a second start only reads
    compare.main(words)
    assert (tmp_path / "record.json").read_text() == text
    table = capsys.readouterr().out.split("| row (seeds) |")[-1]
    compare.main(["--table", f"{tmp_path}/record.json"])
    assert capsys.readouterr().out.endswith(table)
