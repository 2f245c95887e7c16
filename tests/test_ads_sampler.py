"""ads_sampler.py: how a pool is scored, what is selected, and what never is."""

import math

import pytest
import torch

import ads_sampler
from ads_sampler import sample, score_pool


def test_scores_come_in_the_order_of_the_loader_without_gradient_whatever_the_batch_size():
    pool = torch.arange(10.0, dtype=torch.float64)
    weight = torch.tensor(2.0, requires_grad=True)
    for size in (1, 3, 10):
        scores = score_pool(lambda batch: weight * batch, pool.split(size))
        assert torch.equal(scores, 2 * pool.float()) and scores.dtype == torch.float32
        assert not scores.requires_grad


def test_more_than_one_score_per_image_and_an_empty_pool_are_refused():
    with pytest.raises(ValueError, match="empty"):
        score_pool(lambda batch: batch, [])
    with pytest.raises(ValueError, match=r"must return \(B,\) scores; got \(2, 3\)"):
        score_pool(lambda batch: batch, [torch.rand(2, 3)])


@pytest.mark.filterwarnings("error")
def test_the_selection_equals_a_plain_sort_in_python_without_what_is_not_finite():
    values = torch.randint(20, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    unusable = {0: math.nan, 1: math.inf, 2: -math.inf}
    distances = [unusable.get(v, float(v)) for v in values]            # many ties
    slow = sorted((i for i, v in enumerate(distances) if math.isfinite(v)),
                  key=lambda i: (distances[i], i))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        selected = sample(torch.tensor(distances, dtype=dtype), 90)
        assert selected.tolist() == slow[:90] and selected.dtype == torch.int64


@pytest.mark.parametrize("budget", [0, 4, -1])
def test_a_budget_that_does_not_fit_is_refused_with_the_number_that_does(budget):
    with pytest.raises(ValueError, match=f"3 images have a finite.* between 1.*got {budget}"):
        sample(torch.tensor([1, torch.nan, 2, 3]), budget)


@pytest.mark.parametrize(("distances", "got"), [
    (torch.rand(5, 2), r"float32 .*\[5, 2\]"), (torch.rand(5, 1), r"\[5, 1\]"), ([0.5], "list"),
    (torch.tensor(1.0), r"\[\]"), (torch.arange(5), "int64"), (torch.ones(5).bool(), "bool")])
def test_anything_but_one_floating_point_distance_per_image_is_refused(distances, got):
    with pytest.raises(ValueError, match="expected one floating-point distance.*" + got):
        sample(distances, 1)


def test_the_demo_prints_the_worked_example_and_shows_that_nearest_crowds(capsys):
    ads_sampler.demo()
    text = capsys.readouterr().out
    assert "images [3, 5, 1], mean 1.33" in text
    rows = {words[0]: [float(w) for w in words[1:]] for words in map(str.split, text.splitlines())
            if words and words[0] in ("random", "confidence", "nearest")}
    assert rows["nearest"][2] < 1.18 < rows["random"][2] < rows["confidence"][2]    # the idea
    assert rows["nearest"][1] == 0.39                                               # the caveat
