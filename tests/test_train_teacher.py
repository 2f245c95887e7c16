"""train_teacher.py: the data owner's side, from labelled images to a checkpoint."""

import os
from unittest.mock import DEFAULT, Mock

import pytest
import torch

import train_teacher
from support import checkpoint, scenes
from support.checkpoint import fingerprint, load_model


@pytest.fixture(scope="module")
def owner(tmp_path_factory):
    root = tmp_path_factory.mktemp("owner")
    scenes.write_scenes(root, size=(32, 48), train=8, val=2, pool=1)
    return root


def train(root, *words):
    return train_teacher.main(
        f"--dataset folder --num-classes 8 --data-root {root} --image-size 32 48 --steps 10 "
        "--batch-size 4 --model resnet_tiny --amp off".split() + list(map(str, words)))


def test_a_teacher_learns_and_its_checkpoint_holds_classes_size_and_statistics(owner, tmp_path):
    metrics = train(owner, "--steps", 40, "--eval-split", "val", "--out", tmp_path / "t")
    assert metrics["loss"] < 1.6 and metrics["images"] == 8 and 0.2 < metrics["miou"] <= 1
    model = load_model(tmp_path / "t" / "teacher.pt")
    assert (model.name, model.num_classes, model.image_size) == ("resnet_tiny", 8, (32, 48))
    bn = model.net.stem[1]
    assert bn.num_batches_tracked == 40 and not torch.all(bn.running_var == 1)
    assert set(os.listdir(tmp_path / "t")) == {"config.json", "metrics.json", "teacher.pt"}


def test_a_folder_without_parts_is_taken_as_it_is(owner, tmp_path):
    words = "--data-root", owner / "val", "--split", "", "--steps", 1, "--out", tmp_path / "t"
    assert train(owner, *words)["images"] == 2


def test_no_option_of_training_is_ignored(owner, tmp_path):
    teachers = set()
    for words in ("--seed 0", "--seed 1", "--lr 0.05", "--batch-size 2", "--steps 2",
                  "--image-size 16 24", "--model resnet_small"):
        train(owner, "--steps", 1, *words.split(), "--out", tmp_path / words)
        teachers.add(fingerprint(load_model(tmp_path / words / "teacher.pt")))
    assert len(teachers) == 7


def test_an_interrupted_teacher_resumes_to_the_bit(owner, tmp_path, monkeypatch):
    train(owner, "--out", tmp_path / "whole")
    loss = Mock(wraps=train_teacher.cross_entropy, side_effect=[*5 * [DEFAULT], KeyboardInterrupt])
    monkeypatch.setattr("support.training.SAVE_EVERY", 4)
    monkeypatch.setattr(train_teacher, "cross_entropy", loss)
    with pytest.raises(KeyboardInterrupt):
        train(owner, "--out", tmp_path / "torn")
    loss.side_effect = None
    train_teacher.main(["--resume", "--out", str(tmp_path / "torn")])
    assert loss.call_count == 12
    whole, torn = (load_model(tmp_path / name / "teacher.pt") for name in ("whole", "torn"))
    assert fingerprint(whole) == fingerprint(torn)


def test_the_loss_is_the_mean_over_labelled_pixels_and_0_if_there_are_none():
    logits = torch.randn(1, 3, 2, 2)
    target = torch.tensor([[[1, 255], [255, 2]]])
    p = logits[0].softmax(dim=0)
    expected = -(p[1, 0, 0].log() + p[2, 1, 1].log()) / 2
    torch.testing.assert_close(train_teacher.cross_entropy(logits, target), expected)
    assert train_teacher.cross_entropy(logits, torch.full_like(target, 255)).item() == 0


@pytest.mark.parametrize(("words", "message"), [
    (("--num-classes", 4), "holds the label values"), (("--eval-split", "vall"), "no folder"),
    (("--eval-split", "train"), "share images")])
def test_labels_that_do_not_fit_are_refused_before_training(owner, tmp_path, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(owner, *words, "--out", tmp_path / "t")
    assert os.listdir(tmp_path / "t") == ["config.json"]


def test_the_builtin_teacher_is_trained_once_even_if_interrupted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scenes, "write_scenes", Mock())
    train_once = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(train_teacher, "train_teacher", train_once)
    with pytest.raises(KeyboardInterrupt):
        train_teacher.builtin_teacher()
    train_once.side_effect = lambda cfg, out: checkpoint.save({}, out / "teacher.pt")
    root, file = train_teacher.builtin_teacher()
    assert train_teacher.builtin_teacher() == (root, file) and root == "runs/scenes-64x96"
    assert train_teacher.builtin_teacher((32, 48))[1] != file
    assert [call.args[0].image_size for call in train_once.mock_calls] == [
        (64, 96), (64, 96), (32, 48)]
