"""The drawn scenes are pure functions of their arguments, exact in their labels and complete."""
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from support import scenes


def pixels(*arguments, **more):
    image, label = scenes.street_scene(*arguments, **more)
    return image.tobytes() + label.tobytes()


def test_a_scene_is_a_pure_function_of_its_arguments():
    first = pixels(3, "train", 5)
    np.random.seed(0)
    pixels(3, "val", 6)
    assert pixels(3, "train", 5) == first
    assert len({first, pixels(4, "train", 5), pixels(3, "val", 5), pixels(3, "train", 6)}) == 4


def test_a_wild_image_is_a_pure_function_of_its_arguments():
    def draw(seed, index):
        return scenes.wild_image(seed, index)[0].tobytes()
    assert draw(0, 9) == draw(0, 9)
    assert len({draw(0, 9), draw(1, 9), draw(0, 10)}) == 3


def test_every_class_appears_and_holds_half_a_percent_of_the_pixels():
    labels = np.stack([np.asarray(scenes.street_scene(0, "train", i)[1]) for i in range(30)])
    shares = np.bincount(labels.ravel(), minlength=8) / labels.size
    assert labels.max() == 7 and len(shares) == len(scenes.CLASSES) == len(scenes.PALETTE) == 8
    assert shares.min() > 0.005, dict(zip(scenes.CLASSES, shares.round(4), strict=True))


def test_one_call_draws_the_same_pixels_into_image_and_label():
    c = scenes.Canvas((40, 60), np.random.default_rng(0))
    c.oval(0.75, 0.5, 0.3, 0.4, (255, 0, 0), scenes.CAR)
    c.draw([(0.1, 0.1), (0.4, 0.2), (0.2, 0.8)], (255, 0, 0), scenes.CAR)
    red = np.asarray(c.image.reduce(scenes.SUPERSAMPLE))[..., 0]
    is_car = np.asarray(c.develop(0)[1]) == scenes.CAR
    assert is_car[red == 255].all() and not is_car[red == 0].any() and is_car.any()


@pytest.mark.parametrize("size", [(48, 64), (96, 128), (65, 97)])
def test_other_sizes_show_the_same_scene(size):
    image, label = scenes.street_scene(0, "val", 2, size)
    assert image.mode == "RGB" and label.mode == "L"
    assert image.size == label.size == size[::-1]
    for i in range(20):
        assert scenes.wild_image(0, i, size)[0].size == size[::-1]
    # A coarse view of a large scene is the small scene, but for grain and thin poles.
    small = np.asarray(scenes.street_scene(0, "val", 2, (48, 72))[1])
    large = scenes.street_scene(0, "val", 2, (96, 144))[1].resize((72, 48), Image.NEAREST)
    assert (small == np.asarray(large)).mean() > 0.9


def test_the_pool_has_nine_kinds_and_the_related_ones_are_a_minority():
    kinds = Counter(scenes.wild_image(0, i, (24, 36))[1] for i in range(500))
    assert set(kinds) == {*scenes.UNRELATED, *scenes.RELATED} and len(kinds) == 9
    assert 0.15 < sum(kinds[kind] for kind in scenes.RELATED) / 500 < 0.30


def test_files_are_laid_out_as_promised_and_an_interrupted_writing_is_redone(tmp_path, monkeypatch):
    def stop_early(pictures, name, total):
        assert total == 9
        yield next(pictures)
        raise KeyboardInterrupt
    sizes = {"size": (24, 36), "train": 3, "val": 2, "pool": 4}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scenes, "progress", stop_early)
        scenes.write_scenes(tmp_path, **sizes)
    assert not (tmp_path / "complete").exists()

    scenes.write_scenes(tmp_path, **sizes)
    files = {str(p.relative_to(tmp_path).as_posix()) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {"complete", "pool_kinds.csv", *(f"pool/{i:04d}.png" for i in range(4)),
                     *(f"{split}/{folder}/{i:04d}.png" for folder in ("images", "labels")
                       for split, count in (("train", 3), ("val", 2)) for i in range(count))}
    label = np.asarray(Image.open(tmp_path / "train/labels/0001.png"))
    assert (label == np.asarray(scenes.street_scene(0, "train", 1, (24, 36))[1])).all()
    rows = (tmp_path / "pool_kinds.csv").read_text().splitlines()
    assert rows[0] == "file,kind"
    assert rows[3] == "0002.png," + scenes.wild_image(0, 2, (24, 36))[1]

    (tmp_path / "pool/0000.png").unlink()
    scenes.write_scenes(tmp_path, **sizes)    # complete: returns at once, writes nothing
    assert not (tmp_path / "pool/0000.png").exists()
