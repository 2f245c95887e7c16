"""How does a student learn from a teacher's logits? It tries to give the same ones.

Picture
    A pixel on a kerb. Its label says "road" and no more. A trained network says road 0.6, pavement
    0.4, sky 0: it is road, it looks like pavement, and it is nothing like sky. A bus is bus 0.8,
    car 0.2: a bus is a car a little. No label says so, but who imitates the network learns it.

Idea
    A small network, the student, learns to give the outputs (logits) of a trained one, the teacher.
    One loss compares the classes at each pixel ("what is here?"), the other the pixels of each
    class ("where is it?").

Equation
    pixelwise    T^2 mean over pixels of sum over k of t log(t / s),  s, t = softmax_k(logits / T)
    channelwise  T^2 mean over k of sum over pixels of t log(t / s),  s, t = softmax_hw(logits / T)

    Both logits have one shape, as small as the networks give them: nothing is resized here, and
    nothing need be brought to the image's size.
    The value does not depend on the batch and does not grow with the crop (channelwise: its upper
    limit does).

Paper
    DFSS (Sun & Wu, arXiv 2512.13175) does not publish its KD loss; our default is the sum of both.
    pixelwise: Hinton et al., arXiv 1503.02531, at each pixel. channelwise: Shu et al. (CWD), arXiv
    2011.13256, here for each image and not averaged over the batch.

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

Use it
    from kd_loss import channelwise_kd, pixelwise_kd
    with torch.no_grad():
        answers = teacher(images)                                     # (B, K, H, W)
    logits = student(images)                                          # (B, K, H, W)
    losses = pixelwise_kd(logits, answers) + channelwise_kd(logits, answers)      # (B,)

Run it
    python kd_loss.py           (CPU, a second: what each loss sees and what it cannot see)
"""

import math

import torch
import torch.nn.functional as F


def as_float(student_logits, teacher_logits):
    """Return both logits in float32 or float64, the teacher's as constants; shapes must match."""
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 4:
        raise ValueError(f"student logits {tuple(student_logits.shape)} and teacher logits "
                         f"{tuple(teacher_logits.shape)} must have the same shape (B, K, H, W); "
                         "resize one of them")
    # Half precision overflows in the sums and loses small probabilities.
    s, t = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            for x in (student_logits, teacher_logits.detach()))
    return s, t


def pixelwise_kd(student_logits, teacher_logits, temperature=1.0):
    """Return the mean over pixels of KL(teacher || student): (B, K, H, W) twice -> (B,).

    One number for each image, so that the caller can weight images before averaging. In nats,
    >= 0. No gradient reaches the teacher. ValueError if the shapes differ. Formula: Hinton et al.
    """
    s, t = as_float(student_logits, teacher_logits)
    T = temperature
    log_s = F.log_softmax(s / T, dim=1)                              # (B, K, H, W)
    log_t = F.log_softmax(t / T, dim=1)                              # (B, K, H, W)

    # Summed over classes, averaged over pixels. Not reduction="batchmean": on a 4-D tensor it
    # divides by B only, and the loss would grow with the crop.
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=1)        # (B, H, W)

    # Dividing logits by T makes the gradient about T^2 times smaller. T^2 undoes this, so that
    # another T does not act like another learning rate.
    return T ** 2 * kl.mean(dim=(1, 2))                              # (B,)


def channelwise_kd(student_logits, teacher_logits, temperature=4.0):
    """Return the mean over classes of KL(teacher || student) over space: (B, K, H, W) x2 -> (B,).

    Softmax over the H W logits of a class says where the class is. A small class counts as much as
    a large one, and a constant added to a whole class changes nothing. In nats, >= 0. Each pixel
    split in four gives the same value; but the upper limit depends on the number of pixels: it is
    T^2 ln(H W) for a student whose map is flat. Errors as in `pixelwise_kd`. Formula: Shu et al.
    """
    s, t = as_float(student_logits, teacher_logits)
    T = temperature
    log_s = F.log_softmax(s.flatten(2) / T, dim=2)                   # (B, K, H*W)
    log_t = F.log_softmax(t.flatten(2) / T, dim=2)                   # (B, K, H*W)
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=2)        # (B, K)
    return T ** 2 * kl.mean(dim=1)                                   # (B,)


def demo():
    """Print the worked example, then what each loss says to five students."""
    t = torch.tensor([math.log(3), 0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    s = torch.zeros(1, 2, 2, 2)
    s[0, 0, 1, 1] = math.log(9)
    print(f"Worked example: pixelwise {pixelwise_kd(s, t).item():.4f}, channelwise "
          f"{channelwise_kd(s, t, 1.0).item():.4f}\n")

    # The teacher sees a disc of class 1 on class 0, and no class 2.
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    disc = 12 - ((x - 16) ** 2 + (y - 16) ** 2).sqrt()
    teacher = torch.stack([-disc, disc, torch.full_like(disc, -9)]).unsqueeze(0)     # (1, 3, H, W)
    students = {"equal to the teacher": teacher,
                "less sure: logits halved": teacher / 2,
                "class 1 too strong everywhere": teacher + torch.tensor([0, 4.0, 0]).view(3, 1, 1),
                "disc moved by 4 pixels": teacher.roll(4, dims=3),
                "classes 0 and 1 exchanged": teacher[:, [1, 0, 2]]}
    print(f"{'student':32s}{'pixelwise':>12s}{'channelwise':>14s}")
    for name, student in students.items():
        pixel, channel = (f(student, teacher).item() for f in (pixelwise_kd, channelwise_kd))
        print(f"{name:32s}{abs(pixel):12.4f}{abs(channel):14.4f}")
    print("Compare down a column: T is 1 in pixelwise, 4 in channelwise. Channelwise cannot see a\n"
          "class that is too strong everywhere. Pixelwise does, but large classes rule its mean.")


if __name__ == "__main__":
    demo()
