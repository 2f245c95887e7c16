"""records.py: folders of runs that are begun, kept apart, gone on with, and what they record."""

import csv
import dataclasses
import errno
import json
import os
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support import records
from support.options import Running, one_sentence, option
from support.records import (
    closing,
    configured,
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
class Config(Running):
    steps: int = option(900, "number of updates")
    batch_size: int = option(16, "images an update")
    lr: float = option(0.1, "learning rate")
    size: tuple[int, int] | None = option(None, "height and width")


def started(cfg):
    """Open a run and leave something in it, as an interrupted program would."""
    with open_run(cfg) as out:
        (out / "state.pt").write_text("half-way")
    return out


def resumed(out, *words):
    return configured(Config, ["--resume", "--out", str(out), *words], "")


# ---------------------------------------------------------------- folders of runs

def test_runs_get_the_next_free_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert started(Config()).as_posix() == "runs/001"
    for other in ("009", "teacher", "20-copy"):
        (tmp_path / "runs" / other).mkdir()
    assert started(Config(steps=8)).name == "010"
    assert json.loads((tmp_path / "runs" / "010" / "config.json").read_text())["steps"] == 8


def test_what_a_killed_program_was_about_to_write_is_no_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.123").write_text("{")
    with open_run(Config(out=str(tmp_path / "run"))) as out:
        assert out == tmp_path / "run" and (out / "config.json").is_file()


def test_a_shared_folder_that_has_no_locks_can_be_used(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")                         # not on Windows
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(
        OSError(errno.ENOLCK, "No locks available")))
    with open_run(Config(out=str(tmp_path / "run"))) as out:
        assert (out / "config.json").is_file()


def test_a_folder_is_made_and_belongs_to_one_program_at_a_time(tmp_path):
    pytest.importorskip("fcntl")                                 # not on Windows
    cfg = Config(out=str(tmp_path / "deep" / "run"))
    with open_run(cfg):
        for other in (cfg, dataclasses.replace(cfg, resume=True)):
            with pytest.raises(ValueError, match="another program is at work in .*run; wait"):
                started(other)
    assert started(cfg) == tmp_path / "deep" / "run"             # now it is free


def test_a_folder_that_holds_something_is_refused_unless_it_is_to_be_resumed(tmp_path):
    cfg = Config(out=str(tmp_path), size=(64, 96))
    assert started(cfg) == tmp_path                              # an empty folder is welcome
    with pytest.raises(ValueError, match=r"is not empty; .*--resume"):
        started(cfg)
    with open_run(resumed(tmp_path)) as out:
        assert out == tmp_path and (out / "state.pt").exists()


def test_resume_and_the_folder_are_enough_to_go_on_with_a_run(tmp_path):
    cfg = Config(out=str(tmp_path / "run"), steps=7, size=(64, 96), amp="off")
    started(cfg)
    found = in_folder(lambda cfg, out: (cfg, out), Config,
                      ["--resume", "--out", str(tmp_path / "run")], "")
    assert found == (dataclasses.replace(cfg, resume=True), tmp_path / "run")


def test_a_run_is_not_resumed_where_there_is_none_or_a_finished_one(tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(ValueError, match=f"--resume: there is no run in {out}; name the"):
            resumed(out)
    with pytest.raises(ValueError, match="--resume: there is no run in None; name the folder"):
        configured(Config, ["--resume"], "")
    started(Config(out=str(tmp_path / "done")))
    (tmp_path / "done" / "metrics.json").touch()
    with pytest.raises(ValueError, match="is finished; its result is in metrics.json"):
        resumed(tmp_path / "done")


def test_resuming_with_another_config_names_what_changed_and_keeps_the_record(tmp_path):
    started(Config(out=str(tmp_path)))
    with pytest.raises(ValueError, match=r"\(steps: 900, now 10; size: None, now \[8, 9\]\)"):
        resumed(tmp_path, "--steps", "10", "--size", "8", "9")
    assert resumed(tmp_path, "--steps", "900").steps == 900      # said again, it does not differ
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 900


def test_where_and_how_a_run_is_computed_may_change(tmp_path):
    cfg = Config(out=str(tmp_path))
    started(cfg)
    other = resumed(f"{tmp_path}/", "--workers", "9", "--device", "cpu")
    assert (other.workers, other.device) == (9, "cpu")
    assert digest(other) == digest(cfg) != digest(dataclasses.replace(cfg, seed=1))
    recorded = dataclasses.asdict(cfg)
    recorded.pop("seed")                                         # written before the option existed
    assert differences(dataclasses.asdict(cfg), {**recorded, "out": "x"}) == ["seed: None, now 0"]
    (tmp_path / "config.json").write_text(json.dumps({**recorded, "gone": 1}))
    assert resumed(tmp_path).seed == 0                           # or dropped since


def test_after_a_mistake_the_same_folder_can_be_used_with_other_options(tmp_path):
    for steps in (1, 2):
        with open_run(Config(out=str(tmp_path), steps=steps)):
            pass
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 2


@pytest.mark.parametrize("words", [[], ["--out", "runs/001", "--lr", "1"]])
def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distill.py", *words])

    def stopped(cfg, out, error):
        with open_run(Config(out="runs/teacher")):               # as where a teacher is trained
            raise error

    def said(error):
        with pytest.raises(SystemExit) as caught:
            one_sentence(lambda: in_folder(partial(stopped, error=error), Config, None, ""))()
        shutil.rmtree("runs")
        return caught.value.code, capsys.readouterr().err

    told = "; go on with: python distill.py --resume --out runs/001\n"
    assert said(KeyboardInterrupt()) == (130, f"interrupted{told}")
    assert said(KeyboardInterrupt(15)) == (143, f"interrupted{told}")
    assert said(OSError("disk full")) == (2, f"error: disk full{told}")
    assert said(FileNotFoundError("x")) == (2, "error: x\n")     # no use in going on with a typo


# ---------------------------------------------------------------- tables and metrics

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


def test_a_run_does_not_go_on_with_other_images_than_it_began_with(tmp_path):
    found = {"files": [Path("b.jpg"), Path("a.jpg")], "distances": torch.tensor([1.0, 2.0]),
             "weights": torch.tensor([1.0, 0.0]), "skipped": ["c.jpg: broken"]}
    write_csv(tmp_path / "skipped.csv", ("reason",), [["d.jpg: the same image as e.jpg"]])
    write_choice(tmp_path, found)
    (tmp_path / "state.pt").touch()
    write_choice(tmp_path, found)                                # gone on with: nothing twice
    assert read_csv(tmp_path / "skipped.csv") == [
        ["reason"], ["d.jpg: the same image as e.jpg"], ["c.jpg: broken"]]
    with pytest.raises(ValueError, match="began with other images.*chosen.csv.*--out"):
        write_choice(tmp_path, {**found, "files": found["files"][::-1]})
    assert read_csv(tmp_path / "chosen.csv")[1:] == [["b.jpg", "1.0", "1.0"],
                                                     ["a.jpg", "2.0", "0.0"]]


def test_the_environment_is_recorded_with_and_without_git(monkeypatch, tmp_path):
    known = environment(torch.device("cpu"))
    assert known["torch"] == torch.__version__ and known["device"].endswith("CPU")
    json.dumps(known)
    assert environment(torch.device("cpu"), "bfloat16")["precision"] == "torch.bfloat16"
    assert environment(torch.device("cpu"), "off")["precision"] == "torch.float32"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(torch.device("cpu")) == {**known, "commit": None}


def test_the_metrics_count_images_and_times_as_by_hand():
    def result(miou):
        return {"miou": miou, "pixel_accuracy": 0.9, "iou": torch.tensor([miou, 1.0])}

    teacher = SimpleNamespace(class_names=["road", "sky"], mean=torch.zeros(1))
    found = {"scores": torch.rand(50), "skipped": ["a", "b", "c"], "files": list(range(40))}
    laps = {"scoring": (1.5, 1.0), "distillation": (4.0, 7.5)}
    results = {"teacher": result(0.5), "student": result(0.25), "agreement": result(0.75)}
    told = metrics(Config(steps=4, batch_size=8), results, teacher, found, laps)
    expected = {
        "teacher_miou": 0.5, "student_miou": 0.25, "agreement_miou": 0.75, "agreement_pixels": 0.9,
        "pool_images": 47, "skipped_images": 3, "selected_images": 40, "seen_images": 32,
        "updates": 4, "seconds": 5.5, "stage_seconds": {"scoring": 1.5, "distillation": 4.0},
        "processor_seconds": {"scoring": 1.0, "distillation": 7.5}}
    assert {name: told[name] for name in expected} == expected
    assert told["iou"]["student"] == {"road": 0.25, "sky": 1} and told["config"]["steps"] == 4
    results = {"agreement": result(0.75)}
    bare = metrics(Config(steps=100, batch_size=8), results, teacher, found, laps)
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


def test_two_runs_that_draw_a_number_at_once_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_run(Config()) as first, open_run(Config()) as second:
        assert (str(first), str(second)) == ("runs/001", "runs/002")
