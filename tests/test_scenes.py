"""Drawn scenes: exact labels, pictures that depend on their arguments alone, complete folders."""
import hashlib
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from support import scenes


@pytest.mark.parametrize("x", [-1.5, 0.2, 1.5])      # left of the camera, in front of it, right
@pytest.mark.parametrize("y", [(0, 0.8), (0, 3)])    # lower and higher than the camera
def test_a_box_has_the_pixels_whose_rays_hit_it_and_the_shade_of_the_face_they_hit(x, y):
    c, paint = scenes.Canvas((24, 36), random.Random(0)), np.array((200.0, 150, 100))
    c.box((x, 0.6), y, (3, 4), paint, scenes.CAR)
    eye, low, high = np.array((0, c.height, 0)), (x - 0.6, y[0], 3), (x + 0.6, y[1], 7)
    expected = np.zeros((72, 108, 4), int)                        # colour and label
    for row, column in np.ndindex(72, 108):
        ray = (column - c.middle, c.horizon - row, c.focal)
        enter, leave = np.sort([(low - eye) / ray, (high - eye) / ray], axis=0)    # by axis
        if enter.max() < leave.min():
            tone = (0.7, 1, 0.85)[enter.argmax()]                 # of a side, the top, the front
            colour = (tone * paint * 49 + c.haze) / 50            # in 3 m, 1/50 of haze
            expected[row, column] = *colour.astype(int), scenes.CAR
    drawn = np.dstack([c.image, c.label])
    inside = np.all([(expected == np.roll(expected, (i - 1, j - 1), (0, 1))).all(2)
                     for i, j in np.ndindex(3, 3)], axis=0)       # but for pixels at an edge
    assert (drawn == expected)[inside].all()


def test_each_shape_has_the_same_pixels_in_the_image_and_in_the_label_map():
    c = scenes.Canvas((40, 60), random.Random(0))
    c.haze = np.zeros(3)
    c.ball(0.3, 1.5, 6, 1.2, np.array((0, 250.0, 0)), scenes.TREE)
    c.box((0.5, 1), (0, 1), (4, 2), np.array((250.0, 0, 0)), scenes.CAR)
    red, green, _ = np.moveaxis(np.asarray(c.image), 2, 0)
    for channel, class_index in ((red, scenes.CAR), (green, scenes.TREE)):
        assert ((channel > 0) == (np.asarray(c.label) == class_index)).all() and channel.any()


def digest(seed, split, index):
    """Return a digest of a street scene, or of a pool image for split "pool"."""
    pictures = (scenes.pool_image(seed, index)[:1] if split == "pool"
                else scenes.street_scene(seed, split, index))
    return hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest()


def test_a_picture_depends_on_its_arguments_alone_also_in_another_process():
    arguments = [(3, "train", 5), (4, "train", 5), (3, "val", 5), (3, "train", 6),
                 (3, "pool", 5), (4, "pool", 5), (3, "pool", 6)]
    first = [digest(*each) for each in arguments]
    assert len(set(first)) == len(arguments)
    random.seed(0)
    np.random.seed(0)
    assert [digest(*each) for each in reversed(arguments)] == first[::-1]
    code = f"from test_scenes import digest; print(*[digest(*each) for each in {arguments}])"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             check=True, env={**os.environ, "PYTHONPATH": path})
    assert printed.stdout.split() == first


def test_every_class_has_half_a_percent_of_the_pixels():
    labels = np.stack([np.asarray(scenes.street_scene(0, "train", i)[1]) for i in range(30)])
    shares = np.bincount(labels.ravel()) / labels.size
    assert len(shares) == len(scenes.CLASSES) == len(scenes.PALETTE) == 8
    assert shares.min() > 0.005, dict(zip(scenes.CLASSES, shares.round(4), strict=True))


@pytest.mark.parametrize("size", [(48, 64), (65, 97)])
def test_pictures_have_the_size_and_the_modes_asked_for(size):
    image, label = scenes.street_scene(0, "val", 2, size)
    assert image.mode == "RGB" and label.mode == "L"
    assert {image.size, label.size, scenes.pool_image(0, 0, size)[0].size} == {size[::-1]}


def test_the_label_of_a_pixel_is_the_class_at_its_centre():
    c = scenes.Canvas((24, 36), random.Random("0 val 2"))
    scenes.street(c)
    label = np.asarray(scenes.street_scene(0, "val", 2, (24, 36))[1])
    assert (label == np.asarray(c.label)[1::3, 1::3]).all()


def test_a_larger_scene_shows_the_same_street():
    small = np.asarray(scenes.street_scene(0, "val", 2, (48, 72))[1])
    large = scenes.street_scene(0, "val", 2, (96, 144))[1].resize((72, 48), Image.NEAREST)
    assert (small == np.asarray(large)).mean() > 0.9              # all but thin poles and edges


def test_a_minority_of_the_pool_shows_streets():
    kinds = Counter(scenes.pool_image(0, i, (24, 36))[1] for i in range(150))
    assert set(kinds) == {*scenes.POOL_STREETS, *scenes.UNRELATED}
    assert 0.15 < sum(kinds[kind] for kind in scenes.POOL_STREETS) / 150 < 0.3


def test_files_are_laid_out_as_promised_and_an_interrupted_run_is_redone(tmp_path, monkeypatch):
    def stop_early(indices, name):
        yield 0
        raise KeyboardInterrupt
    sizes = {"size": (24, 36), "train": 3, "val": 2, "pool": 4}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scenes, "progress", stop_early)
        scenes.write_scenes(tmp_path, **sizes)
    assert not (tmp_path / "complete").exists()

    scenes.write_scenes(tmp_path, **sizes)
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {"complete", "pool_kinds.csv", *(f"pool/{i:04d}.png" for i in range(4)),
                     *(f"{split}/{folder}/{i:04d}.png" for folder in ("images", "labels")
                       for split, count in (("train", 3), ("val", 2)) for i in range(count))}
    for folder, drawn in zip(("images", "labels"), scenes.street_scene(0, "train", 1, (24, 36)),
                             strict=True):
        assert Image.open(tmp_path / f"train/{folder}/0001.png").tobytes() == drawn.tobytes()
    rows = (tmp_path / "pool_kinds.csv").read_text().splitlines()
    assert rows == ["file,kind", *(f"{i:04d}.png,{scenes.pool_image(0, i, (24, 36))[1]}"
                                   for i in range(4))]

    (tmp_path / "pool/0000.png").unlink()
    scenes.write_scenes(tmp_path, **sizes)    # complete: returns at once, writes nothing
    assert not (tmp_path / "pool/0000.png").exists()
