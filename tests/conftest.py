"""What several test files share: a small teacher with real-looking statistics, and a tiny pool.

All tests compute on the CPU, wherever they run: the GPUs are hidden before torch can find them.
Only the process that test_gpu.py starts sees them; it has DFSS_TEST_DEVICE set.
"""

import os

VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")            # as the user has it
if "DFSS_TEST_DEVICE" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# ruff: noqa: E402
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pictures import write
from torch import nn

from models import SegmentationModel, build_model
from support import checkpoint
from support.labelled import CITYSCAPES, class_colours


@pytest.fixture(autouse=True)
def apart(tmp_path_factory, monkeypatch):
    """Keep scores away from the user's and from other tests'; small tensors need one thread."""
    monkeypatch.setattr("support.scoring.STORE", tmp_path_factory.mktemp("scores"))
    torch.set_num_threads(1)


def with_random_statistics(model, seed=0):
    """Give every BatchNorm layer of a model running statistics as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def write_photos(folder, count, seed=0):
    """Write small photographs, 00.png and so on: smooth colours of many hues and sizes."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        write(folder / f"{i:02d}.png", small.resize((50 + i, 40), Image.BICUBIC))


@pytest.fixture
def pool_folder(tmp_path):
    """Return a folder of 30 small photographs."""
    write_photos(tmp_path / "pool", 30)
    return tmp_path / "pool"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Return a folder with all that distill.py takes: teacher.pt, a pool of 40, val of 4 images.

    The teacher has 8 classes, random weights, and statistics of images like those of the pool.
    Tests change nothing here.
    """
    root = tmp_path_factory.mktemp("world")
    write_photos(root / "pool", 40)
    write_photos(root / "val" / "images", 4, seed=1)
    for i in range(4):
        labels = np.random.default_rng(i).integers(0, 8, (40, 50 + i), dtype=np.uint8)
        labels[:2] = 255                                         # void
        write(root / "val" / "labels" / f"{i:02d}.png", labels)
    torch.manual_seed(0)
    teacher = build_model("resnet_tiny", 8, image_size=(32, 48))
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0                        # its statistics are those of one batch
    teacher(F.interpolate(torch.rand(64, 3, 3, 4), (32, 48), mode="bilinear"))
    checkpoint.save_model(teacher, root / "teacher.pt")
    return root


@pytest.fixture
def voc_tree(tmp_path):
    """Return a root with VOC 2012 in small: its folders, lists, encodings, and images of any size.

    Each image: 512 pixels of person (15), 128 of void, 256 of background painted like a person.
    """
    voc = tmp_path / "VOC" / "VOCdevkit" / "VOC2012"
    lists = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033", "2007_000042"],
             "trainaug": ["2007_000032", "2008_000002"]}
    lists["trainval"] = lists["train"] + lists["val"]
    palette = np.array(class_colours(range(256)), dtype=np.uint8)
    sizes = {"2007_000033": (48, 80), "2007_000042": (120, 96)}
    for name in {*lists["trainval"], *lists["trainaug"]}:
        labels = np.zeros(sizes.get(name, (64, 90)), dtype=np.uint8)
        labels[16:32, 16:48], labels[16:32, 48:56] = 15, 255
        shown = labels % 255                                         # void looks like background
        shown[:16, 64:80] = 15
        write(voc / "JPEGImages" / f"{name}.jpg", palette[shown], quality=98, subsampling=0)
        mask = Image.fromarray(labels)
        if name in lists["trainaug"]:
            write(voc / "SegmentationClassAug" / f"{name}.png", mask)
        mask.putpalette(palette.flatten().tolist())
        if name.startswith("2007"):
            write(voc / "SegmentationClass" / f"{name}.png", mask)
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    for part, names in lists.items():
        (voc / f"ImageSets/Segmentation/{part}.txt").write_text("\n".join(names) + "\n")
    return tmp_path / "VOC"


@pytest.fixture
def cityscapes_tree(tmp_path):
    """Return a root with Cityscapes in small: road (7), a car (26), and the own bonnet (1) below.

    In each image 128 pixels of road are painted like a car; so is the bonnet, which is ignored.
    """
    labels = np.full((32, 64), 7, dtype=np.uint8)
    labels[8:24, 0:16], labels[24:] = 26, 1
    shown = np.where(labels == 7, 0, 13)                             # train ids of road and car
    shown[:8, 48:64] = 13
    picture = np.array(class_colours(CITYSCAPES), dtype=np.uint8)[shown]
    for stem in ("train/aachen/aachen_000000_000019", "train/aachen/aachen_000001_000019",
                 "train/bochum/bochum_000000_000313", "val/munster/munster_000000_000019",
                 "val/frankfurt/frankfurt_000000_000294"):
        for folder, name, array in (("leftImg8bit", "leftImg8bit", picture),
                                    ("gtFine", "gtFine_labelIds", labels),
                                    ("gtFine", "gtFine_color", picture),
                                    ("gtFine", "gtFine_instanceIds", labels.astype(np.uint16))):
            write(tmp_path / "Cityscapes" / folder / f"{stem}_{name}.png", array)
    return tmp_path / "Cityscapes"


def nearest_colour(class_names, *known):
    """Return a network that calls each pixel that of the known classes whose colour is nearest."""
    colours = torch.tensor(class_colours(class_names)) / 255                     # (K, 3)
    conv = nn.Conv2d(3, len(colours), 1)
    conv.weight.data, conv.bias.data = 2 * colours[:, :, None, None], -colours.square().sum(dim=1)
    conv.bias.data[[k for k in range(len(colours)) if k not in known]] = -1000
    return SegmentationModel(conv, "nearest colour", len(colours), (0, 0, 0), (1, 1, 1),
                             class_names)
