"""Labelled data sets: CamVid, Pascal VOC, Cityscapes, the built-in scenes and any folder.

Idea
    A data set is two lists of files and a table from the values in its masks to classes. All five
    are therefore one class, `Labelled`, and differ in how their files are found. Mistakes in labels
    (RGB masks, JPEG masks, train ids for label ids, 0 and 255 for two classes) raise an error.

Symbols
    K classes, H W pixels.

Use it
    from support.labelled import open_labelled
    data = open_labelled("camvid", "CamVid", "val", size=(96, 128))
    image, target = data[0]       # uint8 (3, h, w) at the scale of size, int64 (H, W) at its own
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import Cityscapes, VOCSegmentation
from torchvision.models.segmentation import FCN_ResNet50_Weights

from support import scenes
from support.images import find_images, load_image, resize_to_cover, to_tensor
from support.options import Options, labels, progress

IGNORE = 255
VOID = "void"                                            # the name of a value that is ignored
CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
          "pedestrian", "bicyclist")
CAMVID_COLOURS = ((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222),
                  (128, 128, 0), (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0),
                  (0, 128, 192))
VOC = ("background", *FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:])
CITYSCAPES, CITYSCAPES_COLOURS = zip(*((c.name, c.color) for c in Cityscapes.classes
                                       if c.train_id not in (-1, 255)), strict=True)
# The size (H, W) at which each data set is used.
DATASETS = {"scenes": (64, 96), "camvid": (360, 480), "voc": (512, 512),
            "cityscapes": (512, 1024), "folder": (256, 256), "none": (256, 256)}


@dataclass(frozen=True)
class Labels(Options):
    """The options that name labelled data."""

    dataset: str = labels("camvid", "labelled data", tuple(n for n in DATASETS if n != "none"))
    data_root: str | None = labels(None, "folder of the labelled data", metavar="FOLDER")
    split: str = labels("train", "part of it; 'train:A,B' keeps the files whose names begin so")
    download: bool = labels(False, "let torchvision fetch Pascal VOC")
    num_classes: int | None = labels(None, "for --dataset folder, if it has no classes.txt")


class Labelled(Dataset):
    """Item i is (whole image at working scale, uint8 (3, h, w); label at its own size, (H, W)).

    table: (256,) from a value in the file to a class, to IGNORE, or to -1 where it must not occur.
    colours: {value: RGB} of palettes, as far as known; all masks with a palette must agree.
    """

    def __init__(self, images, labels, table, class_names, size, colours=()):
        self.images, self.labels, self.table = images, labels, table
        self.class_names, self.size, self.colours = list(class_names), tuple(size), dict(colours)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, mask = load_image(self.images[index], upright=False), self.mask(index)
        if image.size != mask.size:
            raise ValueError(f"{self.labels[index]} has size {mask.size}, its image {image.size}")
        return to_tensor(resize_to_cover(image, self.size)), self.classes(mask, index)

    def mask(self, index):
        """Return a file's label values, a PIL picture; ValueError if they cannot be trusted."""
        path = self.labels[index]
        try:
            with Image.open(path) as mask:
                values, palette = np.asarray(mask), mask.getpalette()        # values, not colours
        except Exception as error:
            raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
        if mask.mode not in ("L", "P", "1") or mask.format in ("JPEG", "MPO"):
            raise ValueError(f"{path} is {mask.format} ({mask.mode}); expected an 8-bit index PNG")
        for _, value in mask.getcolors() if palette else ():
            colour = tuple(palette[3 * value:3 * value + 3])
            if colour != self.colours.setdefault(value, colour):
                raise ValueError(f"{path} gives the value {value} the colour {colour}, not "
                                 f"{self.colours[value]}; has an editor renumbered its classes?")
        return Image.fromarray(values.astype(np.uint8))

    def classes(self, mask, index):
        """Return the classes of an index mask that belongs to a file: int64 (H, W)."""
        target = self.table[to_tensor(mask).long()]
        if (target < 0).any():
            bad = np.unique(np.asarray(mask)[(target < 0).numpy()])[:8].tolist()
            raise ValueError(f"{self.labels[index]} holds the label values {bad}, none of its "
                             f"{len(self.class_names)} classes; see docs/data.md for classes.txt")
        return target


def open_labelled(dataset, root, split, size, num_classes=None, download=False):
    """Return a data set as `Labelled`: scenes, camvid, voc, cityscapes or folder.

    root: for camvid a folder with <split>/ and <split>annot/; for voc and cityscapes the trees of
    their archives; for scenes and folder <split>/images and <split>/labels, or images and labels.
    split: "val", or "train:0001TP,0016E5" to keep files whose names begin so (CamVid's sequences).
    num_classes: of a folder without a classes.txt.
    Raises FileNotFoundError or ValueError with what was expected.
    """
    if not root or not (download or Path(root).is_dir()):
        raise FileNotFoundError(f"there is no folder {root}; --data-root names the {dataset} data")
    part, _, sequences = split.partition(":")
    pairs, values = find_pairs(dataset, Path(root), part, download)
    values = values or [f"class {k}" for k in range(num_classes or 0)]       # names of 0, 1, ...
    names = [name for name in dict.fromkeys(values) if name != VOID]
    if len(names) < 2 or set(values[IGNORE:]) - {VOID}:
        raise ValueError(f"{dataset} has {len(names)} classes, expected 2 to {IGNORE} with values "
                         f"below {IGNORE}; see --num-classes and classes.txt in docs/data.md")
    # Without sequences: ("",), with which every name begins.
    pairs = [p for p in pairs if p[0].name.startswith(tuple(sequences.strip(",").split(",")))]
    if not pairs:
        raise ValueError(f"{root} has no image in split {split!r}")
    # Official labelIds know no 255: a file with one holds train ids under a wrong name.
    table = torch.full((256,), -1)
    table[IGNORE] = -1 if dataset == "cityscapes" else IGNORE
    for value, name in enumerate(values[:IGNORE]):
        table[value] = IGNORE if name == VOID else names.index(name)
    colours = enumerate(class_colours([])) if dataset == "voc" else ()
    return Labelled(*zip(*pairs, strict=True), table, names, size, colours)


def find_pairs(dataset, root, part, download):
    """Return the files of a data set, [(image, label), ...], and the names of its label values.

    The names of a folder are those of its classes.txt, or none.
    """
    if dataset == "camvid":
        return paired(root / part, root / f"{part}annot"), (*CAMVID, VOID)
    if dataset == "voc":
        return voc_pairs(root / "VOCdevkit" / "VOC2012", part, download), VOC
    if dataset == "cityscapes":
        images = find_images(root / "leftImg8bit" / part)
        pairs = [(path, root / "gtFine" / part / path.parent.name
                  / path.name.replace("leftImg8bit", "gtFine_labelIds")) for path in images]
        # The last of torchvision's classes has the id -1, which no file of 8 bits holds.
        return pairs, [VOID if c.train_id == 255 else c.name for c in Cityscapes.classes[:-1]]
    names = scenes.CLASSES if dataset == "scenes" else read_class_names(root / "classes.txt")
    root = root / part if (root / part).is_dir() else root
    return paired(root / "images", root / "labels"), names


def voc_pairs(voc, part, download):
    """Return [(image, label), ...] of train, val, trainval, or trainaug where it was added.

    trainaug.txt holds names, or "/JPEGImages/A.jpg /SegmentationClassAug/A.png" in each line.
    """
    listing = voc / "ImageSets" / "Segmentation" / f"{part}.txt"
    if download and not listing.is_file():    # torchvision would unpack the archive on every run
        VOCSegmentation(voc.parent.parent, download=True)
    masks = voc / ("SegmentationClassAug" if "aug" in part else "SegmentationClass")
    names = [Path(row.split()[0]).stem for row in listing.read_text().split("\n") if row.strip()]
    return [(voc / "JPEGImages" / f"{name}.jpg", masks / f"{name}.png") for name in names]


def paired(images, labels):
    """Return [(image, label), ...] of two folders, paired by relative path without suffix.

    Raises ValueError that names an image without a label, or with two.
    """
    found = {}
    for path in find_images(labels):
        found.setdefault(path.relative_to(labels).with_suffix(""), []).append(path)
    pairs = [(path, *found.get(path.relative_to(images).with_suffix(""), []))
             for path in find_images(images)]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"{pair[0]} has {len(pair) - 1} labels of its name in {labels}, not 1")
    return pairs


def read_class_names(path):
    """Return the lines of a classes.txt, the names of 0, 1, ...; [] without such a file.

    Empty lines and those that say void, in whatever case, become VOID. Lines of one name are one
    class. ValueError if it is no UTF-8.
    """
    text = path.read_text("utf-8-sig", "replace") if path.is_file() else ""
    if {"\N{REPLACEMENT CHARACTER}", "\0"} & set(text):
        raise ValueError(f"{path} is no UTF-8 text; save it again with this encoding")
    lines = [line.strip() for line in text.rstrip().splitlines()]
    return [VOID if line.lower() in ("", VOID) else line for line in lines]


def class_colours(class_names):
    """Return an RGB colour for each class: the data set's own, else of Pascal VOC's map.

    Without names, the 256 colours of that map.
    """
    own = {scenes.CLASSES: scenes.PALETTE, CAMVID: CAMVID_COLOURS, CITYSCAPES: CITYSCAPES_COLOURS}
    # VOC spreads the bits of the class number over the high bits of red, green and blue.
    return own.get(tuple(class_names)) or [
        tuple(sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
              for channel in range(3)) for k in range(len(class_names) or 256)]


def check_labels(data, names=None, most=2000):
    """Read at most `most` pairs of a Labelled data set, evenly spread; say what is wrong.

    names: of a network's classes, perhaps with more behind. Warns if they are others or in another
    order, and of classes that no label has. Raises ValueError that names a bad file, or if there
    are only one class and void.
    """
    ours, theirs = ([name.strip("_").lower() for name in x]
                    for x in (data.class_names, names or data.class_names))
    if len(ours) > len(theirs):
        raise ValueError(f"the labels have {len(ours)} classes, but the network has {len(theirs)}")
    if ours != theirs[:len(ours)] and "class 0" not in (ours[0], theirs[0]):
        print(f"warning: the labels' classes are {', '.join(ours)}, the network's "
              f"{', '.join(theirs)}; an IoU compares those at the same place")
    indices = np.linspace(0, len(data) - 1, min(len(data), most), dtype=int)
    count = sum(data[i][1].flatten().bincount(minlength=256)                           # (256,)
                for i in progress(indices, "checking labels", leave=False))
    absent = [name for name, pixels in zip(data.class_names, count, strict=False) if not pixels]
    if absent:
        found = ", ".join(str(k) for k in count.nonzero().flatten().tolist())
        words = f"no label read has {', '.join(absent)}; classes found: {found} ({IGNORE}: void)"
        if count[:IGNORE].count_nonzero() < 2 and count[IGNORE]:
            raise ValueError(f"{words}; are two classes saved as 0 and 255 instead of 0 and 1?")
        print(f"warning: {words}")
