"""data.py: the pool as it is scored, views of the promised geometry, batches as pure functions."""

import itertools

import numpy as np
import pytest
import torch
from conftest import with_random_statistics
from pictures import coordinates, mask, write
from PIL import Image
from torch.utils.data import DataLoader

from models import build_model
from support import data
from support.data import Batches, Pool, Views, open_pool
from support.images import colour_matcher, resized_crop, to_tensor
from support.labelled import open_labelled

SIZE = (20, 30)


@pytest.fixture
def files(tmp_path):
    """Return seven pictures of one size that encode coordinates."""
    return [write(tmp_path / f"{i}.png", coordinates(240, 160, blue=i)) for i in range(7)]


@pytest.fixture
def plain(monkeypatch):
    """Leave brightness and contrast as they are."""
    monkeypatch.setattr(data, "JITTER", 0)


def test_the_pool_gives_centre_views_and_says_what_cannot_be_read(files, tmp_path):
    (tmp_path / "bad.png").write_text("not an image")
    pool = Pool([tmp_path / "bad.png", files[3]], SIZE)
    (i, blank, broken), (j, image, readable) = pool[0], pool[1]
    assert len(pool) == 2 and (i, j, broken, readable) == (0, 1, False, True)
    assert torch.equal(image, to_tensor(resized_crop(coordinates(240, 160, blue=3), SIZE)))
    assert blank.shape == (3, *SIZE) and blank.dtype == torch.uint8 and not blank.any()
    with pytest.raises(ValueError, match="bad.png: Unidentified"):
        pool.view(0)


def test_a_pool_is_a_folder_or_a_list_in_the_teachers_colours_if_asked(files, tmp_path):
    teacher = with_random_statistics(build_model("resnet_tiny", 3))
    assert open_pool(tmp_path, teacher, SIZE).files == files
    pool = open_pool(files[::-1], teacher, SIZE)
    assert pool.files == files[::-1] and pool.transform is None
    matched = open_pool(files, teacher, SIZE, match_colours=True).view(2)
    picture = colour_matcher(teacher, SIZE)(coordinates(240, 160, blue=2))
    assert torch.equal(matched, to_tensor(resized_crop(picture, SIZE)))


def test_a_view_depends_on_seed_index_and_number_alone(files):
    views, again = Views(files, SIZE, 3), Views(files, SIZE, 3)
    others = [views[0, 0], views[1, 0], views[0, 1], views[0, 1000], Views(files, SIZE, 4)[0, 0]]
    assert others[0].shape == (3, *SIZE) and others[0].dtype == torch.uint8
    assert torch.equal(again[0, 0], others[0]) and torch.equal(again[1, 0], others[1])
    assert not any(torch.equal(a[:2], b[:2]) for a, b in itertools.combinations(others, 2))


def test_two_lists_of_files_get_the_same_views_and_a_transform_changes_the_pictures_alone(
        files, plain):
    ours, others = Views(files, SIZE, 0)[2, 5].int(), Views(files[::-1], SIZE, 0)[2, 5].int()
    assert torch.equal(ours[:2], others[:2]) and (others[2] - ours[2] == 2).all()
    brighter = Views(files, SIZE, 0, lambda picture: picture.point(lambda value: value + 10))
    assert (brighter[2, 5] - ours == 10).all()


def test_crops_have_the_promised_scales_and_places_and_half_of_them_are_flipped(files, plain):
    views = Views(files, SIZE, seed=0)
    images = torch.stack([views[0, number] for number in range(200)]).float()
    slope = (images[:, 0, 10, -2] - images[:, 0, 10, 1]) / 27 * 30               # the crop's width
    flipped = slope < 0
    assert 0.4 < flipped.float().mean() < 0.6
    widths = slope.abs()                       # the largest crop is the whole picture, 240 x 160
    assert 240 / 1.6 - 2 < widths.min() < 155 and 232 < widths.max() < 242
    assert widths.median() == pytest.approx(240 / 1.6 ** 0.5, abs=8)
    left = torch.where(flipped, images[:, 0, 10, -1], images[:, 0, 10, 0])
    assert left.min() < 5 and (left + widths).max() > 235
    part, top = widths < 200, images[:, 1, 0, 15]
    places = torch.stack([left / (240 - widths), top / (160 - widths / 1.5)])[:, part]     # u, v
    assert ((places.mean(dim=1) - 0.5).abs() < 0.1).all()
    assert torch.corrcoef(places)[0, 1].abs() < 0.3


def test_brightness_and_contrast_change_by_up_to_a_fifth(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_SCALE", 1)
    stripes = np.tile(mask([80, 120]).repeat(15), (20, 1))
    views = Views([write(tmp_path / "a.png", Image.fromarray(stripes).convert("RGB"))], SIZE, 0)
    images = torch.stack([views[0, number] for number in range(300)]).float().flatten(1)
    low, high = images.min(dim=1).values, images.max(dim=1).values
    brightness, contrast = (low + high) / 200, (high - low) / (low + high) * 5
    for factor in (brightness, contrast):
        assert 0.77 < factor.min() < 0.82 and 1.18 < factor.max() < 1.23         # bytes are rounded
    assert torch.corrcoef(torch.stack([brightness, contrast]))[0, 1].abs() < 0.2


@pytest.mark.parametrize("side", [5, 12])                        # as it is; reduced when it is read
def test_labels_follow_their_images_through_crop_and_flip(tmp_path, plain, side):
    blocks = np.random.default_rng(0).choice([0, 2, 5, 9], (8, 12)).astype(np.uint8)
    labels = blocks.repeat(side, 0).repeat(side, 1)
    exif = Image.Exif()
    exif[0x0112] = 3                           # a label belongs to the pixels as they are stored
    write(tmp_path / "images" / "a.png", Image.fromarray(25 * labels).convert("RGB"), exif=exif)
    write(tmp_path / "labels" / "a.png", labels)
    labelled = open_labelled("folder", tmp_path, "val", (8 * side, 12 * side), 10)
    assert torch.equal(labelled[0][0][0], 25 * labelled[0][1])
    views = Views(labelled.images, (32, 48), seed=0, labelled=labelled)
    images, _, targets = Batches(views, 20)[0]
    assert targets.shape == (20, 32, 48) and targets.dtype == torch.int64
    assert targets.unique().tolist() == [0, 2, 5, 9]                             # never blended
    shown = images[:, 0].float() / 25                                            # (20, 32, 48)
    for wanted, least, most in ((targets, 0.85, 1), (targets.flip(2), 0, 0.7)):
        share = ((shown - wanted).abs() < 2.5).float().mean((1, 2))              # of the pixels
        assert share.min() >= least and share.max() <= most
    half = Views(labelled.images, (32, 48), 0, labelled=labelled, label_size=(16, 24))
    assert (half[0, 0][1] == targets[0, 1::2, 1::2]).float().mean() > 0.8
    picture, kept = views.sources[0]                             # no larger than the crops need
    assert picture.size == kept.size == ((60, 40) if side == 5 else (77, 51))


def test_pictures_are_kept_up_to_a_limit_and_change_nothing(files, monkeypatch):
    monkeypatch.setattr(data, "SOURCES", 2 * 4 * 240 * 160)
    views = Views(files, (100, 150), 0)                          # of 240 x 160 pixels: not reduced
    kept = [views[index, 0] for index in range(7)]
    assert list(views.sources) == [0, 1] and views.sources[0][0].size == (240, 160)
    assert all(torch.equal(views[index, 0], kept[index]) for index in range(7))


def test_every_file_is_used_once_before_any_is_used_again_each_time_with_its_next_view(files):
    batches = Batches(Views(files, SIZE, 0), 3)
    keys = sum((batches.keys(t) for t in range(7)), [])                          # three epochs
    epochs = [keys[7 * e:7 * e + 7] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [[(i, e) for i in range(7)] for e in range(3)]
    assert len({tuple(i for i, _ in epoch) for epoch in epochs}) == 3            # in other orders


def test_a_batch_holds_the_views_of_its_keys_for_any_seed_and_number_of_workers(files):
    for seed, workers in ((4, 0), (3, 2)):
        views = Views(files, SIZE, seed)
        batches = Batches(views, 3)
        loader = DataLoader(batches, None, sampler=[2, 0, 3], num_workers=workers)
        for t, (images, index, third) in zip([2, 0, 3], loader, strict=True):
            keys = batches.keys(t)
            assert torch.equal(images, torch.stack([views[key] for key in keys]))
            assert index.tolist() == [i for i, _ in keys] and third is None
    assert batches.keys(0) != Batches(Views(files, SIZE, 4), 3).keys(0)
