"""training.py: the learning rate by hand, runs that resume to the bit, and losses that blow up."""

import math
import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from distill import Config
from support import checkpoint, training
from support.checkpoint import fingerprint
from support.data import Batches, Views
from support.options import one_sentence
from support.training import Training, warmup_poly


class Noise(Dataset):
    """Batch t is (images, index, None), a function of t alone, as in data.Batches."""

    def __getitem__(self, t):
        generator = torch.Generator().manual_seed(t)
        return torch.rand(4, 3, 8, 8, generator=generator), (torch.arange(4) + t) % 4, None


def network(seed=0):
    """Return a network with everything a state must hold: BatchNorm buffers, and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5),
                         nn.Conv2d(6, 2, 1))


def usual_loss(model, step, images):
    return (model(images) - 1 - step / 12).square().mean()


def train(model, loss=usual_loss, data=None, out=None, **options):
    """Train with a loss (model, step, images) -> scalar; return the run."""
    cfg = Config(**{"steps": 12, "amp": "off"} | options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = warmup_poly(optimizer, cfg.steps)
    run = Training(model, optimizer, scheduler, cfg, out)
    for step, images, _, _ in run.steps(data or Noise()):
        with run.autocast():
            value = loss(model, step, images)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        scheduler.step()
        run.log(value)
    return run


def same(run, other):
    """Say whether two runs have the same curve and, to the bit, the same model."""
    return run.curve == other.curve and fingerprint(run.model) == fingerprint(other.model)


@pytest.fixture
def often(monkeypatch):
    """Check the loss every two steps and save a state every four."""
    monkeypatch.setattr(training, "CHECK_EVERY", 2)
    monkeypatch.setattr(training, "SAVE_EVERY", 4)


def test_the_learning_rate_warms_up_and_then_falls_by_the_poly_rule():
    optimizer = torch.optim.SGD(network().parameters(), 0.1)
    rate = warmup_poly(optimizer, 1000).lr_lambdas[0]
    by_hand = {0: 1 / 50, 24: 0.5 * 0.976 ** 0.9, 49: 0.951 ** 0.9, 500: 0.535887, 999: 0.001995262}
    assert {t: rate(t) for t in by_hand} == pytest.approx(by_hand, rel=1e-6)


def test_batch_t_comes_at_step_t_and_the_curve_is_the_mean_loss_between_two_checks(often):
    def loss(model, step, images):
        assert torch.equal(images, Noise()[step][0])
        return 0 * model(images).sum() + step ** 2               # 0, 1, 4, 9, 16

    assert train(network(), loss, steps=5).curve == [(2, 0.5), (4, 6.5), (5, 16)]


def test_dropout_depends_on_seed_and_step_alone():
    def loss(model, step, images):
        masks.append(str(model[3](torch.ones(64)).tolist()))
        return model(images).mean()

    masks = []
    for noise, seed in enumerate((7, 8, 0, 20251125123456, 7)):        # a time stamp, too
        train(network(noise), loss, steps=3, seed=seed)
    assert len(set(masks)) == 12 and masks[-3:] == masks[:3]           # three steps of four seeds


def test_a_training_leaves_the_random_numbers_of_its_caller_alone():
    model, before = network(), torch.get_rng_state()
    train(model, steps=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("stop_at", "workers"), [(2, 0), (6, 1), (11, 0)])
def test_a_resumed_run_is_the_same_to_the_bit(often, tmp_path, monkeypatch, stop_at, workers):
    """Stopped before, at and after a state, which may fall between two checks of the loss."""
    monkeypatch.setattr(training, "SAVE_EVERY", 3)

    def stopping(model, step, images):
        value = usual_loss(model, step, images)                  # BatchNorm has moved
        if step == stop_at:
            raise KeyboardInterrupt
        return value

    whole = train(network(), seed=5)
    with pytest.raises(KeyboardInterrupt):
        train(network(), stopping, seed=5, workers=workers, out=tmp_path)
    assert checkpoint.load(tmp_path / "state.pt")["step"] == stop_at // 3 * 3
    torch.manual_seed(1234)
    assert same(train(network(), seed=5, out=tmp_path), whole)
    again = train(network(), loss=None, seed=5, out=tmp_path)    # finished: nothing is trained
    assert same(again, whole) and not again.model.training


def test_a_state_is_saved_every_so_many_steps_and_at_the_end(often, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(training.checkpoint, "save", lambda state, path: saved.append(state))
    train(network(), steps=13, out=tmp_path)
    assert [state["step"] for state in saved] == [0, 4, 8, 12, 13]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_stops_a_run_with_its_name(often, tmp_path, pool_folder, workers):
    data = Batches(Views(sorted(pool_folder.iterdir()), (8, 8), 0), 4)
    gone = data.views.files[data.keys(5)[2][0]]
    gone.unlink()
    with pytest.raises(OSError, match=rf"^{gone}: FileNotFoundError.*; restore this") as error:
        train(network(), data=data, out=tmp_path, workers=workers)
    assert "\n" not in str(error.value) and checkpoint.load(tmp_path / "state.pt")["step"] == 4


class Deadly(Noise):
    """A data set that kills the process that loads it, as lack of memory does."""

    def __getitem__(self, t):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loading_process_that_dies_is_one_sentence_and_hangs_nothing(capsys):
    with pytest.raises(SystemExit):
        one_sentence(lambda: train(network(), data=Deadly(), workers=1))()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: a process that loads images died") and "--workers" in last


@pytest.mark.parametrize(("what", "step", "spoil"), [
    ("the loss", 5, lambda x: x * math.nan), ("the loss", 6, lambda x: x * math.inf),
    ("the loss", 12, lambda x: x * math.nan),
    ("a weight", 8, lambda x: (0 * x).sqrt())])                  # 0, but its slope is infinite
def test_what_is_not_finite_is_named_and_not_saved(often, tmp_path, what, step, spoil):
    def loss(model, t, images):
        value = model(images).square().mean()
        return spoil(value) if t + 1 == step else value

    for out in (None, tmp_path):                  # nor does a caller get them without a folder
        with pytest.raises(ValueError, match=f"{what} became infinite or NaN at step {step}; lower "
                                             "--lr, or use --amp off. Nothing bad was saved"):
            train(network(), loss, out=out)
    state = checkpoint.load(tmp_path / "state.pt")
    assert state["step"] == (step - 1) // 4 * 4 and state["curve"][-1][0] == state["step"]
    assert all(x.isfinite().all() for x in state["model"].values())


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bfloat16", torch.bfloat16)])
def test_mixed_precision_concerns_the_forward_pass_and_weights_stay_float32(amp, dtype):
    def loss(model, step, images):
        output = model(images)
        assert output.dtype == dtype
        return output.float().square().mean()

    run = train(network(), loss, steps=2, amp=amp)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
