"""colours.py: pictures get the colours asked for, and those read off the teacher are found."""

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_model, freeze
from support.recolour import private_colours, repaint
from support.data import to_tensor


def colours(image):
    """Return the mean (3,) and the covariance (3, 3) of a picture's colours, in [0, 1]."""
    pixels = to_tensor(image).flatten(1).double() / 255                          # (3, HW)
    return pixels.mean(dim=1), torch.cov(pixels, correction=0)


@pytest.fixture
def photograph():
    """Return a smooth picture, whose colours are nearly the same at half its size."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(60, 200, (6, 8, 3), dtype=np.uint8))
    return small.resize((96, 64), Image.BICUBIC)


def test_a_picture_gets_the_mean_and_the_covariance_asked_for_within_rounding(photograph):
    mean = torch.tensor([0.6, 0.45, 0.4])
    cov = 0.01 * torch.tensor([[1.5, 0.8, 0.4], [0.8, 1.2, 0.5], [0.4, 0.5, 0.6]])
    for size in ((64, 96), (32, 48)):                            # read at its own and at half size
        painted = repaint(photograph, size, mean, cov)
        found_mean, found_cov = colours(painted)
        assert painted.size == photograph.size and painted.mode == "RGB"
        assert (found_mean - mean).abs().max() < 1e-3
        assert (found_cov - cov).abs().max() < 1e-3


def test_the_teachers_colours_are_given_to_every_picture_whatever_it_had(photograph):
    torch.manual_seed(0)
    teacher = freeze(build_model("resnet_tiny", 4))
    scene = torch.rand(8, 3, 32, 48) * torch.tensor([0.5, 0.3, 0.2]).view(3, 1, 1) + 0.2
    stem = teacher.net.stem
    answers = stem[0]((scene - teacher.mean) / teacher.std)      # what its first layer remembers
    stem[1].running_mean, stem[1].running_var = answers.mean((0, 2, 3)), answers.var((0, 2, 3))
    prepare = private_colours(teacher, (32, 48))
    night = photograph.point(lambda value: value // 4)
    for image in (photograph, night):
        assert (colours(prepare(image))[0] - scene.mean((0, 2, 3))).abs().max() < 0.05
