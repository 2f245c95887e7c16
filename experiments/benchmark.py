"""How close is each step to the least it could cost? Ratios of times, taken side by side.

Idea
    Seconds tell of a machine, ratios of a program. Each time is divided by its floor, what cannot
    be avoided: scoring and answering by a bare pass of the teacher, a training step by a bare step
    of the student (forward, a loss of one line, backward, optimiser), a scan by decoding and
    scoring. Both take turns in one process, and the median and quartiles of their ratios are kept.
    On a CPU processor time counts, which other programs disturb less.

Use it
    python -m experiments.benchmark                      # minutes; steadiest with OMP_NUM_THREADS=1
    python -m experiments.benchmark --quick --out runs   # seconds: tiny sizes, to see that it works
"""

import resource
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from ads_sampler import sample, score_pool
from bn_stats import bn_layers, image_distances
from evaluate import as_input
from kd_loss import channelwise_kd, pixelwise_kd
from models import build_model, freeze
from priority import progressive_weights, weighted_loss
from support.teacher_cache import Kept, answers_of, folded
from support.checkpoint import save_json
from support.data import Batches, Pool, Views
from support.options import Options, one_sentence, option, parse, pick_amp
from support.records import environment
from support.scoring import BATCH, scan
from support.training import Training


@dataclass(frozen=True)
class Config(Options):
    repeats: int = option(7, "repetitions of each measurement, after one to warm up", least=2)
    quick: bool = option(False, "tiny sizes, to see that it works")
    out: str = option("results", "folder for the records, one a device", kind="FOLDER")


def measure(calls, repeats, device):
    """Return {name: seconds of each repetition} of functions that take turns."""
    def clock():
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    seconds = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if repeat:                                                 # the first one warms up
                seconds[name].append(clock() - start)
    return seconds


def row(what, target, seconds):
    """Return the record of a ratio: the last of the times by the sum of the others, its floor."""
    *floor, name = seconds
    ratios = [times[-1] / sum(times[:-1]) for times in zip(*seconds.values(), strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"what": what, "floor": " + ".join(floor), "target": target, "median": median,
            "quartiles": [low, high],
            "medians": {part: statistics.median(seconds[part]) for part in (name, *floor)}}


def network(name, device):
    return build_model(name, 21).to(device, memory_format=torch.channels_last)


def photographs(folder, count):
    """Write `count` JPEGs of 480x640; return their paths."""
    files = [Path(folder) / f"{i}.jpg" for i in range(count)]
    for i, file in enumerate(files):
        Image.effect_mandelbrot((640, 480), (-2, -1, 1, 1 + i / count), 50).save(file)
    return files


def memory(count, device):
    """Return the peak memory of a scan of drawn images beside that of a tenth of them."""
    teacher, peaks = freeze(network("resnet_tiny", device)), {}
    for n in (count // 10, count):
        loader = (torch.rand(50, 3, 16, 16, device=device) for _ in range(n // 50))
        score_pool(lambda images: image_distances(teacher, images), loader)
        peaks[f"{n:,}"] = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss] * 2  # never falls
    return row(f"peak memory of scoring {count:,} images", 1.05, peaks)


def choosing(count, cfg, device):
    """Return what choosing 400 of many images costs beside a second."""
    distances = torch.rand(count)
    seconds = measure({"sample": lambda: sample(distances, 400)}, cfg.repeats, device)
    return row(f"choose 400 of {count:,}", 1, {"1 s": [1] * cfg.repeats, **seconds})


def scanning(count, size, cfg, device):
    """Return what scoring a folder of photographs costs beside decoding and scoring them."""
    teacher = freeze(network("resnet_small", device))
    layers = bn_layers(teacher)

    def rule(images, numbers=None):
        return image_distances(teacher, images, layers)

    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(photographs(folder, count), size)
        views = torch.stack([pool.view(i) for i in range(count)])
        return row(f"scan {count} JPEGs of 480x640", 1.1, measure({
            "decode": lambda: [pool[i] for i in range(count)],
            "score": lambda: [rule(as_input(part, device)).cpu() for part in views.split(BATCH)],
            "scan": lambda: scan(rule, pool, device)}, cfg.repeats, device))


def training(count, batch, size, cfg, device, steps=10, views=24):
    """Return what a training step costs beside a bare one, and answering beside a bare pass."""
    teacher, student = freeze(network("resnet_small", device)), network("resnet_tiny", device)
    images, weights = torch.rand(batch, 3, *size, device=device), torch.rand(count, device=device)
    run = Training(student, 10 ** 6, 1e-4, 0, pick_amp("auto", device))
    ask = partial(answers_of, folded(teacher, size), like=student(images).shape[-2:],
                  precision=run.precision())

    def bare_step():
        with run.precision():
            logits = student(images)
        loss = logits.float().square().mean()
        run.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        run.optimiser.step()

    def step(_, images, slots, answers):
        with run.precision():
            logits = student(images)
        losses = pixelwise_kd(logits, answers) + channelwise_kd(logits, answers)
        now = progressive_weights(weights, 0.5)
        run.step(weighted_loss(losses, now[slots], now.mean()))

    def bare_pass():
        with torch.no_grad(), run.precision():
            teacher(images)

    def answer():
        seen.sources.clear()
        return Kept(ask, seen, views, device, batch)

    with tempfile.TemporaryDirectory() as folder:
        seen = Views(photographs(folder, count), size, 0)
        answering = measure({
            "teacher": lambda: [bare_pass() for _ in range(count * views // batch)],
            "answer": answer}, cfg.repeats, device)
        with closing(run.batches(Batches(seen, batch, answer()))) as batches:
            stepping = measure({"student": lambda: [bare_step() for _ in range(steps)],
                                "train": lambda: [step(*next(batches)) for _ in range(steps)]},
                               cfg.repeats, device)
    what = f"{batch} x {size[0]}x{size[1]}"
    return [row(f"train resnet_tiny, {steps} steps of {what}", 1.3, stepping),
            row(f"answer {views} views of {count} JPEGs, {what}, resnet_small", 1.1, answering)]


def scoring(name, batch, size, target, cfg, device):
    """Return what reading all layers of a network costs beside a bare pass."""
    teacher, images = freeze(network(name, device)), torch.rand(batch, 3, *size, device=device)
    layers = bn_layers(teacher)
    what = f"score {batch} x {size[0]}x{size[1]}, {name}, {len(layers)} layers"
    with torch.no_grad():
        return row(what, target, measure({
            "teacher": lambda: teacher(images),
            "score": lambda: image_distances(teacher, images, layers)}, cfg.repeats, device))


def benchmark(cfg, device):
    """Return all rows on one device."""
    wide, small, batch = ((48, 64), (32, 48), 2) if cfg.quick else ((520, 520), (96, 128), 16)
    rows = []
    if device.type == "cpu":                # memory first: a peak would hide what comes after it
        rows = [memory(1000 if cfg.quick else 100_000, device),
                choosing(1000 if cfg.quick else 1_000_000, cfg, device),
                scanning(4 if cfg.quick else 64, small, cfg, device)]
    return [*rows, *training(2 if cfg.quick else 32, batch, small, cfg, device),
            scoring("resnet_small", batch, small, 1.3, cfg, device),
            scoring("deeplabv3_resnet50", 2, wide, 1.15, cfg, device)]


def table(record):
    """Return a record as a Markdown table."""
    return "\n".join(["| what | floor | ratio (quartiles) | at most |", "|---|---|---|---|", *(
        f"| {r['what']} | {r['floor']} | {r['median']:.3g} ({r['quartiles'][0]:.3g} to "
        f"{r['quartiles'][1]:.3g}) | {r['target']} |" for r in record["rows"])])


def main(argv=None):
    """Measure on the CPU and on a GPU if there is one; write a record each and return them."""
    cfg, records = parse(Config, argv, "Measure how close each step is to its floor."), []
    for device in map(torch.device, ["cpu", "cuda"][:1 + torch.cuda.is_available()]):
        records.append({"environment": environment(device), "repeats": cfg.repeats,
                        "rows": benchmark(cfg, device)})
        save_json(records[-1], Path(cfg.out) / f"benchmark_{device.type}.json")
        print(f"{device.type}\n{table(records[-1])}")
    return records


if __name__ == "__main__":
    one_sentence(main)()
