"""teacher_cache.py: cached logits and views are those of a fresh pass, in memory and in a file."""

import tempfile
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from pictures import coordinates, write
from torch import nn

from support import teacher_cache
from support.data import Batches, Views
from support.teacher_cache import TeacherCache, comparison_size, resize

CPU = torch.device("cpu")


@pytest.fixture
def views(tmp_path):
    """Return views of seven pictures."""
    return Views([write(tmp_path / f"{i}.png", coordinates(240, 160, blue=i)) for i in range(7)],
                 (20, 30), seed=0)


def options(views=3, steps=100):
    return SimpleNamespace(views=views, steps=steps, batch_size=4, workers=0)


# The logits of 21 views take 25,200 bytes, the views themselves 37,800.
@pytest.mark.parametrize(("limit", "files"), [(0, 1), (30_000, 0), (2 ** 32, 0)])
def test_cached_logits_are_those_of_the_same_views(views, tmp_path, monkeypatch, limit, files):
    teacher_pass = nn.Conv2d(3, 4, 3, 2, 1).requires_grad_(False)           # (B, 4, 10, 15)
    monkeypatch.setattr(teacher_cache, "MEMORY", limit)
    file = Mock(wraps=tempfile.TemporaryFile)
    monkeypatch.setattr(tempfile, "TemporaryFile", file)
    cache = TeacherCache(teacher_pass, views, options(), CPU, tmp_path)
    assert [call.kwargs for call in file.mock_calls] == files * [{"dir": tmp_path}]
    assert (cache.images is None) == (limit < 37_800) and cache.logits.dtype == torch.float16
    batches, fresh = Batches(views, 3, cache), Batches(views, 3)
    for t in range(7):                                           # three epochs
        images, index, logits = batches[t]
        assert torch.equal(images, fresh[t][0]) and torch.equal(index, fresh[t][1])
        torch.testing.assert_close(logits.float(), teacher_pass(images / 255), rtol=1e-3, atol=1e-3)
    for t in range(7, 14):                                       # then the same views once more
        assert {view for _, view in batches.keys(t)} <= {0, 1, 2}


def test_logits_beyond_float16_are_cut_and_no_more_views_are_cached_than_will_be_used(views):
    cache = TeacherCache(lambda x: 1e6 * (x[:, :1] - 0.5), views, options(views=24, steps=5), CPU)
    assert cache.count == 3                                      # of 20 / 7
    _, logits = cache[[(6, 2), (0, 0)]]
    assert logits.shape == (2, 1, 20, 30) and logits.abs().max() == 6e4


def test_a_teacher_whose_logits_are_not_finite_is_named_with_the_file(views):
    logits = torch.zeros(21, 1, 5, 5)
    logits[14] = torch.nan                                       # the last view of file 4
    with pytest.raises(ValueError, match="the teacher's logits for .*4.png are infinite or NaN; "):
        TeacherCache(Mock(side_effect=logits.split(4)), views, options(), CPU)


def test_a_disk_without_room_is_one_sentence(views, monkeypatch):
    monkeypatch.setattr(teacher_cache, "MEMORY", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match="no room for 0 GB .*No space left.*--views 0"):
        TeacherCache(nn.Identity(), views, options(), CPU)


@pytest.mark.parametrize(("teacher", "student", "expected"), [
    (4, 4, (16, 24)), (8, 4, (16, 24)), (1, 4, (16, 24)), (1, 1, (64, 96)),  # the student's own, or
    (4, 16, (16, 24)), (8, 16, (8, 12)), (1, 16, (16, 24))])     # the teacher's, at most a quarter
def test_logits_are_compared_at_the_students_size_unless_it_is_coarse(teacher, student, expected):
    networks = (nn.Conv2d(3, 2, stride, stride).train() for stride in (teacher, student))
    assert comparison_size(*networks, (64, 96)) == expected


def test_logits_that_grow_are_bilinear_float32_and_pass_their_gradient():
    """Those that shrink are in test_method.py."""
    logits = torch.rand(2, 3, 16, 24, dtype=torch.bfloat16).requires_grad_()
    assert resize(logits, (16, 24)) is logits
    large = resize(logits, (32, 48))
    torch.testing.assert_close(large, F.interpolate(logits.float(), (32, 48), mode="bilinear"))
    large.sum().backward()
    torch.testing.assert_close(logits.grad.float(), torch.full((2, 3, 16, 24), 4.0))
