"""Drawn street scenes with exact labels, and an unlabelled pool: the data of the default run.

Idea    A pinhole camera looks at a world of boxes and balls. Each shape is drawn into the image and
        into the label map with the same corners, hence the labels are exact. These streets are the
        teacher's training domain. Most of the pool shows no street. A minority shows streets in
        other colours, seen by other cameras. Ours: an illustration, not evidence about photos.
Use it  from support.scenes import CLASSES, PALETTE, pool_image, street_scene, write_scenes

Each picture depends on (seed, split or pool, index, size) alone. `random.Random` is seeded with a
text of the first three, which gives the same numbers in every process. Lengths are in metres, seen
from the camera's foot: X to the right, Y up, Z ahead. Colours are arrays (R, G, B) in 0..255.
"""
import colorsys
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from support.options import progress

CLASSES = ("sky", "building", "road", "pavement", "tree", "car", "person", "sign")
PALETTE = ((70, 130, 180), (88, 80, 84), (128, 64, 128), (244, 35, 232),
           (107, 142, 35), (0, 0, 190), (220, 20, 60), (240, 210, 0))
SKY, BUILDING, ROAD, PAVEMENT, TREE, CAR, PERSON, SIGN = range(8)
SUPERSAMPLE = 3    # drawn this many times too large, then averaged: PIL draws hard edges
DARK, GLASS, WHITE, LAMP = np.array(((24, 26, 40), (70, 84, 104), (255, 255, 250), (255, 200, 120)))

# How streets of the pool differ from the defaults of Canvas, which are the teacher's.
POOL_STREETS = {
    "street_toy": {"height": (2.4, 3.2), "horizon": (0.3, 0.38), "hue_shift": 0.2, "vivid": 2.2},
    "street_high": {"height": (7, 11), "horizon": (0.06, 0.18), "hue_shift": 0.1, "vivid": 1.3},
    "street_night": {"height": (1.2, 1.5), "horizon": (0.48, 0.56), "light": 0.22, "window": LAMP}}


class Canvas:
    """An image, its label map, and the camera that draws into both.

    height: range of the camera's height (metres); horizon: range of its place (image heights from
    the top); hue_shift: largest change of a hue; vivid, light: factors of saturation and value.
    """

    def __init__(self, size, rng, height=(1.8, 2.2), horizon=(0.44, 0.52), hue_shift=0, vivid=1,
                 light=1, window=GLASS):
        self.hue_shift, self.vivid, self.light, self.window = hue_shift, vivid, light, window
        self.rng, self.image = rng, Image.new("RGB", (SUPERSAMPLE * size[1], SUPERSAMPLE * size[0]))
        self.label = Image.new("L", self.image.size, SKY)
        self.pens = ImageDraw.Draw(self.image), ImageDraw.Draw(self.label)
        self.height, self.focal = rng.uniform(*height), rng.uniform(0.9, 1.04) * self.image.height
        self.middle = rng.uniform(0.38, 0.62) * self.image.width
        self.horizon = rng.uniform(*horizon) * self.image.height
        self.haze = self.pick((0.07, 0.13), (0.03, 0.16), (0.86, 0.95))

    def pick(self, hue=(0, 1), saturation=(0.1, 0.9), value=(0.3, 0.95)):
        """Return a random colour of these ranges, as this camera shows it."""
        h, s, v = (self.rng.uniform(*ends) for ends in (hue, saturation, value))
        h += self.hue_shift * self.rng.uniform(-1, 1)
        return 255 * np.array(colorsys.hsv_to_rgb(h % 1, min(1, s * self.vivid), v * self.light))

    def background(self, colours):
        """Stretch a small array (h, w, 3) of colours smoothly over the whole image."""
        small = Image.fromarray(np.array(colours, np.uint8))
        self.image.paste(small.resize(self.image.size, Image.BICUBIC))

    def polygon(self, xs, ys, zs, colour, label):
        """Fill the projection of the given corners in the image and in the label map.

        The colour fades into the haze with the Z of the first corner.
        """
        scales = [self.focal / max(z, 0.5) for z in zs]    # nothing lies behind the camera
        points = [(self.middle + x * scale, self.horizon + (self.height - y) * scale)
                  for x, y, scale in zip(xs, ys, scales, strict=True)]
        colour = colour + min(0.75, max(0, zs[0] / 150)) * (self.haze - colour)
        self.pens[0].polygon(points, tuple(colour.astype(int).tolist()))
        self.pens[1].polygon(points, label)

    def box(self, x, y, z, colour, label=SKY):
        """Draw a block. x: middle and half the width; y: bottom and top; z: front and depth."""
        left, right, (low, high), near, far = x[0] - x[1], x[0] + x[1], y, z[0], z[0] + z[1]
        across, deep = (left, right, right, left), (near, near, far, far)
        side = left if left > 0 else right    # a side that looks away is painted over below
        self.polygon([side] * 4, (low, high, high, low), deep, 0.7 * colour, label)
        if high < self.height:
            self.polygon(across, [high] * 4, deep, colour, label)
        self.polygon(across, (low, low, high, high), [near] * 4, 0.85 * colour, label)

    def ball(self, x, y, z, radius, colour, label=SKY):
        angle = np.arange(0, 2 * np.pi, np.pi / 6)
        for r, tone in ((radius, 0.75), (0.6 * radius, 1)):    # light falls from the upper left
            xs = x + (r - radius) / 2 + r * np.cos(angle)
            ys = y - (r - radius) / 2 + r * np.sin(angle)
            self.polygon(xs.tolist(), ys.tolist(), [z] * 12, tone * colour, label)


def house(c, x, z, side):
    top, wall = c.rng.uniform(6, 11), c.pick((0, 0.14), (0.08, 0.45), (0.65, 1))
    c.box((x + 7 * side, 7), (0, top), (z, 8), wall, BUILDING)
    for low in np.arange(1, top - 1.4, 2.8).tolist():    # rows of windows
        c.box((x, 0.02), (low, low + 1.4), (z + 1, 6), c.window, BUILDING)


def car(c, x, z):
    paint = c.pick()
    c.box((x, 0.85), (0, 0.4), (z + 0.4, 3.4), DARK, CAR)
    c.box((x, 0.9), (0.3, 0.9), (z, 4.2), paint, CAR)
    c.box((x, 0.75), (0.9, 1.4), (z + 0.8, 2.6), c.light * GLASS, CAR)
    c.box((x, 0.75), (1.4, 1.5), (z + 0.8, 2.6), paint, CAR)


def tree(c, x, z):
    leaf, top = c.pick((0.2, 0.32), (0.4, 0.65), (0.4, 0.6)), c.rng.uniform(3.4, 5.2)
    c.box((x, 0.15), (0, top), (z, 0.3), 0.4 * leaf, TREE)
    for r in (1, 0.9, 0.8, 0.7, 0.6, 0.5):    # from large and dark to small and light
        c.ball(c.rng.gauss(x, 0.6), c.rng.gauss(top, 0.6), z, r, (1.3 - 0.6 * r) * leaf, TREE)


def person(c, x, z):
    c.box((x, 0.2), (0, 0.9), (z, 0.2), 0.7 * c.pick(), PERSON)
    c.box((x, 0.3), (0.8, 1.5), (z, 0.2), c.pick(), PERSON)
    c.ball(x, 1.65, z, 0.17, c.pick((0.03, 0.12), (0.3, 0.6), (0.4, 0.9)), PERSON)


def sign(c, x, z):
    c.box((x, 0.07), (0, 2.5), (z, 0.1), 0.5 * WHITE, SIGN)
    c.ball(x, 2.5, z, 0.45, c.pick((0.6, 1), (0.85, 0.9), (0.7, 0.8)), SIGN)


# What stands along the kerb, and the range of its distance from it (below 0: on the road).
OBJECTS = (car, -3.2, -1.0), (tree, 1.2, 1.2), (person, -1.5, 2.2), (sign, 0.35, 0.35)


def street(c):
    """Draw sky and ground, then from far to near the houses and what stands along the kerbs."""
    half, pavement, middle = c.rng.uniform(3.9, 4.6), c.rng.uniform(2.8, 3.8), c.rng.uniform(-3, 0)
    c.background([[c.pick((0.56, 0.62), (0.25, 0.6), (0.68, 0.92))], [c.haze], [c.haze]])
    c.box((0, 400), (0, 0), (1, 400), c.pick((0.07, 0.13), (0.03, 0.1), (0.52, 0.66)), PAVEMENT)
    c.box((middle, half), (0, 0), (1, 400), c.pick((0.6, 0.7), (0.02, 0.07), (0.4, 0.5)), ROAD)
    for z in np.arange(c.rng.uniform(62, 70), -7, -8).tolist():
        c.box((middle, 0.08), (0, 0), (z, 3), WHITE, ROAD)
        for side in (-1, 1):
            house(c, middle + side * (half + pavement), z, side)
            for draw, low, high in OBJECTS:
                x = middle + side * (half + c.rng.uniform(low, high))
                if c.rng.random() < 0.7 and 5 < z < 40 and abs(x) < 0.6 * z:    # in the image
                    draw(c, x, z)


def street_scene(seed, split, index, size=(64, 96)):
    """Return (image, label) of the teacher's training domain: PIL "RGB", PIL "L" in 0..7."""
    c = Canvas(size, random.Random(f"{seed} {split} {index}"))
    street(c)
    return c.image.reduce(SUPERSAMPLE), c.label.resize(size[::-1], Image.NEAREST)


def fruit(c):
    c.background([[c.pick()]])
    c.box((0, 9), (0, 1), (2, 4), c.pick())
    for z in (5, 4.5, 4, 3.5, 3, 2.5):
        c.ball(c.rng.uniform(-0.7 * z, 0.7 * z), 1.4, z, 0.4, c.pick())


def hills(c):
    land = c.pick((0.1, 0.45), (0.4, 0.8), (0.3, 0.6))
    c.background([[c.pick((0.5, 0.7))], [c.haze]])
    for z in range(120, 4, -4):
        c.ball(c.rng.uniform(-z, z), (z / 200 - 0.8) * z, z, c.rng.uniform(0.35, 0.5) * z, land)


def sea(c):
    c.background([[c.pick()], [c.pick()]])
    c.ball(c.rng.uniform(-9, 9), c.height, 20, 2, WHITE)
    c.box((0, 400), (0, 0), (1, 400), 0.6 * c.pick())


UNRELATED = {"fruit": fruit, "hills": hills, "sea": sea}


def pool_image(seed, index, size=(64, 96)):
    """Return (image, kind) of the unlabelled pool; the kind is for reports, no method reads it."""
    rng = random.Random(f"{seed} pool {index}")
    kind = rng.choice(list(POOL_STREETS if rng.random() < 0.22 else UNRELATED))
    c = Canvas(size, rng, **POOL_STREETS.get(kind, {}))
    UNRELATED.get(kind, street)(c)
    return c.image.reduce(SUPERSAMPLE), kind


def write_scenes(root, seed=0, size=(64, 96), train=500, val=100, pool=1600):
    """Write all pictures as PNG below root, unless root/complete, written last, exists."""
    root = Path(root)
    if (root / "complete").exists():
        return
    for folder in ("train/images", "train/labels", "val/images", "val/labels", "pool"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", val)):
        for i in progress(range(count), f"drawing {split}"):
            image, label = street_scene(seed, split, i, size)
            image.save(root / f"{split}/images/{i:04d}.png")
            label.save(root / f"{split}/labels/{i:04d}.png")
    for i in progress(range(pool), "drawing pool"):
        pool_image(seed, i, size)[0].save(root / f"pool/{i:04d}.png")
    (root / "complete").touch()
