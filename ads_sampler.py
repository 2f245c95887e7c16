"""Which images of a wild pool should a student learn from? Those nearest to the private data.

Picture
    You want to teach someone to drive in a town that you may not photograph. You have a box of
    holiday pictures, and a friend who knows the town tells you of each how far it is from the look
    of the place. Sort the box by that number and keep the first 400.

Idea
    A trained network, the teacher, gives every image of a pool a distance to its private training
    data (bn_stats.py measures one). Approximate Distribution Sampling (ADS) keeps the nearest.

Equation
    S = the `budget` images of smallest score; if two are equal, the earlier in the pool

    Any rule of choice is a score, smallest first, and one sampler serves them all:
    nearest      score = d(x), the distance                     the paper's, ADS
    random       score = a seeded random number for each file   what chance would give
    confidence   score = - how sure the teacher is of x         it can be sure and wrong

Paper
    DFSS (Sun & Wu, arXiv 2512.13175) keeps the images that reflect the training data best by d,
    and does not ask the teacher's predictions. How many, and from which pool, is not public.

Symbols
    N images in the pool, B in a batch, D scores of an image.  d (N,): distances, small is near.

Worked example (the private data lie around 0; the demo prints it, a test asserts it)
    pool x  = -3   2  nan   1  -2   1
    d = |x| =  3   2  nan   1   2   1         budget 3
    chosen  = images 3, 5, 1                  of 2 and -2 the earlier wins; nan is never chosen
    their x = 1  1  2, mean 1.33              each is near 0, yet the set sits on one side of it

Use it
    from ads_sampler import sample, score_pool                # loader: of images, in batches
    distances = score_pool(lambda images: image_distances(teacher, images), loader)      # (N,)
    chosen = sample(distances, budget=400)                               # (400,) indices

Run it
    python ads_sampler.py       (CPU, a second: what three rules find in a toy pool)
"""

import torch


@torch.no_grad()
def score_pool(score_batch, loader):
    """Return the scores of a whole pool, in the order of `loader`: (N,) or (N, D), float32, on CPU.

    score_batch: maps whatever `loader` yields to (B,) or (B, D) scores. Only the scores are kept,
    so the memory needed does not depend on the size of the images. For a progress bar, wrap the
    loader: score_pool(f, tqdm(loader)). ValueError for scores of another shape, or no batch at all.
    """
    scores = []
    for batch in loader:
        score = score_batch(batch)
        if score.dim() not in (1, 2) or (scores and score.shape[1:] != scores[0].shape[1:]):
            raise ValueError("score_batch must return (B,) or (B, D), the same for every batch; "
                             f"got shape {tuple(score.shape)}")
        scores.append(score.float().cpu())                             # (B,) or (B, D)
    if not scores:
        raise ValueError("the pool is empty: the loader gave no batch to score")
    return torch.cat(scores)                                           # (N,) or (N, D)


def sample(distances, budget):
    """Return the indices of the `budget` smallest distances, nearest first: (N,) -> (budget,).

    distances: any score of which small is good. NaN and infinity (an unreadable file, say) are
    never chosen. Equal ones go by pool order, so the choice is the same every time.
    ValueError for anything but floating-point (N,), or if the budget does not fit.
    """
    if distances.dim() != 1 or not distances.is_floating_point():
        raise ValueError("expected one floating-point distance for each image, (N,); got "
                         f"{distances.dtype} {tuple(distances.shape)}: take one column, or the sum")
    usable = distances.isfinite().nonzero().squeeze(1)                 # indices into the pool
    if not 1 <= budget <= len(usable):
        raise ValueError(f"the budget must be between 1 and {len(usable)}, the number of images "
                         f"with a finite distance; got {budget}")
    order = distances[usable].sort(stable=True).indices                # stable: ties by pool order
    return usable[order[:budget]]                                      # (budget,)


def demo():
    """Print the worked example, then what three rules find in a pool around private data."""
    x = torch.tensor([-3, 2, torch.nan, 1, -2, 1])
    chosen = sample(x.abs(), 3)
    print(f"Worked example: images {chosen.tolist()}, mean {x[chosen].mean():.2f}\n")

    # Images are points in the plane. The private ones lie around 0 with variance 1; the pool is
    # wider and off-centre. The teacher tells left from right, and is the surer the farther it is
    # from the line between them: sigmoid(|x|).
    generator = torch.Generator().manual_seed(0)
    pool = 1.5 + 2 * torch.randn(3000, 2, generator=generator)         # (N, 2)
    scores = {"random": torch.rand(3000, generator=generator),
              "confidence": -pool[:, 0].abs().sigmoid(),
              "nearest": pool.norm(dim=1)}
    print("300 of 3,000 points by       mean   variance   median distance")
    print("private data (the aim)       0.00       1.00              1.18")   # sqrt(2 ln 2)
    for rule, score in scores.items():
        kept = pool[sample(score, 300)]                                # (300, 2)
        print(f"{rule:25s}{kept.mean():8.2f}{kept.var(dim=0).mean():11.2f}"
              f"{kept.norm(dim=1).median():18.2f}")
    print("Confidence goes far away, where the teacher is sure of things it never saw. Nearest\n"
          "finds the place, but crowds at its centre: variance 0.4 instead of 1.")


if __name__ == "__main__":
    demo()
