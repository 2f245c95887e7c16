"""records.py and options.py: folders of runs, and command lines made from dataclasses."""

import csv
import dataclasses
import json
import os
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support import records
from support.options import one_sentence, option, parse
from support.records import (
    closing,
    differences,
    digest,
    environment,
    in_folder,
    metrics,
    open_run,
    read_csv,
    write_choice,
    write_csv,
)


@dataclass(frozen=True)
class Config:
    steps: int = option(900, "number of updates", group="training")
    lr: float = option(0.1, "learning rate", group="training")
    batch_size: int = option(16, "images an update", group="training")
    seed: int = option(0, "seed")
    name: str = option("a", "one of two", choices=("a", "b"))
    size: tuple[int, int] | None = option(None, "height and width")
    root: str | None = option(None, "a folder")
    temperature: float | None = option(None, "softening")
    out: str | None = option(None, "folder of the run")
    resume: bool = option(False, "go on")
    workers: int = option(2, "processes")
    device: str = option("auto", "where")


def started(cfg):
    """Open a run and leave something in it, as an interrupted program would."""
    out = open_run(cfg)
    (out / "state.pt").write_text("half-way")
    return out


# ---------------------------------------------------------------- folders of runs

@pytest.mark.parametrize(("argv", "told"), [
    ("distill.py --pool 'my photos'", "distill.py --pool 'my photos' --resume --out runs/001"),
    ("distill.py --out runs/001 --lr 1", "distill.py --out runs/001 --lr 1 --resume"),
    ("distill.py --resume --out runs/001", "distill.py --resume --out runs/001")])
def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys, argv, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(argv))

    def stopped(cfg, out, error):
        raise error

    for error, words, code in ((KeyboardInterrupt(), "interrupted", 130),
                               (KeyboardInterrupt(15), "interrupted", 143),
                               (OSError("disk full"), "error: disk full", 2)):
        with pytest.raises(SystemExit) as caught:
            one_sentence(lambda e=error: in_folder(partial(stopped, error=e), Config()))()
        (tmp_path / "runs/001/config.json").unlink()
        (tmp_path / "runs/001").rmdir()
        assert caught.value.code == code
        assert capsys.readouterr().err == f"{words}; go on with: python {told}\n"
    with pytest.raises(SystemExit):
        one_sentence(lambda: in_folder(partial(stopped, error=FileNotFoundError("x")), Config()))()
    assert capsys.readouterr().err == "error: x\n"              # no use in going on with a typo


def test_what_a_killed_program_was_about_to_write_is_no_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.123").write_text("{")
    assert open_run(Config(out=str(tmp_path / "run"))) == tmp_path / "run"


def test_runs_get_the_next_free_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [open_run(Config()).as_posix() for _ in range(2)] == ["runs/001", "runs/002"]
    for other in ("009", "teacher", "20-copy"):
        (tmp_path / "runs" / other).mkdir()
    assert open_run(Config(steps=7)).name == "010"
    assert json.loads((tmp_path / "runs" / "010" / "config.json").read_text())["steps"] == 7


def test_a_folder_that_holds_something_is_refused_unless_it_is_to_be_resumed(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    cfg = Config(out=str(out), size=(64, 96))
    assert started(cfg) == out                                   # an empty folder is welcome
    with pytest.raises(ValueError, match=r"run is not empty; .*--resume"):
        open_run(cfg)
    assert open_run(dataclasses.replace(cfg, resume=True)) == out
    assert (out / "state.pt").exists()
    (out / "metrics.json").touch()
    with pytest.raises(ValueError, match="is finished"):
        open_run(dataclasses.replace(cfg, resume=True))
    for name in ("metrics.json", "config.json"):
        (out / name).unlink()
    with pytest.raises(ValueError, match="holds no run to resume"):
        open_run(dataclasses.replace(cfg, resume=True))


def test_resuming_with_another_config_names_what_changed_and_keeps_the_record(tmp_path):
    cfg = Config(out=str(tmp_path / "run"))
    started(cfg)
    with pytest.raises(ValueError, match=r"\(steps: 900, now 10; size: None, now \[8, 9\]\)"):
        open_run(dataclasses.replace(cfg, resume=True, steps=10, size=(8, 9)))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 900


def test_where_and_how_a_run_is_computed_may_change(tmp_path):
    cfg = Config(out=str(tmp_path / "run"))
    started(cfg)
    other = dataclasses.replace(cfg, resume=True, workers=9, device="cpu", out=f"{cfg.out}/")
    assert open_run(other) == tmp_path / "run"
    assert digest(other) == digest(cfg) != digest(dataclasses.replace(cfg, seed=1))
    assert differences(cfg, {**dataclasses.asdict(cfg), "out": "x"}) == []
    recorded = dataclasses.asdict(cfg)
    recorded.pop("seed")                                         # written before the option existed
    assert differences(cfg, recorded) == ["seed: None, now 0"]


def test_a_table_is_read_back_by_the_csv_module(tmp_path):
    rows = [["a,b.png", 0.5], ['say "x"', 1e-9]]
    write_csv(tmp_path / "t.csv", ("file", "weight"), rows)
    with open(tmp_path / "t.csv", newline="") as file:
        assert list(csv.reader(file)) == [["file", "weight"], ["a,b.png", "0.5"],
                                          ['say "x"', "1e-09"]]


def test_file_names_of_any_bytes_come_back_from_a_table(tmp_path):
    names = ["a b.jpg", "two\nlines.jpg", "re\rturn\\.jpg", os.fsdecode(b"caf\xe9.jpg"), "\xe9.jpg"]
    write_csv(tmp_path / "t.csv", ("file",), [[name] for name in names])
    assert [row[0] for row in read_csv(tmp_path / "t.csv")[1:]] == names
    assert b"caf\xe9.jpg" in (tmp_path / "t.csv").read_bytes()


def test_a_run_does_not_go_on_with_other_images_than_it_began_with(tmp_path, capsys):
    chosen = {"files": [Path("b.jpg"), Path("a.jpg")], "distances": torch.tensor([1.0, 2.0]),
              "weights": torch.tensor([1.0, 0.0]), "skipped": ["c.jpg: broken"]}
    write_choice(tmp_path, chosen, ["d.jpg: the same image as e.jpg"])
    assert "warning: 1 images of the pool" in capsys.readouterr().out
    assert read_csv(tmp_path / "skipped.csv")[1:] == [["c.jpg: broken"],
                                                      ["d.jpg: the same image as e.jpg"]]
    (tmp_path / "state.pt").touch()
    write_choice(tmp_path, chosen)
    with pytest.raises(ValueError, match="began with other images.*chosen.csv.*--out"):
        write_choice(tmp_path, {**chosen, "files": chosen["files"][::-1]})
    assert [row[0] for row in read_csv(tmp_path / "chosen.csv")[1:]] == ["b.jpg", "a.jpg"]


def test_the_environment_is_recorded_with_and_without_git(monkeypatch, tmp_path):
    known = environment(torch.device("cpu"))
    assert known["torch"] == torch.__version__ and known["device"].endswith("CPU")
    json.dumps(known)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(torch.device("cpu")) == {**known, "commit": None}


def test_the_metrics_count_images_and_times_as_by_hand():
    def result(miou):
        return {"miou": miou, "pixel_accuracy": 0.9, "iou": torch.tensor([miou, 1.0])}

    teacher = SimpleNamespace(class_names=["road", "sky"], mean=torch.zeros(1))
    chosen = {"pool": list(range(50)), "skipped": ["a", "b", "c"], "files": list(range(40))}
    laps = [("start", 10.0), ("scoring", 11.5), ("distillation", 15.5)]
    results = {"teacher": result(0.5), "student": result(0.25), "agreement": result(0.75)}
    found = metrics(Config(steps=4, batch_size=8), results, teacher, chosen, laps)
    expected = {
        "teacher_miou": 0.5, "student_miou": 0.25, "agreement_miou": 0.75, "agreement_pixels": 0.9,
        "pool_images": 47, "skipped_images": 3, "selected_images": 40, "seen_images": 32,
        "updates": 4, "seconds": 5.5, "stage_seconds": {"scoring": 1.5, "distillation": 4.0}}
    assert {name: found[name] for name in expected} == expected
    assert found["iou"]["student"] == {"road": 0.25, "sky": 1} and found["config"]["steps"] == 4
    results = {"agreement": result(0.75)}
    bare = metrics(Config(steps=100, batch_size=8), results, teacher, chosen, laps)
    assert bare["student_miou"] is bare["teacher_miou"] is None and bare["seen_images"] == 40


def test_the_closing_lines_give_the_result_with_and_without_labels():
    reached = {"stage_seconds": {"scoring": 1.4, "distillation": 61}, "pool_images": 2000,
               "selected_images": 400, "seen_images": 300, "updates": 900, "student_miou": 0.5012,
               "teacher_miou": 0.6, "agreement_miou": 0.7, "agreement_pixels": 0.8}
    lines = closing(reached, "runs/001").strip().splitlines()
    assert lines == ["2000 pool images scored, 400 chosen, 300 seen in 900 updates",
                     "scoring 1 s, distillation 61 s", "record and figure: runs/001",
                     "student mIoU 50.1%, teacher 60.0%, agreement with the teacher 70.0% "
                     "(pixels 80.0%)"]
    bare = closing({**reached, "student_miou": None, "teacher_miou": None}, "runs/001")
    assert bare.splitlines()[-1] == "agreement with the teacher 70.0% (pixels 80.0%)"


def test_every_neutral_option_says_where_or_how_and_nothing_that_changes_a_result():
    assert {"seed", "steps", "amp", "batch_size"}.isdisjoint(records.NEUTRAL)
    assert {"out", "resume", "device", "workers"} <= records.NEUTRAL


# ---------------------------------------------------------------- command lines

def test_no_words_give_the_defaults():
    assert parse(Config, [], "") == Config()


def test_words_become_values_of_the_declared_types():
    words = "--steps 10 --lr 1e-3 --name b --size 64 96 --root data --temperature 4 --resume"
    cfg = parse(Config, [*words.split(), "--out", "runs/x"], "")
    assert cfg == Config(steps=10, lr=0.001, name="b", size=(64, 96), root="data", temperature=4.0,
                         resume=True, out="runs/x")
    assert isinstance(cfg.temperature, float) and isinstance(cfg.size, tuple)
    hash(cfg)                                                    # as a frozen dataclass promises


@pytest.mark.parametrize("words", ["--name c", "--steps 1.5", "--size 64", "--resume yes",
                                   "--unknown 1"])
def test_words_that_do_not_fit_are_refused_with_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Config, words.split(), "")
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err


def test_the_help_shows_groups_choices_and_every_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Config, ["--help"], "What it does.")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "What it does." in text and "\ntraining:\n" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in ("--steps N number of updates (default: 900)", "--seed N seed (default: 0)",
                 "--lr X learning rate (default: 0.1)",
                 "--name NAME one of two [a, b] (default: a)",
                 "--size H W height and width", "--resume go on"):
        assert line in lines
    assert text.count("\noptions:\n") == 1 and max(map(len, text.splitlines())) <= 100


# ---------------------------------------------------------------- errors of a user

@pytest.mark.parametrize("error", [ValueError("a is 1, b is 2"), FileNotFoundError("no folder x")])
def test_an_error_of_the_user_is_one_line_on_stderr_and_exit_code_2(error, capsys, monkeypatch):
    monkeypatch.delenv("DFSS_TRACEBACK", raising=False)

    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        one_sentence(main)()
    assert caught.value.code == 2 and capsys.readouterr() == ("", f"error: {error}\n")
    monkeypatch.setenv("DFSS_TRACEBACK", "1")
    with pytest.raises(type(error)):
        one_sentence(main)()


def test_an_interruption_is_exit_code_130_and_a_bug_keeps_its_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as caught:
        one_sentence(interrupted)()
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted\n"

    def broken():
        raise TypeError("a bug")
    with pytest.raises(TypeError):
        one_sentence(broken)()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried ..."),
                                   MemoryError()])
def test_out_of_memory_is_one_line_that_names_what_to_lower(error, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        one_sentence(main)()
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1
    assert "out of memory; lower --batch-size or --image-size" in said


def test_a_program_without_an_error_returns_quietly(capsys):
    assert one_sentence(lambda: {"miou": 1})() is None           # a value would be an exit code
    assert capsys.readouterr() == ("", "")


def test_after_a_mistake_the_same_folder_can_be_used_with_other_options(tmp_path):
    open_run(Config(out=str(tmp_path / "a"), steps=1))
    open_run(Config(out=str(tmp_path / "a"), steps=2))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["steps"] == 2
