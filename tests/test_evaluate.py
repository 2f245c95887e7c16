"""evaluate.py against slow loops, a hand-computed example, and whole runs of its command line.

That the file alone, with torch alone, can be imported and used is tested in test_readme.py.
"""

import json
import math

import numpy as np
import pytest
import torch
from conftest import nearest_colour
from pictures import coordinates, folder, mask, write
from PIL import Image
from torch import nn

from evaluate import confusion_matrix, evaluate, main, mean_iou, predict, report, write_masks
from models import build_model, wrap
from support.checkpoint import save_model
from support.labelled import CAMVID, VOC, class_colours

ABSENT = math.nan


def labels(*shape, classes=4):
    """Return (prediction, target) where some targets are 255, and fix what torch draws next."""
    torch.manual_seed(0)
    prediction, target = torch.randint(classes, (2, *shape))
    return prediction, torch.where(torch.rand(shape) < 0.2, 255, target)


def slow_matrix(prediction, target, classes):
    pairs = list(zip(target.flatten().tolist(), prediction.flatten().tolist(), strict=True))
    return [[pairs.count((t, p)) for p in range(classes)] for t in range(classes)]


def network(classes=3):
    """Return a network without BatchNorm whose logits are half the size of its input."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, classes, 3, 1, 1)).eval()


def data():
    """Return six images of 16 x 24 and their targets, of another size."""
    _, targets = labels(6, 9, 14, classes=3)
    return torch.rand(6, 3, 16, 24), targets


def test_matrix_and_mean_iou_equal_slow_loops_rows_are_truth_and_absent_classes_are_left_out():
    prediction, target = labels(2, 15, 20)
    for dtype in (torch.int64, torch.uint8):                     # classes 4 and 5 occur nowhere
        matrix = confusion_matrix(prediction.to(dtype), target.to(dtype), 6)
        assert matrix.dtype == torch.int64 and matrix.tolist() == slow_matrix(prediction, target, 6)
    pairs = torch.stack([prediction, target])[:, target != 255].T.tolist()
    slow = [pairs.count([k, k]) / sum(k in pair for pair in pairs) for k in range(4)]
    miou, iou = mean_iou(matrix)
    assert iou.tolist() == pytest.approx([*slow, ABSENT, ABSENT], nan_ok=True, abs=1e-6)
    assert miou.item() == pytest.approx(sum(slow) / 4, abs=1e-6)
    ignored = confusion_matrix(torch.tensor([2, 7, -1]), torch.tensor([0, 9, 9]), 3, ignore_index=9)
    assert ignored.sum() == ignored[0, 2] == 1                   # predicted as anything


@pytest.mark.parametrize(("prediction", "target", "message"), [
    ([0, 3], [0, 1], r"prediction values 0\.\.3, not 0"), ([0, -1], [0, 1], "prediction values"),
    ([0, 1], [0, 3], "target values"), ([-1, 0], [-1, 0], r"target values -1\.\.0, not 0\.\.2"),
    ([0, 1], [0], "same shape")])
def test_values_and_shapes_that_do_not_fit_are_refused(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(prediction), torch.tensor(target), 3)


def test_logits_are_resized_not_classes_and_between_pixel_centres():
    # Two columns become eight, whose centres lie at -0.375, -0.125, 0.125, ... of the two. Class 1
    # overtakes class 0 at a quarter of the way, so in the fourth column of eight.
    logits = torch.tensor([[0.25, 0.25], [0.0, 1.0]]).view(1, 2, 1, 2)
    assert predict(lambda images: logits, torch.zeros(1, 3, 1, 2), (1, 8)).tolist() == [
        [[0, 0, 0, 1, 1, 1, 1, 1]]]


def test_the_hand_computed_example_and_outputs_beyond_the_classes_count_as_wrong():
    #   truth 0 0 1 1 void        IoU_0 = 1 / 2, IoU_1 = 1 / 3, IoU_2 = 0 / 1, IoU_3 = 0 / 0; two of
    #   guess 0 1 1 2 0           four right. With two classes, output 2 is beyond them.
    logits = nn.functional.one_hot(torch.tensor([[[0, 1, 1, 2, 0]]]), 4).permute(0, 3, 1, 2).float()
    batches = [(logits, torch.tensor([[[0, 0, 1, 1, 255]]]))]   # the images are the logits
    for K, miou in ((4, 5 / 18), (2, 5 / 12)):
        result = evaluate(nn.Identity(), batches, K, device="cpu")
        assert result["iou"].tolist() == pytest.approx([1 / 2, 1 / 3, 0, ABSENT][:K], nan_ok=True)
        assert (result["miou"], result["pixel_accuracy"]) == pytest.approx((miou, 2 / 4))
        assert result["matrix"][:2, :2].tolist() == [[1, 1], [0, 1]] and len(result["matrix"]) == K
    assert mean_iou(torch.zeros(3, 3))[0].isnan()


def test_the_score_depends_neither_on_batches_nor_on_bytes_and_targets_keep_their_size():
    images, targets = data()
    whole, model = (255 * images).byte(), network()
    expected = slow_matrix(predict(model, whole / 255, (9, 14)), targets, 3)
    for x, size in ((whole, 1), (whole / 255, 4), (whole, 6)):
        batches = zip(x.split(size), targets.split(size), strict=True)
        assert evaluate(model.train(), batches, 3)["matrix"].tolist() == expected
    assert not model.training


def test_labels_outside_the_classes_are_refused_also_if_the_network_has_more_outputs():
    for value in (3, -1):
        with pytest.raises(ValueError, match=rf"target values .*{value}, not 0\.\.2"):
            evaluate(network(5), [(torch.rand(1, 3, 8, 8), torch.full((1, 8, 8), value))], 3)


class Named(nn.Module):
    """What torchvision's segmentation networks return."""

    def forward(self, logits):
        return {"out": logits, "aux": -logits}


def test_a_reference_is_used_instead_of_the_targets():
    (images, targets), model, other = data(), network(), network()
    guess, truth = predict(model, images, (9, 14)), predict(other, images, (9, 14))
    void = torch.where(targets == 255, 255, 77)                  # the 77 are not read
    assert evaluate(model, [(images, void)], 3, reference=other)["matrix"].tolist() == slow_matrix(
        guess, torch.where(targets == 255, 255, truth), 3)
    full = slow_matrix(predict(model, images, (16, 24)), predict(other, images, (16, 24)), 3)
    assert evaluate(model, [(images, None)], 3, reference=other)["matrix"].tolist() == full
    # ignore_index is a value of the targets; what the reference predicts is not left out.
    ones = torch.ones(len(images), 16, 24, dtype=torch.uint8)
    for ignored in (0, 2):
        found = evaluate(model, [(images, ones)], 3, reference=other, ignore_index=ignored)
        assert found["matrix"].tolist() == full
    named = nn.Sequential(model, Named())
    assert evaluate(named, [(images, None)], 3, reference=other)["matrix"].tolist() == full
    beyond = evaluate(other, [(images, None)], 1, reference=other)    # both: class 1 or 2, of 1
    assert beyond["pixel_accuracy"] == (predict(other, images, (16, 24)) == 0).float().mean()
    other.insert(1, nn.BatchNorm2d(8))
    evaluate(model, [(images, targets)], 3, reference=other.train())
    assert not other.training and not other[1].running_mean.any()


def test_the_report_has_one_line_per_class_and_a_dash_for_an_absent_one():
    result = {"iou": torch.tensor([0.5, ABSENT], dtype=torch.double), "miou": 0.5,
              "pixel_accuracy": 0.754}
    lines = report({"teacher": result, "student": result}, ["road", "banana"]).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "IoU % teacher student", "road 50.0 50.0", "banana - -", "mean IoU 50.0 50.0",
        "pixel accuracy 75.4 75.4"]
    assert len({len(line) for line in lines}) == 1                               # aligned


@pytest.fixture
def photos(tmp_path):
    """Return a folder of two pictures and a file that is none."""
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (50, 40)), ("deeper/b.png", (31, 64))):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        write(tmp_path / "photos" / name, small.resize(size, Image.BICUBIC))
    (tmp_path / "photos" / "broken.png").write_text("not an image")
    return tmp_path / "photos"


def test_voc_is_scored_at_each_images_own_resolution(voc_tree, tmp_path, monkeypatch, capsys):
    # Images of 80x48 and 96x120 pixels, seen at 160x96 and 96x120: of both together 256 pixels are
    # void, 1024 person (all found), 14080 background, of which 512 are taken for a person.
    model = nearest_colour(VOC, 0, 13, 15)
    monkeypatch.setattr("support.checkpoint.load_model", lambda path, *_: model)
    metrics = main(["--checkpoint", "any.pt", "--device", "cpu", "--dataset", "voc", "--data-root",
                    str(voc_tree), "--image-size", "96", "96", "--out", str(tmp_path / "m.json")])
    expected = {"background": 13568 / 14080, "person": 1024 / 1536}
    assert metrics["iou"] == {**dict.fromkeys(VOC), **expected}
    assert metrics["miou"] == pytest.approx(sum(expected.values()) / 2)
    assert metrics["pixel_accuracy"] == pytest.approx((13568 + 1024) / 15104)
    written = json.loads((tmp_path / "m.json").read_text())
    assert written["iou"] == metrics["iou"] and written["config"]["dataset"] == "voc"
    assert f"mean IoU {100 * metrics['miou']:22.1f}" in capsys.readouterr().out


def test_masks_keep_names_and_sizes_and_hold_classes_with_colours(photos, tmp_path, capsys):
    out = tmp_path / "masks"
    torch.manual_seed(0)
    model = build_model("resnet_tiny", 11, class_names=CAMVID, image_size=(32, 48)).eval()
    nn.init.normal_(model.net.head.weight)        # untrained, it would call every pixel the same
    save_model(model, tmp_path / "m.pt")
    words = ["--checkpoint", str(tmp_path / "m.pt"), "--images", str(photos), "--device", "cpu"]
    assert main([*words, "--out", str(out)]) == {"masks": 2}
    assert "skipped" in (said := capsys.readouterr().out) and "broken.png" in said
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*")) == [
        "a.png", "deeper/b.png"]
    written = Image.open(out / "deeper" / "b.png")
    assert written.mode == "P" and Image.open(out / "a.png").size == (50, 40)
    assert written.getpalette()[:33] == [c for rgb in class_colours(CAMVID) for c in rgb]
    # b.png is 31 x 64: it covers 32 x 48 at 48 x 99, and its classes are found there.
    photo = Image.open(photos / "deeper" / "b.png")
    image = torch.from_numpy(np.array(photo.resize((48, 99), Image.BILINEAR))).permute(2, 0, 1)
    with torch.no_grad():
        expected = predict(model, image[None] / 255, (64, 31))[0].numpy()
    assert len(np.unique(expected)) >= 2 and (np.asarray(written) == expected).all()


def test_two_images_of_one_name_get_two_masks_and_unnamed_classes_get_colours(photos, tmp_path):
    Image.new("RGB", (20, 30), "white").save(photos / "a.png")
    out = tmp_path / "masks"
    for model in (network(), wrap(network()), wrap(network(), 2)):               # 2 of 3 named
        assert write_masks(model, photos, out, (32, 48), "cpu") == 3
        written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
        assert written == ["a.jpg.png", "a.png.png", "deeper/b.png.png"]
        colours = Image.open(out / "a.jpg.png").getpalette()
        assert colours[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]                    # VOC's


def test_what_is_missing_on_the_command_line_and_labels_that_do_not_fit_are_named(
        photos, tmp_path):
    save_model(build_model("resnet_tiny", 2), tmp_path / "m.pt")
    data = folder(tmp_path / "data", coordinates(8, 8), 255 * mask([0, 1] * 4).repeat(8, axis=0))
    model, sized = f"--checkpoint {tmp_path}/m.pt", "--image-size 32 48"
    for words, message in (
            (f"{model} --images {photos}", "m.pt does not say its image size; give --image-size"),
            (f"{model} {sized} --images {photos}", "--out is missing"),
            (f"{model} {sized} --images {photos} --out {photos}/masks", "in the folder of the im"),
            (f"{model} {sized} --images {photos} --out {photos}", "in the folder of the images"),
            (f"{model} {sized} --dataset folder --data-root {data}", "saved as 0 and 255")):
        with pytest.raises(ValueError, match=message):
            main(words.split())
