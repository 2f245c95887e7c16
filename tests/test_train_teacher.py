"""train_teacher.py: the data owner's side, from labelled images to a checkpoint."""

import pytest
import torch

import train_teacher
from support import scenes, training
from support.checkpoint import fingerprint, load, load_model


@pytest.fixture(scope="module")
def owner(tmp_path_factory):
    root = tmp_path_factory.mktemp("owner")
    scenes.write_scenes(root, size=(32, 48), train=8, val=2, pool=1)
    return root


def train(root, *words):
    return train_teacher.main(
        f"--dataset folder --num-classes 8 --data-root {root} --image-size 32 48 --steps 10 "
        "--batch-size 4 --amp off".split() + list(map(str, words)))


def test_the_checkpoint_holds_model_classes_normalisation_size_and_statistics(owner, tmp_path):
    metrics = train(owner, "--eval-split", "val", "--out", tmp_path / "t")
    model = load_model(tmp_path / "t" / "teacher.pt")
    assert (model.name, model.num_classes, model.image_size) == ("resnet_small", 8, (32, 48))
    assert load(tmp_path / "t" / "teacher.pt")["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert metrics["images"] == 8 and 0 <= metrics["miou"] <= 1
    first = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert first.num_batches_tracked == 10 and not torch.all(first.running_var == 1)


def test_a_finished_teacher_is_never_overwritten(owner, tmp_path):
    train(owner, "--out", tmp_path / "t")
    with pytest.raises(ValueError, match="the run in .* is finished"):
        train(owner, "--out", tmp_path / "t", "--resume")


def test_an_interrupted_teacher_resumes_to_the_bit_and_with_its_own_options_only(
        owner, tmp_path, monkeypatch):
    train(owner, "--out", tmp_path / "whole")
    loss, calls = train_teacher.cross_entropy, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(training, "SAVE_EVERY", 4)
    monkeypatch.setattr(train_teacher, "cross_entropy", stopping)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(owner, "--out", tmp_path / "torn")
    assert caught.value.__notes__[0].endswith(f"--resume --out {tmp_path}/torn")
    with pytest.raises(ValueError, match="--resume"):
        train(owner, "--out", tmp_path / "torn")
    with pytest.raises(ValueError, match=r"another config \(lr: 0.1, now 0.2\)"):
        train_teacher.main(["--resume", "--lr", "0.2", "--out", str(tmp_path / "torn")])
    train_teacher.main(["--resume", "--out", str(tmp_path / "torn")])
    assert len(calls) == 12
    whole, torn = (load_model(tmp_path / name / "teacher.pt") for name in ("whole", "torn"))
    assert fingerprint(whole) == fingerprint(torn)


def test_cross_entropy_is_minus_the_log_of_the_softmax():
    logits = torch.tensor([[[[2.0]], [[0.0]]]])
    target = torch.tensor([[[0]]])
    assert train_teacher.cross_entropy(logits, target).item() == pytest.approx(0.1269, abs=1e-4)


def test_void_pixels_do_not_count_and_an_all_void_crop_gives_zero():
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[[1, 255], [255, 255]]])
    expected = -torch.log_softmax(logits[0, :, 0, 0], 0)[1]
    torch.testing.assert_close(train_teacher.cross_entropy(logits, target), expected)
    assert train_teacher.cross_entropy(logits, torch.full_like(target, 255)).item() == 0


def test_a_bad_label_is_found_before_training(owner, tmp_path):
    with pytest.raises(ValueError, match="holds the label values"):
        train(owner, "--num-classes", 4, "--out", tmp_path / "t")


def test_what_the_teacher_is_scored_on_is_checked_before_training(owner, tmp_path):
    for words, said in ((("--eval-split", "vall"), "no folder"),
                        (("--eval-split", "train"), "share images")):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            train(owner, *words, "--out", tmp_path / "t")
        assert {path.name for path in (tmp_path / "t").iterdir()} == {".lock", "config.json"}
