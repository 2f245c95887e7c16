"""records.py: folders of runs that are begun, kept apart and resumed, and what they record."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from distill import Config
from support.images import read_csv
from support.options import one_sentence
from support.records import (by_name, differences, digest, environment, in_folder, write_csv,
                             write_selection)


def begin(*words):
    """Leave a run in its folder, as an interrupted program would; return the folder."""
    def run(cfg, out):
        (out / "state.pt").write_text("half-way")
        return out
    return in_folder(run, Config, list(map(str, words)), "")


def resumed(out, *words):
    return in_folder(lambda cfg, out: cfg, Config, ["--resume", "--out", str(out), *words], "")


def test_runs_get_the_next_free_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert begin().as_posix() == "runs/001"
    for other in ("009", "teacher", "20-copy"):
        (tmp_path / "runs" / other).mkdir()
    assert begin("--steps", 8).name == "010"
    assert json.loads((tmp_path / "runs/010/config.json").read_text())["steps"] == 8


def test_a_folder_that_holds_a_result_is_refused_unless_its_run_is_resumed(tmp_path):
    for name in (".123.4f", "config.json", "skipped.csv"):       # of a run that failed early
        (tmp_path / name).write_text("{")
    words = ["--out", tmp_path, "--steps", 7, "--image-size", 64, 96]
    assert begin(*words) == tmp_path
    with pytest.raises(ValueError, match="is not empty; choose another --out, or .*--resume"):
        begin(*words)
    assert resumed(tmp_path) == Config(out=str(tmp_path), steps=7, image_size=(64, 96), resume=True)


def test_a_run_is_not_resumed_where_there_is_none_or_a_finished_one(tmp_path):
    begin("--out", tmp_path / "done")
    (tmp_path / "done/metrics.json").touch()
    for out in (tmp_path / "nowhere", tmp_path, tmp_path / "done"):
        with pytest.raises(ValueError, match=f"--resume: there is no unfinished run in {out}; "):
            resumed(out)


def test_resuming_with_other_options_names_what_changed_and_keeps_the_record(tmp_path):
    begin("--out", tmp_path, "--steps", 900)
    with pytest.raises(ValueError, match=r"\(image_size: None, now \[8, 9\]; steps: 900, now 10\)"):
        resumed(tmp_path, "--steps", "10", "--image-size", "8", "9")
    other = resumed(tmp_path, "--workers", "9", "--device", "cpu")
    assert (other.workers, other.device) == (9, "cpu")           # how it is computed may change
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert (recorded["steps"], recorded["workers"]) == (900, None)
    assert digest(other) == digest(Config(steps=900)) != digest(Config(steps=900, amp="off"))
    recorded.pop("seed")                            # as before the option existed: its default, 0
    assert differences(other, recorded) == []
    assert differences(dataclasses.replace(other, seed=3), recorded) == ["seed: 0, now 3"]


def test_an_interrupted_run_says_how_to_resume_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distill.py", "--steps", "1"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)       # as of python distill.py

    def said(error):
        with pytest.raises(SystemExit) as caught:
            one_sentence(lambda: in_folder(Mock(side_effect=error), Config, None, ""))()
        shutil.rmtree("runs")
        return caught.value.code, capsys.readouterr().err

    command = "; resume with: python distill.py --resume --out runs/001\n"
    assert said(KeyboardInterrupt()) == (130, f"interrupted; what is done is kept{command}")
    assert said(OSError("disk full")) == (2, f"error: disk full{command}")
    assert said(torch.OutOfMemoryError("CUDA out of memory"))[1].endswith(command)
    assert said(FileNotFoundError("x")) == (2, "error: x\n")     # a typo is not resumed
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="support.x"))
    monkeypatch.setattr(sys, "argv", ["/a/support/x.py", "--dry-run"])
    assert said(OSError("disk full"))[1].endswith(
        "python -m support.x --resume --out runs/001 --dry-run\n")


def test_a_dry_run_is_continued_by_a_run(tmp_path):
    begin("--out", tmp_path, "--dry-run", "--steps", 7)
    assert (resumed(tmp_path).dry_run, resumed(tmp_path).steps) == (False, 7)
    assert resumed(tmp_path, "--dry-run").dry_run


def test_a_table_is_read_back_also_with_file_names_of_any_bytes(tmp_path):
    names = ["a,b.png", 'say "x"', "two\nlines.jpg", "re\rturn\\.jpg", os.fsdecode(b"caf\xe9.jpg"),
             "\xe9.jpg"]
    write_csv(tmp_path / "t.csv", ("file", "weight"), [[name, 1e-9] for name in names])
    rows = [["file", "weight"], *([n, "1e-09"] for n in names)]
    assert read_csv(tmp_path / "t.csv") == rows
    assert b"caf\xe9.jpg" in (tmp_path / "t.csv").read_bytes()
    (tmp_path / "t.csv").write_bytes(b"\r\n" + (tmp_path / "t.csv").read_bytes() + b"\r\n")
    assert read_csv(tmp_path / "t.csv") == rows                       # empty lines do not count


def test_a_run_does_not_resume_with_other_images_than_it_began_with(tmp_path):
    result = {"files": [Path("b.jpg"), Path("a.jpg")], "distances": torch.tensor([1.0, 2.0]),
              "weights": torch.tensor([1.0, 0.0]), "skipped": ["c.jpg: broken"]}
    write_csv(tmp_path / "skipped.csv", ("reason",), [["d.jpg: the same image as e.jpg"]])
    write_selection(tmp_path, result)
    (tmp_path / "state.pt").touch()
    write_selection(tmp_path, result)                            # resumed: nothing is listed twice
    assert read_csv(tmp_path / "skipped.csv") == [
        ["reason"], ["d.jpg: the same image as e.jpg"], ["c.jpg: broken"]]
    with pytest.raises(ValueError, match="began with the images in chosen.csv; restore pool"):
        write_selection(tmp_path, {**result, "files": result["files"][::-1]})
    assert read_csv(tmp_path / "chosen.csv")[1:] == [["b.jpg", "1.0", "1.0"],
                                                     ["a.jpg", "2.0", "0.0"]]


def test_the_environment_is_recorded_with_and_without_git(monkeypatch, tmp_path):
    known = environment(torch.device("cpu"), "bfloat16")
    assert known["precision"] == "torch.bfloat16" and known["device"].endswith("CPU")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(torch.device("cpu"), "off") == {**known, "commit": None,
                                                       "precision": "torch.float32"}


def test_a_class_that_is_absent_has_no_number_in_json():
    iou = torch.tensor([0.25, torch.nan])
    assert json.dumps(by_name(["road", "sky"], iou)) == '{"road": 0.25, "sky": null}'
