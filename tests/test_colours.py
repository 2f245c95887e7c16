"""colours.py: colours read off a layer, and given exactly to each image."""

import pytest
import torch
from torch import nn

import colours
from colours import apply_colours, colour_target, match_colours, square_root, transfer


@pytest.fixture
def images():
    """Return 5 images whose three colours are correlated, well inside [0, 1]."""
    torch.manual_seed(0)
    mix = torch.tensor([[1.0, 0.4, 0.2], [0.0, 0.8, 0.3], [0.0, 0.0, 0.5]])
    return 0.5 + 0.05 * torch.einsum("ij,bjhw->bihw", mix, torch.randn(5, 3, 24, 32))


def moments(images):
    pixels = images.double().flatten(2)
    mean = pixels.mean(dim=2)
    centred = pixels - mean[..., None]
    return mean, centred @ centred.mT / pixels.shape[2]


def test_the_worked_example():
    image = torch.tensor([0.5, 0.7]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    maps = transfer(image, torch.full((3,), 0.4), torch.full((3, 3), 0.04), floor=1e-9)
    torch.testing.assert_close(apply_colours(image, maps)[0, :, 0],
                               torch.tensor([[0.2, 0.6]] * 3), atol=1e-3, rtol=0)


def test_the_colours_of_the_private_images_are_read_off_a_pointwise_filter(images):
    torch.manual_seed(1)
    filters = nn.Conv2d(3, 16, 1)
    with torch.no_grad():
        maps = filters(images).permute(1, 0, 2, 3).flatten(1)                       # (16, N)
        mean, cov = colour_target(lambda x: filters(x).mean(dim=(2, 3)), maps.mean(dim=1),
                                  maps.var(dim=1, unbiased=False), (8, 8))
    pixels = images.permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(mean, pixels.mean(dim=1), atol=1e-4, rtol=0)
    torch.testing.assert_close(cov, torch.cov(pixels), atol=1e-4, rtol=1e-2)


def test_a_layer_that_hardly_sees_colour_gives_typical_ones_not_noise():
    torch.manual_seed(0)
    seen = torch.randn(16, 1).expand(16, 3)
    true = 0.08 * (0.05 * torch.eye(3) + 0.95)

    def read(filters):
        var = ((filters @ true) * filters).sum(dim=1) * (1 + 0.1 * torch.randn(16))     # with edges
        return colour_target(lambda x: x.mean(dim=(2, 3)) @ filters.T, filters.sum(dim=1) * 0.4,
                             var, (4, 4))[1]

    for filters in (seen, seen + 0.02 * torch.randn(16, 3)):         # brightness alone, and nearly
        torch.testing.assert_close(read(filters), true, atol=0, rtol=0.1)
    colourful = read(torch.randn(16, 3))                             # read as it is, not replaced
    assert colourful[0, 1] != colourful[0, 2]


def test_what_a_layer_cannot_see_is_not_made_of_rounding_errors():
    """Filters of brightness alone, and the same but for the last bit of float32."""
    torch.manual_seed(0)
    seen, noise = torch.randn(16, 1).expand(16, 3), torch.randn(16)
    var = 0.08 * seen.sum(dim=1).square() * (1 + 0.2 * noise) + 1e-3                 # with edges
    mean_bn = seen.sum(dim=1) * 0.4 + 0.05 * torch.randn(16)

    def read(filters):
        return colour_target(lambda x: x.mean(dim=(2, 3)) @ filters.T, mean_bn, var, (4, 4))

    first, *others = (read(seen * (1 + 1e-7 * torch.randn(16, 3))) for _ in range(5))
    for mean, cov in others:
        torch.testing.assert_close(mean, first[0], atol=0, rtol=1e-3)
        torch.testing.assert_close(cov, first[1], atol=0, rtol=1e-3)
    assert (first[0] - 0.4).abs().max() < 0.05


def test_transfer_gives_exactly_the_asked_mean_and_covariance(images):
    mean = torch.tensor([0.4, 0.5, 0.6])
    cov = torch.tensor([[0.004, 0.002, 0.001], [0.002, 0.003, 0.001], [0.001, 0.001, 0.002]])
    maps = transfer(images, mean, cov, floor=0.0)
    mapped = torch.einsum("bij,bjhw->bihw", maps[:, :, :3], images) + maps[:, :, 3, None, None]
    got_mean, got_cov = moments(mapped)
    torch.testing.assert_close(got_mean, mean.double().expand(5, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(got_cov, cov.double().expand(5, 3, 3), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(maps[:, :, :3], maps[:, :, :3].mT, atol=1e-4, rtol=1e-4)


def test_images_that_have_the_target_colours_stay_as_they_are(images):
    mean, cov = (m[0].float() for m in moments(images[:1]))
    maps = transfer(images[:1], mean, cov)
    torch.testing.assert_close(maps, torch.eye(3, 4)[None], atol=1e-3, rtol=0)


def test_a_flat_image_gets_the_mean_and_a_bounded_gain():
    flat = torch.full((1, 3, 8, 8), 0.9)
    maps = transfer(flat, torch.full((3,), 0.4), 0.08 * torch.eye(3))
    assert maps.isfinite().all() and maps[:, :, :3].abs().max() < 10
    torch.testing.assert_close(apply_colours(flat, maps), torch.full_like(flat, 0.4))


def test_an_image_is_mapped_alike_in_any_company(images):
    mean, cov = torch.full((3,), 0.5), 0.01 * torch.eye(3)
    together = transfer(images, mean, cov)
    alone = torch.cat([transfer(image[None], mean, cov) for image in images])
    torch.testing.assert_close(together, alone)


def test_apply_keeps_to_the_range_and_the_identity_changes_nothing(images):
    same = torch.eye(3, 4).repeat(5, 1, 1)
    assert torch.equal(apply_colours(images, same), images)
    bright = same.clone()
    bright[:, :, 3] = 2.0
    assert torch.equal(apply_colours(images, bright), torch.ones_like(images))


def test_matching_colours_is_the_transfer_applied_and_changes_each_image_by_itself(images):
    mean, cov = torch.tensor([0.4, 0.5, 0.6]), 0.01 * torch.eye(3)
    matched = match_colours(images, mean, cov)
    assert torch.equal(matched, apply_colours(images, transfer(images, mean, cov)))
    assert matched.shape == images.shape and matched.dtype == images.dtype
    assert matched.min() >= 0 and matched.max() <= 1
    alone = torch.cat([match_colours(image[None], mean, cov) for image in images])
    torch.testing.assert_close(alone, matched)


def test_matched_images_have_the_asked_colours_but_for_the_floor(images):
    mean, cov = torch.tensor([0.4, 0.5, 0.6]), torch.diag(torch.tensor([0.01, 0.008, 0.006]))
    got_mean, got_cov = moments(match_colours(images, mean, cov))
    torch.testing.assert_close(got_mean, mean.double().expand(5, 3), atol=2e-3, rtol=0)
    assert (got_cov - cov).abs().max() < 5e-3


def test_the_map_is_the_formula_of_the_docstring_written_with_matrix_functions(images):
    mean, cov = torch.tensor([0.4, 0.5, 0.6]), torch.tensor(
        [[0.004, 0.002, 0.001], [0.002, 0.003, 0.001], [0.001, 0.001, 0.002]])
    m, S = moments(images)
    maps = transfer(images, mean, cov)
    for b in range(5):
        target, own = cov.double() + 1e-3 * torch.eye(3), S[b] + 1e-3 * torch.eye(3)
        T = maps[b, :, :3].double()
        torch.testing.assert_close(T @ own @ T.T, target, atol=1e-6, rtol=1e-4)
        assert torch.linalg.eigvalsh((T + T.T) / 2).min() > 0        # symmetric and positive
        torch.testing.assert_close(T @ m[b] + maps[b, :, 3].double(), mean.double(),
                                   atol=1e-5, rtol=0)
        root = square_root(own)
        torch.testing.assert_close(root @ root, own)
        torch.testing.assert_close(square_root(own, -0.5) @ root, torch.eye(3).double())


def test_a_layer_of_four_channels_is_treated_as_one_that_hardly_sees_colour():
    filters = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    true = 0.04 * (0.05 * torch.eye(3) + 0.95)
    var = ((filters @ true) * filters).sum(dim=1)
    mean, cov = colour_target(lambda x: x.mean(dim=(2, 3)) @ filters.T, filters.sum(dim=1) * 0.4,
                              var, (4, 4))
    assert cov[0, 1] == cov[0, 2] == cov[1, 2] and cov[0, 0] == cov[1, 1]
    assert cov[0, 1].item() == pytest.approx(0.95 * cov[0, 0].item())
    assert mean.isfinite().all()


def test_what_is_read_off_a_layer_carries_no_gradient(images):
    filters = nn.Conv2d(3, 16, 1)
    mean, cov = colour_target(lambda x: filters(x).mean(dim=(2, 3)), torch.zeros(16),
                              torch.ones(16), (8, 8))
    assert not mean.requires_grad and not cov.requires_grad


def test_the_demo_prints_the_worked_example_and_a_photograph_in_the_cameras_colours(capsys):
    colours.demo()
    text = capsys.readouterr().out
    assert "[0.2, 0.6]" in text
    rows = [line.split("mean")[1].split("standard")[0] for line in text.splitlines()
            if "standard deviation" in line]
    assert rows[0] == rows[1] == rows[3] != rows[2]
