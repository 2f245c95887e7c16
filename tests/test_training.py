"""training.py: the learning rate by hand, runs that resume to the bit, and losses that blow up."""

import errno
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Dataset

from models import fingerprint
from support import checkpoint, training
from support.data import Batches
from support.options import one_sentence
from support.training import fit, learning_rate


class Noise(Dataset):
    """Batch t is (images, slots), a function of t alone, as data.Batches."""

    files = [f"{i}.jpg" for i in range(4)]

    def slots(self, t):
        return (torch.arange(4) + t) % 4

    def __len__(self):
        return 1000

    def __getitem__(self, t):
        generator = torch.Generator().manual_seed(t)
        return torch.rand(4, 3, 8, 8, generator=generator), self.slots(t)


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
    models = [network() for _ in range(3)]
    curves = [fit(model, loss_of(model), Noise(), 9, 0.1, workers=workers)
              for model, workers in zip(models, (0, 1, 4), strict=True)]
    assert curves[0] == curves[1] == curves[2] and len(set(map(fingerprint, models))) == 1


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_waits_for_the_end_of_the_step_saves_and_resumes_to_the_bit(tmp_path, number,
                                                                             workers):
    whole, torn, resumed = network(), network(), network(seed=9)
    curve = fit(whole, loss_of(whole), Noise(), 12, 0.1)
    before = signal.getsignal(number)

    def batch_loss(progress, images, slots):
        loss = loss_of(torn)(progress, images, slots)            # BatchNorm has moved already
        if progress > 6 / 12:
            signal.raise_signal(number)
        return loss

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(torn, batch_loss, Noise(), 12, 0.1, state_path=tmp_path / "s.pt", workers=workers)
    assert caught.value.args == (number,) and signal.getsignal(number) == before
    assert checkpoint.load(tmp_path / "s.pt")["step"] == 8
    again = fit(resumed, loss_of(resumed), Noise(), 12, 0.1, state_path=tmp_path / "s.pt")
    assert again == curve and fingerprint(resumed) == fingerprint(whole)


@pytest.fixture
def interruptible():
    """Handle SIGINT as Python does, which a shell's background jobs do not: they ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once(tmp_path, interruptible):
    model = network()

    def batch_loss(progress, images, slots):
        signal.raise_signal(signal.SIGINT)                # os.kill's two could arrive as one
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(model, batch_loss, Noise(), 12, 0.1, state_path=tmp_path / "s.pt")
    assert caught.value.args == () and not (tmp_path / "s.pt").exists()


def test_a_state_is_saved_at_least_every_so_many_seconds_and_at_the_end(tmp_path, monkeypatch):
    saved, clock, model = [], iter(range(100)), network()
    monkeypatch.setattr(training.checkpoint, "save", lambda state, path: saved.append(state))
    monkeypatch.setattr(training, "SAVE_SECONDS", 7)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: 2 * next(clock)))
    fit(model, loss_of(model), Noise(), 13, 0.1, state_path=tmp_path / "s.pt")
    assert [state["step"] for state in saved] == [4, 8, 12, 13]
    assert all(value.isfinite().all() for value in saved[0]["model"].values())


def test_a_file_that_vanishes_stops_with_its_name_and_training_goes_on_when_it_is_back(
        tmp_path, pool_folder):
    files, state = sorted(pool_folder.iterdir()), tmp_path / "s.pt"

    def train(seed, **how):
        model = network(seed)
        batches = Batches(files, (8, 8), 4, 0)
        return fit(model, loss_of(model), batches, 12, 0.1, **how), fingerprint(model)

    whole = train(0)
    gone = files[Batches(files, (8, 8), 4, 0).slots(5)[2]]
    gone.rename(tmp_path / "elsewhere")
    for workers in (0, 1):
        with pytest.raises(OSError, match=rf"^{gone}: FileNotFoundError.*; put this file") as error:
            train(0, state_path=state, workers=workers)
        assert "\n" not in str(error.value) and checkpoint.load(state)["step"] == 5
    (tmp_path / "elsewhere").rename(gone)
    assert train(9, state_path=state) == whole


class Deadly(Noise):
    """A data set whose fourth batch kills the process that loads it, as want of memory does."""

    def __getitem__(self, t):
        if t == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(t)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loading_process_that_dies_is_one_sentence_and_hangs_nothing(capsys):
    model = network()
    with pytest.raises(SystemExit):
        one_sentence(lambda: fit(model, loss_of(model), Deadly(), 12, 0.1, workers=1))()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: a process that loads images died") and "--workers" in last


def test_a_disk_that_fills_up_stops_with_the_last_good_state(often, tmp_path, monkeypatch):
    whole, torn, resumed, state = network(), network(), network(seed=9), tmp_path / "s.pt"
    curve = fit(whole, loss_of(whole), Noise(), 12, 0.1)

    def full(source, target):
        if checkpoint.load(source)["step"] == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(checkpoint.os, "replace", full)
    with pytest.raises(OSError, match=r"could not write .*s\.pt: No space left.*free some space"):
        fit(torn, loss_of(torn), Noise(), 12, 0.1, state_path=state)
    assert checkpoint.load(state)["step"] == 4 and os.listdir(tmp_path) == ["s.pt"]
    monkeypatch.setattr(checkpoint.os, "replace", rename)
    assert fit(resumed, loss_of(resumed), Noise(), 12, 0.1, state_path=state) == curve
    assert fingerprint(resumed) == fingerprint(whole)


# ---------------------------------------------------------------- losses that blow up

@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_saves_nothing(often, tmp_path,
                                                                                  bad):
    model, steps = network(), iter(range(1, 13))

    def batch_loss(progress, images, slots):
        return model(images).square().mean() * (bad if next(steps) == 7 else 1)

    with pytest.raises(ValueError, match=r"the loss became infinite or NaN at step 7 on 2\.jpg, "
                                         r"3\.jpg, 0\.jpg, 1\.jpg; lower --lr"):
        fit(model, batch_loss, Noise(), 12, 0.1, state_path=tmp_path / "s.pt")
    state = checkpoint.load(tmp_path / "s.pt")
    assert state["step"] == 4 and [step for step, _ in state["curve"]] == [2, 4]
    assert all(value.isfinite().all() for value in state["model"].values())


def test_the_term_and_the_file_that_are_not_finite_are_named(often):
    model = network()

    def batch_loss(progress, images, slots):
        each = model(images).square().mean((1, 2, 3))                                # (B,)
        broken = each + torch.where(slots == 2, math.inf, 0.0) * (progress >= 0.5)   # 0 inf = NaN
        return each.mean() + 0 * broken.mean(), {"pixelwise": each, "pairwise": broken}

    with pytest.raises(ValueError, match=r"^pairwise became infinite or NaN at step 1 on 2\.jpg;"):
        fit(model, batch_loss, Noise(), 12, 0.1)


def test_weights_that_are_not_finite_behind_a_finite_loss_are_not_saved(often, tmp_path):
    model, steps = network(), iter(range(1, 13))

    def batch_loss(progress, images, slots):
        loss = model(images).square().mean()                     # at 8, the slope of sqrt(0) is inf
        return loss if next(steps) != 8 else (0 * loss).sqrt()

    with pytest.raises(ValueError, match="weights became infinite or NaN between steps 7 and 8"):
        fit(model, batch_loss, Noise(), 12, 0.1, state_path=tmp_path / "s.pt")
    assert checkpoint.load(tmp_path / "s.pt")["step"] == 4


# ---------------------------------------------------------------- mixed precision

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
