"""Procedurally drawn scenes: a labelled street world and an unlabelled wild pool.

Idea    A pinhole camera projects a street in metres, and each shape goes into image and label map
        by one call, so the labels are exact: the teacher's private world. Most of the wild pool
        shows no street; a minority does (toy town, high camera, night), in other colours and seen
        by another camera. Ours throughout: an illustration, not evidence about photographs.
Use it  from support.scenes import CLASSES, PALETTE, street_scene, wild_image, write_scenes

Each picture depends on (seed, split or pool, index, size) alone. Lengths on the canvas are in image
heights, lengths in a scene in metres: X to the right, Y up, Z away from the camera.
"""
import colorsys
import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from support.progress import progress

CLASSES = ("sky", "building", "road", "pavement", "tree", "car", "person", "sign")
PALETTE = ((70, 130, 180), (88, 80, 84), (128, 64, 128), (244, 35, 232),
           (107, 142, 35), (0, 0, 190), (220, 20, 60), (240, 210, 0))
SKY, BUILDING, ROAD, PAVEMENT, TREE, CAR, PERSON, SIGN = range(8)
STREAMS = {"train": 0, "val": 1, "pool": 2}
SUPERSAMPLE = 3    # drawn this many times too large, then averaged: PIL draws hard edges

# Colours are ranges of (hue, saturation, value), of which each thing picks its own.
ZENITH = (0.56, 0.62), (0.25, 0.6), (0.68, 0.92)
LOW_SKY = (0.07, 0.13), (0.03, 0.16), (0.86, 0.95)
WALLS = (0.01, 0.14), (0.08, 0.45), (0.62, 0.95)
GLASS = (0.55, 0.62), (0.15, 0.4), (0.22, 0.5)
ASPHALT = (0.6, 0.7), (0.02, 0.07), (0.4, 0.5)
SLABS = (0.07, 0.13), (0.03, 0.1), (0.52, 0.66)
LEAVES = (0.2, 0.32), (0.4, 0.65), (0.36, 0.52)
TAN = (0.03, 0.12), (0.3, 0.6), (0.4, 0.9)    # of skin and wood
ANY = (0, 1), (0.1, 0.9), (0.3, 0.95)
DARK, WHITE, RED, LAMP = (24, 26, 40), (236, 236, 230), (206, 30, 36), (255, 190, 100)
FULL = (0, 0), (1, 0), (1, 1), (0, 1)    # the shape of a whole face

# Street worlds: ranges of the camera's height and, in image heights from the top, of its horizon;
# spread of hues, factors of saturation and value; glow of windows (1 is a lamp); shadows' colour.
PRIVATE = (1.8, 2.2), (0.44, 0.52), (0, 1, 1), 0.2, DARK
RELATED = {"toy_street": ((2.4, 3.2), (0.3, 0.38), (0.2, 2.2, 1.3), 0.9, DARK),
           "street_high": ((7, 11), (0.06, 0.18), (0.1, 1.3, 1), 0.2, DARK),
           "night": ((1.2, 1.5), (0.48, 0.56), (0, 1, 0.22), 1, LAMP)}    # pools of light


def mix(a, b, t):
    """Return what lies t of the way (1 is b, more lies beyond) from a to b: points or colours."""
    return a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), a[2] + t * (b[2] - a[2])


def rect(left, right, low, high):
    return (left, low), (right, low), (right, high), (left, high)


def disc(x, y, rx, ry):
    return [(x + rx * math.cos(k * math.pi / 6), y + ry * math.sin(k * math.pi / 6))
            for k in range(12)]


class Canvas:
    """Image, label map and camera; one call draws into both, so that they cannot drift apart."""

    def __init__(self, size, rng, style=PRIVATE):
        self.size, self.rng = size, rng
        height, horizon, (self.spread, self.vivid, self.light), self.glow, self.shadow = style
        self.unit, self.aspect = SUPERSAMPLE * size[0], size[1] / size[0]
        large = (SUPERSAMPLE * size[1], SUPERSAMPLE * size[0])
        self.image, self.label = Image.new("RGB", large), Image.new("L", large)
        self.pens = ImageDraw.Draw(self.image), ImageDraw.Draw(self.label)
        self.height, self.horizon = rng.uniform(*height), rng.uniform(*horizon)
        self.focal, self.shift = rng.uniform(0.9, 1.04), 0
        self.middle = self.aspect * rng.uniform(0.38, 0.62)
        self.haze, self.reach = self.pick(LOW_SKY), rng.uniform(110, 200)

    def pick(self, colour):
        """Return one (R, G, B) of the ranges of a colour, as the style shows it."""
        hue, saturation, value = (self.rng.uniform(*ends) for ends in colour)
        hue += self.rng.uniform(-self.spread, self.spread)
        rgb = colorsys.hsv_to_rgb(hue % 1, min(1, saturation * self.vivid), value * self.light)
        return mix((0, 0, 0), rgb, 255)

    def at(self, point):
        scale = self.focal / max(point[2], 0.4)    # never behind the camera
        return (self.middle + (point[0] - self.shift) * scale,
                self.horizon + (self.height - point[1]) * scale)

    def draw(self, points, colour, label=None, shape="polygon", **how):
        pixels = [(x * self.unit, y * self.unit) for x, y in points]
        getattr(self.pens[0], shape)(pixels, fill=tuple(map(int, colour)), **how)
        if label is not None:
            getattr(self.pens[1], shape)(pixels, fill=label, **how)

    def oval(self, x, y, rx, ry, colour, label=None):
        self.draw([(x - rx, y - ry), (x + rx, y + ry)], colour, label, "ellipse")

    def face(self, corners, parts, label=None):
        """Draw parts, pairs (shape, colour), in fractions (right, up) of the face's sides."""
        a, b, c, d = corners
        (ax, ay), (bx, by), (dx, dy) = self.at(a), self.at(b), self.at(d)
        if ((bx - ax) * (dy - ay) >= (dx - ax) * (by - ay)
                or max(ax, bx, dx) < 0 or min(ax, bx, dx) > self.aspect):
            return    # it looks away or is beside the picture
        far = min(0.75, min(a[2], b[2], c[2], d[2]) / self.reach)
        for shape, colour in parts:
            points = [self.at(mix(mix(a, b, s), mix(d, c, s), t)) for s, t in shape]
            self.draw(points, mix(colour, self.haze, far), label)

    def board(self, x, z, half, low, high, parts, label):
        self.face([(a, b, z) for a, b in rect(x - half, x + half, low, high)], parts, label)

    def floor(self, left, right, near, far, colour, label=None):
        self.face([(x, 0, z) for x, z in rect(left, right, near, far)], [(FULL, colour)], label)

    def box(self, place, low, high, base, top, colour, label=None, parts=((), (), (), ())):
        """Draw a block; place is (X, Z, turn), base and top (back, front, half the width)."""
        x, z, sin, cos = place[0], place[1], math.sin(place[2]), math.cos(place[2])
        below, above = ([(x + u * sin + v * cos, y, z + u * cos - v * sin)
                         for u, v in ((back, -half), (back, half), (front, half), (front, -half))]
                        for y, (back, front, half) in ((low, base), (high, top)))
        for i in range(4):
            corners = below[i], below[i - 3], above[i - 3], above[i]
            self.face(corners, [(FULL, mix(DARK, colour, 0.84 + 0.12 * (i % 2))), *parts[i]], label)
        self.face(above, [(FULL, mix(DARK, colour, 1.14))], label)

    def soft(self, shapes, colour, strength, blur):
        """Lay a blurred, translucent colour over the shapes: shadows, clouds, light."""
        mask = Image.new("L", self.size[::-1])
        for shape in shapes:
            pixels = [(x * self.size[0], y * self.size[0]) for x, y in shape]
            ImageDraw.Draw(mask).polygon(pixels, fill=int(255 * strength))
        mask = mask.filter(ImageFilter.GaussianBlur(blur * self.size[0]))
        self.image.paste(tuple(map(int, colour)), mask=mask.resize(self.image.size, Image.BILINEAR))

    def field(self, colours, top=0.0, bottom=1.0):
        """Stretch a small array (h, w, 3) of colours smoothly over the rows from top to bottom."""
        small = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
        top, bottom = round(top * self.unit), round(bottom * self.unit)
        self.image.paste(small.resize((self.image.width, bottom - top), Image.BICUBIC), (0, top))

    def develop(self, cast):
        """Return (image, label): averaged down, with the camera's grain and colour cast."""
        pixels = np.asarray(self.image.reduce(SUPERSAMPLE), np.float32)               # (H, W, 3)
        grain = self.rng.standard_normal((*self.size, 1), np.float32) * self.rng.uniform(1, 4)
        pixels = (pixels + grain) * self.rng.uniform(1 - cast, 1 + cast, 3)
        return (Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)),
                self.label.resize(self.size[::-1], Image.NEAREST))


def car(c, x, z):
    """Draw a hull with lamps and wheels, then a cabin with windows."""
    length, nose, high = c.rng.uniform((1.9, 0.6, 0.55), (2.2, 1.4, 0.85)).tolist()
    turn = (math.pi if x < 0 else 0) + 1.5 * (c.rng.uniform() < 0.1)    # few stand across
    paint, glass = c.pick(ANY), c.pick(GLASS)
    end = [(rect(0, 1, -0.08, 0.26), mix(DARK, paint, 0.45)), (rect(0.36, 0.64, 0.3, 0.5), WHITE),
           (rect(0.05, 0.21, -0.5, -0.05), DARK), (rect(0.79, 0.95, -0.5, -0.05), DARK)]
    rear, front = ([*end, (rect(0.03, 0.23, 0.5, 0.82), lamp), (rect(0.77, 0.97, 0.5, 0.82), lamp)]
                   for lamp in (RED, WHITE))
    wheels = [(disc(axle, 0, size, 6.5 * size), colour) for axle in (0.19, 0.81)
              for size, colour in ((0.085, DARK), (0.045, WHITE))]
    screen = [(rect(0.09, 0.91, 0.16, 0.86), glass)]
    panes = [(rect(0.07, 0.48, 0.14, 0.84), glass), (rect(0.53, 0.94, 0.14, 0.84), glass)]
    hull, foot, roof = (-length, length, 0.9), (-1.85, nose, 0.84), (-1.6, nose - 0.5, 0.7)
    c.box((x, z, turn), 0.3, 0.92, hull, hull, paint, CAR, (rear, wheels, front, wheels))
    c.box((x, z, turn), 0.92, 0.92 + high, foot, roof, paint, CAR, (screen, panes, screen, panes))


def tree(c, x, z):
    """Draw a trunk, then leaves from large and dark to small and light."""
    high, radius = c.rng.uniform(3.4, 5.2), c.rng.uniform(1.3, 2) * c.focal / z
    leaf, (mx, my) = mix(c.pick(LEAVES), c.haze, z / c.reach), c.at((x, high, z))
    c.board(x, z, 0.15, 0, high, [(FULL, mix(DARK, leaf, 0.3))], TREE)
    leaves = c.rng.normal(-0.1, 0.36, (12 + int(60 * radius), 2)).tolist()    # few if it is small
    for k, (dx, dy) in enumerate(leaves):
        size, tone = radius * (0.55 - 0.4 * k / len(leaves)), 0.6 + 0.65 * k / len(leaves)
        c.oval(mx + radius * dx, my + radius * dy, size, 0.85 * size, mix(DARK, leaf, tone), TREE)


def person(c, x, z):
    high, half, step = c.rng.uniform((1.7, 0.32, 0), (2, 0.42, 0.3)).tolist()
    coat, legs, skin = c.pick(ANY), c.pick(ANY), c.pick(TAN)
    c.board(x, z, half, 0, high, (
        (((0.2, 0.5), (0.5, 0.5), (0.46 - step, 0), (0.2 - step, 0)), mix(DARK, legs, 0.6)),
        (((0.5, 0.5), (0.8, 0.5), (0.8 + step, 0), (0.54 + step, 0)), mix(DARK, legs, 0.8)),
        (rect(0, 1, 0.47, 0.8), mix(DARK, coat, 0.75)), (rect(0.2, 0.8, 0.45, 0.84), coat),
        (disc(0.5, 0.93, 0.22, 0.09), skin)), PERSON)


def sign(c, x, z):
    """Draw a pole with a round, three-cornered or square plate, or with a traffic light."""
    high, middle = c.rng.uniform(1.8, 2.5), disc(0.5, 0.4, 0.24, 0.24)
    plates = (((disc(0.5, 0.5, 0.5, 0.5), RED), (middle, WHITE)),
              ((((-0.1, 0), (1.1, 0), (0.5, 1.1)), RED), (middle, WHITE)),
              ((FULL, (30, 84, 180)), (middle, WHITE)),
              ((rect(0.15, 0.85, -0.3, 1.3), DARK), (middle, (70, 240, 120))))
    pole = rect(0.42, 0.58, -high / 0.92, 0), (120, 122, 126)
    c.board(x, z, 0.46, high, high + 0.92, (pole, *plates[c.rng.integers(4)]), SIGN)


def house(c, x, z, tone):
    """Draw a block with rows of windows above a row of doors, and a roof, flat or steep."""
    wall, glass = c.pick(WALLS), c.pick(GLASS)
    height, length, rise = c.rng.uniform((7, 4.8, 0.2), (10, 5.5, 2.2)).tolist()
    columns, levels, ends = c.rng.integers(3, 5), round(height / 2.9), (-length, length, 6)
    c.box((x, z, 0), height, height + rise, (-length, length, 6.3), (0.3 - length, length, 0.3),
          mix((60, 30, 28), wall, 0.4), BUILDING)
    front = [(rect(0, 1, 0, 1 / levels), mix(DARK, wall, 0.6 * tone))]
    for i, j in np.ndindex(columns, levels if z < 20 + length else 0):    # else too small to see
        low = (j + 0.2) / levels if j else 0
        pane = rect((i + 0.26) / columns, (i + 0.74) / columns, low, (j + 0.78) / levels)
        front.append((pane, mix(glass, LAMP, c.glow * c.rng.uniform())))
    c.box((x, z, 0), 0, height, ends, ends, mix(DARK, wall, tone), BUILDING, ((), front, (), front))


def backdrop(c, half):
    """Draw sky, ground, clouds, haze on the horizon and, far away, houses and woods."""
    slabs, zebra = c.pick(SLABS), c.rng.uniform(6, 18)
    c.field([[c.pick(ZENITH)], [c.haze]], 0, c.horizon + 0.02)
    c.floor(-200, 200, 1.5, 400, slabs, PAVEMENT)
    c.floor(-half, half, 1.5, 400, c.pick(ASPHALT), ROAD)
    clouds = [disc(x * c.aspect, c.horizon * y, 0.1 + 0.3 * w, 0.02 + 0.03 * w)
              for x, y, w in c.rng.uniform(size=(5, 3))]
    c.soft([*clouds, rect(0, c.aspect, c.horizon, c.horizon + 0.05)], c.haze, 0.6, 0.03)
    for x, high, kind in c.rng.uniform((-90, 5, 0), (90, 15, 1), (12, 3)).tolist():
        colour, label = (WALLS, BUILDING) if kind < 0.5 else (LEAVES, TREE)
        c.board(x, 150, 7, 0, high, [(FULL, c.pick(colour))], label)
    for z in range(2, 42, 5):
        c.floor(-0.08, 0.08, z, z + 2.6, WHITE)
    for x in range(-3, 4) if zebra < 11 else ():
        c.floor(x - 0.27, x + 0.27, zebra, zebra + 2.6, WHITE)


def street(c):
    """Draw, far to near: the backdrop, two rows of houses, shadows, and all that stands about."""
    half, walk, c.shift = c.rng.uniform((3.9, 2.8, 0), (4.6, 3.8, 3)).tolist()
    edge, sun, tip = half + walk, c.rng.choice((-1, 1)), half + c.rng.uniform(-1, 2)
    backdrop(c, half)
    for side in (-1, 1):
        for z in np.arange(c.rng.uniform(70, 80), 0, -11).tolist():
            house(c, side * (edge + 6), z, 0.78 if side == sun else 1.12)
    things, shadows = [], [rect(sun * tip, sun * edge, 2, 90)]
    # Up to so many per side: first Z, steps, least and most distance to the kerb, half a shadow.
    for thing, most, first, step, low, high, wide in (
            (car, 4, 7, 6, -3.2, -1, 1.1), (tree, 3, 8, 8, 1.2, 1.2, 1.6),
            (person, 2, 5, 2.5, -1.5, 2.2, 0.6), (sign, 2, 5.5, 3, 0.35, 0.35, 0.5)):
        for side, k in np.ndindex(2, most):
            x = (2 * side - 1) * (half + c.rng.uniform(low, high))
            z = max(first + step * (k + c.rng.uniform(0, 0.5)),
                    2.3 * c.focal / c.aspect * abs(x - c.shift))    # inside the picture
            if c.rng.uniform() < 0.6:
                things.append((z, thing, x))
                shadows.append(rect(x - wide, x + wide, z - 2 * wide, z + 2 * wide))
    c.soft([[c.at((x, 0, z)) for x, z in shape] for shape in shadows], c.shadow, 0.45, 0.008)
    for z, thing, x in sorted(things, key=lambda t: -t[0]):
        thing(c, x, z)


def street_scene(seed, split, index, size=(64, 96)):
    """Return (image, label) of the private world: PIL "RGB" and "L" with values 0..7."""
    c = Canvas(size, np.random.default_rng([seed, STREAMS[split], index]))
    street(c)
    return c.develop(0.04)


def fruit(c):
    edge, wood = c.rng.uniform(0.35, 0.55), c.pick(TAN)
    c.field([[c.pick(ANY)]], 0, edge)
    c.field([[mix(DARK, wood, 0.6)], [wood]], edge)
    peel, balls = c.pick(ANY), c.rng.uniform((edge, 0.1, 0.1), (0.8, 1.4, 0.22), (5, 3)).tolist()
    c.soft([disc(x + 0.3 * r, y + 0.8 * r, r, 0.35 * r) for y, x, r in balls], DARK, 0.6, 0.02)
    for y, x, r in sorted(balls):
        for k in np.arange(0, 0.9, 0.1):    # discs that shrink towards the light
            c.oval(x - 0.4 * k * r, y - 0.4 * k * r, r - k * r, r - k * r, mix(DARK, peel, 0.5 + k))


def room(c):
    window = [(rect(x, x + 0.13, 0.4, 0.85), (190, 220, 245)) for x in (0.3, 0.45)]
    walls, chest = (-3, 3, -2.8), (-0.5, 0.5, 0.4)    # a negative width turns a box inside out
    c.box((0, 4, 0), 0, 2.9, walls, walls, c.pick(ANY), None, ((), (), window, ()))
    c.floor(-2.8, 2.8, 1.5, 7, c.pick(TAN))
    for z in (6.4, 5.7, 5, 4.3):
        x, high, turn = c.rng.uniform((-2, 0.4, 0), (2, 1.5, 6)).tolist()
        c.box((x, z, turn), 0, high, chest, chest, c.pick(ANY))


def hills(c):
    sky, near = c.pick(ZENITH), c.pick(((0.1, 0.45), (0.4, 0.8), (0.25, 0.6)))
    c.field([[sky], [mix(sky, WHITE, 0.7)]], 0, 0.7)
    far, x = mix(c.pick(ANY), sky, 0.6), np.linspace(0, c.aspect, 40)
    for k in range(5):
        a, b, phase = c.rng.uniform((3, 7, 0), (6, 15, 6))
        y = 0.42 + 0.13 * k + 0.07 * np.sin(a * x + phase) + 0.02 * np.sin(b * x)
        c.draw([*zip(x, y, strict=True), (c.aspect, 1.1), (0, 1.1)], mix(far, near, k / 4))


def sea(c):
    low = c.pick(((0, 0.14), (0.4, 0.9), (0.8, 1)))
    x, r, edge = c.rng.uniform((0.2, 0.05, 0.4), (1.3, 0.14, 0.6)).tolist()
    c.field([[c.pick(ANY)], [low]], 0, edge)
    c.soft([disc(x, edge - r, 2.2 * r, 2.2 * r)], (255, 240, 200), 0.6, 0.06)
    c.oval(x, edge - 0.6 * r, r, r, (255, 230, 170))
    c.field([[mix(low, (10, 30, 60), 0.4)], [(10, 20, 50)]], edge)
    for y, shift, wide in c.rng.uniform((edge, -0.2, 0.2), (1, 0.2, 1), (60, 3)).tolist():
        c.oval(x + shift, y, wide * r, 0.014 * (y - edge), mix(low, (255, 240, 210), 0.5 * wide))


def glyphs(c):
    step, ink = c.rng.uniform(0.09, 0.22), mix(DARK, c.pick(ANY), 0.4)
    c.field([[mix(c.pick(ANY), WHITE, 0.8)]])
    for i, j in np.ndindex(int(c.aspect / step), int(0.7 / step)):
        strokes = c.rng.integers(0, 3, (4, 2)) * (0.33, 0.45) + (i + 0.3, 1.4 * j + 0.3)
        c.draw(strokes * step, ink, None, "line", width=round(0.14 * step * c.unit))


UNRELATED = {draw.__name__: draw for draw in (fruit, room, hills, sea, glyphs)}
UNRELATED["blend"] = lambda c: c.field(c.rng.uniform(0, 255, (3, 3, 3)))


def wild_image(seed, index, size=(64, 96)):
    """Return (image, kind) of the wild pool; no method may read the kind."""
    rng = np.random.default_rng([seed, STREAMS["pool"], index])
    kind = str(rng.choice(list(RELATED if rng.uniform() < 0.22 else UNRELATED)))
    c = Canvas(size, rng, RELATED.get(kind, PRIVATE))
    UNRELATED.get(kind, street)(c)
    return c.develop(0.12)[0], kind


def write_picture(root, seed, size, job):
    """Write picture i of a split, or of the pool, below root; return its kind."""
    split, i = job
    if split == "pool":
        image, kind = wild_image(seed, i, size)
        image.save(root / f"pool/{i:04d}.png", compress_level=1)        # noise hardly packs
        return kind
    image, label = street_scene(seed, split, i, size)
    image.save(root / f"{split}/images/{i:04d}.png", compress_level=1)
    label.save(root / f"{split}/labels/{i:04d}.png")
    return "private"


def write_scenes(root, seed=0, size=(64, 96), train=500, val=100, pool=1600):
    """Write all images as PNG below root, unless root/complete, written last of all, exists."""
    root = Path(root)
    if (root / "complete").exists():
        return
    for folder in ("train/images", "train/labels", "val/images", "val/labels", "pool"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    jobs = [(split, i) for split, count in (("train", train), ("val", val), ("pool", pool))
            for i in range(count)]
    with ProcessPoolExecutor() as processes:
        drawn = processes.map(partial(write_picture, root, seed, size), jobs, chunksize=8)
        kinds = list(progress(drawn, "drawing scenes", total=len(jobs)))
    rows = ["file,kind", *(f"{i:04d}.png,{kind}" for i, kind in enumerate(kinds[train + val:]))]
    (root / "pool_kinds.csv").write_text("\n".join(rows) + "\n", "utf-8", newline="\n")
    (root / "complete").touch()
