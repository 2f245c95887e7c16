"""How close is each step to the least it could cost? Ratios of times, taken side by side.

Idea
    Seconds tell of a machine, ratios of a program. Each time is divided by its floor, what cannot
    be avoided: scoring by a bare pass of the teacher, a training step by its parts, a scan by
    decoding and scoring. Both take turns in one process, and the median and quartiles of their
    ratios are kept. On a CPU processor time counts, which other programs disturb less.

Use it
    python -m experiments.benchmark                      # minutes; steadiest with OMP_NUM_THREADS=1
    python -m experiments.benchmark --quick --out runs   # seconds: tiny sizes, to see that it works
"""

import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

import distill
from ads_sampler import sample, score_pool
from bn_stats import bn_layers, image_distances, select_layers
from evaluate import as_input
from kd_loss import channelwise_kd, pixelwise_kd
from models import build_model, freeze
from support.checkpoint import save_json
from support.data import Pool
from support.options import Options, one_sentence, option, parse
from support.records import environment
from support.scoring import BATCH, score
from support.training import OPTIMISERS, fit


@dataclass(frozen=True)
class Config(Options):
    repeats: int = option(7, "repetitions of each measurement, after one to warm up; 2 or more")
    quick: bool = option(False, "tiny sizes, to see that it works")
    out: str = option("results", "folder for benchmark_cpu.json and benchmark_cuda.json")


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


def row(what, target, seconds, name, floor, times=1):
    """Return the record of a ratio: seconds[name] by `times` the sum of those in `floor`."""
    parts = zip(*(seconds[part] for part in floor), strict=True)
    ratios = [a / (times * sum(b)) for a, b in zip(seconds[name], parts, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"what": what, "floor": " + ".join(floor), "target": target, "median": median,
            "quartiles": [low, high],
            "medians": {part: statistics.median(seconds[part]) for part in (name, *floor)}}


def network(name, device):
    return build_model(name, 21).to(device, memory_format=torch.channels_last)


def scoring(name, batch, size, targets, cfg, device):
    """Return what reading the layers of each spec in `targets` costs beside a bare pass."""
    teacher, images = freeze(network(name, device)), torch.rand(batch, 3, *size, device=device)
    layers = {spec: select_layers(bn_layers(teacher), spec) for spec in targets}
    calls = {spec: lambda few=few: image_distances(teacher, images, few)
             for spec, few in layers.items()}
    with torch.no_grad():
        seconds = measure({"teacher": lambda: teacher(images)} | calls, cfg.repeats, device)
    return [row(f"score {batch} x {size[0]}x{size[1]}, {name}, {len(layers[spec])} layers", target,
                seconds, spec, ["teacher"]) for spec, target in targets.items()]


def training(batch, size, cfg, device, steps=5):
    """Return what training steps cost beside their parts."""
    images, logits = (torch.rand(batch, c, *size, device=device) for c in (3, 21))
    teacher, student = freeze(network("resnet_small", device)), network("resnet_tiny", device)
    optimiser, output = OPTIMISERS["adamw"](student.parameters()), logits.clone().requires_grad_()

    def loss(output, target):
        return (pixelwise_kd(output, target) + channelwise_kd(output, target)).mean()

    def batch_loss(progress, images, slots):
        with torch.no_grad():
            target = teacher(images)
        return loss(student(images), target)

    parts = {"teacher": lambda: teacher(images), "loss": lambda: loss(output, logits).backward(),
             "student": lambda: student.train()(images).backward(logits),
             "optimiser": optimiser.step}
    batches = [(images.cpu(), torch.arange(batch))] * steps
    seconds = measure(parts | {"fit": lambda: fit(student, batch_loss, batches, steps, 0.001)},
                      cfg.repeats, device)
    return [row(f"train resnet_tiny, {steps} steps of {batch} x {size[0]}x{size[1]}", 1.05, seconds,
                "fit", list(parts), steps)]


def scan(count, size, cfg, device):
    """Return what scoring a folder of photographs costs beside decoding and scoring them."""
    teacher = freeze(network("resnet_small", device))
    layers = bn_layers(teacher)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.jpg" for i in range(count)]
        for i, file in enumerate(files):
            Image.effect_mandelbrot((640, 480), (-2, -1, 1, 1 + i / count), 50).save(file)
        pool = Pool(files, size)
        views = torch.stack([image for image, _ in pool])
        seconds = measure({
            "decode": lambda: [pool[i] for i in range(count)],
            "score": lambda: [image_distances(teacher, as_input(part, device), layers).cpu()
                              for part in views.split(BATCH)],
            "scan": lambda: score(teacher, layers, files, size, distill.Config())},
            cfg.repeats, device)
    return [row(f"scan {count} JPEGs of 480x640", 1.1, seconds, "scan", ["decode", "score"])]


def memory(count, device):
    """Return the peak memory of a scan of drawn images beside that of a tenth of them."""
    teacher, peaks = freeze(network("resnet_tiny", device)), {}
    for n in (count // 10, count):
        loader = (torch.rand(50, 3, 16, 16, device=device) for _ in range(n // 50))
        score_pool(lambda images: image_distances(teacher, images), loader)
        peaks[f"{n:,}"] = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss] * 2  # never falls
    return [row(f"peak memory of scoring {n:,} images", 1.05, peaks, f"{n:,}", [f"{n // 10:,}"])]


def benchmark(cfg, device):
    """Return all rows on one device."""
    wide, small, batch = ((48, 64), (32, 48), 2) if cfg.quick else ((520, 520), (96, 128), 16)
    rows = []
    if device.type == "cpu":                # memory first: a peak would hide what comes after it
        rows += memory(1000 if cfg.quick else 100_000, device)
        distances = torch.rand(1000 if cfg.quick else 1_000_000)
        seconds = measure({"sample": lambda: sample(distances, 400)}, cfg.repeats, device)
        rows.append(row(f"choose 400 of {len(distances):,}", 1,
                        seconds | {"1 s": [1] * cfg.repeats}, "sample", ["1 s"]))
        rows += scan(4 if cfg.quick else 64, small, cfg, device)
    rows += training(batch, small, cfg, device)
    rows += scoring("resnet_small", batch, small, {"all": 1.3}, cfg, device)
    upto2 = "net.backbone.bn1,net.backbone.layer1,net.backbone.layer2"
    return rows + scoring("deeplabv3_resnet50", 2, wide, {
        "all": 1.15, f"{upto2},net.backbone.layer3": 0.35, upto2: 0.15}, cfg, device)


def table(record):
    """Return a record as a Markdown table."""
    return "\n".join(["| what | floor | ratio (quartiles) | at most |", "|---|---|---|---|", *(
        f"| {r['what']} | {r['floor']} | {r['median']:.3g} ({r['quartiles'][0]:.3g} to "
        f"{r['quartiles'][1]:.3g}) | {r['target']} |" for r in record["rows"])])


def main(argv=None):
    """Measure on the CPU and on a GPU if there is one; write a record each and return them."""
    cfg, records = parse(Config, argv, "Measure how close each step is to its floor."), []
    if cfg.repeats < 2:
        raise ValueError(f"--repeats {cfg.repeats} gives no quartiles; expected 2 or more")
    for device in map(torch.device, ["cpu", "cuda"][:1 + torch.cuda.is_available()]):
        records.append({"environment": environment(device), "repeats": cfg.repeats,
                        "rows": benchmark(cfg, device)})
        save_json(records[-1], Path(cfg.out) / f"benchmark_{device.type}.json")
        print(f"{device.type}\n{table(records[-1])}")
    return records


if __name__ == "__main__":
    one_sentence(main)()
