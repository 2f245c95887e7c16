"""training.py: the learning rate by hand, runs that resume to the bit, and losses that blow up."""

import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Dataset

import checkpoint
import training
from models import fingerprint
from training import fit, learning_rate, pick_amp, pick_device


class Noise(Dataset):
    """Batch t is (images, slots), a function of t alone."""

    def __len__(self):
        return 1000

    def __getitem__(self, t):
        generator = torch.Generator().manual_seed(t)
        return torch.rand(4, 3, 8, 8, generator=generator), torch.arange(4)


def network(seed=0):
    """Return a network with everything a state must hold: BatchNorm buffers, and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5),
                         nn.Conv2d(6, 2, 1))


def loss_of(model, stop_at=None, steps=12):
    def batch_loss(progress, images, slots):
        if stop_at is not None and progress >= stop_at / steps:
            raise KeyboardInterrupt
        return (model(images) - 1 - progress).square().mean()
    return batch_loss


@pytest.fixture
def often(monkeypatch):
    """Look at the loss every two steps and save a state every four."""
    monkeypatch.setattr(training, "CHECK_EVERY", 2)
    monkeypatch.setattr(training, "SAVE_EVERY", 4)


def test_the_learning_rate_warms_up_and_then_falls_by_the_poly_rule():
    assert learning_rate(0, 1000, 0.1) == pytest.approx(0.1 / 50)
    assert learning_rate(24, 1000, 0.1) == pytest.approx(0.1 * 0.5 * 0.976 ** 0.9)
    assert learning_rate(49, 1000, 0.1) == pytest.approx(0.1 * 0.951 ** 0.9)
    assert learning_rate(500, 1000, 0.1) == pytest.approx(0.0535887, abs=1e-7)   # 0.1 / 2^0.9
    assert learning_rate(999, 1000, 0.1) == pytest.approx(0.1 * 0.001 ** 0.9)


def test_every_step_uses_the_learning_rate_of_its_number():
    used, model = [], network()
    hook = register_optimizer_step_pre_hook(
        lambda optimiser, args, kwargs: used.append(optimiser.param_groups[0]["lr"]))
    fit(model, loss_of(model), Noise(), 5, 0.1)
    hook.remove()
    assert used == pytest.approx([learning_rate(t, 5, 0.1) for t in range(5)])


def test_training_lowers_the_loss_and_ends_in_eval_mode(often):
    model = network().eval()
    curve = fit(model, lambda progress, images, slots: (model(images) - 1).square().mean(), Noise(),
                60, 0.05)
    assert [step for step, _ in curve] == list(range(2, 61, 2)) and not model.training
    assert curve[-1][1] < 0.5 * curve[0][1]
    assert model[1].num_batches_tracked == 60                    # it was in train mode before


def test_the_curve_is_the_mean_loss_between_two_looks_and_progress_is_the_share_done(often):
    model, seen = network(), []

    def batch_loss(progress, images, slots):
        assert torch.equal(images, Noise()[len(seen)][0])        # batch t at step t
        seen.append(progress)
        return 0 * model(images).sum() + (len(seen) - 1) ** 2    # 0, 1, 4, 9, 16

    curve = fit(model, batch_loss, Noise(), 5, 0.1)
    assert curve == [(2, 0.5), (4, 6.5), (5, 16)]
    assert seen == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


# ---------------------------------------------------------------- going on after an interruption

@pytest.mark.parametrize("stop_at", [2, 6, 11])            # before, between and after two states
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(often, tmp_path, stop_at):
    whole = network()
    curve = fit(whole, loss_of(whole), Noise(), 12, 0.1, seed=5)

    torn, state = network(), tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(torn, loss_of(torn, stop_at), Noise(), 12, 0.1, seed=5, state_path=state)
    assert state.exists() == (stop_at > 4)
    resumed = network(seed=9 if stop_at > 4 else 0)        # what it starts from is in the state
    torch.manual_seed(1234)
    assert fit(resumed, loss_of(resumed), Noise(), 12, 0.1, seed=5, state_path=state) == curve
    assert fingerprint(resumed) == fingerprint(whole) != fingerprint(network())


def test_a_state_changes_nothing_and_a_finished_run_is_not_trained_again(often, tmp_path):
    plain, kept, again = network(), network(), network(seed=9)
    curve = fit(plain, loss_of(plain), Noise(), 8, 0.1)
    assert fit(kept, loss_of(kept), Noise(), 8, 0.1, state_path=tmp_path / "s.pt") == curve
    assert fit(again, None, Noise(), 8, 0.1, state_path=tmp_path / "s.pt") == curve
    assert fingerprint(plain) == fingerprint(kept) == fingerprint(again)


def test_the_number_of_loader_workers_does_not_matter(often):
    models = [network(), network()]
    curves = [fit(model, loss_of(model), Noise(), 4, 0.1, workers=workers)
              for model, workers in zip(models, (0, 2), strict=True)]
    assert curves[0] == curves[1] and fingerprint(models[0]) == fingerprint(models[1])


def test_dropout_depends_on_seed_and_step_alone():
    def masks(seed, noise):
        model, seen = network(), []

        def batch_loss(progress, images, slots):
            seen.append(model[3](torch.ones(64)).tolist())
            return model(images).mean()
        torch.manual_seed(noise)
        fit(model, batch_loss, Noise(), 3, 0.1, seed=seed)
        return seen

    first = masks(7, noise=1)
    assert masks(7, noise=2) == first
    drawn = [str(mask) for seed in (7, 8, 0) for mask in masks(seed, noise=1)]
    assert len(set(drawn)) == 9                                  # three steps of three seeds


# ---------------------------------------------------------------- losses that blow up

@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_names_the_steps_and_saves_nothing(often, tmp_path,
                                                                                   bad):
    model, steps = network(), iter(range(1, 13))

    def batch_loss(progress, images, slots):
        return model(images).square().mean() + (bad if next(steps) == 7 else 0)

    with pytest.raises(ValueError, match=r"loss became (nan|inf) .*between steps 7 and 8; lower"):
        fit(model, batch_loss, Noise(), 12, 0.1, state_path=tmp_path / "s.pt")
    state = checkpoint.load(tmp_path / "s.pt")
    assert state["step"] == 4 and [step for step, _ in state["curve"]] == [2, 4]
    assert all(value.isfinite().all() for value in state["model"].values())


def test_weights_that_are_not_finite_behind_a_finite_loss_are_not_saved(often, tmp_path):
    model, steps = network(), iter(range(1, 13))

    def batch_loss(progress, images, slots):
        loss = model(images).square().mean()                     # at 8, the slope of sqrt(0) is inf
        return loss if next(steps) != 8 else (0 * loss).sqrt()

    with pytest.raises(ValueError, match="between steps 7 and 8"):
        fit(model, batch_loss, Noise(), 12, 0.1, state_path=tmp_path / "s.pt")
    assert checkpoint.load(tmp_path / "s.pt")["step"] == 4


def test_the_loss_is_looked_at_before_every_state_that_is_saved():
    assert training.SAVE_EVERY % training.CHECK_EVERY == 0


# ---------------------------------------------------------------- devices and mixed precision

def test_devices_and_precisions_are_picked_by_name(monkeypatch):
    cpu = torch.device("cpu")
    assert pick_device("cpu") == cpu
    assert [pick_amp(name, cpu) for name in ("bfloat16", "float16", "off")] == [
        torch.bfloat16, torch.float16, None]
    assert pick_amp("auto", cpu) in (torch.bfloat16, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == cpu
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"--device {name} .*no CUDA device.*--device cpu"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    for capability, dtype in (((7, 5), None), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, now=capability: now)
        assert pick_amp("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_mixed_precision_concerns_the_forward_pass_and_the_weights_stay_float32(amp):
    model, seen = network(), []

    def batch_loss(progress, images, slots):
        seen.append(model(images).dtype)
        return model(images).float().square().mean()

    fit(model, batch_loss, Noise(), 2, 0.1, amp=amp)
    assert seen == [amp or torch.float32] * 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_on_a_gpu_too_a_resumed_run_equals_an_uninterrupted_one(often, tmp_path, amp):
    whole, torn, resumed = (network(seed).cuda() for seed in (0, 0, 9))
    curve = fit(whole, loss_of(whole), Noise(), 12, 0.1, amp=amp)
    with pytest.raises(KeyboardInterrupt):
        fit(torn, loss_of(torn, 6), Noise(), 12, 0.1, amp=amp, state_path=tmp_path / "s.pt")
    again = fit(resumed, loss_of(resumed), Noise(), 12, 0.1, amp=amp, state_path=tmp_path / "s.pt")
    torch.testing.assert_close(torch.tensor(again), torch.tensor(curve), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=1e-3, atol=1e-4)
