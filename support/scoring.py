"""Score a folder of photographs once: batch by batch, in order, and never twice.

Idea
    Scoring is the one pass over the whole pool, which may be large. Each batch of scores is written
    as it comes, so that an interrupted scan goes on where it stopped, and a later run with the same
    teacher, pool and settings only reads. Memory is one batch and the scores.

Symbols
    N files of the pool, B images of a batch, D columns: distance, shift, features for herding.

Use it
    scores, skipped = score(teacher, layers, files, size=(96, 128), cfg=Config())      # (N, D)
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import PIL
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ads_sampler import mean_shift, moment_features, score_pool
from bn_stats import bn_distance, capture_bn_inputs
from evaluate import as_input
from experiments.baselines import PREDICTION_SCORES, prediction_scores
from models import fingerprint, segmentation_logits
from support.checkpoint import atomic
from support.data import Pool, loaded

BATCH = 16                      # fixed: convolutions round a little differently at other sizes
FEATURES = 512                  # columns that herding needs beside distance and shift
STORE = Path("runs/scores")     # where finished scores are kept for later runs
CODE = ("support/scoring", "bn_stats", "ads_sampler", "experiments/baselines", "alignment",
        "support/data")         # what makes a score


def store_path(teacher, layers, files, size, cfg):
    """Return the file that keeps the scores of this teacher, pool and settings: its name is a hash.

    A photograph counts as the same if path, size in bytes and time of change are. Whoever tries a
    distance of their own in one of the modules of CODE gets new scores, not those kept before.
    """
    def stamp(path):
        try:
            status = path.stat()
            return str(path.resolve()), status.st_size, status.st_mtime_ns
        except OSError:                                    # vanished, or not ours to read
            return str(path), 0, 0

    content = (fingerprint(teacher), type(teacher).__name__, list(layers), cfg.sampling, cfg.metric,
               cfg.align == "transfer-first", list(size), torch.__version__, PIL.__version__,
               next(teacher.parameters()).device.type, [stamp(path) for path in files],
               [(Path(__file__).parents[1] / f"{name}.py").read_text() for name in CODE])
    return STORE / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}.f32"


def read_rows(path, columns):
    """Return the whole rows in a file of float32, none if there is no file: (n, columns)."""
    flat = np.fromfile(path, dtype=np.float32) if path and path.is_file() else np.empty(0, "f4")
    rows = flat[:len(flat) // columns * columns].reshape(-1, columns)
    return torch.from_numpy(rows.copy())


def score(teacher, layers, files, size, cfg, part=None, store=None, prepare=None):
    """Return (scores (N, 2 or more) float32, reasons why files are left out).

    Column 0 is the distance, column 1 the shift (ads_sampler.mean_shift), the rest are features for
    herding. A file that cannot be read scores NaN. cfg: its sampling, metric and workers count.
    part: file to which batches are appended, and from which a scan goes on. store: file that keeps
    finished scores (`store_path`); if it is there it is read and nothing is computed. prepare: what
    is done to the images (B, 3, H, W) before the teacher sees them, if anything.
    """
    device = next(iter(layers.values())).running_mean.device
    columns = 2 + FEATURES * (cfg.sampling == "herding")

    def score_batch(batch):
        images, errors = as_input(batch[0], device), batch[1]
        images = prepare(images) if prepare else images
        predicted = cfg.sampling in PREDICTION_SCORES
        with capture_bn_inputs(teacher, layers, stop=not predicted) as captured:
            output = segmentation_logits(teacher, images)
        if predicted:
            distance = prediction_scores(output, cfg.sampling)                    # (B,)
        else:
            distance = bn_distance(captured, layers, cfg.metric).sum(dim=1)       # (B,)
        scores = torch.stack([distance, mean_shift(captured, layers)], dim=1)
        if cfg.sampling == "herding":
            scores = torch.cat([scores, moment_features(captured, layers, FEATURES)], dim=1)
        scores[[bool(error) for error in errors]] = torch.nan
        if part:
            with open(part, "ab") as file:
                file.write(scores.float().cpu().numpy().tobytes())
        return scores

    pool = Pool(files, size)
    scores = read_rows(store, columns)
    if len(scores) != len(files):
        scores = read_rows(part, columns)
        scores = scores[:len(scores) // BATCH * BATCH]      # the last batch may be half written
        if part:
            scores.numpy().tofile(part)
        todo = range(len(scores), len(files))
        if todo:
            loader = DataLoader(Subset(pool, todo), BATCH, num_workers=cfg.workers,
                                pin_memory=device.type == "cuda")
            bar = tqdm(loaded(loader), desc="scoring", mininterval=1, total=len(loader))
            scores = torch.cat([scores, score_pool(score_batch, bar)])
        if store:
            with atomic(store) as temporary:
                scores.numpy().tofile(temporary)
        if part:
            part.unlink()
    bad = (~scores.isfinite().all(dim=1)).nonzero().squeeze(1).tolist()
    reasons = [pool[i][1] or f"{files[i]}: it could not be scored" for i in bad]
    if len(bad) > len(files) / 2:
        raise ValueError(f"{len(bad)} of {len(files)} files of the pool cannot be used, more than "
                         f"half; the first is {reasons[0]}")
    return scores, reasons


def verdict(scores, chosen):
    """Return a sentence: does this pool fit this teacher?

    A rule of thumb from one teacher (results/pool_check.csv): CamVid's own training images lie at
    0.2, the chosen of a mixed pool at 0.3, of landscapes only at 0.5, any photographs at 1.1.
    """
    near, whole = (float(s.square().nanmean().sqrt()) for s in (scores[chosen, 1], scores[:, 1]))
    fits = "fits well" if near < 0.4 else "fits in part" if near < 0.7 else "hardly fits"
    return (f"This pool {fits}: the chosen images lie {near:.2f} standard deviations from the "
            f"teacher's channel means,\n            the whole pool {whole:.2f}; training images "
            "lie below 0.3 or so. Look at the nearest, too.")
