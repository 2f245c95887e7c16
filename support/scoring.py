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
import sys
import time
from pathlib import Path

import numpy as np
import PIL
import torch

from bn_stats import bn_layers, image_distances, select_layers
from support import checkpoint, command, data, options
from support.images import as_input

BATCH = 16                      # fixed: convolutions round a little differently at other sizes
STORE = Path("runs/scores")     # this folder may be deleted at any time
MISSING = -np.inf               # not scored yet. NaN: cannot be read, inf: the score is not finite


def score_file(teacher, layers, pool, cfg):
    """Return the path of the scores of this teacher, this pool and these options.

    A photo counts as the same if path, size in bytes and time of change are. The name also depends
    on the code of this repository and on the files that define the teacher: whoever changes them
    gets new scores.
    """
    paths = [os.path.realpath(path) for path in pool.files]
    stats = [(s.st_size, s.st_mtime) for s in map(os.stat, filter(os.path.exists, paths))]
    root = Path(__file__).parents[1]
    files = sorted([*root.glob("*.py"), *root.glob("support/*.py")])
    modules = {sys.modules.get(type(module).__module__) for module in teacher.modules()}
    defining = sorted({getattr(module, "__file__", None) or "" for module in modules})
    files += map(Path, [teacher.name.rpartition(":")[0], *defining])            # FILE.py:FUNCTION
    code = [path.read_bytes().hex() for path in files if path.is_file()]
    sampling = getattr(cfg, "sampling", "nearest")                       # absent in `main`
    settings = (sampling, cfg.metric, cfg.match_colours, cfg.seed if sampling == "random" else 0)
    content = (checkpoint.fingerprint(teacher), repr(teacher), teacher.multiple, list(layers),
               settings, pool.size, [torch.__version__, PIL.__version__, teacher.mean.device.type],
               paths, stats, code)
    return STORE / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}.f32"


def open_scores(path, count):
    """Return the array (count,) float32 in a file, which is made if need be; else OSError."""
    if not path.exists():
        with checkpoint.atomic(path) as temporary:
            np.full(count, MISSING, np.float32).tofile(temporary)
    return np.memmap(path, np.float32, "r+", shape=(count,))


@torch.no_grad()
def cached_scores(score, pool, device, workers=None, path=None, rank=0, processes=1):
    """Return (scores of a `data.Pool` (N,) float32, why files cannot be used, one line each).

    score: from images (B, 3, H, W) in [0, 1] and their pool indices (B,) to scores (B,). path: a
    file of scores; only what is missing in it is computed. NaN: the file cannot be read, infinity:
    its score is not finite. Of several processes each scores every `processes`-th batch, and what
    others score is -inf here until they have. ValueError if most files cannot be used.
    """
    stored = open_scores(path, len(pool)) if path else np.full(len(pool), MISSING, np.float32)
    batches = [range(i, min(i + BATCH, len(pool))) for i in range(0, len(pool), BATCH)]
    # A comparison with NaN is false: files that could not be read are tried again.
    todo = [batch for batch in batches[rank::processes] if not (stored[batch] > MISSING).all()]
    if path and not todo and rank == 0:
        print(f"the scores of this pool are read from {path}")
    loader = data.iterate(pool, device, workers, batch_sampler=todo)
    hidden = rank > 0 or not todo
    loader = options.progress(loader, "scoring", total=len(todo), disable=hidden)
    for index, images, readable in loader:
        scores = score(as_input(images, device), index.to(device)).float().cpu()         # (B,)
        scores = scores.nan_to_num(torch.inf, torch.inf, torch.inf)
        stored[index] = scores.masked_fill(~readable, torch.nan)
    scores, reasons = torch.from_numpy(np.array(stored)), []
    for i in (scores.isnan() | scores.isposinf()).nonzero().flatten().tolist():
        try:
            pool.view(i)
            reasons.append(f"{pool.files[i]}: its score is not finite")
        except ValueError as error:
            reasons.append(str(error))
    if len(reasons) > len(pool) / 2:
        raise ValueError(f"{len(reasons)} of {len(pool)} pool files are unusable: {reasons[0]}")
    return scores, reasons


def main(argv=None):
    """Score a pool by distance, in each process that torchrun started, or in this one."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cfg = options.parse(command.Inputs, argv, main.__doc__)
    if cfg.deterministic:
        options.set_deterministic()
    teacher, files, _ = command.open_inputs(cfg)
    pool = data.open_pool(files, teacher, teacher.image_size, cfg.match_colours)
    layers = select_layers(bn_layers(teacher), cfg.layers)
    path = score_file(teacher, layers, pool, cfg)
    if rank == 0:                    # one process alone makes the file: another would empty it
        open_scores(path, len(pool))
    while not path.exists():
        time.sleep(0.1)
    cached_scores(lambda images, _: image_distances(teacher, images, layers, cfg.metric), pool,
                  teacher.mean.device, cfg.workers, path, rank, processes)
    if rank == 0:
        print(f"scores: {path}; distill.py with the same options reads them")


if __name__ == "__main__":
    options.one_sentence(main)()
