"""ads_sampler.py: what is scored, what is chosen, and what never is."""

import itertools

import pytest
import torch
from conftest import with_random_statistics
from torch import nn

from ads_sampler import mean_shift, moment_features, sample, score_pool
from bn_stats import bn_layers, capture_bn_inputs


def test_the_worked_example_in_the_docstring_is_right():
    f = torch.tensor([1.0, 1, 2, -2, -3])
    assert sample(f.abs(), 3).tolist() == [0, 1, 2]
    assert sample(f.abs(), 3, "herding", f[:, None]).tolist() == [0, 1, 3]


def test_scores_come_in_the_order_of_the_loader_whatever_the_batch_size():
    pool = torch.arange(10.0)
    for size in (1, 3, 10):
        assert torch.equal(score_pool(lambda batch: 2 * batch, pool.split(size)), 2 * pool)
    assert score_pool(lambda b: torch.stack([b, b], 1), pool.split(4)).shape == (10, 2)


def test_scores_carry_no_gradient():
    weight = torch.ones(1, requires_grad=True)
    assert not score_pool(lambda batch: batch * weight, [torch.rand(3)]).requires_grad


def test_scores_of_a_changing_shape_and_an_empty_pool_are_refused():
    with pytest.raises(ValueError, match="empty"):
        score_pool(lambda batch: batch, [])
    with pytest.raises(ValueError, match="same for every batch"):
        score_pool(lambda batch: batch, [torch.rand(2, 3), torch.rand(2)])


def test_nearest_is_a_sorted_prefix_with_ties_in_pool_order():
    distances = torch.tensor([3.0, 1, 2, 1, 3, 0])
    assert sample(distances, 6).tolist() == [5, 1, 3, 2, 0, 4]
    assert sample(distances, 2).tolist() == [5, 1]


@pytest.mark.parametrize("method", ["nearest", "herding"])
def test_images_without_a_finite_distance_are_never_chosen_and_reported(method):
    distances = torch.tensor([torch.nan, 1, torch.inf, 2, 3])
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="2 of 5"):
        assert sample(distances, 3, method, features).tolist() == [1, 3, 4]


@pytest.mark.parametrize("budget", [0, 4, -1])
def test_a_budget_that_does_not_fit_is_refused_with_the_number_that_does(budget):
    with pytest.raises(ValueError, match="between 1 and 3"):
        sample(torch.rand(3), budget)


def test_unknown_methods_and_missing_features_are_refused():
    with pytest.raises(ValueError, match="'best'"):
        sample(torch.rand(3), 1, "best")
    with pytest.raises(ValueError, match="features"):
        sample(torch.rand(3), 1, "herding")


def test_herding_takes_at_each_step_the_image_that_brings_the_sum_nearest_to_zero():
    features = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)) + 0.5
    chosen = []
    for _ in range(5):                                              # slow, from the definition
        norms = {i: sum(features[j] for j in [*chosen, i]).norm().item()
                 for i in range(12) if i not in chosen}
        chosen.append(min(norms, key=norms.get))
    distances = features.norm(dim=1)
    expected = sorted(chosen, key=lambda i: distances[i])
    assert sample(distances, 5, "herding", features).tolist() == expected


def test_herding_matches_the_mean_of_a_set_better_than_nearest():
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(2)) + 0.4
    distances = features.norm(dim=1)
    near, herd = (features[sample(distances, 30, m, features)].mean(0).norm()
                  for m in ("nearest", "herding"))
    assert herd < 0.2 * near


def test_features_average_zero_over_the_images_that_the_statistics_come_from():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(400, 3, 6, 6, generator=generator) * 2 + torch.randn(
        400, 3, 1, 1, generator=generator)
    layer = nn.BatchNorm2d(3, momentum=1.0)
    layer(images)
    with capture_bn_inputs(layer.eval()) as captured:
        layer(images)
    features = moment_features(captured, bn_layers(layer), dim=64)
    assert features.mean(dim=0).norm() < 1e-2 < features.norm(dim=1).mean()


def test_the_sketch_keeps_lengths_and_differences_on_average():
    network = with_random_statistics(nn.Sequential(nn.Conv2d(3, 200, 3), nn.BatchNorm2d(200)))
    with torch.no_grad(), capture_bn_inputs(network) as captured:
        network(torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    layers = bn_layers(network)
    mean, var = captured["1"]
    s2 = layers["1"].running_var + layers["1"].eps
    shift = (mean - layers["1"].running_mean) / s2.sqrt()
    full = torch.cat([shift, var / s2 + shift ** 2 - 1], dim=1) / 400 ** 0.5       # no sketch
    sketches = [moment_features(captured, layers, dim=32, seed=s) for s in range(60)]
    for i, j in itertools.combinations(range(6), 2):
        square = torch.stack([(s[i] - s[j]).square().sum() for s in sketches]).mean()
        assert square.item() == pytest.approx((full[i] - full[j]).square().sum().item(), rel=0.3)


def test_the_mean_square_shift_of_the_training_images_is_at_most_one():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(500, 4, 8, 8, generator=generator) + 2 * torch.randn(
        500, 4, 1, 1, generator=generator)
    layer = nn.BatchNorm2d(4, momentum=1.0)
    layer(images)
    with capture_bn_inputs(layer.eval()) as captured:
        layer(images)
    # Between-image variance 4 of a total of 5: the mean square shift is their ratio.
    shift = mean_shift(captured, bn_layers(layer))
    assert shift.square().mean().item() == pytest.approx(0.8, abs=0.05)


def test_choosing_from_a_million_distances_takes_under_a_second():
    import time
    distances = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    start = time.process_time()
    sample(distances, 1000)
    assert time.process_time() - start < 1
