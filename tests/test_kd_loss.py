"""kd_loss.py against slow loops, the published channel-wise formula, and autograd's own check."""

import math

import pytest
import torch

from kd_loss import channelwise_kd, pairwise_kd, parse_losses, pixelwise_kd

LOSSES = [pixelwise_kd, channelwise_kd, pairwise_kd]


def logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(values):
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


def kl(t, s):
    return sum(a * math.log(a / b) for a, b in zip(t, s, strict=True))


def test_the_worked_example_in_the_docstring_is_right():
    t = torch.tensor([math.log(3), 0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    s = torch.zeros(1, 2, 2, 2)
    s[0, 0, 1, 1] = math.log(9)
    assert pixelwise_kd(s, t).item() == pytest.approx(0.1212, abs=5e-5)
    assert channelwise_kd(s, t, temperature=1).item() == pytest.approx(0.2747, abs=5e-5)
    assert pairwise_kd(s, t, grid=2).item() == pytest.approx(0.9375)


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


def test_pairwise_equals_slow_loops():
    s, t = logits(1, 3, 4, 4), logits(1, 3, 4, 4, seed=1)

    def cosines(x):
        regions = [x[0, :, i:i + 2, j:j + 2].mean((1, 2)) for i in (0, 2) for j in (0, 2)]
        return [[(a @ b / a.norm() / b.norm()).item() for b in regions] for a in regions]

    a, b = cosines(s), cosines(t)
    slow = sum((a[i][j] - b[i][j]) ** 2 for i in range(4) for j in range(4)) / 16
    assert pairwise_kd(s, t, grid=2).item() == pytest.approx(slow, rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_value_of_an_image_does_not_depend_on_the_batch(loss):
    s, t = logits(5, 3, 8, 8), logits(5, 3, 8, 8, seed=1)
    single = torch.cat([loss(s[i:i + 1], t[i:i + 1]) for i in range(5)])
    torch.testing.assert_close(loss(s, t), single)


@pytest.mark.parametrize("loss", LOSSES)
def test_doubling_the_crop_by_repetition_does_not_change_the_value(loss):
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


@pytest.mark.parametrize("loss", [pixelwise_kd, channelwise_kd, lambda s, t: pairwise_kd(s, t, 2)])
def test_gradcheck_in_float64(loss):
    s, t = logits(2, 3, 4, 4).double().requires_grad_(), logits(2, 3, 4, 4, seed=1).double()
    assert torch.autograd.gradcheck(lambda x: loss(x, t), (s,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_gives_finite_float32_values_under_autocast(loss, dtype):
    s, t = logits(2, 3, 8, 8, scale=200).to(dtype), logits(2, 3, 8, 8, seed=1, scale=200).to(dtype)
    with torch.autocast("cpu", dtype):
        value = loss(s, t)
    assert value.dtype == torch.float32 and torch.isfinite(value).all()
    torch.testing.assert_close(value, loss(s.float(), t.float()))


@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_that_differ_are_refused(loss):
    with pytest.raises(ValueError, match="same shape"):
        loss(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4))


def test_a_sum_of_losses_is_read_with_its_factors():
    assert parse_losses("pixelwise") == {"pixelwise": 1}
    assert parse_losses("pixelwise+10*channelwise+0.5*pairwise") == {
        "pixelwise": 1, "channelwise": 10, "pairwise": 0.5}


@pytest.mark.parametrize("text", ["", "telepathy", "2*", "x*pixelwise", "-1*pixelwise",
                                  "pixelwise+pixelwise", "pixelwise channelwise"])
def test_what_is_no_sum_of_losses_gets_one_sentence(text):
    with pytest.raises(ValueError, match="is no sum of losses; expected each of some of pixelwise"):
        parse_losses(text)
