"""Every figure of the programs. Functions take results and a path and write a PNG.

Use it
    from support.figures import pool_figure
    pool_figure(result, size, "nearest", "pool.png")      # result: what distill.distill returned
"""

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from ads_sampler import sample
from priority import progressive_weights
from support import images, labelled
from support.checkpoint import atomic

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"
# What the scores of each --sampling are, and what the smallest and the largest of them mean.
SCORES = {"nearest": ("distance to the teacher's training data", "Nearest", "Farthest"),
          "confidence": ("1 - the teacher's confidence", "Most confident", "Least confident"),
          "random": ("random number", "First drawn", "Last drawn")}


def save_png(figure, path):
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def save_mask(mask, path, colours):
    """Write classes (H, W) as an index PNG with a palette of RGB colours."""
    png = Image.fromarray(mask.byte().cpu().numpy())
    png.putpalette([value for colour in colours for value in colour])
    with atomic(path) as temporary:
        png.save(temporary, format="PNG")


def picture_row(figure, pictures, title, titles=None):
    """Fill a subfigure with one row of pictures (RGB arrays or PIL pictures)."""
    axes = figure.subplots(1, len(pictures), squeeze=False)[0]
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    for ax, picture, name in zip(axes, pictures, titles or [""] * len(pictures), strict=True):
        ax.set_axis_off()
        ax.set_title(name, fontsize=8, pad=2)
        ax.imshow(picture)


def histogram(ax, scores, selected, sampling):
    """Draw the scores of the pool and, in colour, of the selected images."""
    d = scores[scores.isfinite()]
    top = float(np.quantile(d, 0.99))
    bins = np.linspace(float(d.min()), top, 50)
    ax.hist(d.clamp(max=top), bins, color=GREY, label=f"pool, {len(d)} images")
    ax.hist(scores[selected].clamp(max=top), bins, color=BLUE, label=f"selected, {len(selected)}")
    what, first, _ = SCORES[sampling]
    ax.set(xlabel=f"{what} (last bin: all beyond)", ylabel="images",
           title=f"Score the pool, select the {first.lower()}")
    ax.legend(frameon=False, fontsize=8)


def weight_curves(ax, weights, schedule, sampling):
    """Draw how the weights of the nearest, the middle and the farthest image move in training."""
    progress = torch.linspace(0, 1, 50).tolist()
    curves = torch.stack([progressive_weights(weights, p, schedule) for p in progress])  # (50, N)
    _, first, last = SCORES[sampling]
    for rank, name, shade in ((0, first, 1), (len(weights) // 2, "Median", 0.6), (-1, last, 0.3)):
        ax.plot(progress, curves[:, rank], color=ORANGE, alpha=shade, lw=2, label=name)
    ax.set(xlabel="progress of training, from 0 to 1", ylabel="weight in the loss", ylim=(0, 1.05),
           title="How much a selected image counts")
    ax.legend(frameon=False, fontsize=8)


def pool_rows(top, bottom, result, size, sampling):
    """Fill two subfigures with the ten nearest and the ten farthest images of the pool."""
    d, (_, first, last) = result["scores"], SCORES[sampling]
    order = sample(d, int(d.isfinite().sum())).tolist()
    for figure, indices, name in ((top, order[:10], first), (bottom, order[-10:], last)):
        files = [result["pool"].files[i] for i in indices]
        pictures = [images.resized_crop(images.load_image(path, size), size) for path in files]
        picture_row(figure, pictures, f"{name} in the pool", [f"{d[i]:.3g}" for i in indices])


def pool_figure(result, size, sampling, path):
    """Write the figure of --dry-run: histogram, nearest and farthest images."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    top, *rows = figure.subfigures(3, 1, height_ratios=(2, 1, 1))
    histogram(top.subplots(), result["scores"], result["selected"], sampling)
    pool_rows(*rows, result, size, sampling)
    save_png(figure, path)


@torch.inference_mode()
def examples(eval_data, models, predict):
    """Return {"Input": [RGB array, ...], "Truth": [classes (H, W), ...], a name of models: ...}.

    eval_data: a DataLoader of (images, labels), or a list of (images, None); five are drawn, evenly
    spread. predict: from model, images, size to classes (B, h, w).
    """
    items = getattr(eval_data, "dataset", eval_data)
    rows = {name: [] for name in ("Input", "Truth", *models)}
    for i in np.unique(np.linspace(0, len(items) - 1, 7).astype(int)[1:-1]):
        image, target = items[i]
        image = image.reshape(1, *image.shape[-3:])                              # (1, 3, h, w)
        size = image.shape[-2:] if target is None else target.shape[-2:]
        rows["Input"].append(image[0].permute(1, 2, 0).numpy())
        rows["Truth"] += [] if target is None else [target]
        for name, model in models.items():
            device = next(model.parameters()).device
            rows[name].append(predict(model, images.as_input(image, device), size)[0])
    return {name: pictures for name, pictures in rows.items() if pictures}


def run_figure(result, teacher, cfg, rows, path):
    """Write the figure of a run: from the pool to the student's masks. rows: of `examples`."""
    # Void is white: no class is.
    colours = np.array([*labelled.class_colours(teacher.class_names), (255,) * 3], np.uint8)
    figure = Figure(figsize=(11, 6.3 + 1.45 * len(rows)), layout="constrained")
    # A dollar sign would start a formula.
    patches = [Patch(facecolor=colour / 255, edgecolor=GREY, label=name.replace("$", r"\$"))
               for colour, name in zip(colours, [*teacher.class_names, "void"], strict=True)]
    figure.legend(handles=patches, loc="outside lower center", fontsize=8, frameon=False, ncols=10)
    heights = [2.6, 1, 1] + [1.35] * len(rows)
    top, *parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    left, right = top.subplots(1, 2, width_ratios=(3, 2))
    histogram(left, result["scores"], result["selected"], cfg.sampling)
    weight_curves(right, result["weights"], cfg.schedule, cfg.sampling)
    pool_rows(*parts[:2], result, teacher.image_size, cfg.sampling)
    for part, (name, pictures) in zip(parts[2:], rows.items(), strict=True):
        if name != "Input":                              # classes; void, all beyond K, is white
            pictures = [colours[mask.clamp(max=len(colours) - 1).cpu()] for mask in pictures]
        picture_row(part, pictures, name)
    save_png(figure, path)
