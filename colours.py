"""Can a wild photograph be made to look as if the private camera had taken it? Change its colours.

Picture
    The private photographs were taken on warm, soft evenings, yours at a blue, hard noon. Turn the
    colour knobs of yours until its average colour and its contrast are those of the evenings; every
    edge stays where it is. Nobody shows you an evening, but the teacher has seen them.

Idea
    The first BatchNorm layer of a trained network, the teacher, sees the image through nothing but
    a linear filter, so its running mean and variance tell the mean and covariance of the private
    colours. Each photograph is then given these by a 3x3 matrix and an offset, without any search.

Equation
    a constant colour x gives the answer A x + b before the first BatchNorm layer; so
    private mean        m* = argmin over m of || (A m + b - mu_bn) / s ||
    private covariance  S* = argmin over S of sum over channels c of (a_c' S a_c / var_bn_c - 1)^2
    new colour          y  = T (x - m) + m*,   T = S^-1/2 (S^1/2 S* S^1/2)^1/2 S^-1/2
                        (S and S* with a small number added to their diagonals)

Paper
    None: this is ours, not DFSS's (Sun & Wu, arXiv 2512.13175). T is the linear Monge-Kantorovitch
    map of colour transfer (Pitie & Kokaram, CVMP 2007). S* also holds how private images differ
    from one another, so a changed image has a little more contrast than most private ones.

Symbols
    B images, H W pixels, C channels.  x, y colours in [0, 1];  m (3,), S (3, 3): mean and
    covariance of the colours of an image, m* and S* those of the private images.
    mu_bn, var_bn (C,): running mean and variance of the first BatchNorm layer;  s = sqrt(var_bn).
    A (C, 3) with rows a_c, b (C,);  ' transposes.  maps (B, 3, 4): a matrix and an offset each.

Worked example (grey values, nothing added to S; the demo prints its end, a test asserts it)
    a filter that answers 4 x - 1, with mu_bn = 0.6, var_bn = 0.64:  m* = 1.6 / 4 = 0.4,  S* = 0.04
    an image of half 0.5 and half 0.7:  m = 0.6,  S = 0.01,  T = 0.2 / 0.1 = 2
    y = 2 (x - 0.6) + 0.4:  0.5 becomes 0.2 and 0.7 becomes 0.6

Use it
    from colours import colour_target, match_colours
    def response(x):                                     # images in [0, 1] -> (n, C), for a ResNet
        return teacher.conv1(normalise(x)).mean(dim=(2, 3))         # bn = teacher.bn1 comes next
    mean, cov = colour_target(response, bn.running_mean, bn.running_var, images.shape[-2:])
    images = match_colours(images, mean, cov)            # (B, 3, H, W) -> (B, 3, H, W)

Run it
    python colours.py         (CPU, a second: a filter's statistics give a camera's colours away)
"""

import torch

# ---------------------------------------------------------- give a photograph the private colours

def square_root(matrices, power=0.5):
    """Return symmetric positive matrices (..., 3, 3) to a power."""
    values, vectors = torch.linalg.eigh(matrices)
    return vectors @ (values.clamp_min(1e-15) ** power).diag_embed() @ vectors.mT


def transfer(images, mean, cov, floor=1e-3):
    """Return the maps that give each image the colours `mean` (3,) and `cov` (3, 3): (B, 3, 4).

    images: (B, 3, H, W). floor is added to both covariances: so the contrast of a flat image, or of
    a colour that it hardly has, is not raised without limit.
    """
    pixels = images.double().flatten(2)                                             # (B, 3, HW)
    m = pixels.mean(dim=2, keepdim=True)                                            # (B, 3, 1)
    mean, cov = mean.double(), cov.double()
    eye = floor * torch.eye(3, device=images.device, dtype=torch.float64)
    S = (pixels - m) @ (pixels - m).mT / pixels.shape[2] + eye                      # (B, 3, 3)
    half, inverse = square_root(S), square_root(S, -0.5)
    T = inverse @ square_root(half @ (cov + eye) @ half) @ inverse                  # (B, 3, 3)
    return torch.cat([T, mean.view(1, 3, 1) - T @ m], dim=2).float()


def apply_colours(images, maps):
    """Return the images with their colours mapped, cut to [0, 1]: (B, 3, H, W), (B, 3, 4)."""
    matrix, offset = maps[:, :, :3], maps[:, :, 3]
    return (torch.einsum("bij,bjhw->bihw", matrix, images) + offset[..., None, None]).clamp(0, 1)


def match_colours(images, mean, cov):
    """Return the images in the colours `mean` (3,) and `cov` (3, 3): (B, 3, H, W) -> (B, 3, H, W).

    In [0, 1]. It is a way to read a photograph: what comes later need not know of it. Each image is
    changed by itself, whatever else is in the batch.
    """
    return apply_colours(images, transfer(images, mean, cov))


# ----------------------------------------------------- read the private colours off the first layer

def least_squares(matrix, vector):
    """Return the smallest argmin over x of || matrix x - vector ||: (C, n), (C,) -> (n,).

    In float64 inside. Directions that the matrix sees no better than float32 rounds are left at 0:
    with filters of brightness alone, the answer would be made of rounding errors.
    """
    return (torch.linalg.pinv(matrix.double(), rtol=1e-5) @ vector.double()).to(matrix.dtype)


def hardly_sees_colour(system, entries):
    """Say whether a covariance read off a layer is too unsure to use: (C, 6), (6,) -> bool.

    A layer whose filters all look at brightness cannot tell how the colours differ, and least
    squares then answers with noise. "Too unsure": for two colours, the standard error of the
    variance of their difference is more than half the variance of grey.
    """
    system, entries = system.double(), entries.double()
    noise = (system @ entries - 1).square().sum() / max(len(system) - 6, 1) + 1e-6
    gram = system.T @ system + 1e-9 * system.square().sum() * torch.eye(6).to(system)   # invertible
    spread = noise * torch.linalg.inv(gram)                          # covariance of entries (6, 6)
    # var(red - green) = S_rr - 2 S_rg + S_gg; entries are in the order rr rg rb gg gb bb.
    differences = system.new_tensor([[1, -2, 0, 1, 0, 0], [1, 0, -2, 0, 0, 1], [0, 0, 0, 1, -2, 1]])
    errors = (differences @ spread @ differences.T).diagonal().clamp_min(0).sqrt()          # (3,)
    grey = (entries @ system.new_tensor([1, 2, 2, 1, 2, 1])) / 9
    return bool(errors.max() > grey / 2)


@torch.no_grad()
def colour_target(response, mean_bn, var_bn, size):
    """Return the mean (3,) and covariance (3, 3) of the private colours, read off one layer.

    response: maps images (n, 3, H, W) in [0, 1] to the (n, C) mean of what enters a BatchNorm layer
    behind linear filters alone, the network's first. mean_bn, var_bn (C,): its running statistics.
    size (H, W): of the constant images that show how the layer answers to a colour.
    Neighbouring pixels are nearly alike, so a filter answers nearly everywhere as to a constant
    colour. This is exact for 1x1 filters, as in the demo, and approximate for larger ones. Where
    the layer hardly sees colour (or C < 6), only the variance of grey is read, and the three
    colours are taken to vary together as in most photographs (correlation 0.95).
    """
    grey, step = 0.5, 0.2
    colours = grey + step * torch.cat([torch.zeros(1, 3), torch.eye(3)]).to(mean_bn)        # (4, 3)
    answers = response(colours.view(4, 3, 1, 1).expand(4, 3, *size).contiguous())           # (4, C)
    A = (answers[1:] - answers[0]).T / step                                                 # (C, 3)
    var_bn = var_bn.clamp_min(1e-12)                      # a dead channel has variance 0
    s = var_bn.sqrt()                                                                       # (C,)
    mean = grey + least_squares(A / s[:, None], (mean_bn - answers[0]) / s)                 # (3,)

    # a' S a is linear in the six different entries of S; off the diagonal each occurs twice.
    i, j = torch.triu_indices(3, 3, device=A.device)                                        # (6,)
    products = A[:, i] * A[:, j] * torch.where(i == j, 1.0, 2.0)                            # (C, 6)
    system = products / var_bn[:, None]
    entries = least_squares(system, torch.ones_like(s))
    cov = A.new_zeros(3, 3)
    cov[i, j] = cov[j, i] = entries
    if hardly_sees_colour(system, entries):
        return mean, cov.mean() * (0.05 * torch.eye(3) + 0.95).to(cov)
    values, vectors = torch.linalg.eigh(cov)              # least squares may leave some negative
    return mean, vectors @ values.clamp_min(0).diag() @ vectors.T


def demo():
    """Print the worked example, then read a camera's colours off a random filter bank."""
    image = torch.tensor([0.5, 0.7]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    grey = torch.ones(3, 3) * 0.04                                  # all colours vary together
    maps = transfer(image, torch.full((3,), 0.4), grey, floor=1e-9)
    print("Worked example:", [round(v, 3) for v in apply_colours(image, maps)[0, 0, 0].tolist()])

    generator = torch.Generator().manual_seed(0)
    cast = torch.tensor([[0.16, 0, 0], [0.10, 0.08, 0], [0.06, 0.06, 0.05]])
    truth = torch.tensor([0.6, 0.45, 0.3])
    pixels = truth + torch.randn(4096, 3, generator=generator) @ cast.T              # a warm camera
    A, b = torch.randn(16, 3, generator=generator), torch.randn(16, generator=generator)
    answers = pixels @ A.T + b
    mean, cov = colour_target(lambda x: x.mean(dim=(2, 3)) @ A.T + b, answers.mean(dim=0),
                              answers.var(dim=0, unbiased=False), (4, 4))
    blue = torch.tensor([0.3, 0.4, 0.7]).view(1, 3, 1, 1) + 0.1 * torch.randn(
        1, 3, 64, 64, generator=generator)
    rows = {"the camera": (pixels.mean(dim=0), pixels.T.cov()), "read off the layer": (mean, cov)}
    after = match_colours(blue, mean, cov)
    for name, x in (("photograph before", blue), ("photograph after", after)):
        rows[name] = x.mean(dim=(0, 2, 3)), x[0].flatten(1).cov()
    print("\nA warm camera, what 16 running means and variances tell of it, and a blue photograph:")
    for name, (m, S) in rows.items():
        print(f"    {name:20s}mean" + "".join(f"{v:6.2f}" for v in m)
              + "    standard deviation" + "".join(f"{v:6.2f}" for v in S.diagonal().sqrt()))


if __name__ == "__main__":
    demo()
