"""kd_loss.py against slow loops over both published formulas."""

import math

import pytest
import torch

import kd_loss
from kd_loss import channelwise_kd, pixelwise_kd

both_losses = pytest.mark.parametrize("loss", [pixelwise_kd, channelwise_kd])


def logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(values):
    exps = [math.exp(v - max(values)) for v in values]
    return [e / sum(exps) for e in exps]


def slow_kl(t, s, temperature):
    """Return T^2 times the mean of KL(t || s) over pairs of rows of logits."""
    kls = [sum(a * math.log(a / b) for a, b in zip(*map(softmax, pair), strict=True))
           for pair in zip((t / temperature).tolist(), (s / temperature).tolist(), strict=True)]
    return temperature ** 2 * sum(kls) / len(kls)


@pytest.mark.parametrize(("loss", "default"), [(pixelwise_kd, 1.0), (channelwise_kd, 4.0)])
@pytest.mark.parametrize("temperature", [None, 2.5])
def test_each_image_has_the_loss_of_the_published_formula(loss, default, temperature):
    """Rows: the classes of a pixel; Shu et al.: the pixels of a class, averaged over classes."""
    s, t = logits(2, 3, 4, 5), logits(2, 3, 4, 5, seed=1)
    rows = [x.flatten(2) if loss == channelwise_kd else x.flatten(2).mT for x in (t, s)]
    slow = [slow_kl(*pair, temperature or default) for pair in zip(*rows, strict=True)]
    torch.testing.assert_close(loss(s, t, *filter(None, [temperature])), torch.tensor(slow))


@both_losses
def test_equal_logits_have_loss_zero_and_repeated_pixels_change_nothing(loss):
    s, t = (logits(2, 3, 8, 8, seed=seed).requires_grad_() for seed in (0, 1))
    torch.testing.assert_close(loss(t, t), torch.zeros(2), atol=1e-5, rtol=0)
    twice = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (s, t)]
    torch.testing.assert_close(loss(*twice), loss(s, t))
    loss(s, t).sum().backward()
    assert t.grad is None and s.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both_losses
def test_half_precision_gives_finite_float32_values_under_autocast(loss, dtype):
    s, t = (logits(2, 3, 8, 8, seed=seed, scale=200).to(dtype) for seed in (0, 1))
    with torch.autocast("cpu", dtype):
        value = loss(s, t)
    assert value.dtype == torch.float32 and torch.isfinite(value).all()
    torch.testing.assert_close(value, loss(s.float(), t.float()))


@both_losses
@pytest.mark.parametrize(("student", "teacher"), [
    ((1, 3, 8, 8), (1, 3, 4, 4)), ((1, 3, 8, 8), (2, 3, 8, 8)), ((3, 8, 8), (3, 8, 8))])
def test_logits_of_different_shapes_or_without_a_batch_are_refused(loss, student, teacher):
    with pytest.raises(ValueError, match=r"logits of one shape \(B, K, H, W\), resized if"):
        loss(torch.zeros(student), torch.zeros(teacher))


def test_over_a_single_class_only_channelwise_has_something_to_compare():
    with pytest.raises(ValueError, match="two classes or more"):
        pixelwise_kd(torch.zeros(2, 1, 8, 8), torch.rand(2, 1, 8, 8))
    assert (channelwise_kd(torch.zeros(2, 1, 8, 8), torch.rand(2, 1, 8, 8)) > 0).all()


def test_the_upper_limit_of_channelwise_for_a_constant_student_is_that_of_the_docstring():
    t = torch.full((1, 2, 8, 8), -1e4)
    t[..., 0, 0] = 1e4                                             # all in one pixel
    assert channelwise_kd(torch.zeros_like(t), t).item() == pytest.approx(16 * math.log(64))


def test_the_demo_prints_what_channelwise_does_not_see(capsys):
    kd_loss.demo()
    assert any(line.split()[-2:] == ["0.3106", "0.0000"]
               for line in capsys.readouterr().out.splitlines()
               if line.startswith("class 1 too strong"))
