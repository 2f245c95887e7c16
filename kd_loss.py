"""How does a student learn from a teacher's logits? It learns to predict the same distributions.

Picture
    A pixel on a kerb. Its label says "road" and nothing else. The teacher says road 0.6, pavement
    0.4, sky 0: this is road, it resembles pavement, and it does not resemble sky. A student that
    imitates the teacher learns these similarities, too. No label contains them.

Idea
    A small network, the student, learns to reproduce the logits of a trained one, the teacher. One
    loss compares the classes at each pixel ("what is here?"). The other compares the pixels of each
    class ("where is it?").

Equation
    p = softmax(t / T) of the teacher, q = softmax(s / T) of the student
    pixelwise    T^2 mean over pixels of sum over k of p log(p / q),  softmax over the classes k
    channelwise  T^2 mean over k of sum over pixels of p log(p / q),  softmax over the pixels

    Both logits must have the same shape; resize one of them beforehand. The loss of an image does
    not depend on the rest of its batch. channelwise can grow if a larger crop adds background: for
    a student with equal logits everywhere, it is ln(H W) minus the entropy of p, and background
    hardly changes the entropy. If both logits are upsampled instead, both terms grow alike.

Paper
    The KD loss of DFSS (Sun & Wu, arXiv 2512.13175) is not public; the sum of both is our default.
    pixelwise: Hinton et al., arXiv 1503.02531, at each pixel. channelwise: CWD (Shu et al., arXiv
    2011.13256), here per image instead of averaged over the batch.

Symbols
    B images, K classes, H W pixels.  s, t: logits of student and teacher;  q, p: their
    probabilities.  T: temperature; above 1 it softens both and small probabilities count more.

Worked example (K = 2 classes, 2x2 pixels, T = 1; the demo prints it, a test asserts it)
    teacher logits  class 0: ln 3 everywhere,  class 1: 0        -> 3/4 and 1/4 at each pixel
    student logits  class 0: 0 0 / 0 ln 9,     class 1: 0        -> 1/2, and 9/10 at the last pixel
    pixelwise   three pixels of 3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308,
                one of 3/4 ln(5/6) + 1/4 ln(5/2) = 0.0923         -> mean 0.1212
    channelwise class 0: p = 1/4 each, q = 1/12 1/12 1/12 3/4:
                3/4 ln 3 + 1/4 ln(1/3) = 0.5493;  class 1: 0      -> mean 0.2747

Use it
    import torch
    from kd_loss import channelwise_kd, pixelwise_kd
    teacher, student = torch.nn.Conv2d(3, 5, 1), torch.nn.Conv2d(3, 5, 1)    # yours
    images = torch.rand(8, 3, 96, 128)
    with torch.no_grad():
        t = teacher(images)                                                  # (B, K, H, W)
    s = student(images)                                                      # (B, K, H, W)
    losses = pixelwise_kd(s, t) + channelwise_kd(s, t)                       # (B,)
    losses.mean().backward()

Run it
    python kd_loss.py           (CPU, a second: which mistakes each loss sees and which it does not)
"""

import math

import torch
import torch.nn.functional as F


def check_and_cast(student_logits, teacher_logits):
    """Return both logits in at least float32, the teacher's detached; ValueError for the shape."""
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 4:
        raise ValueError("expected logits of one shape (B, K, H, W), resized if need be; got "
                         f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}")
    # Half precision overflows in the sums and loses small probabilities.
    s, t = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            for x in (student_logits, teacher_logits.detach()))
    return s, t


def pixelwise_kd(student_logits, teacher_logits, temperature=1.0):
    """Return the mean over pixels of KL(teacher || student): (B, K, H, W) twice -> (B,).

    One value per image, so that the caller can weight the images: >= 0, in nats times T^2. The
    teacher gets no gradient. Logits must be finite; padded pixels count, crop them. ValueError if
    the shapes differ, or for one class: over one class every softmax is 1. Formula: Hinton et al.
    """
    s, t = check_and_cast(student_logits, teacher_logits)
    if s.shape[1] == 1:
        raise ValueError("expected two classes or more; for a sigmoid's logit z, pass 0 and z")
    T = temperature
    log_s = F.log_softmax(s / T, dim=1)                              # (B, K, H, W)
    log_t = F.log_softmax(t / T, dim=1)                              # (B, K, H, W)

    # Summed over classes, averaged over pixels. Not reduction="batchmean": on a 4-D tensor it
    # divides by B only, and the loss would grow with the crop.
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=1)        # (B, H, W)

    # Division by T makes the gradient about T^2 times smaller. The factor T^2 compensates, so that
    # the temperature does not act as a learning rate.
    return T ** 2 * kl.mean(dim=(1, 2))                              # (B,)


def channelwise_kd(student_logits, teacher_logits, temperature=4.0):
    """Return the mean over classes of KL(teacher || student) over space: (B, K, H, W) x2 -> (B,).

    The softmax over the H W logits of a class says where the class is. Small classes count as much
    as large ones, and a constant added to all logits of a class has no effect. The value is >= 0,
    in nats times T^2. ValueError if the shapes differ. Formula: Shu et al.
    """
    s, t = check_and_cast(student_logits, teacher_logits)
    T = temperature
    log_s = F.log_softmax(s.flatten(2) / T, dim=2)                   # (B, K, H*W)
    log_t = F.log_softmax(t.flatten(2) / T, dim=2)                   # (B, K, H*W)
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=2)        # (B, K)
    return T ** 2 * kl.mean(dim=1)                                   # (B,)


def demo():
    """Print the worked example, then the two losses of five students."""
    t = torch.tensor([math.log(3), 0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    s = torch.zeros(1, 2, 2, 2)
    s[0, 0, 1, 1] = math.log(9)
    print(f"Worked example: pixelwise {pixelwise_kd(s, t).item():.4f}, channelwise "
          f"{channelwise_kd(s, t, 1.0).item():.4f}\n")

    # The teacher sees a disc of class 1 on class 0, and no class 2.
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    disc = 12 - ((x - 16) ** 2 + (y - 16) ** 2).sqrt()
    teacher = torch.stack([-disc, disc, torch.full_like(disc, -9)]).unsqueeze(0)     # (1, 3, H, W)
    bias = torch.tensor([0, 4.0, 0]).view(3, 1, 1)
    students = {"equal to the teacher": teacher,
                "less confident: logits halved": teacher / 2,
                "disc moved by 4 pixels": teacher.roll(4, dims=3),
                "classes 0 and 1 exchanged": teacher[:, [1, 0, 2]],
                "class 1 too strong everywhere": teacher + bias}
    print(f"{'student':32s}{'pixelwise':>12s}{'channelwise':>14s}")
    for name, student in students.items():
        pixel, channel = (f(student, teacher).item() for f in (pixelwise_kd, channelwise_kd))
        print(f"{name:32s}{abs(pixel):12.4f}{abs(channel):14.4f}")       # abs: no -0.0000
    print("Compare within a column only: T is 1 in pixelwise and 4 in channelwise.\n"
          "Caveat: channelwise does not see a class that is too strong everywhere. Pixelwise\n"
          "does, but large classes dominate its mean.")


if __name__ == "__main__":
    demo()
