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

from support import checkpoint, training
from support.checkpoint import fingerprint
from support.data import Batches, Views
from support.options import one_sentence
from support.training import Training, learning_rate


class Noise(Dataset):
    """Batch t is (images, slots), a function of t alone, as data.Batches."""

    def __len__(self):
        return 1000

    def __getitem__(self, t):
        generator = torch.Generator().manual_seed(t)
        return torch.rand(4, 3, 8, 8, generator=generator), (torch.arange(4) + t) % 4


def network(seed=0):
    """Return a network with everything a state must hold: BatchNorm buffers, and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5),
                         nn.Conv2d(6, 2, 1))


def usual_loss(model, t, progress, images):
    return (model(images) - 1 - progress).square().mean()


def train(model, steps=12, lr=0.1, loss=usual_loss, data=None, workers=0, **how):
    """Train with a loss (model, step, progress, images) -> scalar; return the run."""
    run = Training(model, steps, lr, **how)
    for progress, images, *_ in run.batches(data or Noise(), workers):
        with run.precision():
            value = loss(model, run.done, progress, images)
        run.step(value)
    return run


def stopping(at):
    """Return a loss that raises at a step, after BatchNorm has moved."""
    def loss(model, t, progress, images):
        value = usual_loss(model, t, progress, images)
        if t == at:
            raise KeyboardInterrupt
        return value
    return loss


def same(run, other):
    """Say whether two runs have the same curve and, to the bit, the same model."""
    return run.curve == other.curve and fingerprint(run.model) == fingerprint(other.model)


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
    used = []
    hook = register_optimizer_step_pre_hook(
        lambda optimiser, args, kwargs: used.append(optimiser.param_groups[0]["lr"]))
    train(network(), steps=5)
    hook.remove()
    assert used == pytest.approx([learning_rate(t, 5, 0.1) for t in range(5)])


@pytest.mark.parametrize("optimiser", training.OPTIMISERS)
def test_training_lowers_the_loss_and_ends_in_eval_mode(often, optimiser):
    model = network().eval()
    run = train(model, 60, 0.05, lambda model, t, progress, x: (model(x) - 1).square().mean(),
                optimiser=optimiser)
    assert [step for step, _ in run.curve] == list(range(2, 61, 2)) and not model.training
    assert run.curve[-1][1] < 0.5 * run.curve[0][1]
    assert model[1].num_batches_tracked == 60                    # it was in train mode before


def test_the_curve_is_the_mean_loss_between_two_looks_and_progress_is_the_share_done(often):
    seen = []

    def loss(model, t, progress, images):
        assert torch.equal(images, Noise()[t][0])                # batch t at step t
        seen.append(progress)
        return 0 * model(images).sum() + t ** 2                  # 0, 1, 4, 9, 16

    assert train(network(), 5, loss=loss).curve == [(2, 0.5), (4, 6.5), (5, 16)]
    assert seen == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


# ---------------------------------------------------------------- going on after an interruption

@pytest.mark.parametrize("stop_at", [2, 6, 11])            # before, between and after two states
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(often, tmp_path, stop_at):
    state = tmp_path / "state.pt"
    whole = train(network(), seed=5)
    with pytest.raises(KeyboardInterrupt):
        train(network(), loss=stopping(stop_at), seed=5, state_path=state)
    model = network(seed=9)                                # what it starts from is in the state
    torch.manual_seed(1234)
    assert same(train(model, seed=5, state_path=state), whole)
    assert fingerprint(model) != fingerprint(network())


def test_a_state_changes_nothing_and_a_finished_run_is_not_trained_again(often, tmp_path):
    plain, kept = train(network(), 8), train(network(), 8, state_path=tmp_path / "s.pt")
    again = train(network(seed=9), 8, loss=None, state_path=tmp_path / "s.pt")
    assert same(plain, kept) and same(plain, again) and not again.model.training


def test_the_state_of_another_run_is_refused_with_its_name(tmp_path):
    train(network(), 2, state_path=tmp_path / "s.pt")
    with pytest.raises(ValueError, match=r"s\.pt is no state of this run; delete it to begin anew"):
        Training(nn.Conv2d(3, 5, 1), 2, 0.1, state_path=tmp_path / "s.pt")
    train(network(), 2, state_path=tmp_path / "t.pt", about="that")
    with pytest.raises(ValueError, match=r"t\.pt is no state of this run"):
        Training(network(), 2, 0.1, state_path=tmp_path / "t.pt", about="this")
    checkpoint.save({"step": 1}, tmp_path / "s.pt")
    with pytest.raises(ValueError, match=r"s\.pt is no state of this run"):
        Training(network(), 2, 0.1, state_path=tmp_path / "s.pt")


def test_the_number_of_loader_workers_does_not_matter(often):
    alone, *others = (train(network(), 9, workers=workers) for workers in (0, 1, 2))
    assert all(same(alone, other) for other in others)


def test_a_time_stamp_may_be_the_seed():
    assert train(network(), 2, seed=20251125123456).done == 2


def test_dropout_depends_on_seed_and_step_alone():
    def masks(seed, noise):
        seen = []

        def loss(model, t, progress, images):
            seen.append(model[3](torch.ones(64)).tolist())
            return model(images).mean()
        model = network()
        torch.manual_seed(noise)
        train(model, 3, loss=loss, seed=seed)
        return seen

    first = masks(7, noise=1)
    assert masks(7, noise=2) == first
    drawn = [str(mask) for seed in (7, 8, 0) for mask in masks(seed, noise=1)]
    assert len(set(drawn)) == 9                                  # three steps of three seeds


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_stops_at_once_and_training_goes_on_to_the_bit_from_the_last_state(
        often, tmp_path, interruptible, workers):
    def loss(model, t, progress, images):
        value = usual_loss(model, t, progress, images)           # BatchNorm has moved already
        if t == 7:
            signal.raise_signal(signal.SIGINT)
        return value

    state = tmp_path / "s.pt"
    with pytest.raises(KeyboardInterrupt):
        train(network(), loss=loss, state_path=state, workers=workers)
    assert checkpoint.load(state)["step"] == 4
    assert same(train(network(seed=9), state_path=state), train(network()))


@pytest.fixture
def interruptible():
    """Handle SIGINT as Python does, which a shell's background jobs do not: they ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_state_is_saved_at_least_every_so_many_seconds_and_at_the_end(tmp_path, monkeypatch):
    saved, clock = [], iter(range(100))
    monkeypatch.setattr(training.checkpoint, "save", lambda state, path: saved.append(state))
    monkeypatch.setattr(training, "SAVE_SECONDS", 7)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: 2 * next(clock)))
    train(network(), 13, state_path=tmp_path / "s.pt")
    assert [state["step"] for state in saved] == [0, 4, 8, 12, 13]


def test_a_file_that_vanishes_stops_with_its_name_and_training_goes_on_when_it_is_back(
        often, tmp_path, pool_folder):
    files, state = sorted(pool_folder.iterdir()), tmp_path / "s.pt"

    def start(seed, **how):
        return train(network(seed), data=Batches(Views(files, (8, 8), 0), 4), **how)

    whole = start(0)
    gone = files[Batches(Views(files, (8, 8), 0), 4)[5][1][2]]
    gone.rename(tmp_path / "elsewhere")
    for workers in (0, 1):
        with pytest.raises(OSError, match=rf"^{gone}: FileNotFoundError.*; put this file") as error:
            start(0, state_path=state, workers=workers)
        assert "\n" not in str(error.value) and checkpoint.load(state)["step"] == 4
    (tmp_path / "elsewhere").rename(gone)
    assert same(start(9, state_path=state), whole)


class Deadly(Noise):
    """A data set whose fourth batch kills the process that loads it, as want of memory does."""

    def __getitem__(self, t):
        if t == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(t)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loading_process_that_dies_is_one_sentence_and_hangs_nothing(capsys):
    with pytest.raises(SystemExit):
        one_sentence(lambda: train(network(), data=Deadly(), workers=1))()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: a process that loads images died") and "--workers" in last


def test_a_disk_that_fills_up_stops_with_the_last_good_state(often, tmp_path, monkeypatch):
    state, rename = tmp_path / "s.pt", os.replace

    def full(source, target):
        if checkpoint.load(source)["step"] == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", full)
    with pytest.raises(OSError, match=r"could not write .*s\.pt: No space left.*free some space"):
        train(network(), state_path=state)
    assert checkpoint.load(state)["step"] == 4 and os.listdir(tmp_path) == ["s.pt"]
    monkeypatch.setattr(checkpoint.os, "replace", rename)
    assert same(train(network(seed=9), state_path=state), train(network()))


# ---------------------------------------------------------------- losses that blow up

@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("step", [5, 6, 12])
def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_saves_nothing(
        often, tmp_path, bad, step):
    def loss(model, t, progress, images):
        return model(images).square().mean() * (bad if t + 1 == step else 1)

    with pytest.raises(ValueError, match=f"the loss became infinite or NaN at step {step}; lower "
                                         "--lr, or use --amp off. Nothing bad was saved"):
        train(network(), loss=loss, state_path=tmp_path / "s.pt")
    state = checkpoint.load(tmp_path / "s.pt")
    assert state["step"] == (step - 1) // 4 * 4 and state["curve"][-1][0] == state["step"]
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(("bad", "kept"), [(8, 4), (12, 8)])
def test_weights_that_are_not_finite_behind_a_finite_loss_are_not_saved(often, tmp_path, bad, kept):
    def loss(model, t, progress, images):
        value = model(images).square().mean()                    # the slope of sqrt(0) is infinite
        return value if t + 1 != bad else (0 * value).sqrt()

    with pytest.raises(ValueError, match=f"weights became infinite or NaN by step {bad}; lower"):
        train(network(), loss=loss, state_path=tmp_path / "s.pt")
    assert checkpoint.load(tmp_path / "s.pt")["step"] == kept
    with pytest.raises(ValueError, match=f"weights became infinite or NaN by step {bad}"):
        train(network(), loss=loss)                              # nor handed on where nothing is


# ---------------------------------------------------------------- mixed precision

@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_mixed_precision_concerns_the_forward_pass_and_the_weights_stay_float32(amp):
    seen = []

    def loss(model, t, progress, images):
        seen.append((output := model(images)).dtype)
        return output.float().square().mean()

    run = train(network(), 2, loss=loss, amp=amp)
    assert seen == [amp or torch.float32] * 2
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_on_a_gpu_too_a_resumed_run_equals_an_uninterrupted_one(often, tmp_path, amp):
    whole = train(network().cuda(), amp=amp)
    with pytest.raises(KeyboardInterrupt):
        train(network().cuda(), loss=stopping(6), amp=amp, state_path=tmp_path / "s.pt")
    again = train(network(9).cuda(), amp=amp, state_path=tmp_path / "s.pt")
    torch.testing.assert_close(torch.tensor(again.curve), torch.tensor(whole.curve), rtol=1e-3,
                               atol=1e-4)
    torch.testing.assert_close(again.model.state_dict(), whole.model.state_dict(), rtol=1e-3,
                               atol=1e-4)
