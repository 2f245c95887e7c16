"""Colours as a way to read a photograph: colours.py where files are read.

Use it
    prepare = private_colours(teacher, size=(96, 128))
    Pool(files, size, prepare)                     # every picture in the private camera's colours
"""

from functools import partial

from colours import colour_target, transfer
from bn_stats import bn_layers, capture_bn_inputs, run_until
from support.data import to_tensor, whole_view


def repaint(image, size, mean, cov):
    """Return a PIL picture whose colours have this mean (3,) and covariance (3, 3).

    Both are read at the size (H, W) that the teacher saw, where fine grain is averaged away.
    """
    small = to_tensor(whole_view(image, size)).unsqueeze(0) / 255                # (1, 3, h, w)
    rows = transfer(small, mean, cov)[0].tolist()                                # (3, 4)
    return image.convert("RGB", sum(([*row[:3], 255 * row[3]] for row in rows), []))


def private_colours(teacher, size):
    """Return a function that gives a PIL picture the colours of the teacher's training images."""
    (name, first), *_ = bn_layers(teacher).items()

    def response(images):
        with capture_bn_inputs(teacher, {name: first}) as captured:
            run_until(teacher, images, {name: first})
        return captured[name][0]

    mean, cov = colour_target(response, first.running_mean, first.running_var, size)
    return partial(repaint, size=size, mean=mean.cpu(), cov=cov.cpu())
