"""checks.py: what would fail after hours fails at once, in a sentence; and does the pool fit?"""

from unittest.mock import Mock

import pytest
import torch
from conftest import with_random_statistics
from torch import nn

import distill
from bn_stats import bn_layers, capture_bn_inputs
from models import build_model
from support import checks
from support.checkpoint import fingerprint
from support.checks import check_inputs, describe_fit, mean_shift
from support.data import Pool
from support.images import as_input, find_images

SIZE = (32, 48)


def network(classes=3):
    return with_random_statistics(build_model("resnet_tiny", classes))


@pytest.fixture
def check(pool_folder):
    """Return a function that checks networks, by default good ones, with some options."""
    pool = Pool(find_images(pool_folder), SIZE)

    def checked(teacher=None, student=None, **options):
        teacher, student = teacher or network(), student or network()
        cfg = distill.Config(**{"budget": 4, "batch_size": 2, "amp": "off"} | options)
        check_inputs(teacher, student, bn_layers(teacher), pool, cfg)
    return checked


class Returns(nn.Module):
    """A network whose outputs go through a function."""

    def __init__(self, function):
        super().__init__()
        self.net, self.function = network(), function

    def forward(self, x):
        return self.function(self, self.net(x))


def broken(layer, name, value):
    teacher = network()
    getattr(teacher.get_submodule(layer), name).data[:] = value
    return teacher


def shared():
    teacher, student = network(), network()
    student.net.head = teacher.net.head
    return {"teacher": teacher, "student": student}


BAD_NETWORKS = {
    "other classes": (lambda: {"student": network(4)}, "3 classes, but the student 4"),
    "never trained": (lambda: {"teacher": build_model("resnet_tiny", 3).eval()},
                      "looks untrained: were its weights loaded"),
    "same output": (lambda: {"teacher": broken("net.head", "weight", 0)}, "looks untrained"),
    "NaN mean": (lambda: {"teacher": broken("net.stem.1", "running_mean", torch.nan)}, "or NaN"),
    "negative variance": (lambda: {"teacher": broken("net.stem.1", "running_var", -1)}, "or NaN"),
    "a shared layer": (shared, "share weights; give the student a network of its own"),
    "frozen": (lambda: {"student": network().requires_grad_(False)},
               "rehearsed training step: .* does not require grad"),
    "a tuple": (lambda: {"student": Returns(lambda self, x: (x, x) if self.training else x)},
                "rehearsed training step"),
    "one image": (lambda: {"student": build_model("deeplabv3_mobilenet_v2", 3), "batch_size": 1},
                  "rehearsed training step: Expected more than 1"),
    "large budget": (lambda: {"budget": 400}, "the budget is 400, but the pool has 30 files")}


@pytest.mark.parametrize("name", BAD_NETWORKS)
def test_networks_that_cannot_be_used_are_refused_in_one_sentence(check, name):
    make, message = BAD_NETWORKS[name]
    with pytest.raises(ValueError, match=message):
        check(**make())


def test_all_is_checked_before_the_pool_is_scored(pool_folder, monkeypatch):
    monkeypatch.setattr(distill, "cached_scores", lambda *_: pytest.fail("scored"))
    with pytest.raises(ValueError, match="the student 4"):
        distill.distill(network(), network(4), pool_folder, SIZE, distill.Config(budget=4))


def test_neither_a_missing_precision_nor_a_lack_of_memory_is_a_fault_of_the_student(
        check, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory"):
        check(student=Returns(no_room))
    monkeypatch.setattr(checks, "pick_amp", Mock(side_effect=ValueError("no bfloat16")))
    with pytest.raises(ValueError, match="^no bfloat16"):
        check()


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_rehearsed_step_is_one_of_training_and_leaves_the_student_as_it_was(check, amp, dtype):
    seen = []
    student = Returns(lambda self, logits: seen.append((self.training, logits.dtype)) or logits)
    before = fingerprint(student.eval())
    check(student=student, amp=amp)
    assert seen[-1] == (True, dtype) and fingerprint(student) == before
    assert not student.training and all(p.grad is None for p in student.parameters())


def test_a_teacher_that_returns_probabilities_is_warned_of(check, capsys):
    check(teacher=network())
    assert capsys.readouterr().out == ""
    for probabilities in (lambda self, x: x.softmax(dim=1), lambda self, x: x.sigmoid()):
        check(teacher=Returns(probabilities).eval())
        assert "look like probabilities (softmax or sigmoid)" in capsys.readouterr().out


def test_the_mean_shift_is_the_root_mean_square_of_standardised_channel_means(pool_folder):
    teacher, pool = network(), Pool(find_images(pool_folder), SIZE)
    layers, indices = bn_layers(teacher), range(3, 29, 2)        # spread: 13 of 3 to 28, at most 20
    images = as_input(torch.stack([pool.view(i) for i in indices]), "cpu")
    with torch.no_grad(), capture_bn_inputs(teacher) as captured:
        teacher(images)
    squares = [((mean - layer.running_mean) ** 2 / (layer.running_var + layer.eps)).mean().item()
               for mean, layer in ((captured[name][0], layers[name]) for name in layers)]
    shift = mean_shift(teacher, {"layers": layers, "pool": pool}, torch.arange(3, 29), most=20)
    assert shift == pytest.approx((sum(squares) / len(squares)) ** 0.5, rel=1e-4)


def test_the_fit_is_that_of_the_selected_images_and_of_all_that_are_usable(monkeypatch):
    result = {"scores": torch.tensor([torch.nan, 1, 2, torch.inf]), "selected": torch.tensor([2])}
    for near, said in ((0.2, "fits well"), (0.5, "fits in part"), (0.9, "hardly fits")):
        shift = {(2,): near, (1, 2): 1.1}
        monkeypatch.setattr(checks, "mean_shift", lambda teacher, result, indices, shift=shift:
                            shift[tuple(indices.tolist())])
        text = describe_fit(None, result)
        assert f"This pool {said}: the selected images lie {near:.2f} standard" in text
        assert "the whole pool 1.10" in text
