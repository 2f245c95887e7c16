"""Every figure. Functions take results and a path and write a PNG; nothing is shown on a screen.

Use it
    from support.figures import pool_check, story
    pool_check(chosen, size, teacher, "pool.png")      # what distill.distill returned
"""

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ads_sampler import sample
from evaluate import as_input, predict
from priority import progressive_weights
from support.checkpoint import atomic
from support.data import load_image, view
from support.labelled import WHITE, class_colours

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"
# What the scores of each --sampling are, and what the smallest and the largest of them mean.
SCORES = {"nearest": ("distance to the teacher's training data", "Nearest", "Farthest"),
          "confidence": ("1 - the teacher's confidence", "Most confident", "Least confident"),
          "random": ("number drawn at random", "First drawn", "Last drawn")}


def write(figure, path):
    """Write a figure as PNG, never half."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def strip(figure, pictures, title, titles=None):
    """Fill a subfigure with one row of pictures (RGB arrays)."""
    axes = figure.subplots(1, len(pictures), squeeze=False)[0]
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    for ax, picture, name in zip(axes, pictures, titles or [""] * len(pictures), strict=True):
        ax.set_axis_off()
        ax.set_title(name, fontsize=8, pad=2)
        ax.imshow(picture)


def painter(class_names):
    """Return a function from targets (H, W) to a picture (H, W, 3); void, all beyond K, is white.
    """
    colours = np.array([*class_colours(class_names), WHITE], dtype=np.uint8)
    return lambda target: colours[target.clamp(max=len(class_names)).cpu().numpy()]


def legend(figure, class_names):
    """Name the colour of each class below a figure."""
    colours = [*class_colours(class_names), WHITE]
    patches = [Patch(facecolor=np.array(c) / 255, edgecolor=GREY, label=name)
               for c, name in zip(colours, [*class_names, "void"], strict=True)]
    rows = -(-len(patches) // 10)                                # of at most ten names, that fit
    figure.legend(handles=patches, loc="outside lower center", ncols=-(-len(patches) // rows),
                  fontsize=8, frameon=False)


def histogram(ax, scores, chosen, sampling):
    """Draw the scores of the pool and, in colour, of the chosen images."""
    d = scores[scores.isfinite()]
    top = float(np.quantile(d, 0.99))
    bins = np.linspace(float(d.min()), top, 50)
    ax.hist(d.clamp(max=top), bins, color=GREY, label=f"pool, {len(d)} images")
    ax.hist(scores[chosen].clamp(max=top), bins, color=BLUE, label=f"chosen, {len(chosen)}")
    what, first, _ = SCORES[sampling]
    ax.set(xlabel=f"{what} (last bin: all beyond)", ylabel="images",
           title=f"2, 3  Score the pool, keep the {first.lower()}")
    ax.legend(frameon=False, fontsize=8)


def weight_curves(ax, weights, schedule, sampling):
    """Draw how the weights of the nearest, the middle and the farthest image move in training."""
    _, first, last = SCORES[sampling]
    progress = np.linspace(0, 1, 50)
    curves = torch.stack([progressive_weights(weights, float(p), schedule) for p in progress])
    ranks = {first.lower(): 0, "first quarter": len(weights) // 4, "median": len(weights) // 2,
             last.lower(): -1}
    for shade, (name, rank) in zip((1, 0.75, 0.5, 0.3), ranks.items(), strict=True):
        ax.plot(100 * progress, curves[:, rank], color=ORANGE, alpha=shade, lw=2, label=name)
    ax.set(xlabel="training, %", ylabel="weight", ylim=(0, 1.05), title=f"4  Weights ({schedule})")
    ax.legend(frameon=False, fontsize=8)


def pool_rows(figures, chosen, size, sampling, columns=10):
    """Fill two subfigures with the nearest and the farthest images of the pool; return which."""
    d = chosen["scores"]
    order = sample(d, int(d.isfinite().sum())).tolist()
    shown = order[:columns], order[-columns:]
    for figure, indices, name in zip(figures, shown, SCORES[sampling][1:], strict=True):
        paths = [chosen["pool"].files[i] for i in indices]
        pictures = [np.asarray(view(load_image(path, size), size)) for path in paths]
        strip(figure, pictures, f"{name} in the pool", [f"{d[i]:.3g}" for i in indices])
    return shown


def pool_check(chosen, size, teacher, path, sampling="nearest"):
    """Write the figure of `--dry-run`: histogram, nearest and farthest images."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    parts = figure.subfigures(3, 1, height_ratios=(2, 1, 1))
    histogram(parts[0].subplots(), chosen["scores"], chosen["chosen"], sampling)
    pool_rows(parts[1:], chosen, size, sampling)
    write(figure, path)


def examples(data, count=5):
    """Return `count` of (images (1, 3, h, w), targets or None), spread over a loader or a list."""
    items = getattr(data, "dataset", data)
    places = np.unique(np.linspace(0, len(items) - 1, count + 2).astype(int)[1:-1])
    picked = [items[i] for i in places]
    return [(x, y) if x.dim() == 4 else (x[None], y[None]) for x, y in picked]


def story(chosen, size, schedule, teacher, student, data, path, sampling="nearest"):
    """Write the figure of a run: from the pool to the student's masks.

    data: labelled loader, or a list of (images, None). Masks are drawn in the data set's colours.
    """
    paint, device = painter(teacher.class_names), next(student.parameters()).device
    rows = {"6  Input": [], "Truth": [], "Teacher": [], "Student": []}
    for image, target in examples(data):
        image = as_input(image, device)
        rows["6  Input"].append(image[0].permute(1, 2, 0).cpu().numpy())
        shape = image.shape[-2:] if target is None else target.shape[-2:]
        if target is not None:
            rows["Truth"].append(paint(target[0]))
        for name, model in (("Teacher", teacher), ("Student", student)):
            with torch.inference_mode():
                rows[name].append(paint(predict(model, image, shape)[0]))
    rows = {name: pictures for name, pictures in rows.items() if pictures}

    figure = Figure(figsize=(11, 6.3 + 1.45 * len(rows)), layout="constrained")
    legend(figure, teacher.class_names)
    parts = figure.subfigures(3 + len(rows), 1, height_ratios=[2.6, 1, 1] + [1.35] * len(rows))
    left, right = parts[0].subplots(1, 2, width_ratios=(3, 2))
    histogram(left, chosen["scores"], chosen["chosen"], sampling)
    weight_curves(right, chosen["weights"], schedule, sampling)
    pool_rows(parts[1:3], chosen, size, sampling)
    for part, (name, pictures) in zip(parts[3:], rows.items(), strict=True):
        strip(part, pictures, name)
    write(figure, path)
