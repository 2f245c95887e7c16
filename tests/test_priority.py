"""priority.py: weights, schedules and the weighted loss of a batch."""

import pytest
import torch

import priority
from priority import effective_sample_size, progressive_weights, sample_weights, weighted_loss


@pytest.mark.parametrize("method", ["minmax", "rank"])
def test_weights_equal_slow_loops_over_the_formulas(method):
    d = torch.randint(9, (30,), generator=torch.Generator().manual_seed(3)).double()  # with ties
    keys = d.tolist()
    if method == "rank":
        keys = [sum(b < a for b in keys) + (sum(b == a for b in keys) - 1) / 2 for a in keys]
    slow = [(max(keys) - a) / (max(keys) - min(keys)) for a in keys]
    w = sample_weights(d, method)
    torch.testing.assert_close(w.tolist(), slow)
    torch.testing.assert_close(progressive_weights(w, 0.3).tolist(),
                               [x + (1 - x) * 0.3 for x in slow])


@pytest.mark.parametrize("method", ["minmax", "rank"])
@pytest.mark.parametrize("n", [1, 4])
def test_equal_distances_and_a_single_image_have_weight_1(method, n):
    assert sample_weights(torch.full((n,), 7.0), method).tolist() == [1] * n


def test_linear_goes_from_the_weights_to_ones_while_fixed_and_uniform_ignore_progress():
    w, ones = torch.tensor([0.0, 0.4, 1.0]), torch.ones(3)
    assert torch.equal(progressive_weights(w, 0), w)
    torch.testing.assert_close(progressive_weights(w, 1), ones)
    for progress in (0, 0.3, 1):
        assert torch.equal(progressive_weights(w, progress, "fixed"), w)
        assert torch.equal(progressive_weights(w, progress, "uniform"), ones)


def test_over_all_batches_the_loss_averages_to_a_weighted_mean_of_the_images():
    generator = torch.Generator().manual_seed(0)
    losses, w = torch.rand(12, generator=generator), torch.rand(12, generator=generator)
    batches = [weighted_loss(loss, weight, w.mean())
               for loss, weight in zip(losses.split(3), w.split(3), strict=True)]
    torch.testing.assert_close(torch.stack(batches).mean(), (w * losses).sum() / w.sum())


def test_effective_sample_size_counts_equal_weights_and_a_single_one():
    assert effective_sample_size(torch.full((5,), 0.3)) == pytest.approx(5)
    assert effective_sample_size(torch.tensor([0.0, 1, 0])) == pytest.approx(1)


@pytest.mark.parametrize("distances", [torch.ones(0), torch.ones(3, 1), torch.ones(()),
                                       torch.arange(3)])
def test_distances_that_are_empty_or_not_one_per_image_are_refused(distances):
    with pytest.raises(ValueError, match=r"expected floating-point distances \(N,\), at least one"):
        sample_weights(distances)


@pytest.mark.parametrize("losses", [torch.ones(4, 1), torch.ones(4, 4, 4), torch.ones(3),
                                    torch.tensor(1.0)])
def test_losses_that_are_not_one_per_image_are_refused(losses):
    with pytest.raises(ValueError, match=r"one loss and one weight per image.* and \(4,\)"):
        weighted_loss(losses, torch.ones(4), 1.0)


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="finite"):
        sample_weights(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="'softmax'.*expected 'minmax' or 'rank'"):
        sample_weights(torch.rand(3), "softmax")
    for progress in (-0.1, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            progressive_weights(torch.rand(3), progress)
    with pytest.raises(ValueError, match="'cosine'.*expected one of .*linear.*fixed.*uniform"):
        progressive_weights(torch.rand(3), 0.5, "cosine")


def test_the_demo_prints_the_worked_example_and_what_one_far_image_does(capsys):
    priority.demo()
    text = capsys.readouterr().out
    for part in ("[1.0, 0.9, 0.8, 0.0]", "[1.0, 0.95, 0.9, 0.5]", "[1.0, 0.667, 0.333, 0.0]",
                 "[1.0, 0.99, 0.98, 0.0]", "ESS 2.98", "ESS 2.57", "399   400   401   401   401"):
        assert part in text
