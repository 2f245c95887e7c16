"""How much should each image count, and when? Near ones most at first, in the end all equally.

Picture
    You learn the accent of a town from recordings. In the first weeks you listen mostly to speakers
    who sound almost like the town. Week by week the others count more, until all count equally.

Idea
    A small network, the student, learns from images whose distance to the teacher's training data
    is known. Weighted Distribution Progressive Distillation (WDPD) starts with weights near 1 for
    near images and near 0 for far ones. During training, all weights move to 1.

Equation
    w_i         = (max d - d_i) / (max d - min d)          "minmax": nearest 1, farthest 0
                  the same with the ranks 0 1 2 ... as d   "rank"
    w_i(p)      = w_i + (1 - w_i) r(p)                     p: progress of training, 0 to 1
                  r(p) = p "linear",  0 "fixed",  1 "uniform"
    loss(batch) = mean over the batch of w_b(p) l_b  /  mean over all selected images of w_i(p)
    ESS         = (sum w)^2 / sum w^2                      effective sample size

Paper
    DFSS (Sun & Wu, arXiv 2512.13175) uses min-max weights that move from the near images to all.
    The formula of this move is not public; "linear" is our reading. "rank" and the division by the
    mean weight are ours.

Symbols
    N selected images, B images in a batch.  d (N,) distances, w (N,) weights, l (B,) losses.
    r(p): how far the weights have moved towards 1.

Worked example (the demo prints it, a test asserts it)
    d = 1  2  3  11:    minmax  w = 1  0.9  0.8  0;     at p = 0.5  w = 1  0.95  0.9  0.5
                        rank    w = 1  2/3  1/3  0
    ESS at p = 0:       minmax 2.98 of 4,  rank 2.57 of 4
    d = 1  2  3  101:   minmax  w = 1  0.99  0.98  0;   rank as before
                        one far image makes all other min-max weights nearly equal

Use it
    import torch
    from priority import progressive_weights, sample_weights, weighted_loss
    distances = torch.rand(400)                               # yours: of the selected images
    weights = sample_weights(distances)                       # (400,), once
    for step in range(100):                                   # your training loop
        index = torch.randint(400, (16,))                     # the batch's images
        losses = torch.rand(16, requires_grad=True)           # yours: one loss per image
        w = progressive_weights(weights, step / 100)          # (400,)
        weighted_loss(losses, w[index], w.mean()).backward()

Run it
    python priority.py          (CPU, a second: weights and effective sample size over training)
"""

import torch

SCHEDULES = ("linear", "fixed", "uniform")


def sample_weights(distances, method="minmax"):
    """Return the weight of each selected image: (N,) -> (N,) in [0, 1]; the nearest has 1.

    method: "minmax" scales the distances. "rank" spaces the weights evenly in the order of the
    distances (ties share their mean rank); one far image then cannot make the others equal.
    Call this once for the whole selected set: weights computed per batch would depend on which
    other images are in the batch. If all distances are equal, all weights are 1.
    ValueError for another shape, no image, a distance that is not finite, or another method.
    """
    if distances.dim() != 1 or len(distances) == 0 or not distances.is_floating_point():
        raise ValueError("expected floating-point distances (N,), at least one; got "
                         f"{distances.dtype} {tuple(distances.shape)}")
    if not torch.isfinite(distances).all():
        raise ValueError("distances must be finite; leave out images that have no finite distance")
    if method == "rank":
        _, group, counts = distances.unique(return_inverse=True, return_counts=True)
        # Equal distances share the mean of their ranks: d = 5 7 7 has ranks 0 1.5 1.5.
        ranks = counts.cumsum(0) - (counts + 1) / 2
        distances = ranks[group]
    elif method != "minmax":
        raise ValueError(f"method {method!r} is unknown; expected 'minmax' or 'rank'")
    low, high = distances.min(), distances.max()
    if low == high:
        return torch.ones_like(distances)
    return (high - distances) / (high - low)


def progressive_weights(weights, progress, schedule="linear"):
    """Return the weights at one point of training: (N,) -> (N,).

    progress: 0 at the start, 1 at the end. schedule: "linear" moves from `weights` to ones, "fixed"
    stays at `weights`, "uniform" is all ones throughout (a baseline).
    ValueError for another schedule, or progress outside [0, 1].
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is unknown; expected one of {SCHEDULES}")
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie between 0 and 1; got {progress}")
    r = {"linear": progress, "fixed": 0.0, "uniform": 1.0}[schedule]
    return torch.lerp(weights, torch.ones_like(weights), r)            # w + (1 - w) r


def weighted_loss(losses, weights, mean_weight):
    """Return the loss of a batch, a scalar, from its losses (B,), its weights (B,) and mean(w).

    mean_weight: the mean over the whole selected set. Dividing by it makes the weights average 1
    over an epoch, so losses are comparable between schedules. Dividing by the mean of the batch
    instead would give a batch of far images as large a loss as a batch of near ones. If gradients
    of several batches are added up, divide the loss by their number. ValueError for other shapes.
    """
    if losses.dim() != 1 or losses.shape != weights.shape:
        raise ValueError("expected one loss and one weight per image, (B,) each; got "
                         f"{tuple(losses.shape)} and {tuple(weights.shape)}")
    return (weights * losses).mean() / mean_weight


def effective_sample_size(weights):
    """Return (sum w)^2 / sum w^2 of weights (N,), a number between 1 and N (Kish, 1965).

    N if all weights are equal, 1 if one image has all the weight.
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

    # 400 distances, a few small and most of them large; then one very far image is added.
    d = torch.linspace(0.001, 0.999, 400).pow(0.3)
    far = torch.cat([d, d[-1:] * 5])
    print("\nEffective sample size at progress    0  0.25   0.5  0.75     1")
    for name, method, distances in (("minmax, 400 images", "minmax", d),
                                    ("minmax, one far image added", "minmax", far),
                                    ("rank, one far image added", "rank", far)):
        w = sample_weights(distances, method)
        sizes = [effective_sample_size(progressive_weights(w, p)) for p in (0, 0.25, 0.5, 0.75, 1)]
        print(f"{name:32s}" + "".join(f"{size:6.0f}" for size in sizes))
    print("Caveat: one far image makes min-max weights nearly equal at once (ESS 399 of 401).")


if __name__ == "__main__":
    demo()
