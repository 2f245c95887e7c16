"""Which images of a wild pool should a student learn from? Those that look like the private data.

Idea
    A small network, the student, is to learn from a trained one, the teacher. The teacher's own
    training images are private; there is only a pool of unlabelled pictures from anywhere.
    Approximate Distribution Sampling (ADS) gives every image of the pool a distance to the
    teacher's training data (bn_stats.py measures one) and keeps the nearest. The teacher's
    predictions, confidently wrong on foreign images, are never asked.

Equation
    nearest   S = the `budget` images of smallest d(x)
    herding   S grows one image at a time:  x_t = argmin over x of || (sum over S of f) + f(x) ||_2
              f(x) = [(mu - mu_bn) / s,  (var - var_bn + (mu - mu_bn)^2) / s2], each layer

Paper
    DFSS (Sun & Wu, arXiv 2512.13175) keeps the images that reflect the training distribution best
    by d: "nearest". How many, and from which pool, is not public. "herding" (after Welling, ICML
    2009) is ours: a running variance is the variance within images plus the variance of their
    means. A set of images that all sit on the mean has none of the latter, so the best set is not
    the set of the best images. Averaged over the real training images f is 0; herding looks for a
    set that averages 0 too.

Symbols
    N pool images, B images of a batch, D features.  d (N,): distances, smaller is better.
    mu, var (B, C) and mu_bn, var_bn (C,) as in bn_stats.py;  s2 = var_bn + eps,  s = sqrt(s2).

Worked example (one feature; the demo prints it, a test asserts it)
    f = 1  1  2  -2  -3, so d = |f| = 1  1  2  2  3, budget 3
    nearest takes 1, 1, 2 (the tie 2, -2 goes to the earlier): their mean is 1.33
    herding takes 1, then -2 (sum -1), then the other 1 (sum 0): their mean is 0

Use it
    from ads_sampler import sample, score_pool
    distances = score_pool(lambda images: image_distances(teacher, images), loader)      # (N,)
    chosen = sample(distances, budget=400)                                       # (400,) indices
    chosen = sample(distances, 400, "herding", features)    # (N, D), of `moment_features`

Run it
    python ads_sampler.py       (CPU, a second: nearest against herding on a toy pool)
"""

import warnings

import torch


@torch.no_grad()
def score_pool(score_batch, loader):
    """Return the scores of a whole pool, in the order of `loader`: (N,) or (N, D), float32, on CPU.

    score_batch: maps whatever `loader` yields to (B,) or (B, D) scores. Nothing but the scores
    outlives a batch, so memory does not grow with the size of the images. Wrap the loader in a
    progress bar if you like one: score_pool(f, tqdm(loader)).
    Raises ValueError for scores of another shape and for an empty loader.
    """
    scores = []
    for batch in loader:
        score = score_batch(batch)
        if score.dim() not in (1, 2) or (scores and score.shape[1:] != scores[0].shape[1:]):
            raise ValueError("score_batch must return (B,) or (B, D), the same for every batch; "
                             f"got shape {tuple(score.shape)}")
        scores.append(score.float().cpu())
    if not scores:
        raise ValueError("the pool is empty: the loader gave no batch to score")
    return torch.cat(scores)


def moment_features(captured, layers, dim=512, seed=0):
    """Return f(x), what each image adds to the moments of a set it joins: (B, dim), float32.

    captured, layers: as in bn_stats.bn_distance, {name: (mean, var)} and {name: BatchNorm module}.
    Each layer's block is divided by the square root of its number of entries: layers count alike.
    A DeepLabV3 has over 50,000 such numbers, too many to keep for a large pool: each is multiplied
    by a random sign and added to one of `dim` random slots (a count sketch; Charikar et al.,
    2002), fixed by `seed`. Sketches add up exactly; norms are kept on average.
    """
    blocks = []
    for name, (mean, var) in captured.items():
        mean_bn, var_bn = layers[name].running_mean.float(), layers[name].running_var.float()
        s2 = var_bn + layers[name].eps                                                    # (C,)
        first = (mean - mean_bn) / s2.sqrt()                                              # (B, C)
        second = (var - var_bn + (mean - mean_bn).square()) / s2                          # (B, C)
        blocks.append(torch.cat([first, second], dim=1) / (2 * mean.shape[1]) ** 0.5)     # (B, 2C)
    features = torch.cat(blocks, dim=1)
    generator = torch.Generator().manual_seed(seed)
    slot = torch.randint(dim, (features.shape[1],), generator=generator).to(features.device)
    sign = torch.randint(2, (features.shape[1],), generator=generator).to(features.device) * 2 - 1
    sketch = features.new_zeros(len(features), dim)
    return sketch.index_add(1, slot, features * sign)                                   # (B, dim)


def mean_shift(captured, layers):
    """Return the root mean square of (mu - mu_bn) / s over channels and layers: (B,).

    A yardstick of known scale, to see whether a pool fits at all: over the training images the
    mean square is the share of the running variance that lies between images, so at most 1.
    """
    squares = [((mean - layers[name].running_mean).square()
                / (layers[name].running_var + layers[name].eps)).mean(dim=1)
               for name, (mean, _) in captured.items()]                           # L times (B,)
    return torch.stack(squares).mean(dim=0).sqrt()                                # (B,)


def herd(features, budget):
    """Return `budget` distinct row indices of (N, D) whose rows, greedily, sum to nearly zero."""
    squared = features.square().sum(dim=1)                             # (N,)
    total = torch.zeros_like(features[0])                              # (D,)
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen = []
    for _ in range(budget):
        # || total + f ||^2 = || total ||^2 + 2 total.f + || f ||^2, whose first term all share.
        cost = 2 * features @ total + squared                          # (N,)
        index = int(torch.where(free, cost, torch.inf).argmin())
        free[index] = False
        total += features[index]
        chosen.append(index)
    return torch.tensor(chosen, device=features.device)


def sample(distances, budget, method="nearest", features=None):
    """Return the indices of the chosen images, nearest first: (N,) -> (budget,), int64.

    distances: smaller is better; ties go by pool order; NaN and infinity (an unreadable file, an
    overflow) are never chosen, with a warning. method: "nearest", or "herding" on `features`
    (N, D), which are 0 on average over the training data (see `moment_features`). Deterministic.
    Raises ValueError if the budget is not between 1 and the number of usable images.
    """
    if method not in ("nearest", "herding"):
        raise ValueError(f"method {method!r} is unknown; expected 'nearest' or 'herding'")
    usable = torch.isfinite(distances)
    if method == "herding":
        if features is None or len(features) != len(distances):
            raise ValueError("herding needs one row of features for each distance")
        usable &= torch.isfinite(features).all(dim=1)
    if not usable.all():
        warnings.warn(f"{int((~usable).sum())} of {len(distances)} images have no finite distance "
                      "and cannot be chosen", stacklevel=2)
    candidates = usable.nonzero().squeeze(1)                           # indices into the pool
    if not 1 <= budget <= len(candidates):
        raise ValueError(f"the budget must be between 1 and {len(candidates)}, the number of "
                         f"usable images in the pool; got {budget}")
    if method == "herding":
        candidates = candidates[herd(features[candidates], budget)].sort().values
    order = torch.sort(distances[candidates], stable=True).indices     # stable: ties by pool order
    return candidates[order[:budget]]


def demo():
    """Print the worked example, then both rules on a pool of points around a target."""
    f = torch.tensor([1.0, 1, 2, -2, -3]).unsqueeze(1)
    for method in ("nearest", "herding"):
        kept = f[sample(f.abs().squeeze(1), 3, method, f)].squeeze(1)
        print(f"Worked example, {method}: {kept.tolist()}, mean {kept.mean():.2f}")

    # The private data scatter around 0 with variance 1; the pool is wide and off-centre.
    generator = torch.Generator().manual_seed(0)
    pool = 1.5 + 2 * torch.randn(3000, 2, generator=generator)                       # (N, 2)
    features = torch.cat([pool, pool.square() - 1], dim=1)      # both moments, 0 for the private
    print("\nPrivate data: mean 0.00, variance 1.00. 300 of a pool of 3,000 points in the plane:")
    for name, kept in {"the pool itself": torch.arange(3000),
                       "nearest": sample(pool.norm(dim=1), 300),
                       "herding": sample(pool.norm(dim=1), 300, "herding", features)}.items():
        print(f"    {name:16s} mean {pool[kept].mean():5.2f}   variance "
              f"{pool[kept].var(dim=0).mean():5.2f}")
    print("Nearest finds the right place and crowds there; herding restores the spread as well.")


if __name__ == "__main__":
    demo()
