"""What users ran into: each of these was a wrong result without a word, a hang or a traceback."""

import json
import warnings

import numpy as np
import pytest
import torch
from conftest import with_random_statistics
from matplotlib.figure import Figure
from pictures import coordinates, write
from PIL import Image
from torch import nn

import distill
from models import build_model
from support import checkpoint, evaluation, figures
from support.data import find_images, load_image


def small_run(pool, teacher=None, student=None, size=(32, 48), **options):
    teacher = teacher or with_random_statistics(build_model("resnet_tiny", 3))
    student = student or build_model("resnet_tiny", 3)
    cfg = distill.Config(**{"budget": 4, "steps": 1, "batch_size": 2, "amp": "off", **options})
    return distill.distill(teacher, student, pool, size, cfg)


# ---------------------------------------------------------------- wrong, silently

@pytest.mark.parametrize(("classes", "message"), [
    ((1, 1), "teacher has 1 output channels .*two or more"), ((3, 4), "3 .* and the student 4")])
def test_networks_of_one_class_or_of_different_ones_are_refused_before_the_scan(
        pool_folder, monkeypatch, classes, message):
    monkeypatch.setattr(distill, "scan", lambda *_: pytest.fail("scanned"))
    teacher, student = (with_random_statistics(build_model("resnet_tiny", k)) for k in classes)
    with pytest.raises(ValueError, match=message):
        small_run(pool_folder, teacher, student)


def test_a_teacher_that_never_learned_or_is_broken_is_refused_before_the_scan(pool_folder,
                                                                             monkeypatch):
    monkeypatch.setattr(distill, "scan", lambda *_: pytest.fail("scanned"))
    with pytest.raises(ValueError, match="looks untrained: were its weights loaded"):
        small_run(pool_folder, build_model("resnet_tiny", 3))
    for name, value in (("running_mean", torch.nan), ("running_var", -1.0),
                        ("weight", torch.inf)):
        broken = with_random_statistics(build_model("resnet_tiny", 3))
        getattr(broken.net.stem[1], name).data[2] = value
        with pytest.raises(ValueError, match="infinite, NaN or negative"):
            small_run(pool_folder, broken)
    dead = with_random_statistics(build_model("resnet_tiny", 3))
    nn.init.zeros_(dead.net.head.weight)
    with pytest.raises(ValueError, match="looks untrained"):
        small_run(pool_folder, dead)


def test_a_budget_beyond_the_pool_is_said_before_the_scan(pool_folder, monkeypatch):
    monkeypatch.setattr(distill, "scan", lambda *_: pytest.fail("scanned"))
    with pytest.raises(ValueError, match="budget is 400, but the pool has 30 files; .*--budget 0"):
        small_run(pool_folder, budget=400)


@pytest.mark.parametrize("words", ["--teacher mine.pt", "--pool photos",
                                   "--teacher-model fcn_resnet50"])
def test_a_teacher_or_a_pool_of_ones_own_needs_a_dataset_at_once(tmp_path, words, monkeypatch):
    monkeypatch.setattr("support.command.builtin_teacher", lambda *_: pytest.fail("drew scenes"))
    with pytest.raises(ValueError, match="--dataset is missing"):
        distill.main([*words.split(), "--out", str(tmp_path / "a")])


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.uint16])
def test_a_picture_of_more_than_8_bits_is_named_not_clipped(tmp_path, kind):
    path = write(tmp_path / "a.tif", np.array([[0, 1]], dtype=kind))
    with pytest.raises(ValueError, match=r"a\.tif: .*more than 8 bits a pixel; convert it"):
        load_image(path)


def test_a_kind_of_image_that_cannot_be_read_here_is_named(tmp_path):
    (tmp_path / "b.HEIC").write_bytes(b"unknown")
    (path,) = find_images(tmp_path)
    with pytest.raises(ValueError, match="b.HEIC: .*cannot identify"):
        load_image(path)


def test_every_image_gets_a_mask_of_its_own_however_names_clash(tmp_path):
    files = [tmp_path / name for name in ("a.jpg", "a.png", "a.jpg.png")]
    assert len(set(evaluation.mask_names(files))) == 3
    for i, path in enumerate(files):
        write(path, Image.new("RGB", (40, 32), (10 * i, 0, 0)), format="PNG")
    model = build_model("resnet_tiny", 3).eval()
    out = tmp_path.parent / "masks of clashing names"
    assert evaluation.write_masks(model, tmp_path, out, (32, 40), "cpu", overlay=True) == 3
    assert len(list(out.glob("*.png"))) == 3


def test_the_program_does_not_learn_from_its_own_figures(pool_folder, tmp_path):
    model = with_random_statistics(build_model("resnet_tiny", 3, image_size=(32, 48)))
    checkpoint.save_model(model, tmp_path / "t.pt")
    with pytest.raises(ValueError, match="--out .* lies in the pool"):
        distill.main(["--dataset", "none", "--pool", str(pool_folder), "--teacher",
                      str(tmp_path / "t.pt"), "--out", str(pool_folder / "run")])


# ---------------------------------------------------------------- tracebacks

def test_a_list_of_files_may_come_from_windows(tmp_path):
    path = write(tmp_path / "a.jpg", coordinates(40, 30))
    (tmp_path / "list.csv").write_text(f"\ufefffile,note\r\n{path},x\r\n", encoding="utf-8")
    assert find_images(tmp_path / "list.csv") == [path]


# ---------------------------------------------------------------- what annoyed

def test_every_picture_of_masks_has_a_legend_and_void_a_colour_of_its_own():
    paint = figures.painter(["road", "sky"])
    assert paint(torch.tensor([[0, 255]]))[0, 1].tolist() == [255, 255, 255]
    figure = Figure()
    figures.legend(figure, ["road", "sky"])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["road", "sky", "void"]


def test_few_images_are_not_shown_twice():
    items = [(torch.zeros(3, 4, 4), torch.zeros(4, 4)) for _ in range(3)]
    assert len(figures.examples(items)) <= 3


@pytest.mark.parametrize(("sampling", "axis", "first"), [
    ("nearest", "distance to the teacher's training data (last bin: all beyond)", "nearest"),
    ("confidence", "1 - the teacher's confidence (last bin: all beyond)", "most confident"),
    ("random", "number drawn at random (last bin: all beyond)", "first drawn")])
def test_figures_say_what_the_scores_are(sampling, axis, first, pool_folder, tmp_path, monkeypatch):
    model = with_random_statistics(build_model("resnet_tiny", 3, image_size=(32, 48)))
    checkpoint.save_model(model, tmp_path / "t.pt")
    written = []
    monkeypatch.setattr(plots, "write", lambda figure, path: written.append(figure))
    words = ["--dataset", "none", "--pool", str(pool_folder), "--teacher", str(tmp_path / "t.pt"),
             "--budget", "4", "--steps", "1", "--amp", "off", "--sampling", sampling]
    distill.main([*words, "--out", str(tmp_path / "run")])
    distill.main([*words, "--out", str(tmp_path / "dry"), "--dry-run"])
    for figure in written:
        assert figure.axes[0].get_xlabel() == axis
        assert figure.axes[0].get_title() == f"2, 3  Score the pool, keep the {first}"
    lines = [line.get_label() for line in written[0].axes[1].lines]
    assert lines[0] == first and len(written) == 2


def test_nothing_warns_in_a_run_without_trouble(pool_folder):
    with warnings.catch_warnings(action="error"):
        assert len(small_run(pool_folder)["files"]) == 4


def test_the_figure_is_part_of_what_makes_a_run_finished(pool_folder, tmp_path, monkeypatch):
    model = with_random_statistics(build_model("resnet_tiny", 3, image_size=(32, 48)))
    checkpoint.save_model(model, tmp_path / "t.pt")
    words = ["--dataset", "none", "--pool", str(pool_folder), "--teacher", str(tmp_path / "t.pt"),
             "--out", str(tmp_path / "run"), "--budget", "4", "--steps", "1", "--amp", "off"]

    def interrupted(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(plots, "story", interrupted)
        distill.main(words)
    assert not (tmp_path / "run" / "metrics.json").exists()
    metrics = distill.main(["--resume", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "figure.png").exists() and json.dumps(metrics)
