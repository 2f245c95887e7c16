"""colours.py: colours estimated from a BatchNorm layer, and images mapped to given colours."""

import statistics

import pytest
import torch

import colours
from colours import apply_colours, colour_target, match_colours, transfer

R = 0.05 * torch.eye(3) + 0.95
MEAN = torch.tensor([0.4, 0.5, 0.6])
COV = torch.tensor([[0.004, 0.002, 0.001], [0.002, 0.003, 0.001], [0.001, 0.001, 0.002]])


@pytest.fixture
def images():
    """Return 5 images whose three colours are correlated, well inside [0, 1]."""
    torch.manual_seed(0)
    mix = torch.tensor([[1.0, 0.4, 0.2], [0.0, 0.8, 0.3], [0.0, 0.0, 0.5]])
    return 0.5 + 0.05 * torch.einsum("ij,bjhw->bihw", mix, torch.randn(5, 3, 24, 32))


def moments(images):
    """Return the mean (B, 3) and covariance (B, 3, 3) of the colours of each image, in float64."""
    pixels = images.double().flatten(2)
    return pixels.mean(dim=2), torch.stack([torch.cov(p, correction=0) for p in pixels])


def estimate(filters, mean_bn, var_bn, b=0.0):
    """Return what colour_target says of a layer behind 1x1 filters (C, 3) with offset b."""
    return colour_target(lambda x: x.mean(dim=(2, 3)) @ filters.T + b, mean_bn, var_bn, (4, 4))


def test_the_grey_filter_of_the_worked_example_gives_mean_04_and_grey_variance_004():
    mean, cov = estimate(torch.full((1, 3), 4 / 3), torch.tensor([0.6]), torch.tensor([0.64]), -1.0)
    torch.testing.assert_close(mean, torch.full((3,), 0.4))
    assert cov.mean().item() == pytest.approx(0.04)                 # variance of (R + G + B) / 3


def test_the_mean_is_exact_and_the_variance_the_median_of_slow_loops_without_dead_channels():
    torch.manual_seed(0)
    A, var_bn = torch.randn(17, 3), torch.rand(17)
    A[:8] *= 1e-12                                       # dead: nothing but rounding errors
    var_bn[:8] = torch.tensor([0, 1e-45, 1e-20, 1e-20, 1e-20, 1, 1, 1])
    ratios = [var_bn[c].item() / sum(A[c, i].item() * R[i, j].item() * A[c, j].item()
                                     for i in range(3) for j in range(3)) for c in range(8, 17)]
    mean, cov = estimate(A.clone().requires_grad_(), A @ MEAN + 0.3, var_bn, 0.3)
    torch.testing.assert_close(cov, statistics.median(ratios) * R)
    torch.testing.assert_close(mean, MEAN, atol=1e-4, rtol=0)
    assert not mean.requires_grad and not cov.requires_grad


def test_what_a_layer_cannot_see_is_not_made_of_rounding_errors():
    """Filters of brightness alone, and the same but for the last bit of float32."""
    torch.manual_seed(0)
    a, edges = torch.randn(16, 1), torch.rand(16)
    first, second = (estimate(a * (1 + 1e-7 * torch.randn(16, 3)), 1.2 * a[:, 0] + 0.05 * edges,
                              a[:, 0].square() * (1 + edges) + 1e-3)[0] for _ in range(2))
    torch.testing.assert_close(second, first, atol=0, rtol=1e-3)
    assert (first - 0.4).abs().max() < 0.05


def test_a_response_without_any_colour_is_refused():
    with pytest.raises(ValueError, match="the same for all colours"):
        estimate(torch.zeros(4, 3), torch.zeros(4), torch.ones(4))


@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_the_map_is_the_one_of_the_docstring(images, floor):
    """The only symmetric positive T with T S T' = S*, and an offset that brings m to m*."""
    maps, eye = transfer(images, MEAN, COV, floor).double(), floor * torch.eye(3)
    T, (m, S) = maps[:, :, :3], moments(images)
    torch.testing.assert_close(T @ (S + eye) @ T.mT, (COV + eye).double().expand(5, 3, 3),
                               atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(T, T.mT, atol=1e-4, rtol=1e-4)
    assert torch.linalg.eigvalsh(T).min() > 0
    torch.testing.assert_close((T @ m[:, :, None])[..., 0] + maps[:, :, 3],
                               MEAN.double().expand(5, 3), atol=1e-5, rtol=0)


def test_a_flat_image_gets_the_mean_with_a_bounded_gain_and_colours_are_clamped_to_0_and_1():
    flat = torch.full((1, 3, 8, 8), 0.9)
    maps = transfer(flat, torch.full((3,), 0.4), 0.08 * torch.eye(3))
    assert maps[:, :, :3].abs().max() < 10
    for offset, expected in ((0, 0.4), (2, 1), (-2, 0)):
        shifted = maps + torch.tensor([0, 0, 0, offset])
        torch.testing.assert_close(apply_colours(flat, shifted), torch.full_like(flat, expected))


@pytest.mark.parametrize("wrong", [
    torch.zeros(1, 3, 8, 8).byte(), torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8),
    torch.full((1, 3, 8, 8), -0.6), torch.full((1, 3, 8, 8), 255.0)])
def test_all_but_rgb_in_0_to_1_is_refused(wrong):
    with pytest.raises(ValueError, match=r"expected RGB floats \(B, 3, H, W\) in \[0, 1\]"):
        match_colours(wrong, MEAN, COV)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_images_keep_their_precision(images, dtype):
    matched = match_colours(images.to(dtype), MEAN, COV)
    assert matched.dtype == dtype
    expected = match_colours(images, MEAN, COV)
    torch.testing.assert_close(matched.float(), expected, atol=1e-2, rtol=0)


def test_the_demo_prints_the_worked_example_a_good_estimate_and_a_misjudged_camera(capsys):
    colours.demo()
    text = capsys.readouterr().out
    assert "[0.2, 0.6]" in text
    rows = [[float(x) for x in line.split()[-7:]] for line in text.splitlines() if "0.1" in line]
    photo, camera, estimated, matched, other, misjudged, _ = rows
    assert estimated == camera and matched[:6] == camera[:6] != photo[:6]
    assert misjudged[6] == 0.95 and other[6] == 0.5
