"""What a training loop needs besides its method: batches, mixed precision, resume, loss checks.

Idea
    The loop itself shows images, logits, losses, backward(), optimizer and scheduler; what resumes,
    saves and checks the loss is here. Batch t depends on (seed, t) alone, and so does the dropout
    of step t: weights, optimizer, scheduler and step number are the whole state of a run.

Use it
    run = Training(student, optimizer, scheduler, cfg)
    for step, images, index, teacher_logits in run.steps(batches):
        ...                                                # forward, backward, optimizer, scheduler
        run.log(loss)
    run.curve                                              # [(step, mean loss), ...]
"""

from contextlib import closing

import torch

from support import checkpoint, images, options, records
from support.data import iterate

CHECK_EVERY = 50          # steps between two checks of the loss; each check waits for the device
SAVE_EVERY = 250          # steps between two resumable states
PARTS = ("model", "optimizer", "scheduler")               # of a state
BAD = "{} became infinite or NaN at step {}; lower --lr, or use --amp off. Nothing bad was saved"


def warmup_poly(optimizer, steps):
    """Return the scheduler lr(t) = lr0 min(1, (t + 1) / 50) (1 - t / steps)^0.9, 0 <= t < steps.

    A short warm-up, then the "poly" schedule that is usual in semantic segmentation.
    """
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / 50) * max(0, 1 - t / steps) ** 0.9)


class Training:
    """The state of a training run, in memory and on disk.

    cfg: a dataclass with steps, seed, amp and workers. out: a Path; if it holds a state.pt,
    training resumes from it. resume_with: networks and values that, besides cfg and the model's
    initial weights, must be the same as in the run that saved the state, or it is refused.
    """

    def __init__(self, model, optimizer, scheduler, cfg, out=None, resume_with=()):
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.cfg, self.path = cfg, out / "state.pt" if out else None
        self.about = [records.digest(cfg)] + [
            checkpoint.fingerprint(x) if isinstance(x, torch.nn.Module) else str(x)
            for x in (model, *resume_with)]
        self.device = next(model.parameters()).device
        # Channels-last is the faster layout in mixed precision. In float32 on a CPU it gains
        # nothing, and torch 2.14.1 corrupts memory there in the backward pass of a strided 1x1
        # convolution.
        self.amp = options.pick_amp(cfg.amp, self.device)
        if self.amp or self.device.type == "cuda":
            model.to(memory_format=torch.channels_last)
        self.done, self.curve, self.losses = 0, [], []           # losses: since the last check
        if self.path and self.path.exists():
            state = checkpoint.load(self.path)
            if state.get("about") != self.about:
                raise ValueError(f"{self.path} is not a state of this run; delete it to start over")
            for name in PARTS:
                getattr(self, name).load_state_dict(state[name])
            self.done, self.curve, self.losses = state["step"], state["curve"], state["losses"]

    def save(self):
        """Save the state; ValueError, and nothing is written, if a weight is not finite."""
        if not all(x.isfinite().all() for x in self.model.state_dict().values()):
            raise ValueError(BAD.format("a weight", self.done))
        if self.path:
            checkpoint.save({
                "about": self.about, "step": self.done, "curve": self.curve, "losses": self.losses,
                **{name: getattr(self, name).state_dict() for name in PARTS}}, self.path)

    def check_loss(self):
        """Return the mean loss since the last check; ValueError names a step that is not finite."""
        losses = torch.tensor([x.item() for x in self.losses])
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            raise ValueError(BAD.format("the loss", self.done - len(losses) + int(bad[0]) + 1))
        return losses.mean().item()

    def autocast(self):
        """Return the context in which the networks compute: mixed precision, if it is on."""
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def log(self, loss):
        """Note the loss of this step, a scalar."""
        self.losses.append(loss.detach())

    def steps(self, dataset, name="distilling"):
        """Yield (step, *dataset[step]) on the device for each step that is left.

        The model is in training mode until the last one. Images become float32 in [0, 1]. OSError
        for a file that can no longer be read, ValueError when the loss is not finite. Whatever
        stops it, training resumes from the last state.
        """
        todo = range(self.done, self.cfg.steps)
        loader = iterate(dataset, self.device, self.cfg.workers, batch_size=None, sampler=todo)
        self.save()          # a second call that passes the half-trained model is now refused
        self.model.train()
        bar = options.progress(loader, name, initial=self.done, total=self.cfg.steps)
        gpus = [self.device] if self.device.type == "cuda" else []
        # closing ends the loading processes; fork_rng gives the caller its random state back.
        with closing(loader), torch.random.fork_rng(gpus):
            for step, batch in enumerate(bar, self.done):
                # Dropout depends on (seed, step) alone. On a CPU only the low 32 bits count.
                torch.manual_seed((1_000_003 * self.cfg.seed + step) % 2 ** 63)
                yield step, *(x if x is None else images.as_input(x, self.device) for x in batch)
                self.done, last = step + 1, step == todo[-1]
                if self.done % CHECK_EVERY == 0 or last:
                    self.curve.append((self.done, self.check_loss()))
                    self.losses = []
                    bar.set_postfix(loss=f"{self.curve[-1][1]:.4f}", refresh=False)
                if self.done % SAVE_EVERY == 0 or last:
                    self.save()
        self.model.eval()
