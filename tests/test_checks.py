"""checks.py: what would fail after hours fails at once, in a sentence; and does the pool fit?"""

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


def tuple_in_training(self, logits):
    return (logits, logits) if self.training else logits


def broken(name, value):
    teacher = network()
    getattr(teacher.net.stem[1], name).data[2] = value
    return teacher


def dead():
    teacher = network()
    nn.init.zeros_(teacher.net.head.weight)
    return teacher


BAD_NETWORKS = {
    "other classes": (lambda: {"student": network(4)}, "3 .* and the student 4"),
    "never trained": (lambda: {"teacher": build_model("resnet_tiny", 3).eval()},
                      "looks untrained: were its weights loaded"),
    "same output": (lambda: {"teacher": dead()}, "looks untrained"),
    "NaN mean": (lambda: {"teacher": broken("running_mean", torch.nan)}, "infinite or NaN"),
    "negative variance": (lambda: {"teacher": broken("running_var", -1.0)}, "infinite or NaN"),
    "infinite weight": (lambda: {"teacher": broken("weight", torch.inf)}, "infinite or NaN"),
    "frozen": (lambda: {"student": network().requires_grad_(False)}, "weights .* are frozen"),
    "a tuple": (lambda: {"student": Returns(tuple_in_training)}, "rehearsed training step"),
    "one image": (lambda: {"student": build_model("deeplabv3_mobilenet_v2", 3), "batch_size": 1},
                  "rehearsed training step: Expected more than 1"),
    "large budget": (lambda: {"budget": 400}, "budget is 400, but the pool has 30 .*--budget 0")}


@pytest.mark.parametrize("name", BAD_NETWORKS)
def test_networks_that_cannot_be_used_are_refused_in_one_sentence(check, name):
    make, message = BAD_NETWORKS[name]
    with pytest.raises(ValueError, match=message):
        check(**make())


def test_one_network_cannot_be_teacher_and_student_nor_share_a_layer(check):
    teacher, student = network(), network()
    student.net.head = teacher.net.head
    for other in (student, teacher):
        with pytest.raises(ValueError, match="share weights; give the student a network of its"):
            check(teacher, other)


def test_all_is_checked_before_the_pool_is_scored(pool_folder, monkeypatch):
    monkeypatch.setattr(distill, "cached_scores", lambda *_: pytest.fail("scored"))
    with pytest.raises(ValueError, match="the student 4"):
        distill.distill(network(), network(4), pool_folder, SIZE, distill.Config(budget=4))


def test_a_precision_that_the_device_has_not_is_refused_too(check, monkeypatch):
    def refuse(name, device):
        raise ValueError("this card does not compute in bfloat16")

    monkeypatch.setattr(checks, "pick_amp", refuse)
    with pytest.raises(ValueError, match="^this card does not compute in bfloat16"):
        check()


def test_a_lack_of_memory_is_no_fault_of_the_student(check):
    def no_room(self, logits):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory"):
        check(student=Returns(no_room))


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


# ---------------------------------------------------------------- does the pool fit the teacher?

def test_the_mean_shift_is_the_root_mean_square_of_standardised_channel_means(pool_folder):
    teacher, pool = network(), Pool(find_images(pool_folder), SIZE)
    layers, indices = bn_layers(teacher), list(range(3, 25))     # two batches, the second smaller
    images = as_input(torch.stack([pool.view(i) for i in indices]), "cpu")
    with torch.no_grad(), capture_bn_inputs(teacher) as captured:
        teacher(images)
    squares = [((mean - layer.running_mean) ** 2 / (layer.running_var + layer.eps)).mean().item()
               for mean, layer in ((captured[name][0], layers[name]) for name in layers)]
    assert mean_shift(teacher, layers, pool, indices) == pytest.approx(
        (sum(squares) / len(squares)) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(("near", "said"), [(0.2, "fits well"), (0.5, "fits in part"),
                                            (0.9, "hardly fits")])
def test_the_fit_is_that_of_the_selected_and_of_usable_files_spread_over_the_pool(
        monkeypatch, near, said):
    looked = []

    def shift(teacher, layers, pool, indices):
        looked.append(indices)
        return near if len(looked) == 1 else 1.1

    monkeypatch.setattr(checks, "mean_shift", shift)
    result = {"scores": torch.arange(30.0), "selected": torch.tensor([5, 6, 7]), "layers": None,
              "pool": None}
    result["scores"][0] = torch.nan
    text = describe_fit(None, result, most=10)
    assert f"This pool {said}: the selected images lie {near:.2f} standard" in text
    assert "the whole pool 1.10" in text and looked == [[5, 6, 7], list(range(1, 30, 3))]
