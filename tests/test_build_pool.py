"""experiments.build_pool: the pool from folders laid out like the downloads."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from pictures import coordinates, write

from experiments.build_pool import main
from support.images import read_csv
from support.records import write_csv

RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture
def build(tmp_path):
    """Return a function that builds the pool in tmp_path from two data sets in small."""
    root = tmp_path / "downloads"
    colours = [[[128, 0, 0], [0, 0, 128]], [[0, 0, 0], [1, 2, 3]]]
    write(root / "labelmefacade/images/street.jpg", coordinates(80, 60))
    write(root / "labelmefacade/labels/street.png",
          Image.fromarray(np.uint8(colours).repeat(30, 0).repeat(40, 1)))
    write(root / "imagenet-sample-images/n1_tench.JPEG", coordinates(30, 20))
    write_csv(tmp_path / "list.csv", ("file", "data set", "name there", "width", "height"), [
        ("train/images/0.jpg", "labelmefacade", "images/street.jpg", 40, 30),
        ("train/labels/0.png", "labelmefacade", "labels/street.png", 40, 30),
        ("imagenet/0.jpg", "imagenet-sample-images", "n1_tench.JPEG", 30, 20)])
    return lambda: main(["--list", f"{tmp_path}/list.csv", "--out", f"{tmp_path}/pool",
                         "--downloads", str(root)])


def test_photos_are_reduced_and_labels_become_index_masks(build, tmp_path, capsys):
    build()
    image = Image.open(tmp_path / "pool/train/images/0.jpg")
    assert image.size == (40, 30) and JpegImagePlugin.get_sampling(image) == 2         # 4:2:0
    assert list(image.quantization[0][:6]) == [5, 3, 3, 5, 7, 12]                      # 85
    # Red was x: the left half of the picture is darker than the right one by 40.
    red = np.asarray(image)[..., 0].astype(float)
    assert abs(red[:, 20:].mean() - red[:, :20].mean() - 40) < 2
    label = np.asarray(Image.open(tmp_path / "pool/train/labels/0.png"))
    assert label[::15, ::20].tolist() == [[0, 7], [255, 255]]
    assert (tmp_path / "pool/classes.txt").read_text().split()[::7] == ["building", "window"]
    assert Image.open(tmp_path / "pool/imagenet/0.jpg").size == (30, 20)
    assert "3 files written below" in capsys.readouterr().out


def test_a_missing_download_is_named_before_anything_is_written(build, tmp_path):
    (tmp_path / "downloads/imagenet-sample-images/n1_tench.JPEG").unlink()
    with pytest.raises(ValueError, match="1 of 3 files are missing .* first is .*/n1_tench.JPEG"):
        build()
    assert not (tmp_path / "pool").exists()


def test_another_image_of_the_same_name_is_noticed(build, tmp_path):
    write(tmp_path / "downloads/labelmefacade/images/street.jpg", coordinates(60, 80))
    with pytest.raises(ValueError, match="60x80 pixels, which is not the aspect ratio of 40x30"):
        build()


def test_the_lists_have_no_file_twice_and_the_sizes_that_the_page_prints():
    rows = read_csv(RESULTS / "pool.csv")[1:]
    assert len({row[0] for row in rows}) == len({(row[1], row[2]) for row in rows}) == 2800
    assert max(min(int(w), int(h)) for *_, w, h in rows) == 224
    rows = read_csv(RESULTS / "facade.csv")[1:]
    assert Counter(str(Path(row[0]).parent) for row in rows) == {
        "train/images": 600, "train/labels": 600, "val/images": 172, "val/labels": 172}
