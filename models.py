"""Teachers and students: torchvision's segmentation networks and two small ones for a CPU.

Idea
    Every network here maps RGB in [0, 1] to logits at its own stride, a quarter of the image's
    size, say; whoever wants masks resizes them. It carries its own normalisation as buffers: the
    teacher's BatchNorm statistics only mean something under the normalisation it was trained with,
    so the two must not be able to part. `wrap` makes such a network of anybody's.

Paper
    The networks of DFSS are not public. `deeplabv3_mobilenet_v2` follows the student that DFAD
    (Fang et al., arXiv 1912.11006) used on CamVid, with torchvision's inverted residuals.

Symbols
    B images, K classes, H W pixels of an image, h w of the logits.

Use it
    from models import build_model, freeze, wrap
    teacher = freeze(build_model("deeplabv3_resnet50", 21, weights="DEFAULT"))
    logits = teacher(images)                            # (B, 3, H, W) in [0, 1] -> (B, K, h, w)
    mine = wrap(my_network, num_classes=21)             # takes RGB in [0, 1]; else say mean and std

Run it
    python models.py            (CPU, seconds: the names, parameters and multiply-adds)
"""

import types

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TORCHVISION = ("deeplabv3_resnet50", "deeplabv3_resnet101", "fcn_resnet50",
               "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
MODELS = ("resnet_small", "resnet_tiny", "deeplabv3_mobilenet_v2", *TORCHVISION)


def conv_bn(c_in, c_out, kernel=3, stride=1, act=True):
    """Return convolution, BatchNorm and, if `act`, ReLU."""
    layers = [nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
              nn.BatchNorm2d(c_out)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if act else nn.Sequential(*layers)


class HalfSize(nn.Module):
    """nn.AvgPool2d(2, ceil_mode=True), which torch 2.11 exports for some image sizes only."""

    def forward(self, x):
        if not torch.compiler.is_exporting():
            return F.avg_pool2d(x, 2, ceil_mode=True)
        x = F.pad(x, (0, 1, 0, 1), mode="replicate")
        x = x[..., :-1:2, :] + x[..., 1::2, :]
        return (x[..., :-1:2] + x[..., 1::2]) / 4


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: (B, c_in, H, W) -> (B, c_out, H/stride, W/stride)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.body = nn.Sequential(conv_bn(c_in, c_out, 3, stride), conv_bn(c_out, c_out, act=False))
        # The shortcut averages before its 1x1 convolution (ResNet-D): a strided one would look at
        # a quarter of the pixels only.
        self.shortcut = nn.Identity() if c_in == c_out and stride == 1 else nn.Sequential(
            HalfSize() if stride == 2 else nn.Identity(), conv_bn(c_in, c_out, 1, act=False))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network with a light decoder, for a CPU: (B, 3, H, W) -> (B, K, H/4, W/4)."""

    def __init__(self, num_classes, width, blocks):
        super().__init__()
        channels = [width, 2 * width, 4 * width, 8 * width]            # at strides 2, 4, 8, 16
        self.stem = conv_bn(3, width, 3, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(*[ResidualBlock(c_out if i else c_in, c_out, 1 if i else 2)
                            for i in range(blocks)])
            for c_in, c_out in zip(channels, channels[1:], strict=False))
        self.lateral = nn.ModuleList(conv_bn(c, 2 * width, 1) for c in channels[1:])
        self.smooth = nn.Sequential(conv_bn(2 * width, 2 * width), conv_bn(2 * width, 2 * width))
        self.head = nn.Conv2d(2 * width, num_classes, 1)

    def forward(self, x):
        x = self.stem(x)
        maps = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            maps.append(lateral(x))                                    # (B, 2*width, ., .)
        y = maps.pop()
        while maps:                                                    # coarse to fine
            fine = maps.pop()
            y = fine + F.interpolate(y, fine.shape[-2:], mode="bilinear")
        return self.head(self.smooth(y))


class MobileNetV2Features(nn.Module):
    """MobileNetV2 up to its 320 channels at stride 16: (B, 3, H, W) -> (B, 320, H/16, W/16).

    As usual for DeepLab, the last stride becomes a dilation; the block that had it keeps none.
    """

    def __init__(self, weights):
        super().__init__()
        self.features = torchvision.models.mobilenet_v2(weights=weights).features[:-1]
        for i, block in enumerate(self.features[14:]):      # block 14 would go from 16 to 32
            depthwise = block.conv[1][0]                    # 3x3
            depthwise.stride = (1, 1)
            if i:
                depthwise.dilation = depthwise.padding = (2, 2)

    def forward(self, x):
        return self.features(x)


class AtOwnStride(nn.Module):
    """A torchvision segmentation network without its last step, which resizes the logits."""

    def __init__(self, net):
        super().__init__()
        self.backbone, self.classifier = net.backbone, net.classifier
        self.takes_all = isinstance(net, torchvision.models.segmentation.LRASPP)

    def forward(self, x):
        features = self.backbone(x)
        return self.classifier(features if self.takes_all else features["out"])


class SegmentationModel(nn.Module):
    """A network with its normalisation and its name: RGB in [0, 1] -> logits at its own stride.

    net: any module from normalised images to logits, `{"out": logits}` or an object with `.logits`.
    Mean and standard deviation (3,) are buffers; image_size: (H, W) it was trained at, if known.
    """

    def __init__(self, net, name, num_classes, mean=IMAGENET_MEAN, std=IMAGENET_STD,
                 class_names=None, image_size=None):
        super().__init__()
        self.net, self.name, self.num_classes = net, name, num_classes
        self.class_names = list(class_names or (f"class {k}" for k in range(num_classes)))
        self.image_size = image_size and tuple(image_size)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images):
        output = self.net((images - self.mean) / self.std)
        if isinstance(output, dict):                # also transformers' outputs, which are dicts
            logits = output.get("out", output.get("logits"))
        else:
            logits = getattr(output, "logits", output)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 4:
            raise ValueError("a segmentation network must return logits (B, K, H, W), {'out': "
                             f"logits}} or an object with .logits; got {type(output).__name__}")
        return logits                                                            # (B, K, h, w)


def wrap(network, num_classes=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), class_names=None):
    """Return any segmentation network as a SegmentationModel; one that is one already, as it is.

    network: see SegmentationModel; torchvision's lose the resizing at their end. Weights are
    shared, not copied. mean, std: what it expects of its input; by default it takes RGB in [0, 1].
    num_classes or class_names: needed for masks and for files, not for distilling.
    """
    if isinstance(network, SegmentationModel):
        return network
    family = torchvision.models.segmentation
    if isinstance(network, family.DeepLabV3 | family.FCN | family.LRASPP):
        network = AtOwnStride(network)
    return SegmentationModel(network, type(network).__name__, num_classes or len(class_names or ()),
                             mean, std, class_names)


def build_model(name, num_classes=None, weights=None, weights_backbone=None, **more):
    """Return a SegmentationModel, randomly initialised unless weights are asked for.

    name: one of MODELS. num_classes: K; with `weights` it may be left out and must agree.
    weights: "DEFAULT" or another name of torchvision's published segmentation weights; its classes
    and normalisation come from their metadata. weights_backbone: the same for an ImageNet
    backbone. Both download. more: mean, std, class_names, image_size of the SegmentationModel.
    Raises ValueError for what does not fit together.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; expected one of {', '.join(MODELS)}")
    if weights is not None:
        known = dict(torchvision.models.get_model_weights(name).__members__
                     if name in TORCHVISION else {})
        if weights not in known:
            raise ValueError(f"there are no published segmentation weights {weights!r} for {name}; "
                             f"expected {', '.join(known) or ', '.join(TORCHVISION)}")
        published = known[weights]
        preset, categories = published.transforms(), published.meta["categories"]
        if num_classes not in (None, len(categories)):
            raise ValueError(f"{name} with weights {weights} has {len(categories)} classes, not "
                             f"{num_classes}: {', '.join(categories)}")
        net = AtOwnStride(torchvision.models.get_model(name, weights=published))
        return SegmentationModel(net, name, len(categories), preset.mean, preset.std, categories)
    if num_classes is None:
        raise ValueError(f"{name} without published weights needs a number of classes")
    if weights_backbone is not None and name in ("resnet_small", "resnet_tiny"):
        raise ValueError(f"there are no published backbone weights for {name}")

    if name == "resnet_small":                # the CPU teacher
        net = SmallResNet(num_classes, width=32, blocks=2)
    elif name == "resnet_tiny":               # its student, about thirteen times cheaper
        net = SmallResNet(num_classes, width=12, blocks=1)
    elif name == "deeplabv3_mobilenet_v2":
        net = nn.Sequential(MobileNetV2Features(weights_backbone), DeepLabHead(320, num_classes))
    else:
        net = AtOwnStride(torchvision.models.get_model(
            name, weights=None, weights_backbone=weights_backbone, num_classes=num_classes))
    return SegmentationModel(net, name, num_classes, **more)


def freeze(model):
    """Return `model` in eval mode, without gradients, and unable to leave that mode.

    Otherwise `train()` on a module that contains it would overwrite its statistics.
    """
    model.eval().requires_grad_(False)
    for module in model.modules():
        module.train = types.MethodType(lambda self, mode=True: self, module)
    return model


@torch.no_grad()
def cost(model, size):
    """Return (parameters, multiply-adds for one image of size (H, W)); see torch's flop_counter."""
    training, device = model.training, next(model.parameters()).device
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, *size, device=device))
    model.train(training)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def demo():
    """Print what each network costs."""
    print(f"{'model':32s}{'parameters':>14s}{'multiply-adds at 96x128':>28s}")
    for name in MODELS:
        parameters, macs = cost(build_model(name, 11), (96, 128))
        print(f"{name:32s}{parameters / 1e6:12.2f} M{macs / 1e6:26.0f} M")


if __name__ == "__main__":
    demo()
