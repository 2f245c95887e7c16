"""Score a folder of photographs once: batch by batch, in order, and never twice.

Idea
    Scoring is the one pass over the whole pool, which may be large. Each batch of scores is written
    as it comes, so that an interrupted scan goes on where it stopped, and a later run with the same
    teacher, pool and settings only reads. Memory is one batch and the scores.

Symbols
    N files of the pool, B images of a batch.

Use it
    scores, skipped = scan(lambda x, numbers: image_distances(teacher, x), pool, device)     # (N,)
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import PIL
import torch
from torch.utils.data import DataLoader, Subset

from ads_sampler import score_pool
from bn_stats import capture_bn_inputs, run_until
from evaluate import as_input
from support import together
from support.teacher_cache import common_size
from support.checkpoint import atomic, fingerprint
from support.data import loaded
from support.progress import progress

BATCH = 16                      # fixed: convolutions round a little differently at other sizes
STORE = Path("runs/scores")     # where finished scores are kept for later runs


@torch.no_grad()
def look_over(teacher, student, layers, pool, cfg):
    """Return (h, w) to compare logits at; ValueError for what would only show after the scan.

    That is a budget larger than the pool, networks of different classes or of one, and a teacher
    that is not finite or was never trained.
    """
    if cfg.budget > len(pool):
        raise ValueError(f"the budget is {cfg.budget}, but the pool has {len(pool)} files; use "
                         "--budget 0 for all of them")
    tensors = [*teacher.parameters(), *teacher.buffers()]
    if not all(x.isfinite().all() for x in tensors) or any((m.running_var < 0).any()
                                                           for m in layers.values()):
        raise ValueError("the teacher's weights or statistics are infinite, NaN or negative; take "
                         "another teacher")
    images = torch.rand(2, 3, *pool.size, generator=torch.Generator().manual_seed(0))
    answers = teacher(images.to(tensors[0].device))                               # (2, K, h, w)
    if torch.equal(answers[0], answers[1]) or all(
            (m.running_mean == 0).all() and (m.running_var == 1).all() for m in layers.values()):
        raise ValueError("the teacher looks untrained: were its weights loaded? Its BatchNorm "
                         "statistics are still 0 and 1, or its output is the same for any image")
    logits = student.eval()(images.to(next(student.parameters()).device))         # (2, K, h, w)
    if logits.shape[1] != answers.shape[1] or answers.shape[1] < 2:
        raise ValueError(f"the teacher has {answers.shape[1]} output channels and the student "
                         f"{logits.shape[1]}; expected one for each of two or more classes in "
                         "both, background included")
    return common_size(answers.shape[-2:], logits.shape[-2:], pool.size)


def score_key(teacher, layers, pool, cfg):
    """Return a name for the scores of this teacher, this pool and the options that matter, a hash.

    A photograph counts as the same if path, size in bytes and time of change are. Whoever changes
    the code, a distance say, gets new scores, not those kept before.
    """
    def stamp(path):
        try:
            status = Path(path).stat()
            return str(Path(path).resolve()), status.st_size, status.st_mtime_ns
        except OSError:                                    # vanished, or not ours to read
            return str(path), 0, 0

    root = Path(__file__).parents[1]
    settings = (cfg.sampling, cfg.metric, cfg.align, cfg.sampling == "random" and cfg.seed)
    content = (fingerprint(teacher), repr(teacher), list(layers), settings, pool.size,
               torch.__version__, PIL.__version__, next(teacher.parameters()).device.type,
               [stamp(path) for path in pool.files],
               [path.read_text() for where in (root, root / "support")
                for path in sorted(where.glob("*.py"))])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_scores(path):
    """Return the scores in a file of float32, none if there is no file: (n,)."""
    if not path or not path.is_file():
        return torch.empty(0)
    return torch.from_numpy(np.fromfile(path, dtype=np.float32))


def unreadable(pool, scores):
    """Return {number: why it cannot be read, or None} for the files of the pool without a score."""
    reasons = {}
    for i in (~scores.isfinite()).nonzero().flatten().tolist():
        try:
            pool.view(i)
            reasons[i] = None
        except ValueError as error:
            reasons[i] = str(error)
    return reasons


def unusable(pool, scores):
    """Return why files of the pool cannot be used, a line each; ValueError if that is most of it.
    """
    reasons = [why or f"{pool.files[i]}: it could not be scored"
               for i, why in unreadable(pool, scores).items()]
    if len(reasons) > len(pool) / 2:
        raise ValueError(f"{len(reasons)} of {len(pool)} files of the pool cannot be used, more "
                         f"than half; the first is {reasons[0]}")
    return reasons


def scan(rule, pool, device, workers=0, out=None, key=None):
    """Return (scores (N,) float32; why files cannot be used, a line each).

    The score is NaN for a file that cannot be read, infinity for one whose score is not finite.

    rule: maps (images (B, 3, H, W) in [0, 1], their numbers in the pool (B,)) to scores (B,). out:
    folder of the run; batches are appended to a file in it, from which an interrupted scan goes on.
    key: name under which finished scores are kept for other runs, and read if they are there.
    ValueError if more than half of the files cannot be used.
    """
    store = key and STORE / f"{key}.f32"
    part = out and key and Path(out) / f"{key}.part"  # goes on only with this pool and this teacher
    scores = read_scores(store)[:len(pool)]
    # A file that could not be read then, and can be now, was out of reach for a while.
    still = all(why for i, why in unreadable(pool, scores).items() if scores[i].isnan())
    scores = together.told(scores if still else scores[:0])
    if len(scores) == len(pool):
        return scores, unusable(pool, scores)
    scores = read_scores(part)
    scores = together.told(scores[:len(scores) // BATCH * BATCH])  # the last may be half written
    if part:
        part.parent.mkdir(parents=True, exist_ok=True)
        scores.numpy().tofile(part)

    def score_batch(batch):
        numbers, images, readable = batch
        found = rule(as_input(images, device), numbers.to(device))                # (B,)
        found = found.float().cpu().nan_to_num(torch.inf, torch.inf, torch.inf)
        found = found.masked_fill(~readable, torch.nan)
        found = torch.cat(together.gathered(found, BATCH) or [found])             # (n B,)
        found = found[:len(pool) - int(numbers[0])]                               # no padding
        if part:
            with open(part, "ab") as file:
                file.write(found.numpy().tobytes())
        return found

    todo = [range(i, min(i + BATCH, len(pool))) for i in range(len(scores), len(pool), BATCH)]
    if todo:
        # Of n processes each scores every n-th batch: the file grows in pool order, whatever n is.
        # In the last round some may have none left, and score one again.
        rank, n = together.place.get()
        own = [todo[i % len(todo)] for i in range(rank, -(-len(todo) // n) * n, n)]
        loader = DataLoader(pool, batch_sampler=own, num_workers=workers,
                            pin_memory=device.type == "cuda")
        bar = progress(loaded(loader), "scoring", total=len(loader))
        scores = together.told(torch.cat([scores, score_pool(score_batch, bar)]))
    if store:
        with atomic(store) as temporary:
            scores.numpy().tofile(temporary)
    if part:
        part.unlink()
    return scores, unusable(pool, scores)


@torch.no_grad()
def mean_shift(teacher, layers, pool, indices):
    """Return how far images lie from the teacher's channel means, in standard deviations: a number.

    The root mean square of (mu - mu_bn) / sqrt(var_bn + eps) over images, layers and channels, a
    yardstick of known scale: over the training images the mean square is the share of the running
    variance that lies between images, so at most 1.
    """
    device, squares = next(teacher.parameters()).device, []
    for batch in DataLoader(Subset(pool, indices), BATCH):
        with capture_bn_inputs(teacher, layers) as captured:
            run_until(teacher, as_input(batch[1], device), layers)
        squares += [((mean - layers[name].running_mean).square()
                     / (layers[name].running_var + layers[name].eps)).mean(dim=1)
                    for name, (mean, _) in captured.items()]                      # L times (B,)
    return torch.cat(squares).mean().sqrt().item()


def verdict(teacher, found, most=200):
    """Return a sentence: does this pool fit this teacher? It looks at `most` of chosen and pool.

    A rule of thumb from one teacher (results/pool_check.csv): CamVid's own training images lie at
    0.2, the chosen of a mixed pool at 0.3, of landscapes only at 0.5, any photographs at 1.1.
    """
    usable = found["scores"].isfinite().nonzero().flatten()
    near, whole = (mean_shift(teacher, found["layers"], found["pool"],
                              some[::-(-len(some) // most)].tolist())
                   for some in (found["chosen"], usable))
    fits = "fits well" if near < 0.4 else "fits in part" if near < 0.7 else "hardly fits"
    return (f"This pool {fits}: the chosen images lie {near:.2f} standard deviations from the "
            f"teacher's channel\nmeans, the whole pool {whole:.2f}; the training images of the one "
            "teacher that this rule of thumb\nwas read off lay at 0.2. Look at the nearest, too.")
