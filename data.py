"""Images in, tensors out: the unlabelled pool, the labelled data sets, and stateless batches.

Idea
    Batch t of a run is a pure function of (seed, t): which images, which crops, which jitter. A run
    then resumes from its step alone, the number of loader workers cannot change a result, and two
    methods that differ only in their images are paired crop by crop.

Symbols
    B images of a batch, K classes, H W pixels, N images.

Use it
    from data import Batches, Pool, open_labelled
    batches = Batches(files, size=(96, 128), batch_size=16, seed=0)
    images, slots = batches[t]                # (B, 3, H, W) float in [0, 1], (B,) indices of files
"""

import csv
import hashlib
import os
import signal
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

import scenes
from alignment import apply_colours

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}
IGNORE = 255
CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
          "pedestrian", "bicyclist")
VOC = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
       "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
       "train", "tvmonitor")
CITYSCAPES = tuple(c.name for c in torchvision.datasets.Cityscapes.classes
                   if c.train_id not in (-1, 255))
VOID = "void"                                            # the name of a value that is ignored
# For each data set its class names (None: see list_folder) and the size it is used at.
DATASETS = {"scenes": (scenes.CLASSES, (64, 96)), "camvid": (CAMVID, (360, 480)),
            "voc": (VOC, (512, 512)), "cityscapes": (CITYSCAPES, (512, 1024)),
            "folder": (None, (256, 256)), "none": (None, (256, 256))}
HINTS = {"folder": "; line k + 1 of a classes.txt in --data-root names the value k, 'void' one to "
                   "ignore, for labels that count from 1 or have another void than 255",
         "cityscapes": "; if these are train ids, name the files *_gtFine_labelTrainIds.png"}


# ---------------------------------------------------------------- files and single images

def find_images(folder):
    """Return the image files anywhere below a folder, sorted. Links to folders are not followed.

    Instead of a folder: a CSV whose first column is `file`, such as a run's chosen.csv; its files
    are returned in its order. Raises FileNotFoundError if there is no such folder or no image in
    it, or if a listed file is missing; ValueError if the CSV has no such column.
    """
    if str(folder).lower().endswith(".csv") and Path(folder).is_file():
        return listed_images(folder)
    if not folder or not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; expected a folder of images")
    found = sorted(Path(root) / name for root, _, names in os.walk(folder) for name in names
                   if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."))
    if not found:
        raise FileNotFoundError(f"no image below {folder}; expected files that end in "
                                f"{', '.join(sorted(IMAGE_SUFFIXES))}")
    return found


def listed_images(path):
    """Return the files that the first column, `file`, of a CSV lists; see `find_images`."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2 or rows[0][0] != "file":
        raise ValueError(f"{path} lists no images; expected a CSV whose first column is headed "
                         "'file', such as a run's chosen.csv")
    for name, *_ in rows[1:]:
        if not Path(name).is_file():
            raise FileNotFoundError(f"{path} lists {name}, which is not there; a relative path "
                                    "counts from the working folder")
    return [Path(name) for name, *_ in rows[1:]]


def load_image(path, at_least=None):
    """Return a file as an upright RGB picture; ValueError names the path if it cannot be read.

    at_least: (H, W) that will do; a large JPEG is then decoded at a fraction of its size.
    """
    try:
        # Pillow warns of large and of odd pictures, which would be a flood over a wild pool.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if at_least is not None:
                # Twice the target keeps the later reduction antialiased. Orientation is not
                # applied yet, so ask for the longer side both ways.
                image.draft("RGB", (2 * max(at_least), 2 * max(at_least)))
            ImageOps.exif_transpose(image, in_place=True)           # a copy of a large one is dear
            if image.mode.startswith("I;16"):       # convert("RGB") would clip 16 bits to white
                image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:                      # decoders raise nearly anything on bad input
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def view(image, size, scale=1.0, u=0.5, v=0.5, resample=Image.BILINEAR):
    """Return a crop of a PIL picture with the shape of `size` = (H, W), resized to it.

    At scale 1 the crop is as large as fits, at scale 2 half that on each side. u, v in [0, 1] place
    it: 0 left or top, 1 right or bottom. The default is the view in which pool images are scored.
    """
    H, W = size
    shrink = min(image.width / W, image.height / H) / scale
    # Rounding may carry W * (width / W) past the width, and Pillow refuses such a box.
    w, h = min(W * shrink, image.width), min(H * shrink, image.height)
    x, y = u * (image.width - w), v * (image.height - h)
    return image.resize((W, H), resample, box=(x, y, x + w, y + h))


def whole_view(image, size, resample=Image.BILINEAR):
    """Return the whole picture, its shape kept, at the scale at which it just covers `size`."""
    scale = max(size[0] / image.height, size[1] / image.width)
    return image.resize((round(image.width * scale), round(image.height * scale)), resample)


def to_tensor(image):
    """Return a PIL picture as uint8: (3, H, W) for RGB, (H, W) for an index mask."""
    array = torch.from_numpy(np.array(image))
    return array.permute(2, 0, 1).contiguous() if array.dim() == 3 else array


def hold_out(files):
    """Return (files to learn from, files to measure agreement on): every twentieth, at most 200."""
    step = max(20, -(-len(files) // 200))
    if len(files) < step:
        raise ValueError(f"the pool has {len(files)} images; --dataset none needs at least {step}, "
                         "because it holds some out to measure agreement on")
    return [f for i, f in enumerate(files) if i % step], files[::step]


def leave_out(files, others):
    """Return (the files that are none of the others by content, the rest as lines of skipped.csv).

    Only files whose sizes agree are read. One that cannot be read stays: the scan will name it.
    """
    def each(read, paths):
        found = {}
        for path in paths:
            with suppress(OSError):
                found[path] = read(path)
        return found

    def digest(path):
        return hashlib.sha256(Path(path).read_bytes()).digest()

    sizes = set(each(os.path.getsize, others).values())
    alike = [path for path, size in each(os.path.getsize, files).items() if size in sizes]
    known = {key: path for path, key in each(digest, others if alike else []).items()}
    twins = {path: known[key] for path, key in each(digest, alike).items() if key in known}
    return ([path for path in files if path not in twins],
            [f"{path}: the same image as {other}, which is evaluated on"
             for path, other in twins.items()])


class Pool(Dataset):
    """Item i is (centre view of file i, uint8 (3, H, W), ""), or (zeros, why it cannot be read)."""

    def __init__(self, files, size):
        self.files, self.size = files, tuple(size)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        try:
            return to_tensor(view(load_image(self.files[index], self.size), self.size)), ""
        except ValueError as error:
            return torch.zeros(3, *self.size, dtype=torch.uint8), str(error)


# ---------------------------------------------------------------- labelled data sets

class Labelled(Dataset):
    """Item i is (whole image at working scale, uint8 (3, h, w); label at its own size, (H, W)).

    table: (256,) from a value in the file to a class, to IGNORE, or to -1 where it must not occur;
    hint: what to do then. resize_labels: labels are reduced to the working scale, too (nearest).
    """

    def __init__(self, images, labels, table, class_names, size, hint="", resize_labels=False):
        self.images, self.labels, self.table, self.hint = images, labels, table, hint
        self.class_names, self.size = list(class_names), tuple(size)
        self.resize_labels = resize_labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, mask = load_image(self.images[index]), load_mask(self.labels[index])
        if image.size != mask.size:
            raise ValueError(f"{self.labels[index]} is {mask.width}x{mask.height} but its image is "
                             f"{image.width}x{image.height}; they must have the same size")
        if self.resize_labels:
            mask = whole_view(mask, self.size, Image.NEAREST)
        return to_tensor(whole_view(image, self.size)), self.classes(mask, self.labels[index])

    def classes(self, mask, path):
        """Return the classes of an index mask, int64 (H, W)."""
        target = self.table[to_tensor(mask).long()]
        if (target < 0).any():
            bad = sorted(set(np.asarray(mask)[(target < 0).numpy()].tolist()))
            raise ValueError(f"{path} holds the label values {bad[:8]}, which are none of the "
                             f"{len(self.class_names)} classes nor void{self.hint}")
        return target


def load_mask(path):
    """Return an index mask, one number a pixel. Raises ValueError for an RGB or a broken mask."""
    try:
        with Image.open(path) as mask:
            mode, indices = mask.mode, np.asarray(mask)             # the indices, not the colours
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if mode not in ("L", "P", "1"):
        raise ValueError(f"{path} is a {mode} picture; expected an index mask with one class "
                         "number a pixel (8-bit greyscale or palette)")
    return Image.fromarray(indices.astype(np.uint8))


def open_labelled(dataset, root, split, size, num_classes=None, download=False,
                  resize_labels=False):
    """Return a data set as `Labelled`: scenes, camvid, voc, cityscapes or folder.

    root: for camvid a folder with <split>/ and <split>annot/; for voc and cityscapes the trees of
    their archives; for scenes and folder <split>/images and <split>/labels, or images and labels.
    split: "val", or "train:0001TP,0016E5" to keep files whose names begin so (CamVid's sequences).
    Raises FileNotFoundError or ValueError with what was expected.
    """
    if not root or not (download or Path(root).is_dir()):
        raise FileNotFoundError(f"there is no folder {root}; --data-root must name the {dataset} "
                                "data (README, 'Data layouts')")
    part, _, sequences = split.partition(":")
    images, labels, values = LISTINGS[dataset](Path(root), part, download)
    values = (values or DATASETS[dataset][0]                               # names of 0, 1, ...
              or [f"class {k}" for k in range(num_classes or 0)])
    names = [name for name in dict.fromkeys(values) if name != VOID]
    if not names or num_classes not in (None, len(names)):
        raise ValueError(f"{dataset} has {len(names) or 'an unknown number of'} classes, but "
                         f"{num_classes} were expected; --num-classes or a classes.txt tells, and "
                         "the teacher's must be the same")
    keep = [i for i, path in enumerate(images) if path.name.startswith(tuple(sequences.split(",")))]
    if not keep:
        raise ValueError(f"{root} has no image in split {split!r}")
    images, labels = [images[i] for i in keep], [labels[i] for i in keep]
    absent = [path for path in images + labels if not path.is_file()]
    if absent:                                          # better now than after hours of training
        raise FileNotFoundError(f"{len(absent)} files of {dataset}, split {split!r}, are missing; "
                                f"the first is {absent[0]}")
    table = torch.full((256,), -1)
    # Official labelIds know no 255: a file with one holds train ids under a wrong name.
    table[IGNORE] = -1 if dataset == "cityscapes" and VOID in values else IGNORE
    for value, name in enumerate(values):
        table[value] = IGNORE if name == VOID else names.index(name)
    return Labelled(images, labels, table, names, size, HINTS.get(dataset, ""), resize_labels)


def paired(images, labels):
    """Return the files of two folders, paired by relative path without suffix.

    Raises ValueError that names an image without a label.
    """
    files = find_images(images)
    by_name = {path.relative_to(labels).with_suffix(""): path for path in find_images(labels)}
    names = [path.relative_to(images).with_suffix("") for path in files]
    alone = [path for path, name in zip(files, names, strict=True) if name not in by_name]
    if alone:
        raise ValueError(f"{len(alone)} images have no label, the first is {alone[0]}; expected a "
                         f"file of the same name below {labels}")
    return files, [by_name[name] for name in names]


def list_folder(root, part, download):
    """Return (images, labels, names of the label values 0, 1, ..., if a classes.txt tells them).

    A value named "void" or not at all is ignored, and values of one name are one class.
    """
    known = root / "classes.txt"
    lines = known.read_text().rstrip().splitlines() if known.is_file() else []
    root = root / part if (root / part).is_dir() else root
    return *paired(root / "images", root / "labels"), [line.strip() or VOID for line in lines]


def list_camvid(root, part, download):
    return *paired(root / part, root / f"{part}annot"), (*CAMVID, VOID)


def list_voc(root, part, download):
    """Return (images, labels, names) of train, val, trainval, or trainaug where it was added.

    trainaug.txt holds names, or "/JPEGImages/A.jpg /SegmentationClassAug/A.png" a line.
    """
    voc = root / "VOCdevkit" / "VOC2012"
    listing = voc / "ImageSets" / "Segmentation" / f"{part}.txt"

    def files():
        lines = [line.split() for line in listing.read_text().splitlines() if line.strip()]
        masks = "SegmentationClassAug" if "aug" in part else "SegmentationClass"
        lines = [line if len(line) == 2 else (f"JPEGImages/{line[0]}.jpg", f"{masks}/{line[0]}.png")
                 for line in lines]
        return [[voc / line[i].lstrip("/") for line in lines] for i in (0, 1)]

    # torchvision would extract the archive again on every run.
    if download and not (listing.is_file() and all(p.is_file() for p in sum(files(), []))):
        try:
            torchvision.datasets.VOCSegmentation(root, download=True)
        except RuntimeError as error:
            raise OSError(f"Pascal VOC could not be fetched to {root}: {error}") from error
    if not listing.is_file():
        raise FileNotFoundError(f"no Pascal VOC 2012 with the split {part!r} below {root}: there "
                                f"is no {listing}; --download fetches all but trainaug")
    return *files(), VOC


def list_cityscapes(root, part, download):
    """Return (images, labels, names): labelIds, or labelTrainIds where there is none of these."""
    images = [path for path in find_images(root / "leftImg8bit" / part)
              if path.stem.endswith("_leftImg8bit")]
    fine = root / "gtFine" / part
    kind = "labelIds" if any(fine.glob("*/*_gtFine_labelIds.png")) else "labelTrainIds"
    labels = [fine / path.parent.name / path.name.replace("leftImg8bit", f"gtFine_{kind}")
              for path in images]
    ids = [VOID if c.train_id == 255 else c.name
           for c in torchvision.datasets.Cityscapes.classes[:-1]]               # the last is id -1
    return images, labels, ids if kind == "labelIds" else CITYSCAPES


LISTINGS = {"scenes": list_folder, "folder": list_folder, "camvid": list_camvid, "voc": list_voc,
            "cityscapes": list_cityscapes}


def class_colours(class_names):
    """Return an RGB colour for each class: scenes' or Cityscapes' own, else Pascal VOC's map."""
    if tuple(class_names) == scenes.CLASSES:
        return scenes.PALETTE
    if tuple(class_names) == CITYSCAPES:
        return [c.color for c in torchvision.datasets.Cityscapes.classes if c.name in CITYSCAPES]
    # VOC spreads the bits of the class number over the high bits of red, green and blue.
    return [tuple(sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
                  for channel in range(3)) for k in range(len(class_names))]


def check_labels(data, most=2000):
    """Open a Labelled data set, at most about `most` pairs of it; ValueError names a bad one.

    Returns (pixels of each class and of void (K + 1,), number of labels of each (H, W)).
    """
    K = len(data.class_names)
    pixels, sizes = torch.zeros(K + 1, dtype=torch.int64), Counter()
    for i in tqdm(range(0, len(data), -(-len(data) // most)), desc="checking labels", leave=False):
        target = data[i][1]
        pixels += target.clamp(max=K).flatten().bincount(minlength=K + 1)
        sizes[tuple(target.shape)] += 1
    return pixels, sizes


def overlay(data, count=4):
    """Return `count` images of a Labelled data set, spread over it, with their labels over them."""
    colours = np.array([*class_colours(data.class_names), (0, 0, 0)], dtype=np.uint8)
    tiles = []
    for i in np.linspace(0, len(data) - 1, count).astype(int):
        image, target = data[i]
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
        mask = Image.fromarray(colours[target.clamp(max=len(colours) - 1)]).resize(image.size, 0)
        tiles.append(view(Image.blend(image, mask, 0.5), data.size))
    return Image.fromarray(np.hstack([np.asarray(tile) for tile in tiles]))


# ---------------------------------------------------------------- loading

def deaf(worker):
    """Let a loading process ignore Ctrl-C, which all processes get: the main one decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loaded(loader):
    """Yield what a DataLoader does; a file that cannot be read raises OSError, in one sentence."""
    try:
        yield from loader
    except ValueError as error:                 # a worker wraps the reason in its own traceback
        reason = str(error).split("\nValueError: ")[-1].strip()
        raise OSError(f"{reason}; put this file right and resume") from error
    except (ConnectionError, EOFError) as error:             # one of the ways to notice its death
        raise RuntimeError("a DataLoader worker died") from error


# ---------------------------------------------------------------- stateless training batches

class Batches(Dataset):
    """Batch t is (images (B, 3, H, W) float in [0, 1], slots (B,)), a pure function of (seed, t).

    files: image paths; slots are indices into them. Every file is used once before any is used
    again. A random crop (scale min_scale to max_scale), a flip, and brightness and contrast changed
    by up to `jitter` are drawn from (seed, t, place in the batch), not from the file. labelled: a
    Labelled data set over the same files adds targets (B, H, W). colours: (N, 3, 4), a colour map
    of each file (alignment.py), applied before brightness and contrast.
    """

    def __init__(self, files, size, batch_size, seed, max_scale=1.6, jitter=0.2, labelled=None,
                 colours=None, min_scale=1.0):
        self.files, self.size, self.batch_size, self.seed = files, tuple(size), batch_size, seed
        self.max_scale, self.jitter, self.labelled = max_scale, jitter, labelled
        self.colours, self.min_scale = colours, min_scale
        self.cache, self.cached_bytes = {}, 0

    def __len__(self):
        return 2 ** 31                                   # as many as anyone asks for

    def slots(self, t):
        """Return the file indices of batch t: (B,), int64."""
        places = np.arange(t * self.batch_size, (t + 1) * self.batch_size)
        epochs, offsets = np.divmod(places, len(self.files))
        orders = {epoch: np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.files))
                  for epoch in np.unique(epochs)}
        return torch.tensor([orders[e][o] for e, o in zip(epochs, offsets, strict=True)])

    def source(self, slot):
        """Return the picture (and mask) of a file, no larger than the crops need, kept in memory.

        Reducing once makes every later crop cheap. At most 1 GB is kept; the rest is read anew.
        """
        if slot in self.cache:
            return self.cache[slot]
        need = [round(side * self.max_scale) for side in self.size]
        image = load_image(self.files[slot], need)
        mask = load_mask(self.labelled.labels[slot]) if self.labelled else None
        scale = max(need[0] / image.height, need[1] / image.width)
        if scale < 1:
            small = (round(image.width * scale), round(image.height * scale))
            image = image.resize(small, Image.BILINEAR)
            mask = mask and mask.resize(small, Image.NEAREST)
        if self.cached_bytes < 2 ** 30:
            self.cache[slot] = image, mask
            self.cached_bytes += 4 * image.width * image.height
        return image, mask

    def __getitem__(self, t):
        slots = self.slots(t)
        images, targets = [], []
        for place, slot in enumerate(slots.tolist()):
            rng = np.random.default_rng([self.seed, 2, t, place])
            u, v, s, brightness, contrast = rng.random(5)
            flip = rng.random() < 0.5
            scale = self.min_scale * (self.max_scale / self.min_scale) ** s
            crop = {"scale": scale, "u": u, "v": v}
            image, mask = self.source(slot)
            x = to_tensor(view(image, self.size, **crop)).float() / 255             # (3, H, W)
            if self.colours is not None:
                x = apply_colours(x[None], self.colours[slot][None])[0]
            contrast, brightness = 1 + self.jitter * (2 * np.array([contrast, brightness]) - 1)
            x = (((x - x.mean()) * contrast + x.mean()) * brightness).clamp(0, 1)
            images.append(x.flip(2) if flip else x)
            if mask is not None:
                y = view(mask, self.size, **crop, resample=Image.NEAREST)
                y = self.labelled.classes(y, self.labelled.labels[slot])            # (H, W)
                targets.append(y.flip(1) if flip else y)
        batch = (torch.stack(images), slots)
        return (*batch, torch.stack(targets)) if targets else batch
