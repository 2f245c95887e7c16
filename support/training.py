"""The one training loop, for the teacher and for the student.

Idea
    What differs between training a teacher and distilling a student is the loss of a batch, so it
    is an argument. All the rest, from the learning rate to going on after an interruption, is
    here. Batch t depends on (seed, t) alone and so does the dropout of step t: weights, optimiser
    and step number are the whole state of a run.

Equation
    lr(t) = lr0 min(1, (t + 1) / 50) (1 - t / steps)^0.9          (warm-up, then "poly")

Use it
    from support.training import fit
    curve = fit(student, lambda progress, images, slots: ..., batches, steps=900, lr=0.05)
"""

import signal
import threading
import time
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from support import checkpoint
from support.data import deaf, loaded

CHECK_EVERY = 50          # steps between two looks at the loss; each look waits for the device
SAVE_EVERY = 500          # steps between two resumable states, but never more than
SAVE_SECONDS = 60         # so many seconds


def learning_rate(step, steps, lr0):
    """Return the learning rate of a step, 0 <= step < steps."""
    return lr0 * min(1, (step + 1) / 50) * (1 - step / steps) ** 0.9


OPTIMISERS = {"adamw": partial(torch.optim.AdamW, weight_decay=0.01),
              "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4)}


@contextmanager
def held_back():
    """Hold the first SIGINT or SIGTERM back, and yield a list it is put on; a second acts at once.

    So training can finish its step and save. Outside the main thread, which gets them, do nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    came, before = [], {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if main}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number, frame):
        came.append(number)
        restore()

    try:
        for number in before:
            signal.signal(number, note)
        yield came
    finally:
        restore()


class Watch:
    """The mean loss since the last look, and where a loss first was not finite.

    Both are kept on the device, so that only a look waits for it.
    """

    def __init__(self, batches, device, total=0.0, count=0):
        self.batches, self.total, self.count = batches, torch.tensor(total, device=device), count
        self.step, self.bad = torch.tensor(-1, device=device), torch.tensor(False, device=device)

    def see(self, step, loss, terms, slots):
        """Take in a loss and its terms, {name: scalar or (B,)}."""
        self.total, self.count, self.names = self.total + loss.detach(), self.count + 1, list(terms)
        bad = torch.stack([~x.detach().isfinite().expand(len(slots)) for x in terms.values()])
        first = (self.step < 0) & bad.any()
        self.step = torch.where(first, step, self.step)
        self.bad = torch.where(first, bad, self.bad)                            # (terms, B)

    def look(self, model, done):
        """Return the mean loss. ValueError names the terms, the step and the files of a bad one."""
        step, advice = int(self.step), "lower --lr, or use --amp off. Nothing bad was saved"
        if step >= 0:
            names = [self.names[i] for i in self.bad.any(dim=1).nonzero().flatten().tolist()]
            slots = self.batches.slots(step)[self.bad.any(dim=0).cpu()].tolist()
            raise ValueError(f"{' and '.join(names)} became infinite or NaN at step {step + 1} on "
                             f"{', '.join(str(self.batches.files[i]) for i in slots)}; {advice}")
        values = (self.total, *model.state_dict().values())
        if not torch.stack([x.isfinite().all() for x in values]).all():
            raise ValueError("the weights became infinite or NaN between steps "
                             f"{done + 1 - self.count} and {done}; {advice}")
        return self.total.item() / max(self.count, 1)


def update(model, optimiser, scaler, lr, batch_loss, amp):
    """Take one step down the gradient of batch_loss(); return (loss, {term: scalar or (B,)}).

    batch_loss returns a scalar, or (scalar, terms). Under autocast if amp names a dtype.
    """
    for group in optimiser.param_groups:
        group["lr"] = lr
    device = next(model.parameters()).device
    with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
        loss = batch_loss()
    loss, terms = loss if isinstance(loss, tuple) else (loss, {"the loss": loss})
    optimiser.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.step(optimiser)
    scaler.update()
    return loss, terms


def resumed(path, parts):
    """Load the state kept at `path` into its parts, if there is one; return (step, curve, window).
    """
    if not (path and Path(path).exists()):
        return 0, [], ()
    state = checkpoint.load(path)
    for key, part in parts.items():
        part.load_state_dict(state[key])
    return state["step"], state["curve"], state["window"]


def fit(model, batch_loss, batches, steps, lr, seed=0, amp=None, workers=0, state_path=None,
        name="train", optimiser="adamw"):
    """Train `model` in place for `steps` updates; return the curve [(step, mean loss), ...].

    batch_loss(progress, *batch) returns a scalar, or (scalar, {term: (B,)}) so that a bad term can
    be named; progress runs from 0 towards 1; the batch is on the model's device. batches: as
    data.Batches. optimiser: one of OPTIMISERS. amp: autocast dtype or None. state_path: where to
    keep the resumable state; if one is there, training goes on from it. SIGINT and SIGTERM wait for
    the end of a step, save and raise KeyboardInterrupt(number); so does OSError, for a file that
    can no longer be read. Raises ValueError when the loss is not finite.
    """
    device = next(model.parameters()).device
    # Channels-last is the faster layout in mixed precision. In float32 on a CPU it gains nothing,
    # and there torch 2.14.1 corrupts memory in the backward pass of a strided 1x1 convolution.
    if amp or device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    optimiser = OPTIMISERS[optimiser](model.parameters(), lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    parts = {"model": model, "optimiser": optimiser, "scaler": scaler}
    start, curve, window = resumed(state_path, parts)
    watch, saved = Watch(batches, device, *window), time.monotonic()

    def keep(done):
        watch.look(model, done)
        if state_path:
            checkpoint.save({
                "step": done, "curve": curve, "window": (watch.total.item(), watch.count),
                **{key: part.state_dict() for key, part in parts.items()}}, state_path)

    feed = loaded(DataLoader(
        batches, batch_size=None, sampler=range(start, steps), num_workers=workers,
        pin_memory=device.type == "cuda", persistent_workers=workers > 0, worker_init_fn=deaf))
    model.train()
    bar = tqdm(desc=name, initial=start, total=steps, mininterval=1)
    with held_back() as came, closing(feed), bar:             # closing ends the loading processes
        for step in range(start, steps):
            try:
                batch = next(feed)
            except OSError:
                keep(step)
                raise
            batch = [x.to(device, non_blocking=True) for x in batch]
            # Dropout depends on (seed, t) alone. On a CPU only the low 32 bits of a seed count.
            torch.manual_seed(1_000_003 * seed + step)
            loss, terms = update(model, optimiser, scaler, learning_rate(step, steps, lr),
                                 partial(batch_loss, step / steps, *batch), amp)
            watch.see(step, loss, terms, batch[1])
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
                curve.append((step + 1, watch.look(model, step + 1)))
                bar.set_postfix(loss=f"{curve[-1][1]:.4f}", refresh=False)
                watch = Watch(batches, device)
            bar.update()
            overdue = (step + 1) % SAVE_EVERY == 0 or time.monotonic() - saved > SAVE_SECONDS
            if overdue or came or step + 1 == steps:
                keep(step + 1)
                saved = time.monotonic()
            if came:
                raise KeyboardInterrupt(came[0])
    model.eval()
    return curve
