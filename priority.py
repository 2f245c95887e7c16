"""How much should each image count, and when? Near ones most at first, in the end all alike.

Picture
    You learn the accent of a town from recordings. In the first weeks you listen most to speakers
    who sound nearly like the town. Week by week the others count for more, until all count alike.

Idea
    A small network, the student, learns to imitate a trained one, the teacher, on images whose
    distance to the teacher's training data is known. Weighted Distribution Progressive Distillation
    (WDPD) gives near images a weight near 1 and far ones a weight near 0, and moves all weights to
    1 as training goes on.

Equation
    w_i         = (max d - d_i) / (max d - min d)          "minmax": nearest 1, farthest 0
                  the same with ranks 0 1 2 ... for d      "rank"
    w_i(p)      = w_i + (1 - w_i) r                        p: progress of training, 0 to 1
                  r = p  "linear",  0  "fixed",  1  "uniform"
    loss(batch) = mean over the batch of w_b(p) l_b  /  mean over all chosen images of w_i(p)
    ESS         = (sum w)^2 / sum w^2                      effective sample size

Paper
    DFSS (Sun & Wu, arXiv 2512.13175): min-max weights of the distances, which move from the near
    images to all of them. The formula of this move is not public: "linear" is our reading. "rank"
    and the division by the mean weight are ours.

Symbols
    N chosen images, B images of a batch, d (N,) distances, w (N,) weights, l (B,) losses.
    r: how far the weights have moved to 1.

Worked example (the demo prints it, a test asserts it)
    d = 1  2  3  11:       minmax  w = 1  0.9  0.8  0,  at p = 0.5  w = 1  0.95  0.9  0.5
                           rank    w = 1  2/3  1/3  0
    effective sample size  minmax 2.98 of 4,  rank 2.57 of 4    (at p = 0)
    d = 1  2  3  101:      minmax  w = 1  0.99  0.98  0: because of one far image, min-max gives the
                           other three nearly the same weight; rank does not change

Use it
    from priority import progressive_weights, sample_weights, weighted_loss
    w = sample_weights(distances)                                     # once, over the chosen set
    w_now = progressive_weights(w, step / steps)                      # (N,)
    loss = weighted_loss(losses, w_now[slots], w_now.mean())          # slots: the batch's indices

Run it
    python priority.py          (CPU, a second: how many images the weights leave, and when)
"""

import torch

SCHEDULES = ("linear", "fixed", "uniform")


def sample_weights(distances, method="minmax"):
    """Return the weight of each chosen image: (N,) -> (N,) in [0, 1], the nearest 1.

    method: "minmax" scales the distances; "rank" spaces the weights evenly in the order of the
    distances (equal ones share their mean rank), so that one far image cannot make the rest alike.
    Call it once, for the whole chosen set: in a batch, an image's weight would depend on which
    others are drawn. Equal distances give weight 1 to all.
    ValueError for another shape, no image, a distance that is not finite, or another method.
    """
    if distances.dim() != 1 or len(distances) == 0:
        raise ValueError("expected the distances of one image or more, (N,); got shape "
                         f"{tuple(distances.shape)}")
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

    progress: 0 at the start, 1 at the end. schedule: "linear" moves from `weights` to ones;
    "fixed" keeps `weights`, and "uniform" is all ones from the start, to compare with.
    ValueError for another schedule or a progress outside [0, 1].
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is unknown; expected one of {SCHEDULES}")
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie between 0 and 1; got {progress}")
    r = {"linear": progress, "fixed": 0.0, "uniform": 1.0}[schedule]
    return torch.lerp(weights, torch.ones_like(weights), r)            # w + (1 - w) r


def weighted_loss(losses, weights, mean_weight):
    """Return the loss of a batch, a scalar: (B,) losses, (B,) weights, mean weight of the set.

    Divided by the mean weight of the whole chosen set: so the weights of an epoch average 1, and
    the learning rate keeps its meaning. Not by the mean of this batch: then a batch of far images
    would move the student as much as one of near images.
    """
    return (weights * losses).mean() / mean_weight


def effective_sample_size(weights):
    """Return (sum w)^2 / sum w^2 of (N,) weights, a number between 1 and N (Kish, 1965).

    The effective sample size: how many images of equal weight teach as much. N if all weights are
    equal, 1 if a single image has all the weight.
    """
    return (weights.sum().square() / weights.square().sum()).item()


def demo():
    """Print the worked example, then the effective sample size over training."""
    for d in ([1, 2, 3, 11], [1, 2, 3, 101]):
        for method in ("minmax", "rank"):
            w = sample_weights(torch.tensor(d, dtype=torch.float), method)
            half = progressive_weights(w, 0.5)
            print(f"d = {str(d):16s}{method:8s}w = {[round(x, 3) for x in w.tolist()]!s:26s}"
                  f"at p = 0.5 {[round(x, 3) for x in half.tolist()]!s:28s}"
                  f"ESS {effective_sample_size(w):.2f}")

    # 400 distances, a few small and most of them large, and the same with one far image more.
    d = torch.linspace(0.001, 0.999, 400).pow(0.3)
    far = torch.cat([d, d[-1:] * 5])
    print("\nEffective sample size at progress    0  0.25   0.5  0.75     1")
    for name, method, distances in (("minmax, 400 images", "minmax", d),
                                    ("minmax, and one far image", "minmax", far),
                                    ("rank, and one far image", "rank", far)):
        w = sample_weights(distances, method)
        sizes = [effective_sample_size(progressive_weights(w, p)) for p in (0, 0.25, 0.5, 0.75, 1)]
        print(f"{name:32s}" + "".join(f"{size:6.0f}" for size in sizes))
    print("With one far image, min-max hardly weights at all (399 of 401 at the start); rank does.")


if __name__ == "__main__":
    demo()
