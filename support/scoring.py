"""Score a pool once: batch by batch, resumable, in one process or in several.

Idea
    Scoring is the only step whose cost grows with the pool. The scores lie in one file of N
    float32, below runs/scores, whose name depends on teacher, pool and options. Each batch is
    written as soon as it is scored, and only what is missing is computed: by a resumed run, by a
    later run, or by several processes at once, each of which takes every n-th batch.

Symbols
    N files of the pool, B images of a batch.

Use it (the options are those of distill.py, which then reads these scores)
    torchrun --nproc-per-node 8 -m support.scoring --dataset none --teacher T.pt --pool photos
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import PIL
import torch

from ads_sampler import score_pool
from bn_stats import bn_layers, image_distances, select_layers
from support.checkpoint import atomic, fingerprint
from support.command import Inputs, open_inputs
from support.data import iterate, open_pool
from support.images import as_input
from support.options import one_sentence, parse, set_deterministic
from support.progress import progress

BATCH = 16                      # fixed: convolutions round a little differently at other sizes
STORE = Path("runs/scores")     # this folder may be deleted at any time
MISSING = -np.inf               # not scored yet. NaN: cannot be read, inf: the score is not finite


def score_file(teacher, layers, pool, cfg):
    """Return the path of the scores of this teacher, this pool and these options.

    A photo counts as the same if path, size in bytes and time of change are. The name also depends
    on the code: whoever changes a distance gets new scores.
    """
    def stamp(path):
        path = os.path.realpath(path)
        known = os.path.exists(path)                                     # else it has vanished
        return path, *((os.path.getsize(path), os.path.getmtime(path)) if known else ())

    root = Path(__file__).parents[1]
    sampling = getattr(cfg, "sampling", "nearest")
    settings = (sampling, cfg.metric, cfg.match_colours, cfg.seed if sampling == "random" else 0)
    content = (fingerprint(teacher), repr(teacher), list(layers), settings, pool.size,
               torch.__version__, PIL.__version__, next(teacher.parameters()).device.type,
               [stamp(path) for path in pool.files],
               [path.read_text() for where in (root, root / "support")
                for path in sorted(where.glob("*.py"))])
    return STORE / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}.f32"


def open_scores(path, count):
    """Return an array (count,) float32 that is stored in the file `path` (None: in memory only)."""
    empty = np.full(count, MISSING, np.float32)
    if path is None:
        return empty
    try:
        if not path.exists():
            with atomic(path) as temporary:
                empty.tofile(temporary)
        return np.memmap(path, np.float32, "r+", shape=(count,))
    except OSError as error:
        print(f"warning: the scores are not kept for later runs ({error})")
        return empty


def cached_scores(score, pool, device, workers=None, path=None, rank=0, processes=1):
    """Return (scores of a `data.Pool` (N,) float32, why files cannot be used, one line each).

    score: from images (B, 3, H, W) in [0, 1] and their pool indices (B,) to scores (B,). path: a
    file of scores; only what is missing in it is computed. NaN: the file cannot be read, infinity:
    its score is not finite. Of several processes each scores every `processes`-th batch, and what
    others score is -inf here until they have. ValueError if most files cannot be used.
    """
    stored = open_scores(path, len(pool))
    batches = [range(i, min(i + BATCH, len(pool))) for i in range(0, len(pool), BATCH)]
    # A comparison with NaN is false: files that could not be read are tried again.
    todo = [batch for batch in batches[rank::processes] if not (stored[batch] > MISSING).all()]

    def score_batch(batch):
        index, images, readable = batch
        scores = score(as_input(images, device), index.to(device)).float().cpu()         # (B,)
        scores = scores.nan_to_num(torch.inf, torch.inf, torch.inf)
        scores = scores.masked_fill(~readable, torch.nan)
        stored[index.numpy()] = scores.numpy()
        return scores

    if todo:
        loader = iterate(pool, device, workers, batch_sampler=todo)
        score_pool(score_batch, progress(loader, "scoring", total=len(todo), disable=rank > 0))
    elif path and rank == 0:
        print(f"the scores of this pool are read from {path}")
    scores = torch.from_numpy(np.array(stored))
    return scores, unusable(pool, scores)


def unusable(pool, scores):
    """Return why files of the pool cannot be used, one line each; ValueError if most of it cannot.
    """
    reasons = []
    for i in (scores.isnan() | scores.isposinf()).nonzero().flatten().tolist():
        try:
            pool.view(i)
            reasons.append(f"{pool.files[i]}: its score is not finite")
        except ValueError as error:
            reasons.append(str(error))
    if len(reasons) > len(pool) / 2:
        raise ValueError(f"{len(reasons)} of {len(pool)} pool files are unusable: {reasons[0]}")
    return reasons


def main(argv=None):
    """Score a pool by distance, in each process that torchrun started, or in this one."""
    def stop(*_):                    # torchrun ends all processes as soon as one has died
        print("error: another process has ended; start the same command again, it scores only "
              "what is missing", file=sys.stderr, flush=True)
        os._exit(2)

    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        signal.signal(signal.SIGTERM, stop)
    cfg = parse(Inputs, argv, main.__doc__)
    if cfg.deterministic:
        set_deterministic()
    teacher, files, _ = open_inputs(cfg)
    pool = open_pool(files, teacher, teacher.image_size, cfg.match_colours)
    layers = select_layers(bn_layers(teacher), cfg.layers)
    path = score_file(teacher, layers, pool, cfg)
    if rank == 0:                    # one process alone makes the file: another would empty it
        open_scores(path, len(pool))
        if not path.exists():
            raise ValueError(f"{path} cannot be written; start where it can be")
    while not path.exists():
        time.sleep(0.1)
    cached_scores(lambda images, _: image_distances(teacher, images, layers, cfg.metric), pool,
                  teacher.mean.device, cfg.workers, path, rank, processes)
    if rank == 0:
        print(f"scores: {path}; distill.py with the same options reads them")


if __name__ == "__main__":
    one_sentence(main)()
