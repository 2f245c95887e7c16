"""evaluate.py against slow loops, a hand-computed example, and whole runs of its command line."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import nearest_colour
from PIL import Image
from torch import nn

from evaluate import confusion_matrix, evaluate, main, mean_iou, predict, report
from models import build_model
from support import evaluation
from support.checkpoint import save_model
from support.evaluation import mask_names, write_masks
from support.labelled import CAMVID, CITYSCAPES, VOC, class_colours

ABSENT = math.nan


def labels(*shape, classes=4, seed=0, ignored=0.2):
    """Return (prediction, target) where some targets are 255."""
    rng = np.random.default_rng(seed)
    prediction, target = rng.integers(0, classes, (2, *shape))
    target[rng.random(shape) < ignored] = 255
    return torch.tensor(prediction), torch.tensor(target)


def slow_matrix(prediction, target, classes):
    matrix = [[0] * classes for _ in range(classes)]
    for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t != 255:
            matrix[t][p] += 1
    return matrix


def slow_iou(prediction, target, classes):
    """Return each class's intersection over union from sets of pixels, None where absent."""
    seen = [(p, t) for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(),
                                   strict=True) if t != 255]
    found = []
    for k in range(classes):
        guess, truth = ({i for i, pair in enumerate(seen) if pair[side] == k} for side in (0, 1))
        found.append(len(guess & truth) / len(guess | truth) if guess | truth else None)
    return found


def network(classes=3, seed=0):
    """Return a network without BatchNorm whose logits are half the size of its input."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, classes, 3, 1, 1)).eval()


def loader(seed=0, size=(9, 14)):
    """Return six images of 16 x 24 as batches of one, with targets of another size."""
    images = torch.rand(6, 3, 16, 24, generator=torch.Generator().manual_seed(seed))
    return list(zip(images.split(1), labels(6, *size, classes=3)[1].split(1), strict=True))


def joined(batches):
    return tuple(torch.cat(part) for part in zip(*batches, strict=True))


def test_the_confusion_matrix_equals_slow_loops_and_rows_are_truth():
    prediction, target = labels(2, 15, 20)
    matrix = confusion_matrix(prediction, target, 4)
    assert matrix.dtype == torch.int64 and matrix.tolist() == slow_matrix(prediction, target, 4)
    assert matrix.sum() == (target != 255).sum() < 600
    assert confusion_matrix(torch.tensor([2]), torch.tensor([1]), 3)[1, 2] == 1
    other_void = confusion_matrix(torch.tensor([2, 0]), torch.tensor([9, 0]), 3, ignore_index=9)
    assert other_void.sum() == other_void[0, 0] == 1


@pytest.mark.parametrize("classes", [4, 6, 7])         # two and three of them occur nowhere
def test_mean_iou_equals_slow_loops_and_leaves_absent_classes_out(classes):
    prediction, target = labels(15, 20)
    miou, iou = mean_iou(confusion_matrix(prediction, target, classes))
    slow = slow_iou(prediction, target, classes)
    assert iou.tolist() == pytest.approx([ABSENT if v is None else v for v in slow], nan_ok=True,
                                         abs=1e-6)
    present = [v for v in slow if v is not None]
    assert miou.item() == pytest.approx(sum(present) / len(present), abs=1e-6)
    assert len(present) == 4 and iou.isnan().sum() == classes - 4


def test_a_class_that_is_only_predicted_counts_as_zero_and_no_pixel_at_all_as_nothing():
    miou, iou = mean_iou(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 0]]))
    assert iou.tolist() == pytest.approx([0.75, 0, ABSENT], nan_ok=True)
    assert miou.item() == pytest.approx(0.375)
    assert mean_iou(torch.zeros(3, 3))[0].isnan()


def test_the_hand_computed_example():
    #   truth 0 0 1 1 void        IoU_0 = 1 / 2, IoU_1 = 2 / 3, mIoU = 7 / 12, three of four right
    #   guess 0 1 1 1 0
    batches = [(torch.zeros(1, 3, 1, 5), torch.tensor([[[0, 0, 1, 1, 255]]]))]
    logits = torch.tensor([[1.0, 0, 0, 0, 1], [0, 1, 1, 1, 0]]).view(1, 2, 1, 5)
    result = evaluate(lambda images: logits, batches, 2, device="cpu")
    assert result["matrix"].tolist() == [[1, 1], [0, 2]]
    assert result["iou"].tolist() == pytest.approx([1 / 2, 2 / 3])
    assert (result["miou"], result["pixel_accuracy"]) == pytest.approx((7 / 12, 3 / 4))


@pytest.mark.parametrize(("prediction", "target", "message"), [
    ([0, 3], [0, 1], r"prediction values must lie in 0\.\.2 .*got 0\.\.3"),
    ([0, -1], [0, 1], "prediction values"), ([0, 1], [0, 3], "target values"),
    ([-1, 0], [-1, 0], r"target values .*got -1\.\.0"),
    ([0, 1], [0], "same shape")])
def test_values_and_shapes_that_do_not_fit_are_refused(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(prediction), torch.tensor(target), 3)


def test_evaluate_does_not_spread_one_target_over_several_images():
    with pytest.raises(ValueError, match="must have the same shape"):
        evaluate(network(), [(torch.rand(2, 3, 8, 8), torch.zeros(1, 8, 8).long())], 3)


def test_ignored_pixels_may_be_predicted_as_anything_and_bytes_count_like_integers():
    prediction, target = torch.tensor([-1, 7, 1, 200]), torch.tensor([255, 255, 0, 255])
    assert confusion_matrix(prediction, target, 2).tolist() == [[0, 1], [0, 0]]
    prediction, target = labels(9, 9)
    assert torch.equal(confusion_matrix(prediction.byte(), target.byte(), 4),
                       confusion_matrix(prediction, target, 4))


def test_logits_are_resized_not_classes_and_between_pixel_centres():
    # Two columns become eight, whose centres lie at -0.375, -0.125, 0.125, ... of the two. Class 1
    # overtakes class 0 at a quarter of the way, so in the fourth column of eight.
    logits = torch.tensor([[0.25, 0.25], [0.0, 1.0]]).view(1, 2, 1, 2)
    assert predict(lambda images: logits, torch.zeros(1, 3, 1, 2), (1, 8)).tolist() == [
        [[0, 0, 0, 1, 1, 1, 1, 1]]]


def test_the_batch_size_does_not_matter_and_targets_keep_their_size():
    singles, model = loader(), network()
    threes = [joined(singles[:3]), joined(singles[3:])]
    one, three = evaluate(model, singles, 3), evaluate(model, threes, 3)
    assert torch.equal(one["matrix"], three["matrix"]) and one["miou"] == three["miou"]
    images, targets = joined(singles)
    assert one["matrix"].tolist() == slow_matrix(predict(model, images, (9, 14)), targets, 3)
    assert one["matrix"].sum() == (targets != 255).sum()


def test_bytes_and_floats_give_the_same_score():
    whole = [((255 * images).byte(), targets) for images, targets in loader()]
    floats = [(images.float() / 255, targets) for images, targets in whole]
    assert torch.equal(evaluate(network(), whole, 3)["matrix"],
                       evaluate(network(), floats, 3)["matrix"])


def test_a_reference_takes_the_place_of_the_targets():
    model, other, batches = network(), network(seed=1), loader()
    images, targets = joined(batches)
    guess, truth = predict(model, images, (9, 14)), predict(other, images, (9, 14))
    masked = torch.where(targets == 255, 255, truth)
    found = evaluate(model, batches, 3, reference=other)["matrix"]
    assert found.tolist() == slow_matrix(guess, masked, 3)
    bare = [(x, None) for x, _ in batches]
    full = slow_matrix(predict(model, images, (16, 24)), predict(other, images, (16, 24)), 3)
    assert evaluate(model, bare, 3, reference=other)["matrix"].tolist() == full
    assert evaluate(model, bare, 3, reference=model)["pixel_accuracy"] == 1
    other.insert(1, nn.BatchNorm2d(8))
    evaluate(model, batches, 3, reference=other.train())
    assert not other.training and not other[1].running_mean.any()


def test_the_report_has_a_line_a_class_and_a_dash_for_an_absent_one():
    result = {"iou": torch.tensor([0.5, ABSENT], dtype=torch.double), "miou": 0.5,
              "pixel_accuracy": 0.754}
    lines = report({"teacher": result, "student": result}, ["road", "banana"]).splitlines()
    assert [line.split() for line in lines] == [
        ["IoU", "%", "teacher", "student"], ["road", "50.0", "50.0"], ["banana", "-", "-"],
        ["mean", "IoU", "50.0", "50.0"], ["pixel", "accuracy", "75.4", "75.4"]]
    assert len({len(line) for line in lines}) == 1                               # aligned


# ---------------------------------------------------------------- masks and the command line

@pytest.fixture
def photographs(tmp_path):
    """Return a folder of two pictures and a file that is none."""
    folder = tmp_path / "photographs"
    (folder / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (50, 40)), ("deeper/b.png", (31, 64))):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize(size, Image.BICUBIC).save(folder / name)
    (folder / "broken.png").write_text("not an image")
    return folder


def camvid_model(size=(32, 48)):
    """Return a network for CamVid's classes; an untrained head would call every pixel the same."""
    torch.manual_seed(0)
    model = build_model("resnet_tiny", 11, class_names=CAMVID, image_size=size).eval()
    nn.init.normal_(model.net.head.weight)
    return model


def test_masks_keep_names_and_sizes_and_hold_class_numbers_with_colours(photographs, tmp_path,
                                                                        capsys):
    out, model = tmp_path / "masks", camvid_model()
    assert write_masks(model, photographs, out, (32, 48), "cpu") == 2
    assert "broken.png" in capsys.readouterr().err
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.*")) == ["a.png",
                                                                                "deeper/b.png"]
    for name, size in (("a.png", (50, 40)), ("deeper/b.png", (31, 64))):
        mask = Image.open(out / name)
        assert mask.mode == "P" and mask.size == size
        assert mask.getpalette()[:33] == [c for rgb in class_colours(CAMVID) for c in rgb]
        assert len(np.unique(np.asarray(mask))) >= 2 and np.asarray(mask).max() <= 10
    # b.png is 31 x 64: it covers 32 x 48 at 48 x 99, and its classes are found there.
    resized = Image.open(photographs / "deeper" / "b.png").resize((48, 99), Image.BILINEAR)
    image = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = predict(model, image, (64, 31))[0].numpy()
    assert (np.asarray(Image.open(out / "deeper" / "b.png")) == expected).all()


def test_the_command_line_scores_a_checkpoint_and_writes_the_metrics(tmp_path, capsys):
    model, prediction = camvid_model((30, 40)), []
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 12, (2, 30, 40)).astype(np.uint8)                  # 11 is void
    for part in ("val", "valannot"):
        (tmp_path / part).mkdir()
    for i, target in enumerate(targets):
        photograph = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        photograph = photograph.resize((40, 30), Image.BOX)
        photograph.save(tmp_path / "val" / f"{i}.png")
        Image.fromarray(target).save(tmp_path / "valannot" / f"{i}.png")
        image = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            prediction.append(predict(model, image, (30, 40)))
    save_model(model, tmp_path / "m.pt")
    metrics = main(["--checkpoint", str(tmp_path / "m.pt"), "--dataset", "camvid", "--data-root",
                    str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "metrics.json")])
    truth = torch.from_numpy(np.where(targets == 11, 255, targets).astype(np.int64))
    slow = [v for v in slow_iou(torch.cat(prediction), truth, 11) if v is not None]
    assert metrics["miou"] == pytest.approx(sum(slow) / len(slow), abs=1e-6)
    assert list(metrics["iou"]) == list(CAMVID)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["miou"] == metrics["miou"]
    assert f"mean IoU {100 * metrics['miou']:22.1f}" in capsys.readouterr().out


def scored(monkeypatch, class_names, words):
    """Return what evaluate.py says of a network that takes colours for classes."""
    model = nearest_colour(class_names, 0, 13, 15)
    model.image_size = (96, 96)
    monkeypatch.setattr(evaluation, "load_model", lambda path: model)
    return main(["--checkpoint", "any.pt", "--device", "cpu", *map(str, words)])


def test_voc_is_scored_at_each_images_own_resolution(voc_tree, monkeypatch):
    # Images of 80x48 and 96x120 pixels, seen at 160x96 and 96x120: of both together 256 pixels are
    # void, 1024 person (all found), 14080 background, of which 512 are taken for a person.
    metrics = scored(monkeypatch, VOC, ["--dataset", "voc", "--data-root", voc_tree])
    expected = {"background": 13568 / 14080, "person": 1024 / 1536}
    assert {name: iou for name, iou in metrics["iou"].items() if iou is not None} == expected
    assert metrics["miou"] == pytest.approx(sum(expected.values()) / 2)
    assert metrics["pixel_accuracy"] == pytest.approx((13568 + 1024) / 15104)


def test_cityscapes_is_scored_on_whole_images_without_its_ignored_pixels(cityscapes_tree,
                                                                         monkeypatch):
    # Of each image 512 pixels are ignored, 256 car, 1280 road, of which 128 are taken for a car.
    seen = []
    count = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda model, loader, k: count(
        lambda images: seen.append(tuple(images.shape)) or model(images), loader, k, device="cpu"))
    metrics = scored(monkeypatch, CITYSCAPES, ["--dataset", "cityscapes", "--data-root",
                                               cityscapes_tree, "--image-size", 32, 64])
    assert seen == [(1, 3, 32, 64)] * 2
    assert metrics["iou"]["road"] == 1152 / 1280 and metrics["iou"]["car"] == 256 / 384
    assert metrics["miou"] == pytest.approx((0.9 + 2 / 3) / 2)
    assert metrics["pixel_accuracy"] == pytest.approx(1408 / 1536)


def test_two_images_of_one_name_get_two_masks_and_overlays_show_both(photographs, tmp_path):
    Image.new("RGB", (20, 30), "white").save(photographs / "a.png")
    out, model = tmp_path / "masks", camvid_model()
    assert write_masks(model, photographs, out, (32, 48), "cpu", overlay=True) == 3
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    assert written == ["a.jpg.overlay.jpg", "a.jpg.png", "a.png.overlay.jpg", "a.png.png",
                       "deeper/b.png.overlay.jpg", "deeper/b.png.png"]
    mask, overlay = Image.open(out / "a.png.png"), Image.open(out / "a.png.overlay.jpg")
    assert mask.size == overlay.size == (20, 30)
    expected = (np.asarray(mask.convert("RGB"), dtype=float) + 255) / 2
    assert np.abs(np.asarray(overlay, dtype=float) - expected).mean() < 12               # JPEG
    assert [p.name for p in mask_names([tmp_path / "a.jpg", tmp_path / "b.jpg"])] == ["a.png",
                                                                                      "b.png"]


def test_masks_are_not_written_among_the_images(photographs):
    before = (photographs / "deeper" / "b.png").read_bytes()
    for out in (photographs, photographs / "masks"):
        with pytest.raises(ValueError, match="lies in the folder of the images"):
            write_masks(camvid_model(), photographs, out, (32, 48), "cpu")
    assert (photographs / "deeper" / "b.png").read_bytes() == before


def test_the_command_line_writes_masks_for_a_folder(photographs, tmp_path):
    save_model(camvid_model(), tmp_path / "m.pt")
    words = ["--checkpoint", str(tmp_path / "m.pt"), "--images", str(photographs)]
    assert main([*words, "--out", str(tmp_path / "masks")]) == {"masks": 2}
    assert Image.open(tmp_path / "masks" / "a.png").size == (50, 40)
    with pytest.raises(ValueError, match="--out is missing"):
        main(words)
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        main([*words[:2], "--images", str(tmp_path / "nowhere"), "--out", str(tmp_path / "masks")])
    with pytest.raises(ValueError, match="--images .*m.pt is no folder"):
        main([*words[:2], "--images", str(tmp_path / "m.pt"), "--out", str(tmp_path / "masks")])
    sizeless = camvid_model()
    sizeless.image_size = None
    save_model(sizeless, tmp_path / "n.pt")
    with pytest.raises(ValueError, match="n.pt does not say its image size; give --image-size"):
        main(["--checkpoint", str(tmp_path / "n.pt"), *words[2:], "--out", str(tmp_path / "more")])
    with pytest.raises(ValueError, match="--checkpoint is missing"):
        main([])
    with pytest.raises(ValueError, match="torch cannot compute on --device cuda:99 here"):
        main([*words, "--device", "cuda:99"])
