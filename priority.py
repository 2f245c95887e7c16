"""In which order should a student learn? From the surest images first, from all of them in the end.

Idea
    A small network, the student, learns to imitate a trained one, the teacher, on images chosen for
    their small distance to the teacher's training data. Weighted Distribution Progressive
    Distillation (WDPD) turns these distances into weights between 0 and 1, the nearest counting
    most, and lets the weights relax to 1 as training goes on. Early steps rely on the images most
    like the private data; late ones use all.

Equation
    w_i         = (max d - d_i) / (max d - min d)               "minmax": in [0, 1], nearest 1
                  "rank": the same with the ranks 0 1 2 ... in place of the distances
    w_i(p)      = w_i + (1 - w_i) r(p)                          p: progress of training, 0 to 1
    r(p)        = p  "linear",   (1 - cos(pi p)) / 2  "cosine"
    loss(batch) = mean over batch of w_b(p) l_b  /  mean over all chosen images of w_i(p)
    ESS         = (sum w)^2 / sum w^2

Paper
    DFSS (Sun & Wu, arXiv 2512.13175): min-max weights of the distances, moving from the reliable
    samples to all of them. The schedule's formula is not public; "linear" is our reading of it, and
    "cosine", "rank" weights and the normalised loss are ours.

Symbols
    N chosen images, B images of a batch, d (N,) distances, w (N,) weights, l (B,) losses.

Worked example (the demo prints it, a test asserts it)
    d = 1  2  3  11:       minmax  w = 1  0.9  0.8  0,  at p = 0.5  w = 1  0.95  0.9  0.5
                           rank    w = 1  2/3  1/3  0
    effective sample size  minmax 2.98 of 4,  rank 2.57 of 4   (at p = 0)
    with d = 1  2  3  101  minmax  w = 1  0.99  0.98  0: one outlier, and min-max calls the other
                           three nearly the same; rank does not move

Use it
    from priority import progressive_weights, sample_weights, weighted_loss
    w = sample_weights(distances)                                     # once, over the chosen set
    w_now = progressive_weights(w, step / steps)                      # (N,)
    loss = weighted_loss(losses, w_now[slots], w_now.mean())          # slots: the batch's indices

Run it
    python priority.py          (CPU, a second: what the weights do to the number of images)
"""

import math

import torch

SCHEDULES = ("linear", "cosine", "fixed", "uniform")


def sample_weights(distances, method="minmax"):
    """Return the reliability of each chosen image: (N,) -> (N,) in [0, 1], the nearest 1.

    method: "minmax" scales the distances; "rank" spaces the weights evenly in the order of the
    distances (ties share their mean rank), so that one outlier cannot flatten the rest.
    Compute them once over the chosen set: min and max of a batch would change with the company.
    Equal distances give weight 1 to all. Raises ValueError if a distance is not finite.
    """
    if not torch.isfinite(distances).all():
        raise ValueError("distances must be finite; leave out images that have no finite distance")
    if method == "rank":
        _, group, counts = distances.unique(return_inverse=True, return_counts=True)
        distances = (counts.cumsum(0) - (counts + 1) / 2)[group]       # mean rank of each tie
    elif method != "minmax":
        raise ValueError(f"method {method!r} is unknown; expected 'minmax' or 'rank'")
    low, high = distances.min(), distances.max()
    if low == high:
        return torch.ones_like(distances)
    return (high - distances) / (high - low)


def progressive_weights(weights, progress, schedule="linear"):
    """Return the weights at this point of training: (N,) -> (N,).

    progress: 0 at the start, 1 at the end. schedule: "linear" and "cosine" move from `weights` to
    ones; "fixed" keeps `weights` and "uniform" is all ones throughout, for comparison.
    Raises ValueError for another schedule or a progress outside [0, 1].
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is unknown; expected one of {SCHEDULES}")
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie between 0 and 1; got {progress}")
    relaxed = {"linear": progress,
               "cosine": (1 - math.cos(math.pi * progress)) / 2,
               "fixed": 0.0,
               "uniform": 1.0}[schedule]
    return torch.lerp(weights, torch.ones_like(weights), relaxed)


def weighted_loss(losses, weights, mean_weight):
    """Return the loss of a batch, a scalar: (B,) losses, (B,) weights, mean weight of the set.

    Divided by the mean over the whole chosen set, not over this batch: over an epoch the weights
    then average 1, so the loss keeps its scale and the learning rate its meaning, while a batch
    of unreliable images still moves the student less than a batch of reliable ones.
    """
    return (weights * losses).mean() / mean_weight


def effective_sample_size(weights):
    """Return (sum w)^2 / sum w^2: how many equally weighted images teach as much (Kish, 1965).

    N if all weights are equal, 1 if a single image carries all the weight.
    """
    return (weights.sum().square() / weights.square().sum()).item()


def demo():
    """Print the worked example, then the effective sample size over training."""
    for d in ([1.0, 2, 3, 11], [1.0, 2, 3, 101]):
        for method in ("minmax", "rank"):
            w = sample_weights(torch.tensor(d), method)
            print(f"d = {d}  {method:6s}  w = {[round(x, 3) for x in w.tolist()]}  at half time "
                  f"{[round(x, 3) for x in progressive_weights(w, 0.5).tolist()]}  "
                  f"ESS {effective_sample_size(w):.2f} of {len(d)}")

    # Nearest-first distances of a real selection look like this: a sharp start and a long plateau.
    d = torch.linspace(0.001, 0.999, 400).pow(0.3)
    print("\nEffective sample size of 400 images (401 with the outlier), linear schedule:")
    for name, distances in {"minmax": d, "minmax, one outlier": torch.cat([d, d[-1:] * 5]),
                            "rank, the same outlier": torch.cat([d, d[-1:] * 5])}.items():
        w = sample_weights(distances, name.split(",")[0])
        sizes = [effective_sample_size(progressive_weights(w, p)) for p in (0, 0.25, 0.5, 0.75, 1)]
        print(f"    {name:24s}" + "".join(f"{size:6.0f}" for size in sizes)
              + f"   median weight at the start {w.median():.2f}")
    print("With the outlier min-max hardly weights at all (399 of 401 is nearly uniform); rank\n"
          "still prefers the near images.")


if __name__ == "__main__":
    demo()
