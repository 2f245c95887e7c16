"""How close is each step to the least it could cost? Ratios of times that are measured in turns.

Idea
    Seconds depend on the machine, ratios depend on the program. Each time is divided by its floor,
    which cannot be avoided: scoring and caching by a bare forward pass of the teacher, a training
    step by a bare step of the student (forward, a loss of one line, backward, optimizer), a scan of
    photos by decoding and scoring them. Both are measured in turns in one process. A row shows the
    median and quartiles of their ratios. On a CPU, processor time is measured: other programs
    disturb it less. "setup" is a run of distill.py of one step.

Use it
    python -m experiments.benchmark                      # minutes; steadiest with OMP_NUM_THREADS=1
    python -m experiments.benchmark --quick --out runs   # seconds: tiny sizes, to see that it works
"""

import resource
import tempfile
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch
from PIL import Image

import distill
from ads_sampler import score_pool
from bn_stats import image_distances
from models import build_model, freeze
from support.checkpoint import save_json
from support.data import Pool, Views
from support.options import Options, one_sentence, option, parse, pick_amp, pick_device
from support.records import environment
from support.scoring import cached_scores
from support.teacher_cache import TeacherCache, comparison_size


@dataclass(frozen=True)
class Config(Options):
    repeats: int = option(7, "repetitions of each measurement, after one to warm up", min=2)
    quick: bool = option(False, "tiny sizes, to see that it works")
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


def memory(count):
    """Return the row of the peak memory of scoring `count` images, next to a tenth of them.

    Measured before all else: any higher peak would hide it.
    """
    teacher, peaks = freeze(build_model("resnet_tiny", 21)), []
    for n in (count // 10, count):
        score_pool(lambda images: image_distances(teacher, images),
                   (torch.rand(50, 3, 16, 16) for _ in range(n // 50)))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)        # it never falls
    return {"what": f"peak memory of scoring {count:,} images", "floor": f"{count // 10:,}",
            "target": 1.05, "median": peaks[1] / peaks[0], "quartiles": [peaks[1] / peaks[0]] * 2}


def network(name, size, device):
    """Return a frozen network, with the BatchNorm statistics of noise, and a batch for it."""
    model, images = build_model(name, 21), torch.rand(size)
    model.train()(images[:2])
    return freeze(model).to(device, memory_format=torch.channels_last), images.to(device)


@torch.no_grad()
def bare_passes(model, images, passes=1, context=nullcontext):
    with context():
        for _ in range(passes):
            model(images)


def training(files, size, steps, device):
    """Yield (what, name of the floor, target, floor, call) of training steps and of caching."""
    (batch, _, h, w), views, amp = size, 24, pick_amp("auto", device)
    teacher, images = network("resnet_small", size, device)
    student = build_model("resnet_tiny", 21).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4, fused=True)
    autocast = partial(torch.autocast, device.type, amp, enabled=amp is not None)
    cfg = distill.Config(budget=0, batch_size=batch, views=views, steps=10 ** 6)
    teacher_pass = partial(distill.compute_teacher_logits, teacher, autocast,
                           comparison_size(teacher, student, (h, w)), cfg)

    def distil(steps):
        distill.distill(teacher, student, files, (h, w), replace(cfg, views=1, steps=steps))

    def bare_steps():
        distil(1)                          # what a run does once, which is not of interest here
        student.train()
        for _ in range(steps):
            with autocast():
                loss = student(images).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    yield (f"train resnet_tiny, {steps} steps of {batch} x {h}x{w}", "setup + student", 1.3,
           bare_steps, partial(distil, steps + 1))
    yield (f"cache {views} views of {len(files)} JPEGs, {batch} x {h}x{w}, resnet_small", "teacher",
           1.1, partial(bare_passes, teacher, images, views * len(files) // batch, autocast),
           lambda: TeacherCache(teacher_pass, Views(files, (h, w), 0), cfg, device))


def scoring(files, size, wide, device):
    """Yield the same of scoring a folder of photos, and of scoring batches with two networks."""
    (small, images), pool = network("resnet_small", size, device), Pool(files, size[2:])

    def decode_and_score():
        for i in range(len(files)):
            pool.view(i)
        image_distances(small, images)                                 # as many as there are files

    yield (f"scan {len(files)} JPEGs of 480x640", "decode + score", 1.1, decode_and_score,
           lambda: cached_scores(lambda x, _: image_distances(small, x), pool, device))
    for name, (b, _, h, w), target in (("resnet_small", size, 1.3),
                                       ("deeplabv3_resnet50", wide, 1.15)):
        model, x = network(name, (b, 3, h, w), device)
        yield (f"score {b} x {h}x{w}, {name}", "teacher", target, partial(bare_passes, model, x),
               partial(image_distances, model, x))


def table(record):
    """Return a record as a Markdown table."""
    return "\n".join(["| what | floor | ratio (quartiles) | at most |", "|---|---|---|---|", *(
        f"| {r['what']} | {r['floor']} | {r['median']:.3g} ({r['quartiles'][0]:.3g} to "
        f"{r['quartiles'][1]:.3g}) | {r['target']} |" for r in record["rows"])])


def main(argv=None):
    """Measure on one device, write the record and return it."""
    cfg = parse(Config, argv, "Measure how close each step is to its floor.")
    device = pick_device(cfg.device)
    size, wide, steps, count = (16, 3, 96, 128), (2, 3, 520, 520), 300, 100_000
    if cfg.quick:
        size, wide, steps, count = (2, 3, 32, 48), (2, 3, 48, 64), 5, 1000
    rows = [memory(count)]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
        files = [Path(folder, f"{i}.jpg") for i in range(size[0])]
        for i, file in enumerate(files):
            Image.effect_mandelbrot((640, 480), (-2, -1, 1, 1 + i / 100), 50).save(file)
        for what, name, target, floor, call in (*training(files, size, steps, device),
                                                *scoring(files, size, wide, device)):
            rows.append({"what": what, "floor": name, "target": target,
                         **ratio(floor, call, cfg.repeats, device)})
    record = {"environment": environment(device), "repeats": cfg.repeats, "rows": rows}
    save_json(record, Path(cfg.out) / f"benchmark_{device.type}.json")
    print(table(record))
    return record


if __name__ == "__main__":
    one_sentence(main)()
