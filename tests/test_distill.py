"""distill.py end to end on a miniature world: what it promises, and what it says when it cannot."""

import copy
import csv
import dataclasses
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import with_random_statistics
from PIL import Image
from torch import nn
from tqdm import tqdm

import distill
import train_teacher
from models import build_model
from support import checkpoint, command, scenes
from support.data import Pool, find_images
from support.training import Training

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Return a folder with drawn scenes (train, val, pool) and a teacher trained for a moment."""
    root = tmp_path_factory.mktemp("world")
    scenes.write_scenes(root, size=(32, 48), train=16, val=4, pool=40)
    label = root / "val" / "labels" / "0001.png"
    with Image.open(label) as picture:
        picture.paste(255, (0, 0, 48, 2))                         # void
    picture.save(label)
    train_teacher.main(f"--dataset folder --num-classes 8 --data-root {root} --image-size 32 48 "
                       f"--steps 20 --batch-size 4 --amp off --out {root}/teacher".split())
    return root


@pytest.fixture
def drawn():
    """Draw the figures, which take longer than a miniature run; see `undrawn`."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("support.figures.story", lambda *_: None)
        monkeypatch.setattr("support.figures.pool_check", lambda *_: None)


def run(world, *words, out=None):
    """Run distill.py on the miniature world; return its metrics."""
    line = (f"--dataset folder --num-classes 8 --data-root {world} --pool {world}/pool --amp off "
            f"--teacher {world}/teacher/teacher.pt --budget 8 --steps 4 --batch-size 4")
    return distill.main([*line.split(), "--out", str(out), *map(str, words)])


def weights(out):
    return checkpoint.load(out / "student.pt")["state_dict"]


def identical(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items())


def chosen(out):
    return list(csv.reader(open(out / "chosen.csv")))[1:]


def test_a_run_leaves_a_complete_record(world, tmp_path, drawn):
    metrics = run(world, out=tmp_path / "a")
    assert json.loads((tmp_path / "a/metrics.json").read_text()) == json.loads(json.dumps(metrics))
    for key in ("teacher_miou", "student_miou", "agreement_miou"):
        assert 0 <= metrics[key] <= 1
    assert (metrics["pool_images"], metrics["selected_images"], metrics["updates"]) == (40, 8, 4)
    assert metrics["config"]["budget"] == 8 and metrics["environment"]["torch"]
    assert sum(metrics["stage_seconds"].values()) == pytest.approx(metrics["seconds"])
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        ".lock", "config.json", "metrics.json", "curve.csv", "student.pt", "chosen.csv",
        "skipped.csv", "figure.png"}
    assert Image.open(tmp_path / "a/figure.png").width > 800
    rows = chosen(tmp_path / "a")
    distances, w = ([float(row[i]) for row in rows] for i in (1, 2))
    assert len(rows) == 8 and distances == sorted(distances) and w[0] == 1 and w[-1] == 0


def test_the_teacher_that_is_reported_is_the_one_on_disk(world, tmp_path):
    import evaluate
    metrics = run(world, out=tmp_path / "a")
    again = evaluate.main(f"--checkpoint {world}/teacher/teacher.pt --dataset folder "
                          f"--data-root {world} --device cpu".split())
    assert again["miou"] == pytest.approx(metrics["teacher_miou"])
    student = evaluate.main(f"--checkpoint {tmp_path}/a/student.pt --dataset folder "
                            f"--data-root {world} --device cpu".split())
    assert student["miou"] == pytest.approx(metrics["student_miou"])


def test_without_the_training_folders_the_student_is_the_same_to_the_bit(world, tmp_path):
    run(world, out=tmp_path / "a")
    copy = tmp_path / "copy"
    shutil.copytree(world, copy)
    shutil.rmtree(copy / "train")
    for path in (copy / "val" / "labels").iterdir():              # nor do evaluation labels matter
        Image.new("L", (48, 32)).save(path)
    run(copy, out=tmp_path / "b")
    assert identical(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_the_number_of_workers_does_not_change_the_student(world, tmp_path):
    run(world, out=tmp_path / "a")
    run(world, "--workers", 2, out=tmp_path / "b")
    assert identical(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_an_interrupted_run_resumes_to_the_same_student(world, tmp_path, monkeypatch):
    run(world, out=tmp_path / "a")
    monkeypatch.setattr("support.training.SAVE_EVERY", 2)
    loss, calls = distill.weighted_loss, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(distill, "weighted_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        run(world, out=tmp_path / "b")
    distill.main(["--resume", "--out", str(tmp_path / "b")])      # with the options it had
    assert len(calls) == 4 + 2                                    # steps 3 and 4 only
    assert identical(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_a_scan_goes_on_with_its_own_pool_only(world, tmp_path, monkeypatch):
    """Else the scores of an interrupted scan would be taken for those of other files."""
    pool = tmp_path / "pool"
    shutil.copytree(world / "pool", pool)

    def score_once(batch_score, loader):
        batch_score(next(iter(loader)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("support.scoring.score_pool", score_once)
        run(world, "--pool", pool, out=tmp_path / "a")
    assert list((tmp_path / "a").glob("*.part"))
    scenes.wild_image(7, 0, (32, 48))[0].save(pool / "0000a.png")            # sorts second
    run(world, "--pool", pool, "--dry-run", "--resume", out=tmp_path / "a")
    monkeypatch.setattr("support.scoring.STORE", tmp_path / "another")
    run(world, "--pool", pool, "--dry-run", out=tmp_path / "b")
    assert chosen(tmp_path / "a") == chosen(tmp_path / "b")


def kill_after(calls, work):
    """Do `work` in a forked process, which dies by SIGKILL at its n-th function call.

    Return (exit code, calls made if it lived to tell).
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        made = itertools.count(1)

        def count(*_):
            if next(made) == calls:
                os.kill(os.getpid(), signal.SIGKILL)
        code = 1
        try:
            tqdm.set_lock(threading.RLock())    # its own is shared with us, and dies held
            sys.setprofile(count)
            work()
            sys.setprofile(None)
            os.write(send, str(next(made)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(send)
    _, status = os.waitpid(child, 0)
    with open(receive) as told:
        return os.waitstatus_to_exitcode(status), int(told.read() or 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_any_moment_resumes_to_the_same_student(world, tmp_path, monkeypatch):
    monkeypatch.setattr("support.training.SAVE_EVERY", 2)
    teach = (f"--dataset folder --num-classes 8 --data-root {world} --image-size 32 48 --steps 6 "
             "--batch-size 4 --amp off --out").split()

    def work(out):
        def resume(folder):
            return ["--resume"] if (out / folder / "config.json").exists() else []

        if not (out / "t" / "teacher.pt").exists():
            train_teacher.main([*teach, f"{out}/t", *resume("t")])
        if not (out / "s" / "metrics.json").exists():
            run(world, "--teacher", f"{out}/t/teacher.pt", "--steps", 6, *resume("s"),
                out=out / "s")

    monkeypatch.setattr("support.scoring.STORE", tmp_path / "scores of a")
    code, calls = kill_after(0, lambda: work(tmp_path / "a"))
    assert code == 0
    monkeypatch.setattr("support.scoring.STORE", tmp_path / "scores of b")
    rng = random.Random(0)
    moments = [round(calls * (i + rng.random()) / 8) for i in (0, 3, 1, 2, 2)]    # all stages
    codes = [kill_after(moment, lambda: work(tmp_path / "b"))[0] for moment in moments]
    assert codes.count(-signal.SIGKILL) >= 3 and set(codes) <= {0, -signal.SIGKILL}
    work(tmp_path / "b")
    assert identical(weights(tmp_path / "a/s"), weights(tmp_path / "b/s"))
    assert chosen(tmp_path / "a/s") == chosen(tmp_path / "b/s")


def test_the_default_run_asks_nothing_of_the_network(tmp_path, monkeypatch, drawn):
    def refuse(*_, **__):
        raise AssertionError("something reached for the network")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.chdir(tmp_path)
    write = scenes.write_scenes                                       # the same path, but short
    monkeypatch.setattr(scenes, "write_scenes", lambda root, size: write(
        root, size=size, train=8, val=2, pool=24))
    monkeypatch.setattr(train_teacher, "Training",
                        lambda model, steps, *args: Training(model, 4, *args))
    words = shlex.split("--image-size 32 48 --budget 8 --steps 2 --batch-size 4")
    assert distill.main(words)["updates"] == 2 and (tmp_path / "runs/001/figure.png").exists()


def test_the_teacher_keeps_every_bit_also_in_mixed_precision(world, tmp_path, monkeypatch):
    used, load = [], command.load_teacher
    monkeypatch.setattr(command, "load_teacher", lambda cfg: used.append(load(cfg)) or used[0])
    run(world, "--amp", "bfloat16", "--align", "transfer-first", out=tmp_path / "a")
    on_disk = checkpoint.load_model(world / "teacher/teacher.pt")
    assert checkpoint.fingerprint(used[0]) == checkpoint.fingerprint(on_disk)
    assert not used[0].training


def test_images_to_evaluate_on_are_left_out_of_the_pool(world, tmp_path, capsys):
    pool = tmp_path / "pool"
    shutil.copytree(world / "pool", pool)
    shutil.copy(world / "val/images/0001.png", pool / "sneaked in.png")
    metrics = run(world, "--pool", pool, "--budget", 40, "--dry-run", out=tmp_path / "a")
    assert metrics["pool_images"] == 40 and len(chosen(tmp_path / "a")) == 40
    assert "warning: 1 images of the pool" in capsys.readouterr().out
    assert "sneaked in.png: the same image as" in (tmp_path / "a/skipped.csv").read_text()
    assert "sneaked" not in (tmp_path / "a/chosen.csv").read_text()


def test_the_ladder_differs_by_one_option_a_row(world, tmp_path):
    ladder = {"random": ["--sampling", "random", "--schedule", "uniform"],
              "ads": ["--schedule", "uniform"], "fixed": ["--schedule", "fixed"], "wdpd": []}
    for name, words in ladder.items():
        run(world, *words, out=tmp_path / name)
    files = {name: {row[0] for row in chosen(tmp_path / name)} for name in ladder}
    assert files["ads"] == files["fixed"] == files["wdpd"] != files["random"]
    states = [weights(tmp_path / name) for name in ladder]
    assert not any(identical(a, b) for i, a in enumerate(states) for b in states[:i])


def test_ads_chooses_the_nearest_files_of_the_pool(world, tmp_path):
    run(world, "--budget", 0, "--dry-run", out=tmp_path / "all")
    run(world, "--dry-run", out=tmp_path / "near")
    assert chosen(tmp_path / "near")[0][:2] == chosen(tmp_path / "all")[0][:2]
    assert [r[0] for r in chosen(tmp_path / "near")] == [r[0] for r in chosen(tmp_path / "all")][:8]


def test_confidence_chooses_the_files_whose_surest_class_is_most_probable(world, tmp_path):
    run(world, "--sampling", "confidence", "--dry-run", out=tmp_path / "a")
    teacher = checkpoint.load_model(world / "teacher/teacher.pt")
    pool = Pool(find_images(world / "pool"), (32, 48))
    images = torch.stack([pool.view(i) for i in range(40)]).float() / 255
    with torch.no_grad():
        unsure = 1 - teacher(images).softmax(dim=1).amax(dim=1).mean((1, 2))
    assert [Path(row[0]) for row in chosen(tmp_path / "a")] == [
        pool.files[i] for i in unsure.argsort()[:8].tolist()]


def test_a_random_choice_depends_on_the_seed_and_the_scan_of_distances_does_not(
        world, tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(world, "--sampling", "random", "--seed", seed, "--dry-run", out=tmp_path / name)
    assert chosen(tmp_path / "a") == chosen(tmp_path / "b") != chosen(tmp_path / "c")
    assert {float(row[2]) for row in chosen(tmp_path / "a")} == {1}       # no distance, no weight
    run(world, "--dry-run", out=tmp_path / "d")
    monkeypatch.setattr("support.scoring.score_pool", lambda *_: pytest.fail("scanned again"))
    run(world, "--seed", 1, "--budget", 7, "--dry-run", out=tmp_path / "e")
    assert [row[0] for row in chosen(tmp_path / "e")] == [
        row[0] for row in chosen(tmp_path / "d")][:7]


def test_a_dry_run_looks_at_the_pool_and_trains_nothing(world, tmp_path, capsys, drawn):
    run(world, "--dry-run", out=tmp_path / "a")
    assert "This pool " in capsys.readouterr().out
    assert (tmp_path / "a/pool.png").exists() and not (tmp_path / "a/student.pt").exists()


def test_no_labels_are_needed_anywhere(world, tmp_path, drawn):
    metrics = distill.main(
        f"--dataset none --pool {world}/pool --teacher {world}/teacher/teacher.pt --budget 8 "
        f"--steps 2 --batch-size 4 --out {tmp_path}/a".split())
    assert metrics["student_miou"] is None and metrics["teacher_miou"] is None
    assert 0 <= metrics["agreement_miou"] <= 1 and 0 <= metrics["agreement_pixels"] <= 1
    assert metrics["pool_images"] == 38                           # two are held out


def test_unreadable_files_are_skipped_and_named_and_more_than_half_stop_the_run(world, tmp_path):
    pool = tmp_path / "pool"
    shutil.copytree(world / "pool", pool)
    (pool / "0000.png").write_bytes(b"not a picture")
    (pool / "sub").mkdir()
    (pool / "sub" / "cut.png").write_bytes((pool / "0001.png").read_bytes()[:500])
    metrics = run(world, "--pool", pool, "--budget", 39, out=tmp_path / "a")
    assert (metrics["pool_images"], metrics["skipped_images"]) == (39, 2)
    reasons = (tmp_path / "a/skipped.csv").read_text()
    assert "0000.png" in reasons and "cut.png" in reasons
    assert "0000.png" not in (tmp_path / "a/chosen.csv").read_text()
    for path in sorted(pool.glob("*.png"))[:21]:
        path.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"22 of 41 files of the pool.*the first is .*0000\.png"):
        run(world, "--pool", pool, out=tmp_path / "b")


class UNet(nn.Module):
    """A network that is none of ours: a skip connection, no normalisation of its input."""

    def __init__(self, classes):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(6, 10, 3, 2, 1), nn.BatchNorm2d(10), nn.ReLU())
        self.head = nn.Conv2d(6 + 10, classes, 1)

    def forward(self, x):
        fine = self.enter(x)
        coarse = F.interpolate(self.down(fine), fine.shape[-2:])
        return {"out": self.head(torch.cat([fine, coarse], dim=1))}


def unet():
    return UNet(7)


def from_timm():
    timm = pytest.importorskip("timm")
    body = timm.create_model("resnet18", features_only=True, out_indices=(2,))
    head = nn.Conv2d(body.feature_info.channels()[-1], 7, 1)
    return nn.Sequential(OrderedDict(body=body, last=Last(), head=head))


class Last(nn.Module):
    def forward(self, maps):
        return maps[-1]


def from_segmentation_models_pytorch():
    library = pytest.importorskip("segmentation_models_pytorch")
    return library.Unet("resnet18", encoder_weights=None, classes=7)


@pytest.mark.parametrize("foreign", [unet, from_timm, from_segmentation_models_pytorch])
def test_networks_of_ones_own_enter_through_the_python_api(pool_folder, foreign):
    torch.manual_seed(0)
    teacher, student = with_random_statistics(foreign()), build_model("resnet_tiny", 7)
    before = {name: x.clone() for name, x in student.state_dict().items()}
    memory = {name: x.clone() for name, x in teacher.state_dict().items()}
    cfg = distill.Config(budget=6, steps=3, batch_size=4, amp="off")
    result = distill.distill(teacher, student, pool_folder, (32, 64), cfg)
    assert len(result["files"]) == 6 and len(result["curve"]) == 1
    assert result["distances"].isfinite().all() and result["distances"][0] > 0
    assert not identical(before, student.state_dict())
    assert identical(memory, teacher.state_dict()) and not teacher.training


def test_a_coarse_student_meets_its_teacher_at_the_teachers_size(pool_folder, monkeypatch):
    teacher = with_random_statistics(build_model("resnet_tiny", 7))
    seen, loss = [], distill.pixelwise_kd

    def noted(logits, answers):
        seen.append((logits.shape[2:], answers.shape[2:], logits.dtype))
        return loss(logits, answers)

    monkeypatch.setattr(distill, "pixelwise_kd", noted)
    for views in (2, 0):
        student = build_model("deeplabv3_mobilenet_v2", 7)           # its logits: 3 x 5
        distill.distill(teacher, student, pool_folder, (40, 70), distill.Config(
            budget=4, steps=1, batch_size=4, views=views, amp="bfloat16"))
    assert seen == [((10, 18), (10, 18), torch.float32)] * 2


@pytest.mark.parametrize("views", [2, 0])
def test_the_teachers_temperature_divides_its_logits_and_not_the_students(
        pool_folder, monkeypatch, views):
    teacher, seen = with_random_statistics(build_model("resnet_tiny", 7)), []
    monkeypatch.setattr(distill, "pixelwise_kd",
                        lambda *both: seen.append([x.detach().float() for x in both])
                        or both[0].mean((1, 2, 3)))
    for kd in ("pixelwise", "pixelwise@0.4"):
        torch.manual_seed(0)
        distill.distill(teacher, build_model("resnet_tiny", 7), pool_folder, (32, 48),
                        distill.Config(budget=4, steps=1, batch_size=4, views=views, kd=kd))
    (logits, answers), (same, surer) = seen
    assert torch.equal(logits, same)
    torch.testing.assert_close(surer, 2.5 * answers, rtol=2e-3, atol=1e-3)    # kept in float16


def test_the_python_api_takes_a_list_of_files_and_keeps_a_record_to_go_on_from(
        pool_folder, tmp_path, monkeypatch):
    files = [str(path) for path in sorted(pool_folder.iterdir())[:12]]
    cfg = distill.Config(budget=6, steps=4, batch_size=4, amp="off")
    torch.manual_seed(0)
    teacher = with_random_statistics(unet())
    students = [copy.deepcopy(net) for net in [UNet(7)] * 2]
    distill.distill(teacher, students[0], files, (32, 64), cfg)
    loss, calls = distill.weighted_loss, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(distill, "weighted_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        distill.distill(teacher, students[1], files, (32, 64), cfg, f"{tmp_path}/run")
    found = distill.distill(teacher, students[1], files, (32, 64), cfg, f"{tmp_path}/run")
    assert identical(students[0].state_dict(), students[1].state_dict())
    assert [row[0] for row in chosen(tmp_path / "run")] == list(map(str, found["files"]))
    assert set(map(str, found["files"])) <= set(files) and found["pool"].files == files
    with torch.no_grad():
        another = copy.deepcopy(teacher)
        list(another.parameters())[-1].add_(1)             # changes answers, but no distance
    for other, changed in ((teacher, {"lr": 0.1}), (another, {})):
        with pytest.raises(ValueError, match=r"state\.pt is no state of this run; delete it"):
            distill.distill(other, UNet(7), files, (32, 64), dataclasses.replace(cfg, **changed),
                            f"{tmp_path}/run")


def test_held_out_images_that_cannot_be_read_stop_the_run_before_it_trains(world, tmp_path):
    pool = tmp_path / "pool"
    shutil.copytree(world / "pool", pool)
    for name in ("0000.png", "0020.png"):                                    # every twentieth
        (pool / name).write_text("no picture")
    with pytest.raises(ValueError, match="no image held out .* is readable: .*0000.png"):
        run(world, "--dataset", "none", "--pool", pool, out=tmp_path / "a")


@pytest.mark.parametrize(("schedule", "end"), [("uniform", "8"), ("linear", "8"), ("fixed", None)])
def test_the_effective_sample_size_is_that_of_the_schedule(world, tmp_path, capsys, schedule, end):
    run(world, "--schedule", schedule, "--dry-run", out=tmp_path / "a")
    begin, last = re.search(r"as many as (\d+) equally .*start, (\d+) at the end",
                            capsys.readouterr().out).groups()
    assert (begin == "8") == (schedule == "uniform") and last == (end or begin)


def test_without_dataset_ones_own_pool_is_not_scored_on_the_drawn_scenes(world, tmp_path):
    with pytest.raises(ValueError, match="--dataset is missing"):
        distill.main(["--pool", f"{world}/pool", "--out", str(tmp_path / "a")])


def test_labels_of_other_classes_are_warned_of(world, tmp_path, capsys):
    """The teacher's classes have names, the labels' the same in another order."""
    shutil.copytree(world / "val", tmp_path / "data" / "val")
    names = list(scenes.CLASSES)
    named = build_model("resnet_small", 8, class_names=names, image_size=(32, 48))
    checkpoint.save_model(with_random_statistics(named), tmp_path / "named.pt")
    for lines, warned in ((names, False), (names[::-1], True)):
        (tmp_path / "data" / "classes.txt").write_text("\n".join(lines))
        run(world, "--data-root", tmp_path / "data", "--teacher", tmp_path / "named.pt",
            "--dry-run", out=tmp_path / str(warned))
        said = capsys.readouterr().out
        assert ("warning: the labels' classes are sign, person" in said) == warned


def test_every_bad_input_gets_one_sentence(world, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    checkpoint.save_model(build_model("resnet_tiny", 5), tmp_path / "five.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "foreign.pt")
    cases = [(["--pool", tmp_path / "nowhere"], FileNotFoundError, "no folder"),
             (["--pool", tmp_path / "empty"], FileNotFoundError, "no image"),
             (["--pool", ""], ValueError, "--pool is missing"),
             (["--budget", 41], ValueError, "budget is 41, but the pool has 40"),
             (["--teacher", tmp_path / "five.pt"], ValueError, "num_classes 5, but 8"),
             (["--teacher", tmp_path / "foreign.pt"], ValueError, "not a model of this repository"),
             (["--teacher", tmp_path / "nothing.pt"], FileNotFoundError, "no checkpoint"),
             (["--teacher-model", "fcn_resnet50"], ValueError, "holds model resnet_small"),
             (["--data-root", tmp_path / "nowhere"], FileNotFoundError, "--data-root"),
             (["--layers", "encoder"], ValueError, "'encoder'"),
             (["--kd", "telepathy"], ValueError, "telepathy"),
             (["--lr", "nan"], ValueError, "--lr takes a number of at least 0; got nan"),
             (["--out", tmp_path / "full"], ValueError, "not empty")]
    for i, (words, error, message) in enumerate(cases):
        with pytest.raises(error, match=message):
            run(world, *words, out=tmp_path / f"case{i}")
        if "--kd" in words:                                        # found before the pool is read
            assert sorted(os.listdir(tmp_path / f"case{i}")) == [".lock", "config.json"]
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_labels_out_of_range_stop_the_run_with_the_file_named(world, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(world, copy)
    bad = sorted((copy / "val" / "labels").iterdir())[1]
    Image.new("L", (48, 32), 9).save(bad)
    with pytest.raises(ValueError, match=rf"{bad.name} holds the label values \[9\]"):
        run(copy, out=tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "a")) == [".lock", "config.json"]  # found at once


def test_on_the_command_line_an_error_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run([sys.executable, REPOSITORY / "distill.py", "--dataset", "none", "--pool",
                           tmp_path / "x", "--teacher", "y.pt", "--out", tmp_path / "out"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no checkpoint")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_path_runs_in_mixed_precision(world, tmp_path):
    metrics = run(world, "--device", "cuda", "--amp", "bfloat16", out=tmp_path / "a")
    assert 0 <= metrics["student_miou"] <= 1


def test_alignment_changes_what_is_chosen_and_the_student(world, tmp_path):
    run(world, out=tmp_path / "plain")
    run(world, "--align", "transfer-first", out=tmp_path / "a")
    assert chosen(tmp_path / "a") != chosen(tmp_path / "plain")
    assert not identical(weights(tmp_path / "a"), weights(tmp_path / "plain"))
