"""Can a photo be given the colours of the teacher's training images? Yes, from BatchNorm alone.

Picture
    The teacher was trained on photos of warm, soft evenings. Yours were taken at noon, in hard blue
    light. Change the colours of each of them until its average colour and its contrast are those of
    the evening photos. Every edge stays where it is.

Idea
    In most networks, only linear filters lie between the image and the first BatchNorm layer. Then
    the running statistics of this layer reveal the mean and contrast of the training images'
    colours. One 3x3 matrix and one offset per photo then give the photo this mean and contrast.

Equation (symbols below)
    response to a constant colour x, before the first BatchNorm layer:  A x + b
    mean        m* = argmin over m of || (A m + b - mu_bn) / s ||_2
    covariance  S* = v R,   v = median over channels of var_bn / diag(A R A')
    new colour  y  = T (x - m) + m*,   T = S^-1/2 (S^1/2 S* S^1/2)^1/2 S^-1/2
                (0.001 is added to the diagonals of S and S*)

Paper
    This step is ours, not DFSS's (Sun & Wu, arXiv 2512.13175). T is the linear Monge-Kantorovitch
    map of colour transfer (Pitie & Kokaram, CVMP 2007). R is an assumption: correlations of 0.95
    between red, green and blue, as in everyday photos. var_bn also includes the variance between
    training images. A matched photo thus has more contrast than an average training image.

Symbols
    x, y colours in [0, 1].  m (3,), S (3, 3): mean and covariance of the colours of one image;
    m*, S*: those of the training images;  v: the variance of red, green and blue, taken to be
    equal;  R (3, 3): 1 on the diagonal, 0.95 elsewhere.  mu_bn, var_bn (C,): running mean and
    variance;  s = sqrt(var_bn).  A (C, 3), b (C,).  diag(A R A'), (C,): variance of
    the response to colours of covariance R.  ' transposes.  B images, C channels, H W pixels.

Worked example (simplified: grey, R = 1; the demo prints the last line, a test asserts it)
    a layer whose response to grey x is 4 x - 1, with mu_bn = 0.6, var_bn = 0.64:
        4 m* - 1 = 0.6, hence m* = 0.4;    v = 0.64 / 4^2 = 0.04
    an image, half of it 0.5 and half 0.7:  m = 0.6,  variance 0.01,  T = sqrt(0.04 / 0.01) = 2
    y = 2 (x - 0.6) + 0.4:  0.5 becomes 0.2, and 0.7 becomes 0.6

Use it
    import torch, torchvision
    from colours import colour_target, match_colours
    teacher = torchvision.models.resnet18(weights=None).eval()           # yours: a trained one
    def response(images):         # RGB in [0, 1] -> (n, C): mean input of the first BatchNorm layer
        return teacher.conv1((images - 0.45) / 0.225).mean(dim=(2, 3))
    bn = teacher.bn1
    mean, cov = colour_target(response, bn.running_mean, bn.running_var, size=(96, 128))
    photos = match_colours(torch.rand(8, 3, 96, 128), mean, cov)         # (B, 3, H, W), in [0, 1]
    logits = teacher((photos - 0.45) / 0.225)                            # normalise afterwards

Run it
    python colours.py         (CPU, a second: estimates the training colours, applies them)
"""

import torch


def spd_power(matrices, exponent):
    """Return symmetric positive definite matrices (..., 3, 3) raised to a real exponent."""
    values, vectors = torch.linalg.eigh(matrices)
    return vectors @ (values.clamp_min(1e-15) ** exponent).diag_embed() @ vectors.mT


def transfer(images, mean, cov, floor=1e-3):
    """Return per image the matrix T and the offset m* - T m: (B, 3, H, W) -> (B, 3, 4).

    Applied to the image, they give it mean `mean` (3,) and covariance `cov` (3, 3).
    `floor` is added to both diagonals, so that the gain stays bounded for an image of one colour.
    """
    pixels = images.double().flatten(2)                                             # (B, 3, H*W)
    m = pixels.mean(dim=2, keepdim=True)                                            # (B, 3, 1)
    mean, cov = mean.double(), cov.double()
    eye = floor * torch.eye(3, device=images.device, dtype=torch.float64)
    S = (pixels - m) @ (pixels - m).mT / pixels.shape[2] + eye                      # (B, 3, 3)
    root, inverse = spd_power(S, 0.5), spd_power(S, -0.5)
    T = inverse @ spd_power(root @ (cov + eye) @ root, 0.5) @ inverse               # (B, 3, 3)
    return torch.cat([T, mean.view(1, 3, 1) - T @ m], dim=2).float()


def apply_colours(images, maps):
    """Return T x + offset, clamped to [0, 1]: (B, 3, H, W), (B, 3, 4) -> (B, 3, H, W)."""
    matrix, offset = maps[:, :, :3], maps[:, :, 3]
    matrix, offset = matrix.to(images), offset.to(images)
    return (torch.einsum("bij,bjhw->bihw", matrix, images) + offset[..., None, None]).clamp(0, 1)


def match_colours(images, mean, cov):
    """Return images with colour mean (3,) and covariance (3, 3): (B, 3, H, W) -> same, in [0, 1].

    images: RGB, finite, in [0, 1]; normalise them afterwards. Each is changed on its own. Clamping
    and the floor of `transfer` make it approximate. ValueError for another shape, type or range.
    """
    # The bounds are wider than [0, 1], since antialiased resizing overshoots a little.
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point() or (
            images.min() < -0.5 or images.max() > 1.5):
        raise ValueError("expected RGB floats (B, 3, H, W) in [0, 1], not normalised; got "
                         f"{images.dtype} {tuple(images.shape)}")
    return apply_colours(images, transfer(images, mean, cov))


@torch.no_grad()
def colour_target(response, mean_bn, var_bn, size):
    """Return the estimated colour mean (3,) and covariance (3, 3) of a network's training images.

    response: maps images (n, 3, H, W) in [0, 1] to the spatial mean (n, C) of the input of the
    network's first BatchNorm layer. Only linear filters may lie in between.
    mean_bn, var_bn: the layer's running mean and variance, (C,). size: (H, W) of the training
    images, since the zero padding at their borders changes the response. Exact for 1x1 filters and
    a covariance of the form v R. Approximate for larger filters: the neighbourhood that they see
    is taken to have one colour. ValueError for a response that is the same for all colours.
    """
    # Grey, then grey with 0.2 more of red, green and blue.
    colours = 0.5 + 0.2 * torch.cat([torch.zeros(1, 3), torch.eye(3)]).to(mean_bn)          # (4, 3)
    outputs = response(colours.view(4, 3, 1, 1).expand(4, 3, *size).contiguous())           # (4, C)
    A = (outputs[1:] - outputs[0]).T / 0.2                                                  # (C, 3)
    s = var_bn.clamp_min(1e-12).sqrt()                # (C,); a dead channel has variance 0

    # If all filters respond to brightness alone, mean_bn does not determine the hue. pinv then
    # gives grey (the solution nearest to 0.5), lstsq an arbitrary hue from rounding errors.
    inverse = torch.linalg.pinv((A / s[:, None]).double(), rtol=1e-5)                       # (3, C)
    mean = 0.5 + inverse @ ((mean_bn - outputs[0]) / s).double()                            # (3,)

    R = (0.05 * torch.eye(3) + 0.95).to(A)
    unit_var = ((A @ R) * A).sum(dim=1)               # (C,): variance of the response if v = 1
    alive = unit_var > 1e-8 * unit_var.max()          # else: rounding errors of a dead channel
    if not alive.any():
        raise ValueError("response is the same for all colours; return what enters BatchNorm")
    # Median, not mean: an edge filter hardly responds to a constant colour (small unit_var), but
    # has a large var_bn, so that its ratio is far too large.
    v = (var_bn / unit_var)[alive].median()
    return mean.to(A), v * R


def demo():
    """Print the worked example, then a photo matched to two training sets, the second misjudged."""
    image = torch.tensor([0.5, 0.7]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    maps = transfer(image, torch.full((3,), 0.4), torch.full((3, 3), 0.04), floor=1e-9)
    print("Worked example:", [round(v, 3) for v in apply_colours(image, maps)[0, 0, 0].tolist()])

    def show(name, mean, cov):
        std = cov.diagonal().sqrt()
        numbers = [*mean.tolist(), *std.tolist(), (cov[0, 1] / std[0] / std[1]).item()]
        print(f"{name:28s}" + "".join(f"{x:6.2f}" for x in numbers))

    torch.manual_seed(0)
    A, b = torch.randn(16, 3), torch.randn(16)                         # 16 filters of 1x1 pixel
    photo = torch.tensor([0.3, 0.4, 0.7]).view(3, 1, 1) + 0.1 * torch.randn(1, 3, 64, 64)
    print(f"\n{'':28s}  mean of R, G, B   std of R, G, B    correlation of R and G")
    show("bluish photo", photo.mean(dim=(0, 2, 3)), photo[0].flatten(1).cov())
    for cor in (0.95, 0.5):
        mix = spd_power(0.02 * ((1 - cor) * torch.eye(3) + cor), 0.5)
        pixels = torch.tensor([0.6, 0.45, 0.3]) + torch.randn(4096, 3) @ mix          # (4096, 3)
        inputs = pixels @ A.T + b                                      # (4096, C)
        mean, cov = colour_target(lambda x: x.mean(dim=(2, 3)) @ A.T + b, inputs.mean(dim=0),
                                  inputs.var(dim=0, unbiased=False), (4, 4))
        matched = match_colours(photo, mean, cov)
        show("training images", pixels.mean(dim=0), pixels.T.cov())
        show("    estimate from BatchNorm", mean, cov)
        show("    photo matched to it", matched.mean(dim=(0, 2, 3)), matched[0].flatten(1).cov())
    print("The correlation is assumed to be 0.95: that of the second training set is not found.\n"
          "Clamping to [0, 1] and the floor of `transfer` make the match approximate.")


if __name__ == "__main__":
    demo()
