"""Views, batches and the answers that are kept: pure functions, right geometry, nothing lost."""

import copy
import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import coordinates, folder, mask, write
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import support.teacher_cache as program
from bn_stats import bn_layers
from models import build_model, wrap
from support.teacher_cache import Kept, answers_of, common_size, folded, keep, resized
from support.data import Batches, Views
from support.labelled import open_labelled


@pytest.fixture
def files(tmp_path):
    """Return seven pictures of one size that encode coordinates."""
    return [write(tmp_path / f"{i}.png", coordinates(240, 160, blue=i)) for i in range(7)]


def many(views, count, slot=0):
    """Return `count` views of one file, as float 0 to 255: (count, 3, H, W)."""
    return torch.stack([views[slot, number] for number in range(count)]).float()


# ---------------------------------------------------------------- views

def test_a_view_depends_on_seed_slot_and_number_alone(files):
    def make(seed=3, slot=0, number=0):
        return Views(files, (20, 30), seed)[slot, number]

    assert make().shape == (3, 20, 30) and make().dtype == torch.uint8
    assert torch.equal(make(), make())
    others = [make(), make(seed=4), make(slot=1), make(number=1), make(number=1000)]
    assert not any(torch.equal(a[:2], b[:2]) for a, b in itertools.combinations(others, 2))


def test_two_lists_of_files_get_the_same_views(files, tmp_path):
    others = [write(tmp_path / "other" / f"{i}.png", coordinates(240, 160, blue=200))
              for i in range(7)]
    ours, theirs = (Views(f, (20, 30), seed=0, jitter=0)[2, 5].int() for f in (files, others))
    assert torch.equal(ours[:2], theirs[:2]) and (theirs[2] - ours[2]).min() > 180


def test_crops_have_the_promised_scales_and_half_of_them_are_flipped(files):
    images = many(Views(files, (20, 30), seed=0, jitter=0), 200)
    slope = (images[:, 0, 10, -2] - images[:, 0, 10, 1]) / 27 * 30               # the crop's width
    flipped = slope < 0
    assert 0.4 < flipped.float().mean() < 0.6
    widths = slope.abs()                       # the largest crop is the whole picture, 240 x 160
    assert 240 / 1.6 - 2 < widths.min() < 155 and 232 < widths.max() < 242
    assert widths.median() == pytest.approx(240 / 1.6 ** 0.5, abs=8)
    left = torch.where(flipped, images[:, 0, 10, -1], images[:, 0, 10, 0])
    assert left.min() < 5 and (left + widths).max() > 235
    part, top = widths < 200, images[:, 1, 0, 15]
    u, v = (left / (240 - widths))[part], (top / (160 - widths / 1.5))[part]
    assert 0.4 < u.mean() < 0.6 > v.mean() > 0.4
    assert torch.corrcoef(torch.stack([u, v]))[0, 1].abs() < 0.3


def test_brightness_and_contrast_change_by_up_to_the_jitter(tmp_path):
    stripes = np.tile(mask([80, 120]).repeat(15), (20, 1))
    path = write(tmp_path / "a.png", Image.fromarray(stripes).convert("RGB"))
    images = many(Views([path], (20, 30), seed=0, max_scale=1, jitter=0.3), 300).flatten(1)
    low, high = images.min(dim=1).values, images.max(dim=1).values
    brightness, contrast = (low + high) / 200, (high - low) / (low + high) * 5
    for factor in (brightness, contrast):
        assert 0.66 < factor.min() < 0.73 and 1.27 < factor.max() < 1.34         # bytes are rounded
    assert torch.corrcoef(torch.stack([brightness, contrast]))[0, 1].abs() < 0.2


def test_labels_follow_their_images_through_crop_and_flip(tmp_path):
    blocks = np.random.default_rng(0).choice([0, 2, 5, 9], (8, 12)).astype(np.uint8)
    labels = blocks.repeat(12, 0).repeat(12, 1)                                  # 96 x 144 pixels
    folder(tmp_path, Image.fromarray(25 * labels).convert("RGB"), labels)
    data = open_labelled("folder", tmp_path, "val", (32, 48), 10)
    views = Views(data.images, (32, 48), seed=0, jitter=0, labelled=data)
    images, slots, targets = Batches(views, 20)[0]
    assert targets.shape == (20, 32, 48) and targets.dtype == torch.int64
    assert targets.unique().tolist() == [0, 2, 5, 9]                             # never blended
    shown = images[:, 0].float() / 25                                            # (20, 32, 48)
    for wanted, least, most in ((targets, 0.88, 1), (targets.flip(2), 0, 0.7)):
        share = ((shown - wanted).abs() < 2.5).float().mean((1, 2))              # of the pixels
        assert share.min() >= least and share.max() <= most


def test_crops_of_pictures_of_any_shape_hold_neither_padding_nor_new_labels(voc_tree):
    data = open_labelled("voc", voc_tree, "trainval", (40, 40), 21)
    for path in data.images:
        with Image.open(path) as picture:
            Image.new("RGB", picture.size, "white").save(path)
    views = Views(data.images, (40, 40), seed=0, jitter=0, labelled=data)
    images, _, targets = Batches(views, 40)[0]
    assert images.shape == (40, 3, 40, 40) and images.min() == 255
    assert set(targets.unique().tolist()) == {0, 15, 255}


def test_pictures_are_kept_no_larger_than_the_crops_need(tmp_path):
    folder(tmp_path, coordinates(240, 160).resize((900, 600)), np.zeros((600, 900), dtype=np.uint8))
    data = open_labelled("folder", tmp_path, "val", (20, 30), 1)
    image, labels = Views(data.images, (20, 30), seed=0, max_scale=2, labelled=data).source(0)
    assert image.size == labels.size == (60, 40)


def test_a_photograph_is_prepared_where_it_is_read(files):
    plain = Views(files, (20, 30), 0, jitter=0)[1, 2]
    turned = Views(files, (20, 30), 0, jitter=0, prepare=lambda image: image.point(lambda v: v // 2)
                   )[1, 2]
    assert (plain.int() // 2 - turned.int()).abs().max() <= 1


# ---------------------------------------------------------------- batches

def test_every_file_is_used_once_before_any_is_used_again_each_time_with_its_next_view(files):
    batches = Batches(Views(files, (20, 30), 0), 3)
    keys = sum((batches.keys(t) for t in range(7)), [])                          # three epochs
    epochs = [keys[7 * e:7 * e + 7] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [[(s, e) for s in range(7)] for e in range(3)]
    assert len({tuple(s for s, _ in epoch) for epoch in epochs}) == 3            # in other orders


def test_a_batch_depends_on_seed_and_number_alone_for_any_number_of_workers(files):
    expected = [Batches(Views(files, (20, 30), 3), 3)[t] for t in range(4)]
    for workers in (0, 2):
        batches = Batches(Views(files, (20, 30), 3), 3)
        loader = DataLoader(batches, None, sampler=[2, 0, 3, 1], num_workers=workers)
        for t, batch in zip([2, 0, 3, 1], loader, strict=True):
            assert all(map(torch.equal, batch[:2], expected[t][:2])) and batch[2] is None
    assert expected[0][0].shape == (3, 3, 20, 30) and expected[0][0].dtype == torch.uint8


# ---------------------------------------------------------------- answers

def teacher(scale=1):
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 3, scale, 1).eval()


def test_kept_answers_are_those_to_the_very_views_of_a_batch(files):
    ask = partial(answers_of, teacher(), like=(10, 15))
    kept = Kept(ask, Views(files, (20, 30), 0), 3, torch.device("cpu"), batch_size=4)
    batches, fresh = Batches(kept.views, 3, kept), Batches(Views(files, (20, 30), 0), 3)
    for t in range(7):                                                           # three epochs
        images, slots, answers = batches[t]
        assert torch.equal(images, fresh[t][0]) and torch.equal(slots, fresh[t][1])
        torch.testing.assert_close(answers.float(), ask(images / 255), rtol=1e-3, atol=1e-3)
    for t in range(7, 14):                                         # then the same views once more
        assert {view for _, view in batches.keys(t)} <= {0, 1, 2}


@pytest.mark.parametrize("limit", [0, 7 * 3 * 4 * 10 * 15 * 2, 2 ** 32])
def test_answers_that_do_not_fit_into_memory_go_to_a_file_and_views_are_cut_again(
        files, tmp_path, monkeypatch, limit):
    ask, views = partial(answers_of, teacher(), like=(10, 15)), Views(files, (20, 30), 0)
    whole = Kept(ask, views, 3, torch.device("cpu"))
    monkeypatch.setattr(program, "MEMORY", limit)
    room = tmp_path / "room"
    room.mkdir()
    kept = Kept(ask, views, 3, torch.device("cpu"), folder=room)
    assert (kept.images is None) == (limit < 2 ** 32) and not list(room.iterdir())
    keys = [(slot, view) for view in (2, 0) for slot in range(7)]
    assert all(map(torch.equal, kept[keys], whole[keys]))


def test_a_disk_without_room_for_the_answers_is_said_at_once(files, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "MEMORY", 0)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(program.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for 0 GB .*No space left.*--views 0"):
        Kept(partial(answers_of, teacher(), like=(10, 15)), Views(files, (20, 30), 0), 3,
             torch.device("cpu"), folder=tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"}


def test_no_more_views_are_answered_than_will_be_seen(files):
    class Cfg:
        views, steps, batch_size, workers = 24, 5, 4, 0

    ask = partial(answers_of, teacher(), like=(10, 15))
    assert keep(ask, Views(files, (20, 30), 0), Cfg, torch.device("cpu")).count == 3      # of 20/7
    Cfg.views = 0
    assert keep(ask, Views(files, (20, 30), 0), Cfg, torch.device("cpu")) is None


@pytest.mark.parametrize(("teacher_size", "student_size", "expected"), [
    ((16, 24), (16, 24), (16, 24)), ((8, 12), (16, 24), (16, 24)), ((2, 3), (4, 6), (4, 6)),
    ((64, 96), (16, 24), (16, 24)), ((64, 96), (64, 96), (64, 96)),      # the student's own, or,
    ((16, 24), (4, 6), (16, 24)), ((8, 12), (4, 6), (8, 12)),            # if it is coarse, the
    ((64, 96), (4, 6), (16, 24))])                                       # teacher's, or a quarter
def test_logits_are_compared_at_the_students_size_unless_it_is_coarse(teacher_size, student_size,
                                                                      expected):
    assert common_size(teacher_size, student_size, (64, 96)) == expected


def test_coarse_logits_get_their_gradient_through_the_finer_ones():
    coarse = torch.rand(2, 3, 2, 3, dtype=torch.bfloat16).requires_grad_()
    fine = resized(coarse, (8, 12))
    assert fine.shape == (2, 3, 8, 12) and fine.dtype == torch.float32
    fine.sum().backward()
    torch.testing.assert_close(coarse.grad.float(), torch.full((2, 3, 2, 3), 16.0))
    assert resized(coarse, (2, 3)) is coarse


def test_answers_are_the_teachers_logits_at_the_students_stride():
    images, network = torch.rand(2, 3, 16, 24), teacher()
    logits = network(images)
    torch.testing.assert_close(answers_of(network, images, (16, 24)), logits)
    torch.testing.assert_close(answers_of(network, images, (16, 24), temperature=0.4), 2.5 * logits)
    small = answers_of(network, images, (4, 6))
    torch.testing.assert_close(small, F.interpolate(logits, (4, 6), mode="bilinear",
                                                    antialias=True))
    assert (small.mean((2, 3)) - logits.mean((2, 3))).abs().max() < 0.05         # no pixel left out
    assert not small.requires_grad and small.dtype == torch.float32


def with_statistics(net):
    """Return the network in eval mode, with BatchNorm layers that are far from doing nothing."""
    torch.manual_seed(0)
    for bn in bn_layers(net).values():
        for values in (bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var):
            values.uniform_(0.5, 2)
    return net.eval()


@pytest.mark.parametrize(
    "name", ["resnet_tiny", "deeplabv3_mobilenet_v2", "lraspp_mobilenet_v3_large"])
def test_a_folded_teacher_has_no_batchnorm_left_and_answers_the_same(name):
    network = with_statistics(build_model(name, 4))
    before, images = copy.deepcopy(network.state_dict()), torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        expected, logits = network(images), folded(network, (32, 48))(images)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    with pytest.raises(ValueError, match="no 2-D BatchNorm layer"):
        bn_layers(folded(network, (32, 48)))
    assert all(map(torch.equal, before.values(), network.state_dict().values()))


def test_a_teacher_that_computes_in_another_order_than_it_defines_is_not_folded():
    class Parted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.last = nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.last(self.bn(torch.relu(self.first(x))))

    network = with_statistics(wrap(Parted()))
    assert folded(network, (16, 24)) is network
