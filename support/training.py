"""The mechanics of training, for the teacher and for the student, behind a plain `for` loop.

Idea
    The loop shows images, logits, losses and weights; what resumes, saves and checks the loss is
    here. Batch t depends on (seed, t) alone and so does the dropout of step t:
    weights, optimiser and step number are the whole state of a run.

Equation
    lr(t) = lr0 min(1, (t + 1) / 50) (1 - t / steps)^0.9          (warm-up, then "poly")

Use it
    run = Training(student, steps=900, lr=0.01)
    for progress, images, slots, answers in run.batches(batches):     # progress: 0 towards 1
        run.step(loss_of(images))                                 # a scalar
    run.curve                                                     # [(step, mean loss), ...]
"""

import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from evaluate import as_input
from support import checkpoint
from support.data import loaded
from support.progress import progress

CHECK_EVERY = 50          # steps between two looks at the loss; each look waits for the device
SAVE_EVERY = 500          # steps between two resumable states, but never more than
SAVE_SECONDS = 60         # so many seconds


def learning_rate(step, steps, lr0):
    """Return the learning rate of a step, 0 <= step < steps."""
    return lr0 * min(1, (step + 1) / 50) * (1 - step / steps) ** 0.9


OPTIMISERS = {"adamw": partial(torch.optim.AdamW, weight_decay=0.01, fused=True),
              "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4, fused=True)}


class Training:
    """A model in training: optimiser, learning rate, curve, and the state that is kept on disk.

    amp: autocast dtype or None. optimiser: one of OPTIMISERS. state_path: where to keep the
    resumable state; if one is there, training goes on from it. about: what tells this run from
    others, a string; a state that was kept about another is refused.
    """

    def __init__(self, model, steps, lr, seed=0, amp=None, state_path=None, optimiser="adamw",
                 about=None):
        self.model, self.steps, self.lr, self.seed, self.amp = model, steps, lr, seed, amp
        self.about = about
        self.device, self.path = next(model.parameters()).device, state_path
        # Channels-last is the faster layout in mixed precision. In float32 on a CPU it gains
        # nothing, and there torch 2.14.1 corrupts memory in the backward pass of a strided 1x1
        # convolution.
        if amp or self.device.type == "cuda":
            model.to(memory_format=torch.channels_last)
        self.optimiser = OPTIMISERS[optimiser](model.parameters(), lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == torch.float16)
        self.done, self.curve, self.losses = 0, [], []      # losses: since the last look
        if state_path and Path(state_path).exists():
            self.load(state_path)

    def load(self, path):
        """Go on from the state in a file; ValueError if it is of another run."""
        state = checkpoint.load(path)
        try:
            if state["about"] != self.about:
                raise ValueError("another teacher, or other options")
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.scaler.load_state_dict(state["scaler"])
            self.done, self.curve, self.losses = state["step"], state["curve"], state["losses"]
            self.losses = [x.to(self.device) for x in self.losses]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{path} is no state of this run; delete it to begin anew") from error

    def save(self):
        """Keep the state; ValueError, and nothing is written, if loss or weights are not finite."""
        self.look()
        if not all(x.isfinite().all() for x in self.model.state_dict().values()):
            raise ValueError(f"the weights became infinite or NaN by step {self.done}; lower --lr, "
                             "or use --amp off. Nothing bad was saved")
        if self.path:
            checkpoint.save({"about": self.about, "step": self.done, "curve": self.curve,
                             "losses": self.losses,
                             "model": self.model.state_dict(), "scaler": self.scaler.state_dict(),
                             "optimiser": self.optimiser.state_dict()}, self.path)

    def look(self):
        """Return the mean loss since the last look; ValueError names a step that is not finite."""
        losses = torch.stack(self.losses) if self.losses else torch.zeros(1)
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = self.done - len(losses) + int(bad[0]) + 1
            raise ValueError(f"the loss became infinite or NaN at step {step}; lower --lr, or use "
                             "--amp off. Nothing bad was saved")
        return losses.mean().item()

    def precision(self):
        """Return the context in which the networks compute: mixed precision, if it is on."""
        return torch.autocast(self.device.type, self.amp or torch.bfloat16,
                              enabled=self.amp is not None)

    def step(self, loss):
        """Take one step down the gradient of a scalar loss."""
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.losses.append(loss.detach())

    def batches(self, dataset, workers=0, name="distilling"):
        """Yield (progress, *dataset[t]) on the device for each step t that is left; see `step`.

        Images become float32 in [0, 1]. OSError for a file that can no longer be read, ValueError
        when the loss is not finite. Whatever stops it, training goes on from the last state.
        """
        # Forked processes share the kept answers with this one; others would get a copy.
        fork = "fork" if workers and sys.platform == "linux" else None
        feed = loaded(DataLoader(
            dataset, batch_size=None, sampler=range(self.done, self.steps), num_workers=workers,
            pin_memory=self.device.type == "cuda", multiprocessing_context=fork))
        self.save()              # from where whoever is stopped and calls again with `model` begins
        self.model.train()
        bar = progress(name=name, initial=self.done, total=self.steps)
        saved = time.monotonic()
        with closing(feed), bar:                              # closing ends the loading processes
            for t, batch in enumerate(feed, self.done):
                for group in self.optimiser.param_groups:
                    group["lr"] = learning_rate(t, self.steps, self.lr)
                # Dropout depends on (seed, t) alone. On a CPU only the low 32 bits of a seed count.
                torch.manual_seed((1_000_003 * self.seed + t) % 2 ** 63)
                yield t / self.steps, *(x if x is None else as_input(x, self.device) for x in batch)
                self.done, last = t + 1, t + 1 == self.steps
                if self.done % CHECK_EVERY == 0 or last:
                    self.curve.append((self.done, self.look()))
                    self.losses = []
                    bar.set_postfix(loss=f"{self.curve[-1][1]:.4f}", refresh=False)
                bar.update()
                overdue = self.done % SAVE_EVERY == 0 or time.monotonic() - saved > SAVE_SECONDS
                if overdue or last:
                    self.save()
                    saved = time.monotonic()
        self.model.eval()
