"""One figure per idea, from the built-in scenes and a finished run: see what the numbers mean.

Use it
    python distill.py --out runs/001
    python -m experiments.figures --run runs/001 --out results/ideas
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from ads_sampler import sample, score_pool
from bn_stats import METRICS, bn_distance, bn_layers, capture_bn_inputs
from evaluate import as_input
from models import freeze
from priority import effective_sample_size, progressive_weights, sample_weights
from support.checkpoint import load_model
from support.data import Pool, find_images, load_image, view
from support.labelled import class_colours
from support.options import Options, one_sentence, option, parse
from support.plots import BLUE, GREY, ORANGE, strip, write
from support.progress import progress
from support.records import read_csv


@dataclass(frozen=True)
class Config(Options):
    run: str | None = option(None, "folder of a finished run on the built-in scenes", kind="FOLDER",
                             required=True)
    out: str = option("results/ideas", "folder for the figures", kind="FOLDER")


def measure(teacher, layers, name, files, size):
    """Return (distances (N, 2), by each metric; variances (N, C) of one layer)."""
    def score(batch):
        with capture_bn_inputs(teacher, layers) as captured:
            teacher(as_input(batch[1], teacher.mean.device))
        distances = [bn_distance(captured, layers, m).sum(dim=1, keepdim=True) for m in METRICS]
        return torch.cat([*distances, captured[name][1]], dim=1)

    table = score_pool(score, progress(DataLoader(Pool(files, size), 16), "measuring"))
    return table[:, :len(METRICS)], table[:, len(METRICS):]


def memory_figure(layer, within, private, pool, kinds, path):
    """Idea 1: single images fall short of running_var, and yet distances tell worlds apart."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.scatter(layer.running_var, within.mean(dim=0), s=10, color=BLUE)
    top = float(layer.running_var.max())
    left.plot([0, top], [0, top], color=GREY)
    left.set(xlabel="running_var of a channel", ylabel="mean variance within one image",
             title="One image varies less than all images together")
    streets = torch.tensor([k in ("street_high", "toy_street", "night") for k in kinds])
    bins = np.linspace(float(private.min()), float(pool.quantile(0.99)), 50)
    for name, values, colour in (("pool, other pictures", pool[~streets], GREY),
                                 ("pool, foreign streets", pool[streets], ORANGE),
                                 ("private scenes, never in the pool", private, BLUE)):
        right.hist(values, bins, density=True, alpha=0.75, color=colour, label=name)
    right.set(xlabel="distance (l2)", yticks=[], title="Distances, by what the pictures show")
    right.legend(frameon=False, fontsize=8)
    write(figure, path)


def sampling_figure(choices, files, kinds, size, path):
    """Idea 2: what each rule picks from the same pool; a row is spread evenly over its choice."""
    figure = Figure(figsize=(11, 1.02 * len(choices)), layout="constrained")
    for part, (name, chosen) in zip(figure.subfigures(len(choices), 1), choices.items(),
                                    strict=True):
        shown = chosen[np.linspace(0, len(chosen) - 1, 12).astype(int)]
        counts = Counter(kinds[i] for i in chosen.tolist()).most_common(6)
        strip(part, [np.asarray(view(load_image(files[i]), size)) for i in shown.tolist()],
              f"{name}:  " + ", ".join(f"{kind} {n}" for kind, n in counts))
    write(figure, path)


def weights_figure(distances, path):
    """Idea 3: from distances to weights, and how many images they amount to over training."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    progress = np.linspace(0, 1, 40)
    for method, colour in (("minmax", BLUE), ("rank", ORANGE)):
        w = sample_weights(distances, method)
        left.plot(w, color=colour, label=f"{method}, median {w.median():.2f}")
        right.plot(100 * progress, [effective_sample_size(progressive_weights(w, float(p)))
                                    for p in progress], color=colour, label=method)
    left.set(xlabel="chosen image, nearest first", ylabel="weight at the start",
             title="Weights from distances")
    right.set(xlabel="training, %", ylabel="effective sample size", title="Images that count")
    left.legend(frameon=False, fontsize=8)
    write(figure, path)


@torch.no_grad()
def losses_figure(teacher, student, image, names, path):
    """Idea 4: where each loss sees a difference between teacher and student."""
    t, s = teacher(image), student(image)                                         # (1, K, h, w)
    colours = np.array(class_colours(names), dtype=np.uint8)
    car = names.index("car")
    pixel = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(dim=1)[0]  # (h, w)

    maps = {"image": image[0].permute(1, 2, 0), "teacher": colours[t.argmax(1)[0]],
            "student": colours[s.argmax(1)[0]], "pixelwise: KL": pixel,
            "channelwise: car, teacher": t[0, car].flatten().div(4).softmax(0).view(pixel.shape),
            "channelwise: car, student": s[0, car].flatten().div(4).softmax(0).view(pixel.shape)}
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for ax, (name, picture) in zip(figure.subplots(2, 3).flat, maps.items(), strict=True):
        ax.imshow(picture, cmap="magma", aspect="auto")
        ax.set_title(name, fontsize=9)
        ax.set_axis_off()
    write(figure, path)


def main(argv=None):
    """Write the four figures; return their folder."""
    cfg = parse(Config, argv, "Draw one figure per idea from a run on the built-in scenes.")
    run, out = Path(cfg.run), Path(cfg.out)
    config = json.loads((run / "metrics.json").read_text())["config"]
    teacher, student = load_model(config["teacher"]), load_model(run / "student.pt")
    size = student.image_size
    layers = bn_layers(freeze(teacher))
    root = Path(config["data_root"])
    files, private = find_images(root / "pool"), find_images(root / "val" / "images")
    kind = dict(read_csv(root / "pool_kinds.csv"))
    kinds = [kind[file.name] for file in files]

    middle = list(layers)[len(layers) // 2]
    pool, _ = measure(teacher, layers, middle, files, size)
    own, within = measure(teacher, layers, middle, private, size)
    memory_figure(layers[middle], within, own[:, 0], pool[:, 0], kinds, out / "memory.png")
    count = config["budget"]
    generator = torch.Generator().manual_seed(0)
    choices = {"random": torch.randperm(len(files), generator=generator)[:count],
               **{f"nearest, {m}": sample(pool[:, i], count) for i, m in enumerate(METRICS)}}
    sampling_figure(choices, files, kinds, size, out / "sampling.png")
    weights_figure(pool[choices["nearest, l2"], 0], out / "weights.png")
    image = as_input(Pool(private, size).view(3)[None], "cpu")
    losses_figure(teacher, student, image, teacher.class_names, out / "losses.png")
    print(f"memory.png, sampling.png, weights.png and losses.png are in {out}")
    return out


if __name__ == "__main__":
    one_sentence(main)()
