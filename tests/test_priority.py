"""priority.py: weights, schedules and the size of a step."""

import pytest
import torch

import priority
from priority import effective_sample_size, progressive_weights, sample_weights, weighted_loss


def test_the_worked_example_in_the_docstring_is_right():
    d = torch.tensor([1.0, 2, 3, 11])
    minmax, rank = sample_weights(d), sample_weights(d, "rank")
    torch.testing.assert_close(minmax, torch.tensor([1.0, 0.9, 0.8, 0.0]))
    torch.testing.assert_close(rank, torch.tensor([1.0, 2 / 3, 1 / 3, 0.0]))
    torch.testing.assert_close(progressive_weights(minmax, 0.5), torch.tensor([1.0, .95, .9, .5]))
    assert effective_sample_size(minmax) == pytest.approx(2.98, abs=0.005)
    assert effective_sample_size(rank) == pytest.approx(2.57, abs=0.005)


def test_an_outlier_flattens_min_max_but_not_rank_weights():
    d = torch.tensor([1.0, 2, 3, 101])
    torch.testing.assert_close(sample_weights(d), torch.tensor([1.0, 0.99, 0.98, 0.0]))
    torch.testing.assert_close(sample_weights(d, "rank"), torch.tensor([1.0, 2 / 3, 1 / 3, 0.0]))


@pytest.mark.parametrize("method", ["minmax", "rank"])
def test_weights_lie_in_0_to_1_and_fall_with_the_distance(method):
    d = torch.rand(50, generator=torch.Generator().manual_seed(0))
    w = sample_weights(d, method)
    assert w.min() == 0 and w.max() == 1
    assert torch.equal(w[d.argsort()], w.sort(descending=True).values)


@pytest.mark.parametrize("method", ["minmax", "rank"])
def test_equal_distances_get_equal_weights(method):
    assert sample_weights(torch.full((4,), 7.0), method).tolist() == [1, 1, 1, 1]
    w = sample_weights(torch.tensor([1.0, 2, 2, 3]), method)
    torch.testing.assert_close(w, torch.tensor([1.0, 0.5, 0.5, 0.0]))


def test_the_linear_schedule_starts_at_the_weights_and_ends_at_ones():
    w = torch.tensor([0.0, 0.4, 1.0])
    assert torch.equal(progressive_weights(w, 0), w)
    torch.testing.assert_close(progressive_weights(w, 1), torch.ones(3))
    torch.testing.assert_close(progressive_weights(w, 0.25), torch.tensor([0.25, 0.55, 1.0]))


def test_weights_equal_slow_loops_over_the_formulas():
    d = torch.randint(9, (30,), generator=torch.Generator().manual_seed(3)).double()
    values = d.tolist()
    ranks = [sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]
    for method, keys in (("minmax", values), ("rank", ranks)):
        slow = [(max(keys) - a) / (max(keys) - min(keys)) for a in keys]
        w = sample_weights(d, method)
        torch.testing.assert_close(w.double(), torch.tensor(slow, dtype=torch.double),
                                   atol=1e-6, rtol=0)
        torch.testing.assert_close(progressive_weights(w, 0.3).double(), torch.tensor(
            [x + (1 - x) * 0.3 for x in slow], dtype=torch.double), atol=1e-6, rtol=0)


def test_fixed_and_uniform_do_not_move():
    w = torch.tensor([0.0, 0.4, 1.0])
    for progress in (0, 0.3, 1):
        assert torch.equal(progressive_weights(w, progress, "fixed"), w)
        assert torch.equal(progressive_weights(w, progress, "uniform"), torch.ones(3))


def test_the_loss_is_weighted_and_divided_by_the_mean_weight_of_the_set():
    losses, weights = torch.tensor([2.0, 4.0]), torch.tensor([0.5, 0.25])
    assert weighted_loss(losses, weights, torch.tensor(0.25)) == pytest.approx((1 + 1) / 2 / 0.25)


def test_over_all_batches_the_loss_averages_to_a_weighted_mean_of_the_images():
    generator = torch.Generator().manual_seed(0)
    losses, w = torch.rand(12, generator=generator), torch.rand(12, generator=generator)
    batches = [weighted_loss(loss, weight, w.mean())
               for loss, weight in zip(losses.split(3), w.split(3), strict=True)]
    expected = (w * losses).sum() / w.sum()
    torch.testing.assert_close(torch.stack(batches).mean(), expected)


def test_effective_sample_size_counts_equal_weights_and_a_single_one():
    assert effective_sample_size(torch.full((5,), 0.3)) == pytest.approx(5)
    assert effective_sample_size(torch.tensor([0.0, 1, 0])) == pytest.approx(1)


def test_one_image_alone_counts_fully():
    assert sample_weights(torch.tensor([3.0])).tolist() == [1]


@pytest.mark.parametrize("shape", [(0,), (3, 1), (2, 2), ()])
def test_distances_that_are_empty_or_not_one_column_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected the distances .*\(N,\); got shape"):
        sample_weights(torch.ones(shape))


def test_the_demo_prints_the_worked_example(capsys):
    priority.demo()
    text = capsys.readouterr().out
    for part in ("[1.0, 0.9, 0.8, 0.0]", "[1.0, 0.95, 0.9, 0.5]", "[1.0, 0.667, 0.333, 0.0]",
                 "[1.0, 0.99, 0.98, 0.0]", "ESS 2.98", "ESS 2.57", "399   400   401   401   401"):
        assert part in text


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="finite"):
        sample_weights(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="'softmax'"):
        sample_weights(torch.rand(3), "softmax")
    with pytest.raises(ValueError, match="between 0 and 1"):
        progressive_weights(torch.rand(3), 1.5)
    with pytest.raises(ValueError, match="'steep'"):
        progressive_weights(torch.rand(3), 0.5, "steep")
    with pytest.raises(ValueError, match="expected one of .*linear.*fixed.*uniform"):
        progressive_weights(torch.rand(3), 0.5, "cosine")
