"""Drawn scenes: exact labels, pictures that depend on their arguments alone, complete folders."""
import hashlib
import random
import subprocess
import sys

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
    inside = np.all([(expected == np.roll(expected, (i - 1, j - 1), (0, 1))).all(2)
                     for i, j in np.ndindex(3, 3)], axis=0)       # but for pixels at an edge
    assert (np.dstack([c.image, c.label]) == expected)[inside].all()
    c.ball(0.3, 1.5, 2, 0.5, np.array((0, 250.0, 0)), scenes.TREE)
    green = np.asarray(c.image)[..., 1] > 1.1 * np.asarray(c.image)[..., 0]
    assert (green == (np.asarray(c.label) == scenes.TREE)).all() and green.any()


KEYS = [(3, "train", 5), (4, "train", 5), (3, "val", 5), (3, "train", 6), (3, 5), (4, 5), (3, 6)]


def digest(key):
    """Return a hash of the pixels of a street, or of an image of the pool."""
    image = scenes.pool_image(*key)[0] if len(key) == 2 else scenes.street_scene(*key)[0]
    return hashlib.sha256(image.tobytes()).hexdigest()


def test_a_picture_depends_on_its_arguments_alone_also_in_another_process():
    here = [digest(key) for key in KEYS[::-1]][::-1]
    code = "from tests.test_scenes import KEYS, digest; print(*map(digest, KEYS))"
    there = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert there == here and len(set(there)) == len(KEYS)


def test_every_class_has_half_a_percent_of_the_pixels_and_a_minority_of_the_pool_are_streets():
    labels = np.stack([scenes.street_scene(0, "train", i)[1] for i in range(30)])
    shares = np.bincount(labels.ravel()) / labels.size
    assert len(shares) == len(scenes.CLASSES) == len(scenes.PALETTE) == 8 and shares.min() > 0.005
    kinds = [scenes.pool_image(0, i, (24, 36))[1] for i in range(150)]
    assert set(kinds) == {*scenes.POOL_STREETS, *scenes.UNRELATED}
    assert 0.15 < sum(kind in scenes.POOL_STREETS for kind in kinds) / 150 < 0.3


def test_a_scene_of_any_size_shows_the_same_street_and_has_the_label_at_each_pixels_centre():
    c = scenes.Canvas((48, 72), random.Random("0 val 2"))
    scenes.street(c)
    image, small = scenes.street_scene(0, "val", 2, (48, 72))
    assert (np.asarray(small) == np.asarray(c.label)[1::3, 1::3]).all()
    assert image.mode == "RGB" and small.mode == "L"
    assert image.size == small.size == scenes.pool_image(0, 0, (48, 72))[0].size == (72, 48)
    large = scenes.street_scene(0, "val", 2, (96, 144))[1].resize((72, 48), Image.NEAREST)
    assert (np.asarray(small) == large).mean() > 0.9              # all but thin poles and edges


def test_files_are_laid_out_as_promised_and_an_interrupted_run_is_redone(tmp_path, monkeypatch):
    sizes = {"size": (24, 36), "train": 3, "val": 2, "pool": 4}
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(scenes, "progress", lambda indices, _: (1 // (i < 1) * i for i in indices))
        scenes.write_scenes(tmp_path, **sizes)
    scenes.write_scenes(tmp_path, **sizes)
    files = {f"pool/{i:04d}.png": scenes.pool_image(0, i, (24, 36))[0] for i in range(4)}
    for split, i in (("train", 0), ("train", 1), ("train", 2), ("val", 0), ("val", 1)):
        image, label = scenes.street_scene(0, split, i, (24, 36))
        files |= {f"{split}/images/{i:04d}.png": image, f"{split}/labels/{i:04d}.png": label}
    assert len(list(tmp_path.rglob("*.png"))) == len(files) == 14
    assert all(Image.open(tmp_path / name).tobytes() == image.tobytes()
               for name, image in files.items())
    (tmp_path / "pool/0000.png").unlink()
    scenes.write_scenes(tmp_path, **sizes)    # complete: returns at once, writes nothing
    assert not (tmp_path / "pool/0000.png").exists()
