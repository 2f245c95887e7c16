"""checks.py: what would fail after hours fails at once, in a sentence; and does the pool fit?"""

import re
from unittest.mock import Mock

import pytest
import torch
from conftest import with_random_statistics

import distill
from bn_stats import bn_layers, capture_bn_inputs
from models import build_model
from support import checks
from support.checkpoint import fingerprint
from support.data import Pool
from support.images import as_input, find_images

SIZE = (32, 48)


def network(classes=3):
    torch.manual_seed(0)
    return with_random_statistics(build_model("resnet_tiny", classes))


@pytest.fixture
def check(pool_folder):
    """Return a function that checks networks, by default good ones, with some options."""
    pool = Pool(find_images(pool_folder), SIZE)

    def checked(teacher=None, student=None, **options):
        teacher, student = teacher or network(), student or network()
        cfg = distill.Config(**{"budget": 4, "batch_size": 2, "amp": "off"} | options)
        checks.check_inputs(teacher, student, bn_layers(teacher), pool, cfg)
    return checked


def returning(function):
    """Return a network whose output is function(network, logits)."""
    net = network()
    net.register_forward_hook(lambda net, images, logits: function(net, logits))
    return net


def broken(name, value):
    teacher = network()
    teacher.state_dict()[name][:] = value
    return {"teacher": teacher}


def shared():
    teacher, student = network(), network()
    student.net.head = teacher.net.head
    return {"teacher": teacher, "student": student}


@pytest.mark.parametrize(("networks", "message"), [
    (lambda: {"student": network(4)}, "3 classes, but the student 4"),
    (lambda: {"teacher": build_model("resnet_tiny", 3).eval()}, "untrained: were its weights load"),
    (lambda: broken("net.head.weight", 0), "looks untrained"),
    (lambda: broken("net.stem.1.running_mean", torch.nan), "or NaN"),
    (lambda: broken("net.stem.1.running_var", -1), "or NaN"),
    (shared, "share weights; give the student a network of its own"),
    (lambda: {"student": network().requires_grad_(False)}, "step: .* does not require grad"),
    (lambda: {"student": returning(lambda net, x: (x, x) if net.training else x)}, "rehearsed"),
    (lambda: {"student": build_model("deeplabv3_mobilenet_v2", 3), "batch_size": 1},
     "in a rehearsed training step: Expected more than 1"),
    (lambda: {"student": returning(Mock(side_effect=torch.OutOfMemoryError("out of memory")))},
     "^out of memory"),                                          # no fault of the student
    (lambda: {"budget": 400}, "the budget is 400, but the pool has 30 files")])
def test_networks_that_cannot_be_used_are_refused_in_one_sentence(check, networks, message):
    with pytest.raises((ValueError, torch.OutOfMemoryError), match=message):
        check(**networks())


def test_all_is_checked_before_the_pool_is_scored(pool_folder, monkeypatch):
    monkeypatch.setattr(distill, "cached_scores", Mock(side_effect=AssertionError))
    with pytest.raises(ValueError, match="the student 4"):
        distill.distill(network(), network(4), pool_folder, SIZE, distill.Config(budget=4))


def test_a_missing_precision_is_no_fault_of_the_student(check, monkeypatch):
    monkeypatch.setattr(checks, "pick_amp", Mock(side_effect=ValueError("no bfloat16")))
    with pytest.raises(ValueError, match="^no bfloat16"):
        check()


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_rehearsed_step_is_one_of_training_and_leaves_the_student_as_it_was(check, amp, dtype):
    seen = []
    student = returning(lambda net, logits: seen.append((net.training, logits.dtype)))
    before = fingerprint(student.eval())
    check(student=student, amp=amp)
    assert seen[-1] == (True, dtype) and fingerprint(student) == before
    assert not student.training and all(p.grad is None for p in student.parameters())


def test_a_teacher_that_returns_probabilities_is_warned_of(check, capsys):
    check(teacher=network())
    assert capsys.readouterr().out == ""
    for probabilities in (lambda net, x: x.softmax(dim=1), lambda net, x: x.sigmoid()):
        check(teacher=returning(probabilities))
        assert "look like probabilities (softmax or sigmoid)" in capsys.readouterr().out


def test_the_mean_shift_is_the_root_mean_square_of_standardised_channel_means(pool_folder):
    teacher, pool = network(), Pool(find_images(pool_folder), SIZE)
    layers, indices = bn_layers(teacher), range(3, 29, 2)        # spread: 13 of 3 to 28, at most 20
    images = as_input(torch.stack([pool.view(i) for i in indices]), "cpu")
    with torch.no_grad(), capture_bn_inputs(teacher) as captured:
        teacher(images)
    squares = [((captured[name][0] - layer.running_mean) ** 2 / (layer.running_var + layer.eps))
               .mean() for name, layer in layers.items()]
    shift = checks.mean_shift(teacher, {"layers": layers, "pool": pool}, torch.arange(3, 29), 20)
    assert shift == pytest.approx(torch.stack(squares).mean().sqrt().item(), rel=1e-4)


def test_the_fit_is_that_of_the_selected_images_and_of_all_that_are_usable(monkeypatch):
    result = {"scores": torch.tensor([torch.nan, 1, 2, torch.inf]), "selected": torch.tensor([2])}
    for near, said in ((0.2, "fits well"), (0.5, "fits in part"), (0.9, "hardly fits")):
        monkeypatch.setattr(checks, "mean_shift", lambda teacher, result, indices, near=near: {
            (2,): near, (1, 2): 1.1}[tuple(indices.tolist())])
        said = f"This pool {said}: the selected images lie {near:.2f} .*the whole pool 1.10"
        assert re.match(said, checks.describe_fit(None, result), re.DOTALL)
