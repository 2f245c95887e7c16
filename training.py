"""The one training loop, for the teacher and for the student.

Idea
    What differs between training a teacher and distilling a student is the loss of a batch, so it
    is an argument. All the rest, from the learning rate to going on after an interruption, is
    here. Batch t depends on (seed, t) alone and so does the dropout of step t: weights, optimiser
    and step number are the whole state of a run.

Equation
    lr(t) = lr0 min(1, (t + 1) / 50) (1 - t / steps)^0.9          (warm-up, then "poly")

Use it
    from training import fit
    curve = fit(student, lambda progress, images, slots: ..., batches, steps=900, lr=0.05)
"""

import math
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint

CHECK_EVERY = 50          # steps between two looks at the loss; each look waits for the device
SAVE_EVERY = 500          # steps between two resumable states


def pick_device(name):
    """Return the torch.device that "auto", "cpu", "cuda" or "cuda:1" stands for."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name} was asked for, but torch sees no CUDA device; "
                         "use --device cpu")
    return torch.device(name)


def pick_amp(name, device):
    """Return the autocast dtype that "auto", "bfloat16", "float16" or "off" stands for, or None.

    "auto" is bfloat16 where the hardware computes in it, which about doubles the speed.
    """
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "off": None}[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        able = getattr(torch.cpu, "get_capabilities", dict)()
        native = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    return torch.bfloat16 if native else None


def learning_rate(step, steps, lr0):
    """Return the learning rate of a step, 0 <= step < steps."""
    return lr0 * min(1, (step + 1) / 50) * (1 - step / steps) ** 0.9


OPTIMISERS = {"adamw": partial(torch.optim.AdamW, weight_decay=0.01),
              "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4)}


def fit(model, batch_loss, batches, steps, lr, seed=0, amp=None, workers=0, state_path=None,
        name="train", optimiser="adamw"):
    """Train `model` in place for `steps` updates; return the curve [(step, mean loss), ...].

    batch_loss(progress, *batch) returns a scalar; progress runs from 0 towards 1; the batch is on
    the model's device. optimiser: one of OPTIMISERS. amp: autocast dtype or None. state_path: where
    to keep the resumable state; if one is there, training goes on from it. Raises ValueError when
    the loss is not finite.
    """
    device = next(model.parameters()).device
    # Channels-last is the faster layout in mixed precision. In float32 on a CPU it gains nothing,
    # and there torch 2.14.1 corrupts memory in the backward pass of a strided 1x1 convolution.
    if amp or device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    optimiser = OPTIMISERS[optimiser](model.parameters(), lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    start, curve = 0, []
    if state_path and Path(state_path).exists():
        state = checkpoint.load(state_path)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        scaler.load_state_dict(state["scaler"])
        start, curve = state["step"], state["curve"]

    loader = DataLoader(batches, batch_size=None, sampler=range(start, steps), num_workers=workers,
                        pin_memory=device.type == "cuda", persistent_workers=workers > 0)
    bar = tqdm(loader, desc=name, initial=start, total=steps, mininterval=1)
    model.train()
    window, count = torch.zeros((), device=device), 0          # sum of losses since the last look
    for step, batch in enumerate(bar, start):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        batch = [x.to(device, non_blocking=True) for x in batch]
        # Dropout depends on (seed, t) alone. On a CPU only the low 32 bits of a seed count.
        torch.manual_seed(1_000_003 * seed + step)
        with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
            loss = batch_loss(step / steps, *batch)
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()

        window, count = window + loss.detach(), count + 1
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
            mean = window.item() / count
            if not (math.isfinite(mean) and all(p.isfinite().all() for p in model.parameters())):
                raise ValueError(f"the loss became {mean} or the weights infinite between steps "
                                 f"{step + 2 - count} and {step + 1}; lower --lr, or use --amp "
                                 "off. Nothing bad was saved")
            curve.append((step + 1, mean))
            bar.set_postfix(loss=f"{mean:.4f}")
            window, count = torch.zeros_like(window), 0
        if state_path and (step + 1) % SAVE_EVERY == 0:
            checkpoint.save({"step": step + 1, "model": model.state_dict(), "curve": curve,
                             "optimiser": optimiser.state_dict(), "scaler": scaler.state_dict()},
                            state_path)
    model.eval()
    return curve
