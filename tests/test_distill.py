"""distill.py end to end on a small world: what a run promises, and what it says when it cannot."""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import with_random_statistics
from PIL import Image
from torch import nn

import distill
import evaluate
import train_teacher
from models import build_model
from support import checkpoint, command, scenes, scoring
from support.images import read_csv
from support.options import one_sentence

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def drawn():
    """Draw the figures, which take longer than a small run; see `undrawn`."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("support.figures.run_figure", lambda *_: None)
        monkeypatch.setattr("support.figures.pool_figure", lambda *_: None)


def options(world, out, *more):
    """Return the words of a short run on the small world."""
    return [*(f"--dataset folder --num-classes 8 --data-root {world} --pool {world}/pool --amp off "
              f"--teacher {world}/teacher.pt --budget 8 --steps 4 --batch-size 4 --out").split(),
            *map(str, [out, *more])]


def run(world, *more, out):
    """Run distill.py on the small world; return its metrics."""
    return distill.main(options(world, out, *more))


def weights(out):
    return checkpoint.load(out / "student.pt")["state_dict"]


def identical(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items())


def chosen(out):
    return read_csv(out / "chosen.csv")[1:]


# ---------------------------------------------------------------- what a run leaves

def test_a_run_leaves_a_complete_record(world, tmp_path, drawn):
    with warnings.catch_warnings(action="error"):                # nor does anything warn
        metrics = run(world, out=tmp_path / "a")
    assert json.loads((tmp_path / "a/metrics.json").read_text()) == json.loads(json.dumps(metrics))
    for key in ("teacher_miou", "student_miou", "agreement_miou"):
        assert 0 <= metrics[key] <= 1
    assert (metrics["pool_images"], metrics["selected_images"], metrics["updates"]) == (40, 8, 4)
    assert metrics["config"]["budget"] == 8 and metrics["environment"]["torch"]
    assert sum(metrics["stage_seconds"].values()) == pytest.approx(metrics["seconds"])
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "config.json", "metrics.json", "curve.csv", "student.pt", "chosen.csv", "skipped.csv",
        "figure.png"}
    assert Image.open(tmp_path / "a/figure.png").width > 800
    distances, w = ([float(row[i]) for row in chosen(tmp_path / "a")] for i in (1, 2))
    assert len(distances) == 8 and distances == sorted(distances) and w[0] == 1 and w[-1] == 0


def test_the_reported_scores_are_those_of_the_networks_on_disk(world, tmp_path):
    metrics = run(world, out=tmp_path / "a")
    for name, path in (("teacher", world / "teacher.pt"), ("student", tmp_path / "a/student.pt")):
        again = evaluate.main(f"--checkpoint {path} --dataset folder --data-root {world} "
                              "--num-classes 8 --device cpu".split())
        assert again["miou"] == pytest.approx(metrics[f"{name}_miou"])


def test_the_default_run_needs_no_network(tmp_path, monkeypatch, drawn):
    def refuse(*_, **__):
        raise AssertionError("something reached for the network")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.chdir(tmp_path)
    write, config = scenes.write_scenes, train_teacher.Config         # the same path, but short
    monkeypatch.setattr(scenes, "write_scenes", lambda root, size: write(
        root, size=size, train=8, val=2, pool=24))
    monkeypatch.setattr(train_teacher, "Config", lambda **options: config(**options | {"steps": 4}))
    words = "--image-size 32 48 --budget 8 --steps 2 --batch-size 4"
    metrics = distill.main(words.split())
    assert metrics["updates"] == 2 and metrics["config"]["views"] == 8
    assert (tmp_path / "runs/001/figure.png").exists()


def test_no_labels_are_needed_anywhere(world, tmp_path, drawn):
    metrics = distill.main(
        f"--dataset none --pool {world}/pool --teacher {world}/teacher.pt --budget 8 --steps 2 "
        f"--batch-size 4 --out {tmp_path}/a".split())
    assert metrics["student_miou"] is None and metrics["teacher_miou"] is None
    assert 0 <= metrics["agreement_miou"] <= 1 and 0 <= metrics["agreement_pixels"] <= 1
    assert metrics["pool_images"] == 38                           # two are held out


def test_a_dry_run_says_whether_the_pool_fits_and_trains_nothing(world, tmp_path, capsys, drawn):
    run(world, "--dry-run", out=tmp_path / "a")
    assert "This pool " in capsys.readouterr().out
    assert (tmp_path / "a/pool.png").exists() and not (tmp_path / "a/student.pt").exists()


def test_the_printed_effective_sample_size_is_that_of_the_schedule(world, tmp_path, capsys):
    for schedule, first, last in (("uniform", 8, 8), ("linear", "few", 8), ("fixed", "few", "few")):
        run(world, "--schedule", schedule, "--dry-run", out=tmp_path / schedule)
        w = np.array([float(row[2]) for row in chosen(tmp_path / schedule)])
        few = f"{w.sum() ** 2 / (w ** 2).sum():.0f}"
        line = f"effective sample size {first} at the start, {last} at the end".replace("few", few)
        assert few != "8" and f"{schedule}: {line}" in capsys.readouterr().out


# ---------------------------------------------------------------- what does not change a student

def test_labels_never_reach_training(world, tmp_path, monkeypatch):
    """Without the train folder, and with other labels to evaluate on, the student is the same."""
    shutil.copytree(world, tmp_path / "world")
    shutil.copytree(world / "val", tmp_path / "world/train")
    run(tmp_path / "world", out=tmp_path / "a")
    shutil.rmtree(tmp_path / "world/train")
    for path in (tmp_path / "world/val/labels").iterdir():
        with Image.open(path) as picture:
            Image.new("L", picture.size).save(path)
    monkeypatch.setattr("support.scoring.STORE", tmp_path / "scores")      # so it is scored again
    run(tmp_path / "world", out=tmp_path / "b")
    assert identical(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_workers_do_not_change_the_student(world, tmp_path, monkeypatch):
    for workers in (0, 2):
        monkeypatch.setattr("support.scoring.STORE", tmp_path / f"scores {workers}")
        run(world, "--workers", workers, out=tmp_path / str(workers))
    assert chosen(tmp_path / "0") == chosen(tmp_path / "2")
    assert identical(weights(tmp_path / "0"), weights(tmp_path / "2"))


def test_the_teacher_keeps_every_bit_also_in_bfloat16(world, tmp_path, monkeypatch):
    used, load = [], command.load_teacher
    monkeypatch.setattr(command, "load_teacher", lambda cfg: used.append(load(cfg)) or used[0])
    run(world, "--amp", "bfloat16", "--match-colours", out=tmp_path / "a")
    on_disk = checkpoint.load_model(world / "teacher.pt")
    assert checkpoint.fingerprint(used[0]) == checkpoint.fingerprint(on_disk)
    assert not used[0].train().training                           # nor can it leave eval mode


# ---------------------------------------------------------------- resuming

def killed(module, name, call, words):
    """Run distill.py in a process that kills itself in the n-th call of a function of a module."""
    def work():
        function, calls = getattr(module, name), []

        def deadly(*args):
            calls.append(args)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        setattr(module, name, deadly)                             # in the child process only
        distill.main(words)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_in_scoring_in_caching_and_in_training_resumes_to_the_same_student(
        world, tmp_path, monkeypatch):
    monkeypatch.setattr("support.training.SAVE_EVERY", 2)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run(world, "--steps", 6, "--views", 3, out=whole)
    monkeypatch.setattr("support.scoring.STORE", tmp_path / "scores")
    resume = ["--resume", "--out", str(torn)]

    killed(scoring, "as_input", 2, options(world, torn, "--steps", 6, "--views", 3))
    (path,) = (tmp_path / "scores").iterdir()
    assert np.isfinite(np.fromfile(path, np.float32)).tolist() == [True] * 16 + [False] * 24
    killed(distill, "compute_teacher_logits", 4, resume)
    assert chosen(torn) == chosen(whole) and not (torn / "state.pt").exists()
    killed(distill, "weighted_loss", 6, resume)
    assert checkpoint.load(torn / "state.pt")["step"] == 4

    losses, loss = [], distill.weighted_loss
    monkeypatch.setattr(distill, "weighted_loss", lambda *args: losses.append(1) or loss(*args))
    distill.main(resume)
    assert len(losses) == 2 and identical(weights(whole), weights(torn))
    assert (torn / "curve.csv").read_text() == (whole / "curve.csv").read_text()


def test_a_run_is_finished_only_when_its_figure_is_drawn(world, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("support.figures.run_figure", interrupted)
        run(world, out=tmp_path / "run")
    assert not (tmp_path / "run/metrics.json").exists()
    distill.main(["--resume", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run/metrics.json").exists()


# ---------------------------------------------------------------- the Python API

def bare(seed=0):
    """Return a network that is no SegmentationModel."""
    torch.manual_seed(seed)
    return with_random_statistics(build_model("resnet_tiny", 7).net)


CONFIG = distill.Config(budget=6, steps=4, batch_size=4, amp="off")


def test_the_python_api_takes_a_list_of_files_and_resumes_given_the_initial_student(
        pool_folder, tmp_path, monkeypatch):
    files = [str(path) for path in sorted(pool_folder.iterdir())[:12]]

    def api(out=None):
        student = bare(seed=1)
        return distill.distill(bare(), student, files, (32, 64), CONFIG, out), student

    _, whole = api()
    losses, loss = [], distill.weighted_loss

    def stopping(*args):
        losses.append(1)
        if len(losses) == 3:
            raise KeyboardInterrupt
        return loss(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill, "weighted_loss", stopping)
        api(f"{tmp_path}/run")
    result, student = api(f"{tmp_path}/run")
    assert identical(whole.state_dict(), student.state_dict())
    assert [row[0] for row in chosen(tmp_path / "run")] == result["files"]
    assert set(result["files"]) <= set(files)


def test_another_run_in_the_same_folder_is_refused_and_its_student_left_alone(
        pool_folder, tmp_path):
    def api(**other):
        given = {"teacher": bare(), "student": bare(seed=1), "size": (32, 64), "cfg": CONFIG}
        return distill.distill(pool=pool_folder, out=tmp_path / "run", **given | other)

    api()
    another = bare()
    with torch.no_grad():
        another.head.bias.add_(1)                                 # changes logits, but no distance
    for other in ({"teacher": another}, {"size": (32, 48)},
                  {"cfg": dataclasses.replace(CONFIG, lr=0.1)}):
        with pytest.raises(ValueError, match="is not a state of this run|began with other images"):
            api(**other)
    same_shape = bare(seed=2)
    with pytest.raises(ValueError, match="is not a state of this run; delete it to start over"):
        api(student=same_shape)
    assert identical(bare(seed=2).state_dict(), same_shape.state_dict())


# ---------------------------------------------------------------- which photos are used

def test_images_to_evaluate_on_are_left_out_of_the_pool(world, tmp_path, capsys):
    shutil.copytree(world / "pool", tmp_path / "pool")
    shutil.copy(world / "val/images/01.png", tmp_path / "pool/sneaked in.png")
    metrics = run(world, "--pool", tmp_path / "pool", "--budget", 40, "--dry-run",
                  out=tmp_path / "a")
    assert metrics["pool_images"] == 40 and len(chosen(tmp_path / "a")) == 40
    assert "warning: 1 images of the pool" in capsys.readouterr().out
    assert "sneaked in.png: the same image as" in (tmp_path / "a/skipped.csv").read_text()
    assert "sneaked" not in (tmp_path / "a/chosen.csv").read_text()


def test_unreadable_files_are_skipped_and_named_and_more_than_half_stop_the_run(world, tmp_path):
    pool = tmp_path / "pool"
    shutil.copytree(world / "pool", pool)
    (pool / "00.png").write_bytes(b"not a picture")
    (pool / "sub").mkdir()
    (pool / "sub" / "cut.png").write_bytes((pool / "01.png").read_bytes()[:100])
    metrics = run(world, "--pool", pool, "--budget", 39, out=tmp_path / "a")
    assert (metrics["pool_images"], metrics["skipped_images"]) == (39, 2)
    reasons = (tmp_path / "a/skipped.csv").read_text()
    assert "00.png" in reasons and "cut.png" in reasons
    assert "00.png" not in (tmp_path / "a/chosen.csv").read_text()
    for path in sorted(pool.glob("*.png"))[:21]:
        path.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"22 of 41 pool files are unusable: .*00\.png"):
        run(world, "--pool", pool, out=tmp_path / "b")


# ---------------------------------------------------------------- what is wrong is said

BAD_INPUTS = [
    ("--pool nowhere", "there is no folder nowhere"), ("--pool ", "--pool is missing"),
    ("--budget 41", "budget is 41, but the pool has 40"),
    ("--teacher five.pt", "resnet_tiny has 5 classes, expected 8"),
    ("--layers encoder", "no BatchNorm layer matches 'encoder'"), ("--metric l1", "invalid choice"),
    ("--teacher-temperature 0", "at least 0.01; got 0"), ("--out full", "is not empty"),
    ("--dataset scenes --data-root ", "--dataset is missing"),
    ("--dataset none --pool dark", "no image held out for agreement can be read, such as dark"),
    ("--device cuda:99", "torch cannot compute on --device cuda:99"),
    ("--data-root bad", r"01.png holds the label values \[9\]")]


@pytest.mark.parametrize(("words", "message"), BAD_INPUTS, ids=[words for words, _ in BAD_INPUTS])
def test_a_bad_input_gets_one_sentence_and_leaves_no_more_than_the_config(
        world, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    for name in ("full", "dark"):
        (tmp_path / name).mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    for i in range(20):
        (tmp_path / f"dark/{i:02d}.png").write_text("no picture")
    shutil.copytree(world / "val", tmp_path / "bad/val")
    Image.new("L", (51, 40), 9).save(tmp_path / "bad/val/labels/01.png")
    shutil.copytree(world / "pool", tmp_path / "pool")
    checkpoint.save_model(build_model("resnet_tiny", 5), "five.pt")
    name, *values = words.split(" ")
    line = options(world, "run", "--pool", "pool", name, *values)
    with pytest.raises(SystemExit) as caught:
        one_sentence(lambda: distill.main(line))()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and re.search(message, error) and "error: " in error
    assert not Path("run").exists() or set(os.listdir("run")) <= {"config.json", "skipped.csv"}
    assert (tmp_path / "full/thesis.txt").read_text() == "mine"


def test_labels_of_other_classes_are_warned_of(world, tmp_path, capsys):
    """The network's classes have names; the labels have the same, or in another order."""
    names = list(scenes.CLASSES)
    named = build_model("resnet_tiny", 8, class_names=names, image_size=(32, 48))
    checkpoint.save_model(with_random_statistics(named), tmp_path / "named.pt")
    shutil.copytree(world / "val", tmp_path / "data/val")
    for lines, warned in ((names, False), (names[::-1], True)):
        (tmp_path / "data/classes.txt").write_text("\n".join(lines))
        run(world, "--data-root", tmp_path / "data", "--teacher", tmp_path / "named.pt",
            "--dry-run", out=tmp_path / str(warned))
        assert ("warning: the labels' classes are" in capsys.readouterr().out) == warned


def test_on_the_command_line_an_error_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run([sys.executable, REPOSITORY / "distill.py", "--dataset", "none", "--pool",
                           tmp_path / "x", "--teacher", "y.pt", "--out", tmp_path / "out"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "error: there is no checkpoint at y.pt\n"


class NotFinite(nn.Module):
    """A teacher whose logits are NaN for dark images, although its statistics are fine."""

    def __init__(self):
        super().__init__()
        self.net = build_model("resnet_tiny", 7)

    def forward(self, x):
        dark = x.mean((1, 2, 3), keepdim=True) < 0.45
        return self.net(x).masked_fill(dark, torch.nan)


def test_a_teacher_whose_logits_are_not_finite_is_named_with_the_file(pool_folder):
    torch.manual_seed(0)
    teacher = with_random_statistics(NotFinite())
    cfg = dataclasses.replace(CONFIG, budget=0)
    message = r"the teacher's logits for (.*\.png) are infinite or NaN; use --amp off"
    with pytest.raises(ValueError, match=message) as caught:
        distill.distill(teacher, build_model("resnet_tiny", 7), pool_folder, (32, 64), cfg)
    assert Path(re.match(message, str(caught.value))[1]).parent == pool_folder
