"""How close are a training step and the scoring of a batch to the least they could cost?

Idea
    Seconds depend on the machine, ratios depend on the program. Each time is divided by its floor,
    which cannot be avoided: scoring by a bare forward pass of the teacher, a training step by a
    bare step of the student (forward, a loss of one line, backward, optimizer). Both are measured
    in turns in one process. A row shows the median and quartiles of their ratios. On a CPU,
    processor time is measured: other programs disturb it less. "setup" is a distillation of one
    step.

Use it
    python -m experiments.benchmark           (minutes; steadiest with OMP_NUM_THREADS=1)
"""

from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch

import distill
from bn_stats import image_distances
from models import build_model, freeze
from support import checkpoint, options, records
from support.options import option

SIZE, STEPS = (16, 3, 96, 128), 300                          # of a batch, of training
PHOTO = Path(__file__).parents[1] / "results" / "scenes" / "figure.png"         # any picture


@dataclass(frozen=True)
class Config(options.Options):
    repeats: int = option(7, "repetitions of each measurement, after one to warm up", min=2)
    device: str = option("auto", "cpu, cuda or auto")
    out: str = option("results", "folder for the record, benchmark_cpu.json", metavar="FOLDER")


def seconds(call, device):
    """Return the processor time of a call on a CPU, or its wall time until the GPU has finished."""
    clock = process_time if device.type == "cpu" else perf_counter
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def ratio(floor, call, repeats, device):
    """Return the quartiles of the time of `call` divided by that of `floor`; they take turns."""
    times = [(seconds(floor, device), seconds(call, device)) for _ in range(repeats + 1)]
    times = np.array(times[1:])                                     # the first one warms up
    low, median, high = np.quantile(times[:, 1] / times[:, 0], (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "quartiles": [low, high], "seconds": np.median(times, 0).tolist()}


def measurements(teacher, images, steps):
    """Yield (what, name of the floor, target, floor, call) of each row; images: (B, 3, H, W)."""
    (B, _, H, W), device = images.shape, images.device
    student = build_model("resnet_tiny", 21).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4, fused=True)
    amp = options.pick_amp("auto", device)

    def distil(updates):
        cfg = distill.Config(budget=0, batch_size=B, views=1, steps=updates)
        distill.distill(teacher, student, [PHOTO] * B, (H, W), cfg)

    def bare_steps():
        distil(1)                          # what a run does once, which is not of interest here
        student.train()
        for _ in range(steps):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                loss = student(images).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    yield (f"train resnet_tiny, {steps} steps of {B} x {H}x{W}", "setup + student", 1.3,
           bare_steps, lambda: distil(steps + 1))
    yield (f"score {B} x {H}x{W}, resnet_small", "teacher", 1.3, lambda: teacher(images),
           lambda: image_distances(teacher, images))


def table(record):
    """Return a record as a Markdown table."""
    lines = ["| what | floor | ratio (quartiles) | at most |", "|---|---|---|---|"]
    for row in record["rows"]:
        cell = "{:.3g} ({:.3g} to {:.3g})".format(row["median"], *row["quartiles"])
        lines.append(f"| {row['what']} | {row['floor']} | {cell} | {row['target']} |")
    return "\n".join(lines)


def main(argv=None):
    """Measure on one device, write the record and return it."""
    cfg = options.parse(Config, argv, "Measure how close each step is to its floor.")
    device = options.pick_device(cfg.device)
    images, rows = torch.rand(SIZE, device=device), []
    teacher = build_model("resnet_small", 21).to(device, memory_format=torch.channels_last)
    teacher.train()(images)                              # one that looks untrained is refused
    freeze(teacher)
    with redirect_stdout(None):
        for what, name, target, *calls in measurements(teacher, images, STEPS):
            rows.append({"what": what, "floor": name, "target": target,
                         **ratio(*calls, cfg.repeats, device)})
    record = {"environment": records.environment(device), "repeats": cfg.repeats, "rows": rows}
    checkpoint.save_json(record, Path(cfg.out) / f"benchmark_{device.type}.json")
    print(table(record))
    return record


if __name__ == "__main__":
    options.one_sentence(main)()
