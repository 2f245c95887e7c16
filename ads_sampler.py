"""Which images of an unlabelled pool should a student learn from? Those like the training data.

Picture
    You teach somebody to drive in a town that you cannot photograph. You have a box of photos from
    elsewhere and a friend who knows the town. The friend rates how different each photo looks from
    the town. Sort the box by this number and keep the first 400.

Idea
    A trained network, the teacher, gives each image of a pool a distance to its own training data
    (bn_stats.py). Approximate Distribution Sampling (ADS) selects the nearest images.

Equation
    S = the `budget` images with the smallest score; of two equal scores the earlier in the pool

    Any selection rule is a score, smallest first. The demo compares three:
    nearest      score = d(x), the distance                  ADS
    random       score = a random number per image           baseline
    confidence   score = 1 - mean over pixels of the largest softmax probability       baseline

Paper
    DFSS (Sun & Wu, arXiv 2512.13175) selects the images of smallest d and ignores the teacher's
    predictions. It does not publish how many images it selects, and from which pool.

Symbols
    N images in the pool, B in a batch.  d (N,): distances, small is near.

Worked example (the training data lie around 0; the demo prints it, a test asserts it)
    pool x   = -3   2  nan   1  -2   1
    d = |x|  =  3   2  nan   1   2   1        budget 3
    selected = images 3, 5, 1 (from 0)        x = 2 comes before x = -2; nan is never selected
    their x  = 1, 1, 2, mean 1.33             each one is near 0, but all lie on the same side

Use it
    import torch
    from ads_sampler import sample, score_pool
    loader = torch.rand(60, 3, 32, 32).split(16)                     # yours: batches of images
    def score(images):                                               # yours: see bn_stats.py
        return (images.mean(dim=(1, 2, 3)) - 0.4).abs()              # (B,)
    distances = score_pool(score, loader)                            # (60,)
    selected = sample(distances, budget=10)                          # (10,) indices, nearest first

Run it
    python ads_sampler.py       (CPU, a second: three selection rules in a pool of points)
"""

import torch


@torch.no_grad()
def score_pool(score_batch, loader):
    """Return the score of every image of a pool, in the loader's order: (N,), float32, on the CPU.

    score_batch: maps one batch of `loader` to scores (B,), one for each image. Only the scores are
    kept: the memory needed is one batch and N numbers. For a progress bar: score_pool(f,
    tqdm(loader)). ValueError for scores of another shape, or an empty loader.
    """
    scores = []
    for batch in loader:
        score = score_batch(batch)                                     # (B,)
        if score.dim() != 1:
            raise ValueError(f"score_batch must return (B,) scores; got {tuple(score.shape)}")
        scores.append(score.float().cpu())
    if not scores:
        raise ValueError("the pool is empty: the loader yielded no batch")
    return torch.cat(scores)                                           # (N,)


def sample(distances, budget):
    """Return the indices of the `budget` smallest distances, nearest first: (N,) -> (budget,).

    distances: any score, smallest is best. NaN and infinity (an unreadable file, for example) are
    never selected. Ties go by pool order, hence the selection is reproducible.
    ValueError for anything but floating-point (N,), or a budget beyond the finite distances.
    """
    if not torch.is_tensor(distances) or distances.dim() != 1 or not distances.is_floating_point():
        raise ValueError("expected one floating-point distance per image, (N,), summed over layers;"
                         f" got {getattr(distances, 'dtype', type(distances))} "
                         f"{getattr(distances, 'shape', '')}")
    finite = distances.isfinite().nonzero().squeeze(1)                 # indices into the pool
    if not 1 <= budget <= len(finite):
        raise ValueError(f"{len(finite)} images have a finite distance; the budget must be between "
                         f"1 and this number; got {budget}")
    order = distances[finite].sort(stable=True).indices                # stable: ties by pool order
    return finite[order[:budget]]                                      # (budget,)


def demo():
    """Print the worked example, then what three selection rules find in a pool of points."""
    x = torch.tensor([-3, 2, torch.nan, 1, -2, 1])
    selected = sample(x.abs(), 3)
    print(f"Worked example: images {selected.tolist()}, mean {x[selected].mean():.2f}\n")

    # Images are points in the plane. The training data lie around 0 with variance 1; the pool is
    # wider and off-centre. The teacher separates left from right. Its confidence, sigmoid(|x_0|),
    # grows with the distance from the boundary.
    generator = torch.Generator().manual_seed(0)
    pool = 1.5 + 2 * torch.randn(3000, 2, generator=generator)         # (N, 2)
    scores = {"nearest": pool.norm(dim=1),
              "random": torch.rand(3000, generator=generator),
              "confidence": -pool[:, 0].abs().sigmoid()}
    print("300 of 3,000 points by       mean   variance   median distance to 0\n"
          "(mean and variance: average over both axes)")
    print("training data (the aim)      0.00       1.00       1.18")       # a normal in 2-D
    for rule, score in scores.items():
        points = pool[sample(score, 300)]                              # (300, 2)
        print(f"{rule:25s}{points.mean():8.2f}{points.var(dim=0).mean():11.2f}"
              f"{points.norm(dim=1).median():11.2f}")
    print("Nearest finds the training data; confidence selects points far away from it.\n"
          "Caveat: nearest concentrates at the centre of the data, with variance 0.4 instead of 1.")


if __name__ == "__main__":
    demo()
