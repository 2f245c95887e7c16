"""distill.py end to end on a small world: what a run promises, and what it says when it cannot."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from conftest import with_random_statistics
from PIL import Image
from torch import nn

import distill
import evaluate
import train_teacher
from models import SegmentationModel, build_model
from support import checkpoint, command, scenes, scoring, training
from support.images import read_csv
from support.options import one_sentence


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Leave out the figures, which take longer than a small run, unless the test's name has one."""
    if "figure" not in request.node.name:
        for name in ("run_figure", "pool_figure"):
            monkeypatch.setattr(f"support.figures.{name}", lambda *_: None)


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


@pytest.mark.parametrize(("steps", "said"), [("1", ", too few to see all of them"), ("2", "")])
def test_the_report_says_if_a_run_was_too_short_to_see_all_it_selected(world, tmp_path, capsys,
                                                                       steps, said):
    run(world, "--steps", steps, out=tmp_path / "a")                        # 4 images per update
    text = capsys.readouterr().out
    assert f"\n40 pool images scored, 8 selected, {steps} updates{said}\n" in text


def test_a_run_leaves_a_complete_record_a_figure_and_the_scored_student(world, tmp_path, capsys):
    out = tmp_path / "a"
    with warnings.catch_warnings(action="error"):                # nor does anything warn
        metrics = run(world, out=out)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "student mIoU {student_miou:.1%}, teacher {teacher_miou:.1%}, agreement with the teacher "
        "{agreement_miou:.1%} (pixels {agreement_pixels:.1%})".format(**metrics))
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert 0 < metrics["agreement_miou"] < 1 and 0 < metrics["agreement_pixels"] < 1
    counts = [metrics[f"{name}_images"] for name in ("pool", "selected", "seen", "skipped")]
    assert [*counts, metrics["updates"]] == [40, 8, 8, 0, 4]
    assert metrics["config"]["budget"] == 8 and metrics["environment"]["torch"]
    assert set(metrics["processor_seconds"]) == set(metrics["stage_seconds"]) == {
        "scenes and teacher", "scoring", "distillation", "evaluation"}
    assert sum(metrics["stage_seconds"].values()) == pytest.approx(metrics["seconds"])
    assert {p.name for p in out.iterdir()} == {
        "config.json", "metrics.json", "curve.csv", "student.pt", "chosen.csv", "skipped.csv",
        "figure.png"}
    distances, w = ([float(row[i]) for row in chosen(out)] for i in (1, 2))
    assert len(distances) == 8 and distances == sorted(distances) and w[0] == 1 and w[-1] == 0
    for name, path in (("teacher", world / "teacher.pt"), ("student", out / "student.pt")):
        again = evaluate.main(f"--checkpoint {path} --dataset folder --data-root {world} "
                              "--num-classes 8 --device cpu".split())
        assert again["miou"] == pytest.approx(metrics[f"{name}_miou"])


def test_the_default_run_with_its_figure_needs_no_network(tmp_path, monkeypatch):
    for name in ("socket.socket", "socket.create_connection", "socket.getaddrinfo"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("reached for the network"))
    monkeypatch.chdir(tmp_path)
    write, config = scenes.write_scenes, train_teacher.Config         # the same path, but short
    monkeypatch.setattr(scenes, "write_scenes", lambda root, size: write(
        root, size=size, train=8, val=2, pool=24))
    monkeypatch.setattr(train_teacher, "Config", lambda **options: config(**options | {"steps": 4}))
    words = "--image-size 32 48 --budget 8 --steps 2 --batch-size 4"
    metrics = distill.main(words.split())
    assert metrics["updates"] == 2 and metrics["config"]["views"] == 8
    assert (tmp_path / "runs/001/figure.png").exists()


def test_a_dry_run_says_whether_pool_and_labels_fit_and_trains_nothing(world, tmp_path, capsys):
    """The network's classes have names; the labels have the same, in another order."""
    names = list(scenes.CLASSES)
    named = build_model("resnet_tiny", 8, class_names=names, image_size=(32, 48))
    checkpoint.save_model(with_random_statistics(named), tmp_path / "named.pt")
    shutil.copytree(world / "val", tmp_path / "val")
    (tmp_path / "classes.txt").write_text("\n".join(names[::-1]))
    run(world, "--data-root", tmp_path, "--teacher", tmp_path / "named.pt", "--dry-run",
        out=tmp_path / "a")
    said = capsys.readouterr().out
    assert "warning: the labels' classes are" in said and "This pool " in said
    assert not list((tmp_path / "a").glob("*.pt"))


def test_neither_labels_nor_loader_workers_change_the_student(world, tmp_path, monkeypatch):
    """Without the train folder, and with other labels to evaluate on, the student is the same."""
    shutil.copytree(world, tmp_path / "world")
    shutil.copytree(world / "val", tmp_path / "world/train")
    run(tmp_path / "world", out=tmp_path / "a")
    shutil.rmtree(tmp_path / "world/train")
    for path in (tmp_path / "world/val/labels").iterdir():
        Image.new("L", Image.open(path).size).save(path)
    for workers in (0, 2):                                        # the pool is scored again
        monkeypatch.setattr("support.scoring.STORE", tmp_path / f"scores {workers}")
        out = tmp_path / f"b{workers}"
        run(tmp_path / "world", "--workers", workers, out=out)
        assert chosen(out) == chosen(tmp_path / "a")
        assert identical(weights(out), weights(tmp_path / "a"))


def killed(module, name, call, words):
    """Run distill.py in a process that kills itself in the n-th call of a function of a module."""
    # A new process, not a fork: after a backward pass in several threads, autograd refuses forks.
    code = f"""
import os, signal, sys
from unittest.mock import DEFAULT, Mock
from support import figures, scoring, training
import distill, torch

def effect(*_):
    if deadly.call_count == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return DEFAULT

deadly = Mock(wraps={module}.{name}, side_effect=effect)
{module}.{name} = deadly
scoring.STORE, training.SAVE_EVERY = scoring.Path({str(scoring.STORE)!r}), {training.SAVE_EVERY}
figures.run_figure = Mock()
torch.set_num_threads(1)
distill.main(sys.argv[1:])
"""
    root = Path(distill.__file__).parent
    process = subprocess.run([sys.executable, "-c", code, *words], cwd=root)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_run_killed_anywhere_resumes_to_the_same_student(world, tmp_path, monkeypatch):
    monkeypatch.setattr("support.training.SAVE_EVERY", 2)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run(world, "--steps", 6, "--views", 3, out=whole)
    monkeypatch.setattr("support.scoring.STORE", tmp_path / "scores")
    resume = ["--resume", "--out", str(torn)]
    killed("scoring", "as_input", 2, options(world, torn, "--steps", 6, "--views", 3))
    (path,) = (tmp_path / "scores").iterdir()
    assert np.isfinite(np.fromfile(path, np.float32)).tolist() == [True] * 16 + [False] * 24
    killed("distill", "compute_teacher_logits", 4, resume)
    assert chosen(torn) == chosen(whole) and not (torn / "state.pt").exists()
    killed("distill", "weighted_loss", 6, resume)
    assert checkpoint.load(torn / "state.pt")["step"] == 4
    loss = Mock(wraps=distill.weighted_loss)
    monkeypatch.setattr(distill, "weighted_loss", loss)
    monkeypatch.setattr("support.figures.run_figure", Mock(side_effect=[KeyboardInterrupt, None]))
    with pytest.raises(KeyboardInterrupt):
        distill.main(resume)
    assert not (torn / "metrics.json").exists()           # a run is finished when its figure is
    distill.main(resume)
    assert loss.call_count == 2 and identical(weights(whole), weights(torn))
    assert (torn / "curve.csv").read_text() == (whole / "curve.csv").read_text()


def bare(seed=0):
    """Return a network that is no SegmentationModel."""
    torch.manual_seed(seed)
    return with_random_statistics(build_model("resnet_tiny", 7).net)


CONFIG = distill.Config(budget=6, steps=4, batch_size=4, amp="bfloat16", match_colours=True)


def api(pool, out=None, **other):
    """Distil one bare network into another; return the result and the student."""
    given = {"teacher": bare(), "student": bare(seed=1), "size": (32, 64), "cfg": CONFIG} | other
    return distill.distill(pool=pool, out=out, **given), given["student"]


def test_the_api_takes_files_keeps_the_teacher_and_resumes(pool_folder, tmp_path, monkeypatch):
    files = [str(path) for path in sorted(pool_folder.iterdir())[:12]]
    teacher = bare().train()
    result, whole = api(files, teacher=teacher)
    assert not identical(whole.state_dict(), bare(seed=1).state_dict())
    assert identical(teacher.state_dict(), bare().state_dict()) and not teacher.training
    loss = Mock(wraps=distill.weighted_loss, side_effect=[DEFAULT, DEFAULT, KeyboardInterrupt])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill, "weighted_loss", loss)
        api(files, f"{tmp_path}/run")
    resumed, student = api(files, f"{tmp_path}/run")
    assert identical(whole.state_dict(), student.state_dict())
    assert resumed["curve"] == result["curve"] and len(resumed["curve"]) == 1
    assert [row[0] for row in chosen(tmp_path / "run")] == result["files"] == resumed["files"]
    assert len(result["files"]) == 6 and set(result["files"]) <= set(files)


def test_another_run_in_the_same_folder_is_refused_and_its_student_kept(pool_folder, tmp_path):
    api(pool_folder, tmp_path)
    another, same_shape = bare(), bare(seed=2)
    another.head.bias.data.add_(1)                                # changes logits, but no distance
    for other in ({"teacher": another}, {"student": same_shape}, {"size": (32, 48)},
                  {"student": build_model("resnet_small", 7)},
                  {"cfg": dataclasses.replace(CONFIG, lr=0.1)}):
        with pytest.raises(ValueError, match="is not a state of this run|began with the images"):
            api(pool_folder, tmp_path, **other)
    assert identical(bare(seed=2).state_dict(), same_shape.state_dict())


def test_a_network_that_cannot_take_an_evaluated_size_is_noticed_before_training(world, tmp_path):
    (tmp_path / "nets.py").write_text("""
import torch
from torch import nn

class UNet(nn.Module):                       # for even sizes
    def __init__(self):
        super().__init__()
        self.down, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(7, 8, 1)

    def forward(self, x):
        return self.head(torch.cat([x, nn.Upsample(scale_factor=2)(self.down(x))], 1))
""")
    words = "--student-model", f"{tmp_path}/nets.py:UNet", "--image-size", 32, 46     # val: 37x46
    with pytest.raises(RuntimeError, match="must match"):
        run(world, *words, out=tmp_path / "out")
    assert not (tmp_path / "out" / "chosen.csv").exists()


def test_photos_evaluated_on_and_unreadable_ones_are_left_out_and_named(world, tmp_path, capsys):
    pool = tmp_path / "pool"
    shutil.copytree(world / "pool", pool)
    shutil.copy(world / "val/images/01.png", pool / "sneaked in.png")
    (pool / "00.png").write_bytes(b"not a picture")
    metrics = run(world, "--pool", pool, "--budget", 39, out=tmp_path / "a")
    assert (metrics["pool_images"], metrics["skipped_images"]) == (39, 1)
    assert "warning: 1 images of the pool" in capsys.readouterr().out
    reasons = (tmp_path / "a/skipped.csv").read_text()
    assert "sneaked in.png: evaluated on, as" in reasons and "00.png: Unidentified" in reasons
    names = {Path(row[0]).name for row in chosen(tmp_path / "a")}
    assert len(names) == 39 and names.isdisjoint({"sneaked in.png", "00.png"})


def test_a_teacher_may_lack_a_size_and_have_more_outputs_than_labels(world, tmp_path, capsys):
    teacher = with_random_statistics(build_model("resnet_tiny", 9))
    checkpoint.save_model(teacher, tmp_path / "t.pt")
    metrics = run(world, "--teacher", tmp_path / "t.pt", "--steps", 1, out=tmp_path / "a")
    said = capsys.readouterr().out
    assert "does not say its image size: 256x256 is used" in said and "--image-size" in said
    assert len(metrics["iou"]["agreement"]) == 9 and 0 <= metrics["teacher_miou"] <= 1


def test_pretrained_students_keep_imagenets_normalisation(monkeypatch):
    load = Mock(return_value=nn.Identity())
    monkeypatch.setattr("support.networks.load_network", load)
    teacher = SegmentationModel(nn.Identity(), "own", 3, (0, 0, 0), (1, 1, 1))
    for weights_of in ("none", "imagenet"):
        command.build_student(distill.Config(student_weights=weights_of), teacher)
    plain, pretrained = (call.kwargs for call in load.mock_calls)
    assert plain["mean"] == [0, 0, 0] and "mean" not in pretrained
    assert pretrained["weights_backbone"] == "DEFAULT"


def test_a_named_teacher_needs_its_labels_and_published_weights_their_network(
        pool_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["--teacher-model", "resnet_tiny"], ["--teacher-weights", "DEFAULT"]):
        with pytest.raises(ValueError, match="--dataset is missing"):       # nothing is drawn
            distill.main(words)
    with pytest.raises(ValueError, match="--teacher-weights needs --teacher-model"):
        distill.main(["--teacher-weights", "DEFAULT", "--dataset", "none", "--pool",
                      str(pool_folder)])


BAD_INPUTS = {
    "--pool nowhere": "there is no folder nowhere", "--pool ": "--pool is missing",
    "--metric l1": "--metric takes one of l2, kl; got 'l1'",
    "--teacher-temperature 0": "at least 0.01; got 0",
    "--pool dark --out dark/runs": "lies in the pool",
    "--dataset scenes --data-root ": "--dataset is missing",
    "--dataset none --pool dark": "no image held out for agreement can be read, such as dark",
    "--data-root bad": r"01.png holds the label values \[9\]",
    "--teacher-weights DEFAULT": "--teacher-weights needs --teacher-model, and excludes --teacher",
    "--student-model nets.py:unet --student-weights imagenet": "unet loads its own weights"}


@pytest.mark.parametrize("words", BAD_INPUTS)
def test_a_bad_input_gets_one_sentence(world, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    Path("dark").mkdir()
    Path("dark/00.png").write_text("no picture")
    shutil.copytree(world / "val", "bad/val")
    Image.new("L", (51, 40), 9).save("bad/val/labels/01.png")
    line = options(world, "run", *words.split(" "))
    with pytest.raises(SystemExit) as caught:
        one_sentence(lambda: distill.main(line))()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and re.search(BAD_INPUTS[words], error) and "error: " in error
    assert not Path("run").exists() or set(os.listdir("run")) <= {"config.json", "skipped.csv"}


def test_on_the_command_line_an_error_is_one_line_and_exit_code_2(tmp_path):
    words = f"distill.py --dataset none --pool x --teacher y.pt --out {tmp_path}/out".split()
    done = subprocess.run([sys.executable, *words], cwd=Path(distill.__file__).parent,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "error: there is no checkpoint at y.pt\n"
