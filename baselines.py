"""What DFSS is compared with: other ways to choose images from the same pool.

Idea
    A baseline must differ in one thing only. Each of these gives every image a number, smaller is
    better, that takes the place of the BatchNorm distance; all the rest of a run stays the same.

Equation
    confidence   1 - mean over pixels of max over classes of softmax
    entropy      mean over pixels of - sum over classes of p log p

Paper
    confidence is the rule of DFND (Chen et al., CVPR 2021: images with the smallest
    -log max softmax), averaged over pixels, which is our adaptation to segmentation.

Use it
    from baselines import prediction_scores
    scores = prediction_scores(logits, "confidence")                  # (B, K, H, W) -> (B,)
"""

import torch

PREDICTION_SCORES = ("confidence", "entropy")


def prediction_scores(logits, rule):
    """Return how unsure a teacher is of each image, averaged over pixels: (B, K, H, W) -> (B,)."""
    log_p = logits.float().log_softmax(dim=1)
    if rule == "confidence":
        return 1 - log_p.amax(dim=1).exp().mean(dim=(1, 2))
    if rule == "entropy":
        return -(log_p.exp() * log_p).sum(dim=1).mean(dim=(1, 2))
    raise ValueError(f"rule {rule!r} is unknown; expected one of {PREDICTION_SCORES}")


def random_sample(usable, budget, seed):
    """Return `budget` indices drawn without replacement where `usable` (N,) is true."""
    candidates = usable.nonzero().squeeze(1)
    if not 1 <= budget <= len(candidates):
        raise ValueError(f"the budget must be between 1 and {len(candidates)}, the number of "
                         f"usable images in the pool; got {budget}")
    generator = torch.Generator().manual_seed(seed)
    return candidates[torch.randperm(len(candidates), generator=generator)[:budget]]
