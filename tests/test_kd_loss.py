"""kd_loss.py against slow loops and the published channel-wise formula."""

import math

import pytest
import torch

import kd_loss
from kd_loss import channelwise_kd, pixelwise_kd

LOSSES = [pixelwise_kd, channelwise_kd]


def logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(values):
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


def kl(t, s):
    return sum(a * math.log(a / b) for a, b in zip(t, s, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_pixelwise_equals_slow_loops(temperature):
    T = temperature
    s, t = logits(2, 3, 4, 5), logits(2, 3, 4, 5, seed=1)
    slow = [sum(kl(softmax((t[b, :, y, x] / T).tolist()), softmax((s[b, :, y, x] / T).tolist()))
                for y in range(4) for x in range(5)) / 20 * T ** 2 for b in range(2)]
    torch.testing.assert_close(pixelwise_kd(s, t, T), torch.tensor(slow))


def test_channelwise_equals_the_published_formula():
    s, t, T = logits(2, 3, 4, 5), logits(2, 3, 4, 5, seed=1), 4.0
    # Shu et al.: T^2 / C sum over channels of KL over positions; their code sums, divides by C B.
    slow = [sum(kl(softmax((t[b, k].flatten() / T).tolist()),
                   softmax((s[b, k].flatten() / T).tolist())) for k in range(3)) / 3 * T ** 2
            for b in range(2)]
    torch.testing.assert_close(channelwise_kd(s, t), torch.tensor(slow))
    p = torch.softmax(t.view(-1, 20) / T, dim=1)
    log_p, log_q = (torch.log_softmax(x.view(-1, 20) / T, dim=1) for x in (t, s))
    published = (p * (log_p - log_q)).sum() * T ** 2 / 6
    torch.testing.assert_close(channelwise_kd(s, t).mean(), published)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_an_image_does_not_depend_on_the_batch(loss):
    s, t = logits(5, 3, 8, 8), logits(5, 3, 8, 8, seed=1)
    single = torch.cat([loss(s[i:i + 1], t[i:i + 1]) for i in range(5)])
    torch.testing.assert_close(loss(s, t), single)


@pytest.mark.parametrize("loss", LOSSES)
def test_upsampling_by_repetition_does_not_change_the_value(loss):
    s, t = logits(2, 3, 8, 8), logits(2, 3, 8, 8, seed=1)
    twice = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (s, t)]
    torch.testing.assert_close(loss(*twice), loss(s, t))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_zero_for_equal_logits_and_positive_otherwise(loss):
    s, t = logits(2, 3, 8, 8), logits(2, 3, 8, 8, seed=1)
    torch.testing.assert_close(loss(t, t), torch.zeros(2), atol=1e-5, rtol=0)
    assert (loss(s, t) > 0).all()


def test_the_gradient_keeps_its_size_when_the_temperature_changes():
    s, t = logits(1, 3, 8, 8, scale=0.1), logits(1, 3, 8, 8, seed=1, scale=0.1)
    norms = []
    for T in (1.0, 4.0):
        x = s.clone().requires_grad_()
        pixelwise_kd(x, t, T).sum().backward()
        norms.append(x.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_reaches_the_teacher(loss):
    s, t = logits(1, 3, 8, 8).requires_grad_(), logits(1, 3, 8, 8, seed=1).requires_grad_()
    loss(s, t).sum().backward()
    assert t.grad is None and s.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_gives_finite_float32_values_under_autocast(loss, dtype):
    s, t = logits(2, 3, 8, 8, scale=200).to(dtype), logits(2, 3, 8, 8, seed=1, scale=200).to(dtype)
    with torch.autocast("cpu", dtype):
        value = loss(s, t)
    assert value.dtype == torch.float32 and torch.isfinite(value).all()
    torch.testing.assert_close(value, loss(s.float(), t.float()))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("student", "teacher"), [
    ((1, 3, 8, 8), (1, 3, 4, 4)), ((1, 3, 8, 8), (2, 3, 8, 8)), ((3, 8, 8), (3, 8, 8))])
def test_logits_of_different_shapes_or_without_a_batch_are_refused(loss, student, teacher):
    with pytest.raises(ValueError, match=r"the same shape \(B, K, H, W\); resize"):
        loss(torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize("size", [4, 32])
def test_the_upper_limit_of_channelwise_for_a_constant_student_is_that_of_the_docstring(size):
    t = torch.full((1, 2, size, size), -1e4)
    t[..., 0, 0] = 1e4                                             # all in one pixel
    value = channelwise_kd(torch.zeros_like(t), t, temperature=4.0)
    assert value.item() == pytest.approx(16 * math.log(size ** 2), rel=1e-5)
    some = channelwise_kd(torch.zeros_like(t), logits(1, 2, size, size, scale=9.0))
    assert 0 < some.item() < value.item()


def test_the_demo_prints_the_worked_example_and_what_channelwise_does_not_see(capsys):
    kd_loss.demo()
    text = capsys.readouterr().out
    assert "pixelwise 0.1212, channelwise 0.2747" in text
    assert any(line.split()[-2:] == ["0.3106", "0.0000"] for line in text.splitlines()
               if line.startswith("class 1 too strong"))
