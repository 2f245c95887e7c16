"""Teachers and students: torchvision's segmentation networks, two small ones, and your own.

Idea
    Every network maps RGB in [0, 1] to logits at its own resolution, usually a quarter or an eighth
    of the image size; resize the logits to get masks. It carries its normalisation as buffers:
    BatchNorm statistics only mean something under the normalisation used in training.

Paper
    The networks of DFSS are not public. `deeplabv3_mobilenet_v2` follows the student that DFAD
    (Fang et al., arXiv 1912.11006) used on CamVid, with torchvision's inverted residuals.

Symbols
    B images, K classes, H W pixels of an image, h w of the logits.

Use it
    from models import IMAGENET_MEAN, IMAGENET_STD, build_model, freeze, wrap
    teacher = freeze(build_model("deeplabv3_resnet50", 21, weights="DEFAULT"))
    logits = teacher(images)                            # (B, 3, H, W) in [0, 1] -> (B, K, h, w)
    mine = wrap(network, mean=IMAGENET_MEAN, std=IMAGENET_STD, multiple=32)
"""

import functools
from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.ops import Conv2dNormActivation as ConvBNReLU

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = {"resnet_small": (32, 2),        # (width, blocks): the CPU teacher, and its student, which
         "resnet_tiny": (12, 1)}         # has about thirteen times fewer operations
TORCHVISION = ("deeplabv3_resnet50", "deeplabv3_resnet101", "fcn_resnet50",
               "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
MODELS = (*SMALL, "deeplabv3_mobilenet_v2", *TORCHVISION)
SPECS = f"path/to/file.py:function, or one of {', '.join(MODELS)}"              # in messages


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, c_in, H, W) -> (B, c_out, H/stride, W/stride)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.body = nn.Sequential(ConvBNReLU(c_in, c_out, 3, stride),
                                  ConvBNReLU(c_out, c_out, activation_layer=None))
        # The shortcut averages before its 1x1 convolution (ResNet-D): a strided one would look at
        # a quarter of the pixels only.
        self.shortcut = nn.Identity() if c_in == c_out and stride == 1 else nn.Sequential(
            nn.AvgPool2d(stride, ceil_mode=True),
            ConvBNReLU(c_in, c_out, 1, activation_layer=None))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network with a light decoder, for a CPU: (B, 3, H, W) -> (B, K, H/4, W/4)."""

    def __init__(self, num_classes, width, blocks):
        super().__init__()
        channels = [width, 2 * width, 4 * width, 8 * width]            # at strides 2, 4, 8, 16
        self.stem = ConvBNReLU(3, width, 3, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(ResidualBlock(c, 2 * c, 2),
                          *[ResidualBlock(2 * c, 2 * c, 1) for _ in range(blocks - 1)])
            for c in channels[:-1])
        self.lateral = nn.ModuleList(ConvBNReLU(c, 2 * width, 1) for c in channels[1:])
        self.smooth = nn.Sequential(*[ConvBNReLU(2 * width, 2 * width) for _ in range(2)])
        self.head = nn.Conv2d(2 * width, num_classes, 1)

    def forward(self, x):
        x = self.stem(x)
        maps = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            maps.append(lateral(x))                                    # (B, 2*width, ., .)
        y, *finer = reversed(maps)
        for fine in finer:                                             # coarse to fine
            y = fine + F.interpolate(y, fine.shape[-2:], mode="bilinear")
        return self.head(self.smooth(y))


def mobilenet_v2_features(weights):
    """Return MobileNetV2 up to its 320 channels: (B, 3, H, W) -> (B, 320, H/16, W/16).

    As usual for DeepLab, the last stride goes, and the blocks behind it are dilated instead.
    """
    features = torchvision.models.mobilenet_v2(weights=weights).features[:-1]
    features[14].conv[1][0].stride = (1, 1)                     # its 3x3; it went from 16 to 32
    for block in features[15:]:
        block.conv[1][0].dilation = block.conv[1][0].padding = (2, 2)
    return nn.Sequential(OrderedDict(features=features))       # so named in saved checkpoints


class AtOwnStride(nn.Module):
    """A torchvision segmentation network without its auxiliary head and the final resizing."""

    def __init__(self, net):
        super().__init__()
        self.backbone, self.classifier = net.backbone, net.classifier

    def forward(self, x):
        features = self.backbone(x)
        return self.classifier(features.get("out", features))           # LRASPP's head takes all


class SegmentationModel(nn.Module):
    """A network with its normalisation and its name: RGB in [0, 1] -> logits at its own stride.

    net: a module from normalised images to logits, {"out": logits} or an object with .logits. One
    output channel z, made for a sigmoid, becomes two logits (0, z): the same probabilities.
    mean, std: (3,) each. image_size: (H, W) it was trained at, if known. multiple: images are
    padded to multiples of it, by repeating their right and lower edge; logits of padded images have
    the size of the image.
    """

    def __init__(self, net, name, num_classes, mean=IMAGENET_MEAN, std=IMAGENET_STD,
                 class_names=None, image_size=None, multiple=1):
        super().__init__()
        if not 0 <= min(mean) <= max(mean) <= 1 or not 0 < min(std) <= max(std) <= 1:
            raise ValueError(f"mean {mean} and std {std} must lie in [0, 1], because images do; "
                             "divide values for images in 0..255 by 255")
        self.net, self.name, self.multiple = net, name, multiple
        self.num_classes = 2 if num_classes == 1 else num_classes
        self.with_names(class_names or [f"class {k}" for k in range(self.num_classes)])
        self.image_size = tuple(image_size) if image_size else None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def with_names(self, class_names):
        """Name the classes, and return the model; ValueError if they are another number, or > 255.
        """
        if len(class_names) != self.num_classes or self.num_classes > 255:
            raise ValueError(f"{self.name} has {self.num_classes} classes, expected "
                             f"{len(class_names)} ({', '.join(class_names):.300}); at most 255")
        self.class_names = list(class_names)
        return self

    def forward(self, images):
        x, m = (images - self.mean) / self.std, self.multiple
        H, W = x.shape[-2:]
        right, below = (m - W % m) % m, (m - H % m) % m
        # An exported program always pads, perhaps by 0: its sizes are not known yet.
        padded = m > 1 and (torch.compiler.is_exporting() or right > 0 or below > 0)
        if padded:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        output = self.net(x)
        logits = getattr(output, "logits", output)                              # transformers
        if isinstance(logits, dict):
            logits = logits.get("out", logits.get("logits"))                    # torchvision
        if not isinstance(logits, torch.Tensor) or logits.dim() != 4:
            raise ValueError("a network must return logits (B, K, H, W), {'out': logits} or an "
                             f"object with .logits; got {type(output).__name__}")
        if padded:          # cropped at the image's size: H may be no multiple of the stride
            logits = F.interpolate(logits, x.shape[-2:], mode="bilinear")
            logits = F.pad(logits, (0, -right, 0, -below))     # slices would not export
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        return logits                                                            # (B, K, h, w)


def wrap(network, num_classes=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), class_names=None,
         image_size=None, multiple=None):
    """Return any segmentation network as a SegmentationModel (one that is, unchanged).

    Weights are shared, not copied; torchvision's networks lose the resizing at their end and their
    auxiliary head. mean, std: what it expects of its input; by default it takes RGB in [0, 1].
    num_classes: needed for scores, not for masks or distilling. The rest: by default the network's
    attributes.
    """
    if isinstance(network, SegmentationModel):
        return network
    class_names = class_names or getattr(network, "class_names", ())
    net = AtOwnStride(network) if isinstance(network, DeepLabV3 | FCN | LRASPP) else network
    return SegmentationModel(net, type(network).__name__, num_classes or len(class_names), mean,
                             std, class_names, image_size or getattr(network, "image_size", None),
                             multiple or getattr(network, "multiple", 1))


def build_model(name, num_classes=None, weights=None, weights_backbone=None, **more):
    """Return a SegmentationModel, randomly initialised unless weights are asked for.

    name: one of MODELS. num_classes: K. weights: "DEFAULT" for torchvision's published segmentation
    weights, with their classes and normalisation; weights_backbone: "DEFAULT" for those of an
    ImageNet backbone. Both download. more: mean, std, class_names, image_size; of these, published
    weights only take image_size. Raises ValueError.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; expected {SPECS}")
    if name in SMALL and weights_backbone is not None:
        raise ValueError(f"there are no published backbone weights for {name}")
    if weights is not None:
        if weights != "DEFAULT" or name not in TORCHVISION:
            raise ValueError(f"there are no weights {weights!r} for {name}; expected DEFAULT for "
                             f"one of {', '.join(TORCHVISION)}")
        weights = torchvision.models.get_model_weights(name).DEFAULT
        # The normalisation is ImageNet's.
        more = {"class_names": weights.meta["categories"], "image_size": more.get("image_size")}
        num_classes = num_classes or len(more["class_names"])
    if num_classes is None:
        raise ValueError(f"{name} without published weights needs a number of classes")

    if name in SMALL:
        net = SmallResNet(num_classes, *SMALL[name])
    elif name in TORCHVISION:            # it refuses a number of classes that weights do not have
        net = AtOwnStride(torchvision.models.get_model(
            name, weights=weights, weights_backbone=weights_backbone, num_classes=num_classes))
    else:
        net = nn.Sequential(mobilenet_v2_features(weights_backbone), DeepLabHead(320, num_classes))
    return SegmentationModel(net, name, num_classes, **more)


def stay(module, mode=True):
    """Return a module as it is, instead of `train`."""
    return module


def freeze(model):
    """Return `model` in eval mode, without gradients, and unable to leave that mode.

    Otherwise `train()` on a module that contains it would overwrite its statistics. This lasts: to
    train the network again, make a copy (copy.deepcopy) before.
    """
    model.eval().requires_grad_(False)
    for module in model.modules():
        module.train = functools.partial(stay, module)
    return model
