"""Procedurally drawn scenes: a labelled street world and an unlabelled wild pool.

Idea    A pinhole camera projects a street in metres, and each shape goes into image and label map
        by one call, so the labels are exact: the teacher's private world. Most of the wild pool
        shows no street; a minority does (toy town, high camera, night) with another palette,
        camera and mix. Ours throughout: an illustration, not evidence about photographs.
Use it  from support.scenes import CLASSES, PALETTE, street_scene, wild_image, write_scenes
Run it  python -m support.scenes    writes the contact sheet scenes.png in about a second.

Each picture depends on (seed, split or pool, index, size) alone. Lengths on the canvas are in image
heights, lengths in a scene in metres: X to the right, Y up, Z away from the camera.
"""
import colorsys
import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("sky", "building", "road", "pavement", "tree", "car", "person", "sign")
PALETTE = ((70, 130, 180), (88, 80, 84), (128, 64, 128), (244, 35, 232),
           (107, 142, 35), (0, 0, 190), (220, 20, 60), (240, 210, 0))
SKY, BUILDING, ROAD, PAVEMENT, TREE, CAR, PERSON, SIGN = range(8)
STREAMS = {"train": 0, "val": 1, "pool": 2}
SUPERSAMPLE = 3    # drawn this many times too large, then averaged: PIL draws hard edges
GRAIN = np.array((1.5, 3, 4, 3, 6, 2, 3, 2), np.float32)    # noise of each class, grey levels
ANY = ((0, 1), (0.1, 0.9), (0.3, 0.95))    # ranges of hue, saturation, value


class Style(NamedTuple):
    """What sets one street world apart; colours are ranges of (hue, saturation, value)."""
    height: tuple = (1.8, 2.2)       # of the camera, in metres
    horizon: tuple = (0.44, 0.52)    # in image heights from the top
    focal: tuple = (0.92, 1.02)      # in image heights
    zenith: tuple = ((0.56, 0.62), (0.25, 0.6), (0.68, 0.92))
    low_sky: tuple = ((0.07, 0.13), (0.03, 0.16), (0.86, 0.95))
    walls: tuple = ((0.01, 0.14), (0.08, 0.45), (0.62, 0.95))
    window: tuple = ((0.55, 0.62), (0.15, 0.4), (0.22, 0.5))
    asphalt: tuple = ((0.6, 0.7), (0.02, 0.07), (0.4, 0.5))
    slabs: tuple = ((0.07, 0.13), (0.03, 0.1), (0.52, 0.66))
    leaves: tuple = ((0.2, 0.32), (0.4, 0.65), (0.36, 0.52))
    paint: tuple = ((0, 1), (0.05, 0.85), (0.28, 0.92))    # of cars and clothes
    shadow: tuple = (24, 26, 44)     # at night this "shadow" is a pool of lamp light
    crowd: int = 5                   # persons, at most


PRIVATE = Style()
TOY = Style((2.4, 3.2), (0.3, 0.38), (0.75, 0.9), ((0.44, 0.54), (0.5, 0.8), (0.85, 1)),
            ((0.14, 0.17), (0.3, 0.5), (0.95, 1)), ((0, 1), (0.55, 0.9), (0.8, 1)),
            ((0.14, 0.17), (0.2, 0.5), (0.9, 1)), ((0.72, 0.8), (0.2, 0.35), (0.5, 0.65)),
            ((0.08, 0.14), (0.35, 0.55), (0.85, 0.95)), ((0.3, 0.42), (0.7, 0.9), (0.6, 0.85)),
            ((0, 1), (0.7, 1), (0.8, 1)), crowd=3)
HIGH = Style((7, 11), (0.06, 0.18), (0.85, 1), walls=((0.5, 0.62), (0.05, 0.3), (0.5, 0.8)),
             asphalt=((0.05, 0.1), (0.05, 0.15), (0.5, 0.6)), crowd=8,
             slabs=((0.22, 0.3), (0.15, 0.35), (0.45, 0.6)))
NIGHT = Style((1.2, 1.5), (0.48, 0.56), (1.05, 1.2), ((0.6, 0.7), (0.5, 0.8), (0.06, 0.16)),
              ((0.6, 0.8), (0.4, 0.6), (0.2, 0.34)), ((0.58, 0.75), (0.2, 0.5), (0.12, 0.26)),
              ((0.1, 0.15), (0.4, 0.7), (0.15, 1)), ((0.6, 0.7), (0.2, 0.4), (0.1, 0.16)),
              ((0.6, 0.7), (0.15, 0.3), (0.18, 0.25)), ((0.35, 0.5), (0.4, 0.6), (0.1, 0.18)),
              ((0, 1), (0.3, 0.8), (0.15, 0.4)), (255, 180, 90), 2)


def pick(rng, ranges):
    hue, saturation, value = (rng.uniform(*r) for r in ranges)
    return tuple(int(255 * v) for v in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def mix(a, b, t):
    keep = 1 - t
    return int(a[0] * keep + b[0] * t), int(a[1] * keep + b[1] * t), int(a[2] * keep + b[2] * t)


def shade(colour, factor):
    return tuple([min(255, int(v * factor)) for v in colour])


def disc(x, y, rx, ry, corners=20):
    turns = [2 * math.pi * k / corners for k in range(corners)]
    return [(x + rx * math.cos(t), y + ry * math.sin(t)) for t in turns]


class Canvas:
    """Image, label map and camera; one call draws into both, so that they cannot drift apart."""

    def __init__(self, size):
        self.size, self.unit, self.aspect = size, SUPERSAMPLE * size[0], size[1] / size[0]
        large = (SUPERSAMPLE * size[1], SUPERSAMPLE * size[0])
        self.image, self.label = Image.new("RGB", large), Image.new("L", large)
        self.pens = ImageDraw.Draw(self.image), ImageDraw.Draw(self.label)

    def look(self, height, horizon, focal, haze, reach, shift=0.0, turn=0.0):
        """Set the camera; haze hides 63 % of a colour at a distance of reach metres."""
        self.height, self.horizon, self.focal, self.shift = height, horizon, focal, shift
        self.haze, self.reach, self.middle = haze, reach, self.aspect * (0.5 + turn)

    def at(self, x, y, z):
        scale = self.focal / (z if z > 0.4 else 0.4)    # never behind the camera
        return self.middle + (x - self.shift) * scale, self.horizon + (self.height - y) * scale

    def draw(self, points, colour, label=None, shape="polygon", **how):
        pixels = [(x * self.unit, y * self.unit) for x, y in points]
        getattr(self.pens[0], shape)(pixels, fill=colour, **how)
        if label is not None:    # a detail inside its own class need not be labelled again
            getattr(self.pens[1], shape)(pixels, fill=label, **how)

    def oval(self, x, y, rx, ry, colour, label=None):
        self.draw([(x - rx, y - ry), (x + rx, y + ry)], colour, label, "ellipse")

    def line(self, points, width, colour, label=None):
        self.draw(points, colour, label, "line", width=max(1, round(width * self.unit)))

    def face(self, corners, colour, label=None):
        """Draw a polygon given by (X, Y, Z) corners, behind the haze of its nearest corner."""
        far = 1 - math.exp(-max(0, min([p[2] for p in corners])) / self.reach)
        self.draw([self.at(*p) for p in corners], mix(colour, self.haze, far), label)

    def decal(self, quad, shape, colour, label=None):
        """Draw a shape on a quad; its points are fractions (right, up) of the quad's sides."""
        (ax, ay, az), (bx, by, bz), (cx, cy, cz), (dx, dy, dz) = quad
        corners = []
        for s, t in shape:
            a, b, c, d = (1 - s) * (1 - t), s * (1 - t), s * t, (1 - s) * t
            corners.append((a * ax + b * bx + c * cx + d * dx, a * ay + b * by + c * cy + d * dy,
                            a * az + b * bz + c * cz + d * dz))
        self.face(corners, colour, label)

    def visible(self, quad):
        """Say whether a face looks at the camera and is not beside the picture."""
        (ax, ay), (bx, by), _, (dx, dy) = (self.at(*p) for p in quad)
        return ((bx - ax) * (dy - ay) < (dx - ax) * (by - ay)
                and max(ax, bx, dx) > 0 and min(ax, bx, dx) < self.aspect)

    def soft(self, shapes, colour, strength, blur):
        """Lay a blurred, translucent colour over the shapes: shadows, clouds, light."""
        height, width = self.size
        mask = Image.new("L", (width, height))
        for shape in shapes:
            ImageDraw.Draw(mask).polygon([(x * height, y * height) for x, y in shape],
                                         fill=int(255 * strength))
        mask = mask.filter(ImageFilter.GaussianBlur(blur * height))
        self.image.paste(colour, mask=mask.resize(self.image.size, Image.BILINEAR))

    def field(self, values, top=0.0, bottom=1.0):
        """Stretch a small array (h, w, 3) of colours smoothly over the rows from top to bottom."""
        small = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
        rows = round(top * self.unit), round(bottom * self.unit)
        self.image.paste(small.resize((self.image.width, rows[1] - rows[0]), Image.BICUBIC),
                         (0, rows[0]))

    def develop(self, rng, grain, cast):
        """Average down, then add what the camera does: grain, vignette, colour cast."""
        height, width = self.size
        pixels = np.asarray(self.image.reduce(SUPERSAMPLE), np.float32)        # (H, W, 3)
        label = self.label.resize((width, height), Image.NEAREST)
        strength = GRAIN[np.asarray(label)] if grain is None else np.float32(grain)
        noise = rng.standard_normal((height, width), dtype=np.float32)         # (H, W)
        y, x = np.ogrid[-1:1:height * 1j, -1:1:width * 1j]
        vignette = (1 - 0.06 * (x * x + y * y)).astype(np.float32)
        gain = rng.uniform(1 - cast, 1 + cast, 3).astype(np.float32)
        pixels = (pixels + (strength * noise)[..., None]) * vignette[..., None] * gain
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), label


def ring(x, z, angle, back, front, half, y):
    """Return the four corners of a turned rectangle, left to right as seen from behind it."""
    sin, cos = math.sin(angle), math.cos(angle)
    return [(x + u * sin + v * cos, y, z + u * cos - v * sin)
            for u, v in ((back, -half), (back, half), (front, half), (front, -half))]


def box(x, z, angle, back, front, half, low, high, inset=(0.0, 0.0, 0.0)):
    """Return faces rear, right, front, left, top; the top is inset at back, front and sides."""
    base = ring(x, z, angle, back, front, half, low)
    top = ring(x, z, angle, back + inset[0], front - inset[1], half - inset[2], high)
    return [*((base[i], base[(i + 1) % 4], top[(i + 1) % 4], top[i]) for i in range(4)), top]


def rect(left, right, low, high):
    return (left, low), (right, low), (right, high), (left, high)


def car(c, rng, style, x, z, angle=0.0):
    """Draw a hull with lamps and wheels, then a cabin with windows: both are convex boxes."""
    paint, glass, dark = pick(rng, style.paint), pick(rng, style.window), (26, 26, 30)
    length, half, belt = rng.uniform((1.9, 0.86, 0.85), (2.2, 0.95, 0.98)).tolist()
    nose, high = ((0.3, 0.58), (0.75, 0.95))[rng.uniform() < 0.2]    # a saloon or a van
    end = ((rect(0, 1, -0.08, 0.26), shade(paint, 0.45)),
           (rect(0.36, 0.64, 0.3, 0.5), (226, 226, 214)),
           (rect(0.05, 0.21, -0.5, -0.05), dark), (rect(0.79, 0.95, -0.5, -0.05), dark))
    rear, front = (((rect(0.03, 0.23, 0.5, 0.82), lamp), (rect(0.77, 0.97, 0.5, 0.82), lamp), *end)
                   for lamp in ((235, 36, 30), (255, 250, 220)))
    wheels = [(disc(axle, 0.02, size, 6.4 * size, 14), colour) for axle in (0.19, 0.81)
              for size, colour in ((0.085, dark), (0.045, (168, 170, 176)))]
    screen = [(rect(0.09, 0.91, 0.16, 0.86), glass)]
    panes = [(rect(left, left + 0.41, 0.14, 0.84), glass) for left in (0.07, 0.53)]
    hull = box(x, z, angle, -length, length, half, 0.3, belt, (0.05, 0.1, 0.04))
    cabin = box(x, z, angle, -0.95 * length, nose * length, half - 0.06, belt, belt + high,
                (0.4, 0.5, 0.16))
    parts = (rear, wheels, front, wheels, (), screen, panes, screen, panes, ())
    for face, light, details in zip(hull + cabin, 2 * (0.82, 0.95, 0.82, 0.95, 1.14), parts,
                                    strict=True):
        if c.visible(face):
            c.face(face, shade(paint, light), CAR)
            for shape, colour in details:
                c.decal(face, shape, colour, CAR)


def tree(c, rng, style, x, z):
    """Draw a trunk and three layers of leaves, each lighter, smaller and nearer to the light."""
    height, radius = rng.uniform(3.4, 5.2), rng.uniform(1.3, 2.0) * c.focal / z
    leaf = mix(pick(rng, style.leaves), c.haze, 1 - math.exp(-z / c.reach))
    c.face([(x - 0.2, 0, z), (x + 0.2, 0, z), (x + 0.12, height, z), (x - 0.12, height, z)],
           mix(shade(leaf, 0.6), (70, 48, 34), 0.7), TREE)
    mx, my = c.at(x, height, z)
    for count, size, tone in ((7, 0.48, 0.62), (9, 0.32, 0.92), (11, 0.19, 1.2)):
        rise = 0.22 * (tone - 0.62) * radius
        count = int(count * min(1, 5 * radius)) + 2    # a small crown needs fewer leaves
        for turn, far, swell in rng.uniform(size=(count, 3)).tolist():
            turn, far = 2 * math.pi * turn, 0.72 * radius * math.sqrt(far)
            blob = size * radius * (0.75 + 0.5 * swell)
            c.oval(mx + far * math.cos(turn) - rise, my + far * math.sin(turn) - rise,
                   blob, 0.85 * blob, shade(leaf, tone * (0.92 + 0.16 * swell)), TREE)


def person(c, rng, style, x, z):
    size, wide, step = rng.uniform((1.7, 0.25, 0), (2, 0.33, 0.8)).tolist()
    coat, legs = pick(rng, style.paint), pick(rng, style.paint)
    skin, hair = (pick(rng, ((0.07, 0.08), (0.3, 0.6), v)) for v in ((0.4, 0.95), (0.1, 0.5)))
    for shape, colour in (
            (((-0.6, 0.5), (0, 0.5), (-0.1 - step, 0), (-0.7 - step, 0)), shade(legs, 0.6)),
            (((0, 0.5), (0.6, 0.5), (0.7 + step, 0), (0.1 + step, 0)), shade(legs, 0.75)),
            (rect(-1.3, 1.3, 0.47, 0.8), shade(coat, 0.75)),    # arms
            (((-.8, .45), (.8, .45), (1.1, .83), (.7, .86), (-.7, .86), (-1.1, .83)), coat),
            (disc(0, 0.94, 0.6, 0.1, 12), hair), (disc(0.1, 0.92, 0.48, 0.08, 12), skin)):
        c.face([(x + wide * a, size * b, z) for a, b in shape], colour, PERSON)


def sign(c, rng, style, x, z):
    """Draw a pole with a round, three-cornered or square plate, or with a traffic light."""
    high, kind, lit = rng.uniform(2.2, 2.9), rng.integers(4), rng.integers(3)
    red, white = (206, 30, 36), (238, 238, 234)
    plates = (
        ((disc(0, 0, 1, 1), red), (disc(0, 0, 0.65, 0.65), white), (rect(-.4, .4, -.15, .15), red)),
        ((((-1.1, -.6), (1.1, -.6), (0, 1.2)), red), (((-.6, -.35), (.6, -.35), (0, .6)), white)),
        ((rect(-1, 1, -1, 1), (30, 84, 180)), (((-0.6, -0.5), (0.6, -0.5), (0, 0.7)), white)),
        ((rect(-0.7, 0.7, -1.5, 1.5), (34, 36, 38)), *(
            (disc(0, 0.95 - 0.95 * k, 0.38, 0.38), shade(lamp, 1 if k == lit else 0.3))
            for k, lamp in enumerate(((255, 60, 40), (255, 190, 40), (70, 240, 120))))))
    for shape, colour in ((rect(-0.15, 0.15, -high / 0.48, 0), (120, 122, 126)), *plates[kind]):
        c.face([(x + 0.48 * a, high + 0.48 * b, z) for a, b in shape], colour, SIGN)


def house(c, rng, style, x, z, length, height, tone):
    """Draw a block with a ground floor of doors, rows of windows and, perhaps, a pitched roof."""
    wall, dim, lit = pick(rng, style.walls), pick(rng, style.window), pick(rng, style.window)
    columns, levels, ground = round(0.8 * length), round((height - 3.2) / 2.9), 3.2 / height
    roof = box(x, z, 0, -length, length, 6.3, height, height + 2, (0.3, 0.3, 6))
    for face in filter(c.visible, roof if rng.uniform() < 0.6 else ()):
        c.face(face, mix(shade(wall, 0.6), (90, 50, 40), 0.4), BUILDING)
    for side, face in enumerate(box(x, z, 0, -length, length, 6, 0, height)):
        if not c.visible(face):
            continue
        light = tone if side % 2 else 0.86
        c.face(face, shade(wall, light), BUILDING)
        if side % 2 == 0 or z > 26 + length:    # behind the neighbour, or too small to see
            continue
        c.decal(face, rect(0, 1, 0, ground), shade(wall, 0.6 * light))
        for i in range(columns):
            door, *glow = rng.uniform(size=levels + 1).tolist()
            right = (i + 0.5 + 0.35 * door) / columns
            c.decal(face, rect((i + 0.15) / columns, right, 0, 0.8 * ground), dim)
            for j in range(levels):
                low, rise = ground + (1 - ground) * (j + 0.2) / levels, 0.55 * (1 - ground) / levels
                c.decal(face, rect((i + 0.26) / columns, (i + 0.74) / columns, low, low + rise),
                        mix(dim, lit, glow[j]))


def floor(c, left, right, colour, label, near=1.5, far=400):
    """Draw a strip of ground in short pieces, because haze is constant within one piece."""
    while near < far:
        end = min(2 * near + 3, far)
        c.face([(left, 0, near), (right, 0, near), (right, 0, end), (left, 0, end)], colour, label)
        near = end


def backdrop(c, rng, style):
    """Choose the camera; draw the sky, its clouds and, far away, houses and woods in the haze."""
    low = pick(rng, style.low_sky)
    camera = (rng.uniform(*r) for r in (style.height, style.horizon, style.focal))
    c.look(*camera, low, *rng.uniform((90, 0, -0.12), (160, 3, 0.12)).tolist())
    c.field([[pick(rng, style.zenith)], [low]], 0, c.horizon + 0.02)
    c.soft([disc(x * c.aspect, c.horizon * y, 0.1 + 0.3 * w, 0.02 + 0.03 * w)
            for x, y, w in rng.uniform(size=(5, 3))], shade(low, 1.08), 0.6, 0.04)
    for x, high, kind in rng.uniform((-90, 5, 0), (90, 15, 1), (24, 3)).tolist():
        ranges, label = (style.walls, BUILDING) if kind < 0.5 else (style.leaves, TREE)
        c.face([(x - 7, 0, 150), (x + 7, 0, 150), (x + 6, high, 150), (x - 6, high, 150)],
               pick(rng, ranges), label)


def houses(rng, edge, sun):
    """Return two rows of houses, with a tree in some gaps, as (z, draw, x, ...)."""
    rows = []
    for side in (-1, 1):
        z = rng.uniform(2, 4)
        while z < 75:
            length, height, gap = rng.uniform((3.5, 5.5, 0), (7, 11, 1)).tolist()
            if gap < 0.2:
                rows.append((z + 3, tree, side * (edge + 3)))
                z += 4 + 15 * gap
            light = 0.74 if side == sun else 1.08
            rows.append((z + length, house, side * (edge + 6), length, height, light))
            z += 2 * length
    return rows


def traffic(c, rng, style, half):
    """Return cars, trees, persons and signs as (z, draw, x, angle), all inside the picture."""
    things = []
    def put(thing, x, low, high, *angle):
        z = max(rng.uniform(low, high), 2.3 * c.focal / c.aspect * abs(x - c.shift))
        things.append((z, thing, x, *angle))
    for side, heading in ((-1, math.pi), (1, 0)):
        for k in range(rng.integers(0, 3)):
            put(car, side * (half - 1.05), 8 + 6 * k, 10 + 6 * k, heading)
        for k in range(rng.integers(1, 4)):
            put(tree, side * (half + 1.2), 8 + 9 * k, 15 + 9 * k)
        if rng.uniform() < 0.6:
            put(car, side * half * 0.27, 7, 20, heading)
    if rng.uniform() < 0.25:    # one comes out of a side street
        put(car, rng.uniform(-3, 3), 9, 13, rng.choice((-1, 1)) * rng.uniform(1.3, 1.7))
    for _ in range(rng.integers(style.crowd // 2, style.crowd + 1)):
        aside = rng.choice((-1, 1)) * (half + rng.uniform(0.4, 2.2))
        put(person, aside if rng.uniform() < 0.7 else rng.uniform(-half, half), 5.5, 10)
    for _ in range(rng.integers(1, 4)):
        put(sign, rng.choice((-1, 1)) * (half + 0.35), 5.5, 9)
    return things


def street(c, rng, style=PRIVATE):
    """Draw, far to near: sky, ground, two rows of houses, shadows, and all that stands about."""
    half, walk, sun = rng.uniform(3.9, 4.6), rng.uniform(2.8, 3.8), rng.choice((-1, 1))
    backdrop(c, rng, style)
    edge, slabs, white = half + walk, pick(rng, style.slabs), (218, 218, 210)
    floor(c, -200, 200, slabs, PAVEMENT)
    for z in range(4, 30, 2):    # joints between the slabs; the road covers their middle
        floor(c, -edge, edge, shade(slabs, 0.86), None, z, z + 0.12)
    floor(c, -half - 0.16, half + 0.16, shade(slabs, 1.18), PAVEMENT)
    floor(c, -half, half, pick(rng, style.asphalt), ROAD)
    for z in range(2, 60, 5):
        floor(c, -0.08, 0.08, white, None, z, z + 2.6)
    zebra = rng.uniform(6, 18)
    for x in range(-3, 4) if zebra < 11 else ():
        floor(c, x - 0.27, x + 0.27, white, None, zebra, zebra + 2.6)
    for z, thing, x, *more in sorted(houses(rng, edge, sun), key=lambda t: -t[0]):
        thing(c, rng, style, x, z, *more)
    tip = edge - rng.uniform(0.5, 4)    # of the shadow that the houses throw
    shapes = [[c.at(sun * x, 0, z) for x, z in ((edge, 2), (tip, 2), (tip, 90), (edge, 90))]]
    things = sorted(traffic(c, rng, style, half), key=lambda t: -t[0])
    for z, thing, x, *angle in things:
        length, wide = {car: (2.3, 1.1), tree: (1.7, 1.7)}.get(thing, (0.3, 0.8))
        corners = ring(x - 0.35 * sun * wide, z, sum(angle), -length, length, wide, 0)
        shapes.append([c.at(*p) for p in corners])
    c.soft(shapes, style.shadow, 0.45, 0.008)
    for z, thing, x, *angle in things:
        thing(c, rng, style, x, z, *angle)


def street_scene(seed, split, index, size=(64, 96)):
    """Return (image, label) of the private world: PIL "RGB" and "L" with values 0..7."""
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", not {split!r}')
    rng = np.random.default_rng([seed, STREAMS[split], index])
    c = Canvas(size)
    street(c, rng)
    return c.develop(rng, None, 0.04)


def ball(c, x, y, r, colour):
    """Draw a lit sphere as discs that shrink towards the light."""
    for k in range(9):
        c.oval(x - 0.04 * k * r, y - 0.045 * k * r, r * (1 - 0.1 * k), r * (1 - 0.1 * k),
               shade(colour, 0.5 + 0.1 * k))


def fruit(c, rng):
    edge, colour = rng.uniform(0.35, 0.55), pick(rng, ((0, 0.4), (0.6, 0.95), (0.6, 0.95)))
    wood = pick(rng, ((0.03, 0.14), (0.2, 0.7), (0.4, 0.9)))
    c.field([[pick(rng, ANY)]], 0, edge)
    c.field([[shade(wood, 0.6)], [wood]], edge)
    for y, x, r in sorted(rng.uniform((edge, 0.1, 0.1), (0.8, 1.4, 0.22), (5, 3)).tolist()):
        c.soft([disc(x + 0.3 * r, y + 0.8 * r, 1.1 * r, 0.35 * r)], (20, 10, 10), 0.6, 0.02)
        ball(c, x, y, r, shade(colour, rng.uniform(0.7, 1.1)))


def flowers(c, rng):
    c.field(rng.uniform((10, 50, 10), (90, 170, 80), (4, 6, 3)))
    colour, petals = pick(rng, ((0.75, 1.2), (0.3, 0.9), (0.8, 1))), rng.integers(5, 12)
    for y, x, r in sorted(rng.uniform((0.1, 0, 0.1), (0.8, 1.5, 0.26), (5, 3)).tolist()):
        c.line([(x, y), (x + 0.1, 1.1)], 0.025, (40, 110, 40))
        for k, (px, py) in enumerate(disc(x, y, 0.62 * r, 0.62 * r, petals)):
            c.oval(px, py, 0.36 * r, 0.36 * r, shade(colour, 0.75 + 0.3 * (k % 2)))
        ball(c, x, y, 0.38 * r, (240, 190, 40))


def room(c, rng):
    wall, rug, wood = pick(rng, ANY), pick(rng, ANY), pick(rng, ((0, 0.1), (0.4, 0.7), (0.3, 0.7)))
    c.look(1.5, rng.uniform(0.4, 0.5), 0.8, wall, 1e9, rng.uniform(-0.8, 0.8))
    c.field([[shade(wall, 1.1)]])
    floor(c, -2.5, 2.5, wood, None, 1, 5)
    for x in (-2.5, 2.5):
        c.face([(x, 0, 1), (x, 0, 5), (x, 2.8, 5), (x, 2.8, 1)], shade(wall, 0.88 + 0.04 * x))
    c.face([(-2.5, 0, 5), (2.5, 0, 5), (2.5, 2.8, 5), (-2.5, 2.8, 5)], wall)
    for x in rng.uniform(-2, 0.3) + np.array((0, 1.1)):    # a window with two wings
        c.face([(x, 1.1, 5), (x + 1, 1.1, 5), (x + 1, 2.4, 5), (x, 2.4, 5)], (190, 220, 245))
    c.face(ring(0, 3.2, rng.uniform(-0.3, 0.3), -0.8, 0.8, 1.2, 0), rug)
    for z, x, high, turn in sorted(rng.uniform((-4.6, -2, 0.4, 0), (-2.4, 2, 1.5, 6), (4, 4))
                                   .tolist()):
        paint = pick(rng, ANY)
        for side, face in enumerate(box(x, -z, turn, -0.5, 0.5, 0.4, 0, high)):
            if c.visible(face):
                c.face(face, shade(paint, (0.7, 0.85, 0.95, 0.6, 1.15)[side]))


def hills(c, rng):
    sky, far = pick(rng, ((0.5, 0.65), (0.2, 0.6), (0.7, 1))), pick(rng, ANY)
    c.field([[sky], [mix(sky, (255, 240, 220), 0.7)]], 0, 0.7)
    near = pick(rng, ((0.1, 0.45), (0.4, 0.8), (0.25, 0.6)))
    for k in range(5):
        a, b, phase = rng.uniform((3, 7, 0), (6, 15, 6))
        line = [(x / 20, 0.42 + 0.13 * k + 0.07 * math.sin(a * x / 20 + phase)
                 + 0.02 * math.sin(b * x / 20)) for x in range(36)]
        c.draw([*line, (1.8, 1.1), (0, 1.1)], mix(mix(far, sky, 0.6), near, k / 4))


def sea(c, rng):
    low = pick(rng, ((0, 0.14), (0.4, 0.9), (0.8, 1)))
    x, r, edge = rng.uniform((0.2, 0.05, 0.4), (1.3, 0.14, 0.6)).tolist()
    c.field([[pick(rng, ANY)], [low]], 0, edge)
    c.soft([disc(x, edge - r, 2.2 * r, 2.2 * r)], (255, 240, 200), 0.6, 0.06)
    ball(c, x, edge - 0.6 * r, r, (255, 220, 150))
    c.field([[mix(low, (10, 30, 60), 0.4)], [(10, 20, 50)]], edge)
    for y, shift, wide in rng.uniform((edge, -0.2, 0.2), (1, 0.2, 1), (60, 3)).tolist():
        c.line([(x + shift - wide * r, y), (x + shift + wide * r, y)], 0.02 * (y - edge),
               mix(low, (255, 240, 210), 0.5 * wide))


def glyphs(c, rng):
    paper, ink = pick(rng, ((0, 1), (0, 0.2), (0.8, 1))), pick(rng, ((0, 1), (0, 0.9), (0, 0.35)))
    step = rng.uniform(0.09, 0.22)
    c.field([[paper], [shade(paper, 0.9)]])
    for x in np.arange(0.06, c.aspect - step, step):
        for y in np.arange(0.06, 1 - step, 1.4 * step):
            if rng.uniform() < 0.85:
                strokes = rng.integers(0, 3, (4, 2)) * step * (0.33, 0.45) + (x, y)
                c.line([tuple(p) for p in strokes], 0.14 * step, ink)


def stripes(c, rng):
    """Draw bars or, half of the time, squares, in two or three colours, turned by any angle."""
    inks, squares = [pick(rng, ANY) for _ in range(3)], rng.integers(2)
    turn, step = rng.uniform((0, 0.06), (3.1, 0.25)).tolist()
    count = int(1.3 / step)
    for i, j in np.ndindex(2 * count, 2 * count):
        corners = ring(0.75, 0.5, turn, (j - count) * step, (j - count + 1) * step, 0.5 * step, 0)
        x, y = (i - count) * step * math.cos(turn), (count - i) * step * math.sin(turn)
        c.draw([(x + a, y + b) for a, _, b in corners], inks[(i + j * squares) % (3 - squares)])


UNRELATED = {
    "fruit": fruit, "flowers": flowers, "room": room, "hills": hills, "sea": sea, "glyphs": glyphs,
    "stripes": stripes, "blend": lambda c, rng: c.field(rng.uniform(0, 255, (3, 3, 3))),
    "cloud": lambda c, rng: c.field(rng.uniform(0.3, 1, (18, 27, 1)) * pick(rng, ANY))}
RELATED = {name: lambda c, rng, style=style: street(c, rng, style) for name, style in
           (("toy_street", TOY), ("street_high", HIGH), ("night", NIGHT))}


def wild_image(seed, index, size=(64, 96)):
    """Return (image, kind) of the wild pool; no method may read the kind."""
    rng = np.random.default_rng([seed, STREAMS["pool"], index])
    world = RELATED if rng.uniform() < 0.22 else UNRELATED
    kind = str(rng.choice(list(world)))
    c = Canvas(size)
    world[kind](c, rng)
    return c.develop(rng, rng.uniform(1, 4), 0.12)[0], kind


def write_scenes(root, seed=0, size=(64, 96), train=600, val=150, pool=2000,
                 progress=lambda it: it):
    """Write all images as PNG below root, and last of all the empty file root/complete.

    Where that file exists already, nothing is written, whatever the other arguments say.
    """
    root = Path(root)
    if (root / "complete").exists():
        return
    for folder in ("train/images", "train/labels", "val/images", "val/labels", "pool"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    jobs = [(split, i) for split, count in (("train", train), ("val", val), ("pool", pool))
            for i in range(count)]
    kinds = []
    for split, i in progress(jobs):
        name = f"{i:04d}.png"
        if split == "pool":
            image, kind = wild_image(seed, i, size)
            image.save(root / split / name, compress_level=1)    # noise hardly packs
            kinds.append((name, kind))
        else:
            image, label = street_scene(seed, split, i, size)
            image.save(root / split / "images" / name, compress_level=1)
            label.save(root / split / "labels" / name)
    with open(root / "pool_kinds.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("file", "kind"), *kinds])
    (root / "complete").touch()


if __name__ == "__main__":
    pairs = [street_scene(0, "train", i, (128, 192)) for i in range(6)]
    for _, drawn in pairs:
        drawn.putpalette(sum(PALETTE, ()))
    tiles = [*(pair[0] for pair in pairs), *(pair[1].convert("RGB") for pair in pairs),
             *(wild_image(0, i, (128, 192))[0] for i in range(24))]
    sheet = Image.new("RGB", (6 * 196, 6 * 132), "white")
    for k, tile in enumerate(tiles):
        sheet.paste(tile, (k % 6 * 196 + 2, k // 6 * 132 + 2))
    sheet.save("scenes.png")
    print("scenes.png: 6 private scenes, their labels below, then 24 pictures of the wild pool")
