"""experiments.build_pool: the pool from folders laid out like the downloads."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from pictures import coordinates, write

from experiments.build_pool import main
from support.records import read_csv, write_csv

RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture
def downloads(tmp_path):
    """Write two data sets and a list of what to make of them; return their folder."""
    root = tmp_path / "downloads"
    write(root / "labelmefacade" / "images" / "street.jpg", coordinates(80, 60))
    write(root / "labelmefacade" / "labels" / "street.png",
          Image.fromarray(np.uint8([[[128, 0, 0], [0, 0, 128]], [[0, 0, 0], [1, 2, 3]]])
                          .repeat(30, 0).repeat(40, 1)))
    write(root / "imagenet-sample-images" / "n1_tench.JPEG", coordinates(30, 20))
    write_csv(tmp_path / "list.csv", ("file", "data set", "name there", "width", "height"), [
        ("train/images/0.jpg", "labelmefacade", "images/street.jpg", 40, 30),
        ("train/labels/0.png", "labelmefacade", "labels/street.png", 40, 30),
        ("imagenet/0.jpg", "imagenet-sample-images", "n1_tench.JPEG", 30, 20)])
    return root


def run(downloads, *words):
    return main(["--list", str(downloads.parent / "list.csv"), "--out",
                 str(downloads.parent / "pool"), *words])


def test_photographs_are_reduced_and_labels_become_class_numbers(downloads, capsys):
    run(downloads, "--downloads", str(downloads), "--quality", "85")
    pool = downloads.parent / "pool"
    image = Image.open(pool / "train/images/0.jpg")
    assert image.size == (40, 30) and JpegImagePlugin.get_sampling(image) == 2         # 4:2:0
    assert list(image.quantization[0][:6]) == [5, 3, 3, 5, 7, 12]                      # 85
    # Red was x: the left half of the picture is darker than the right one by 40.
    red = np.asarray(image)[..., 0].astype(float)
    assert abs(red[:, 20:].mean() - red[:, :20].mean() - 40) < 2
    label = np.asarray(Image.open(pool / "train/labels/0.png"))
    assert label[::15, ::20].tolist() == [[0, 7], [255, 255]]
    assert (pool / "classes.txt").read_text().split()[::7] == ["building", "window"]
    assert Image.open(pool / "imagenet/0.jpg").size == (30, 20)
    assert "3 files written below" in capsys.readouterr().out


def test_missing_downloads_are_named_before_anything_is_written(downloads):
    (downloads / "imagenet-sample-images" / "n1_tench.JPEG").unlink()
    with pytest.raises(ValueError, match="1 of 3 files are missing; the first is "
                                         ".*n1_tench.JPEG"):
        run(downloads, "--downloads", str(downloads))
    assert not (downloads.parent / "pool").exists()


def test_another_image_of_the_same_name_is_noticed(downloads):
    write(downloads / "labelmefacade" / "images" / "street.jpg", coordinates(60, 80))
    with pytest.raises(ValueError, match="has 60x80 pixels, not the shape of 40x30"):
        run(downloads, "--downloads", str(downloads))


def test_the_lists_hold_what_the_results_say():
    rows = read_csv(RESULTS / "pool.csv")[1:]
    assert Counter(Path(row[0]).parent.name for row in rows) == {
        "street": 500, "photos": 700, "imagenet": 800, "berkeley": 300, "nature": 500}
    assert len({row[0] for row in rows}) == len({(row[1], row[2]) for row in rows}) == 2800
    assert max(min(int(w), int(h)) for *_, w, h in rows) == 224
    rows = read_csv(RESULTS / "facade.csv")[1:]
    assert Counter(str(Path(row[0]).parent) for row in rows) == {
        "train/images": 600, "train/labels": 600, "val/images": 172, "val/labels": 172}
