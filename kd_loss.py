"""How does a student learn from a teacher's logits? Three ways to compare two segmentation outputs.

Idea
    A small network, the student, learns to give the outputs (logits) of a trained one, the teacher.
    The teacher's logits say more than its decision for each pixel: how sure it is, what it
    confuses, how a class's response falls off around an object. Each loss here compares another
    aspect of them: every pixel by itself, every class's response over space, or the relations
    between regions.

Equation
    pixelwise    T^2 mean over pixels of sum over k of t log(t / s),  s, t = softmax_k(logits / T)
    channelwise  T^2 mean over k of sum over pixels of t log(t / s),  s, t = softmax_hw(logits / T)
    pairwise     mean over regions i, j of (cos(s_i, s_j) - cos(t_i, t_j))^2
                 s_i, t_i (K,): the logits averaged over region i, without softmax

Paper
    DFSS (Sun & Wu, arXiv 2512.13175) does not publish its KD loss; our default is pixelwise plus
    channelwise. pixelwise: Hinton et al., arXiv 1503.02531, at each pixel. channelwise: Shu et
    al. (CWD), arXiv 2011.13256. pairwise: Liu et al. (SKDS), arXiv 1903.04197, here on the logits
    and on a fixed grid of regions, so that the crop size does not matter.

Symbols
    B images, K classes, H W pixels, s / t student / teacher.  T temperature: above 1 it softens
    both outputs, so that the smaller probabilities count for more.

Worked example (K = 2 classes, 2x2 pixels, T = 1; the demo prints it, a test asserts it)
    teacher logits  class 0: ln 3 everywhere,  class 1: 0        -> 3/4 and 1/4 at each pixel
    student logits  class 0: 0 0 / 0 ln 9,     class 1: 0        -> 1/2, and 9/10 at the last
    pixelwise   three pixels of 3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308,
                one of 3/4 ln(5/6) + 1/4 ln(5/2) = 0.0923         -> mean 0.1212
    channelwise class 0: t = 1/4 each, s = 1/12 1/12 1/12 3/4:
                3/4 ln 3 + 1/4 ln(1/3) = 0.5493;  class 1: 0      -> mean 0.2747
    pairwise    (each pixel a region) where the student is all zero its cosines are 0, the
                teacher's are all 1                               -> 15 of 16 pairs: 0.9375

Use it
    from kd_loss import pixelwise_kd
    losses = pixelwise_kd(student_logits, teacher_logits)             # (B, K, H, W) twice -> (B,)

Run it
    python kd_loss.py           (CPU, a second: what each loss sees and what it cannot see)
"""

import math
import re

import torch
import torch.nn.functional as F


def as_float(student_logits, teacher_logits):
    """Return both logits in at least float32, the teacher's as constants; they must match."""
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 4:
        raise ValueError(f"student logits {tuple(student_logits.shape)} and teacher logits "
                         f"{tuple(teacher_logits.shape)} must have the same shape (B, K, H, W)")
    # Half precision overflows in T^2 sums and loses small probabilities; double stays double.
    s, t = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            for x in (student_logits, teacher_logits.detach()))
    return s, t


def pixelwise_kd(student_logits, teacher_logits, temperature=1.0):
    """Return KL(teacher || student) of each image, averaged over pixels: (B, K, H, W) x2 -> (B,).

    One number per image, not one per batch: the caller may weight images before averaging.
    In nats, >= 0. No gradient reaches the teacher. Raises ValueError if the shapes differ.
    """
    s, t = as_float(student_logits, teacher_logits)
    T = temperature
    log_s = F.log_softmax(s / T, dim=1)                              # (B, K, H, W)
    log_t = F.log_softmax(t / T, dim=1)                              # (B, K, H, W)

    # Summed over classes. Not reduction="batchmean": on a 4-D tensor it divides by B only, and
    # the loss would grow with the crop size.
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=1)        # (B, H, W)

    # Softening by T shrinks the gradient to about 1/T^2 of itself; T^2 undoes it, so that changing
    # T does not silently change the learning rate.
    return T ** 2 * kl.mean(dim=(1, 2))                              # (B,)


def channelwise_kd(student_logits, teacher_logits, temperature=4.0):
    """Return KL between each class's response over space, averaged over classes: -> (B,).

    (B, K, H, W) twice. Softmax runs over the H W pixels of one class: a constant added to a class
    cancels, its contrast over space does not; rare classes count as much as common ones. CWD's
    formula (reference: sum / (B K), times T^2) without its mean over B. Errors as in
    `pixelwise_kd`.
    """
    s, t = as_float(student_logits, teacher_logits)
    T = temperature
    log_s = F.log_softmax(s.flatten(2) / T, dim=2)                   # (B, K, H*W)
    log_t = F.log_softmax(t.flatten(2) / T, dim=2)                   # (B, K, H*W)
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=2)        # (B, K)
    return T ** 2 * kl.mean(dim=1)                                   # (B,)


def pairwise_kd(student_logits, teacher_logits, grid=8):
    """Return the mean squared difference of the regions' similarities: (B, K, H, W) x2 -> (B,).

    The logits are averaged over grid x grid regions; the similarity of two regions is the cosine
    of their K-vectors. It only knows relations: permuting the student's classes changes nothing,
    so add it to another loss. In [0, 4]. Errors as in `pixelwise_kd`.
    """
    s, t = as_float(student_logits, teacher_logits)

    def similarities(logits):
        regions = F.adaptive_avg_pool2d(logits, grid).flatten(2)     # (B, K, R), R = grid^2
        regions = F.normalize(regions, dim=1, eps=1e-6)              # all-zero regions stay zero
        with torch.autocast(logits.device.type, enabled=False):      # which would round products
            return regions.transpose(1, 2) @ regions                 # (B, R, R)

    return (similarities(s) - similarities(t)).square().mean(dim=(1, 2))             # (B,)


LOSSES = {"pixelwise": pixelwise_kd, "channelwise": channelwise_kd, "pairwise": pairwise_kd}


def parse_losses(text):
    """Return {name: factor} of a sum of losses: "pixelwise+10*channelwise" -> {..: 1.0, ..: 10.0}.

    Raises ValueError for anything but names of `LOSSES`, with a number and * before them or not.
    """
    factors = {}
    for term in text.split("+"):
        found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)\*)?(\w+)", term)
        if not found or found[2] not in LOSSES or found[2] in factors:
            raise ValueError(f"{text!r} is no sum of losses; expected each of some of "
                             f"{', '.join(LOSSES)} once, such as pixelwise+10*channelwise")
        factors[found[2]] = float(found[1] or 1)
    return factors


def demo():
    """Print the worked example, then how each loss answers to four ways of being wrong."""
    t = torch.tensor([math.log(3), 0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    s = torch.zeros(1, 2, 2, 2)
    s[0, 0, 1, 1] = math.log(9)
    print(f"Worked example: pixelwise {pixelwise_kd(s, t).item():.4f}, channelwise "
          f"{channelwise_kd(s, t, 1.0).item():.4f}, pairwise {pairwise_kd(s, t, 2).item():.4f}\n")

    # A teacher that sees a disc of class 1 on class 0, and students that see it differently.
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    disc = 12 - ((x - 16) ** 2 + (y - 16) ** 2).sqrt()
    teacher = torch.stack([-disc, disc, torch.full_like(disc, -9)]).unsqueeze(0)     # (1, 3, H, W)
    students = {"the same": teacher,
                "half as sure": teacher / 2,
                "class 1 too strong everywhere": teacher + torch.tensor([0, 4.0, 0]).view(3, 1, 1),
                "disc moved by 4 pixels": teacher.roll(4, dims=3),
                "classes 0 and 1 exchanged": teacher[:, [1, 0, 2]]}
    print(f"{'a student that is':32s}{'pixelwise':>12s}{'channelwise':>12s}{'pairwise':>12s}")
    for name, student in students.items():
        row = [abs(f(student, teacher).item()) for f in (pixelwise_kd, channelwise_kd, pairwise_kd)]
        print(f"{name:32s}" + "".join(f"{value:12.4f}" for value in row))
    print("channelwise cannot see a class that is too strong everywhere; pairwise sees neither\n"
          "exchanged classes nor half the sureness; pixelwise sees all four, but counts pixels\n"
          "alike, so large classes rule it. Compare down a column: T is 4 in channelwise, else 1.")


if __name__ == "__main__":
    demo()
