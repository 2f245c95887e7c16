"""models.py: every network's contract, the frozen teacher's rules, and costs counted by hand."""

import copy
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import (
    MODELS,
    HalfSize,
    MobileNetV2Features,
    ResidualBlock,
    SegmentationModel,
    build_model,
    cost,
    fingerprint,
    freeze,
    segmentation_logits,
)


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_every_network_maps_rgb_to_logits_of_the_same_size(name):
    model = build_model(name, 3).eval()
    with torch.inference_mode():
        logits = model(images(1, 3, 64, 96))
    assert logits.shape == (1, 3, 64, 96) and logits.isfinite().all() and logits.std() > 0
    assert (model.name, model.num_classes) == (name, 3)
    assert model.class_names == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize("size", [(33, 47), (16, 16)])
def test_a_small_network_takes_sizes_that_are_no_multiple_of_its_stride(size):
    assert build_model("resnet_tiny", 3).eval()(images(2, 3, *size)).shape == (2, 3, *size)


# ---------------------------------------------------------------- the frozen teacher

def statistics(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def test_a_frozen_network_stays_so_whoever_asks_it_to_train():
    teacher = freeze(build_model("resnet_tiny", 3))
    before, mark = statistics(teacher), fingerprint(teacher)
    parent = nn.ModuleDict({"teacher": teacher, "student": nn.BatchNorm2d(3)}).train()
    assert parent.training and parent["student"].training
    teacher.train()
    teacher.net.stages[0].train()
    next(m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)).train(True)
    assert not any(module.training for module in teacher.modules())
    for seed in range(3):
        parent["teacher"](parent["student"](images(4, 3, 32, 48, seed=seed)))
    assert all(torch.equal(value, before[name]) for name, value in teacher.named_buffers())
    assert fingerprint(teacher) == mark
    assert parent["student"].num_batches_tracked == 3                            # the others learn


def test_a_frozen_network_has_no_gradient_but_passes_one_on_to_its_input():
    teacher, x = freeze(build_model("resnet_tiny", 3)), images(1, 3, 32, 32).requires_grad_()
    teacher(x).square().sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())


def test_a_copy_of_a_frozen_network_works_and_is_independent():
    teacher = freeze(build_model("resnet_tiny", 3))
    double, x = copy.deepcopy(teacher), images(1, 3, 32, 32)
    assert torch.equal(double(x), teacher(x)) and fingerprint(double) == fingerprint(teacher)
    assert double.train() is double and double.net.stem.train() is double.net.stem
    assert not double.net.stem.training
    double.net.stem[1].running_mean += 1
    assert fingerprint(double) != fingerprint(teacher) and not torch.equal(double(x), teacher(x))


def test_one_bit_of_one_buffer_changes_the_fingerprint():
    model = build_model("resnet_tiny", 3)
    mark, mean = fingerprint(model), model.net.stem[1].running_mean
    mean[5] = torch.nextafter(mean[5], torch.tensor(9.0))
    assert fingerprint(model) != mark
    mean[5] = 0
    assert fingerprint(model) == mark == fingerprint(model.to(memory_format=torch.channels_last))


# ---------------------------------------------------------------- any network's logits

class Output(OrderedDict):
    """What transformers returns: a dict whose values are attributes as well."""

    logits = property(lambda self: self["logits"])


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"out": x, "aux": x[:, :1]},
                                  lambda x: SimpleNamespace(logits=x), lambda x: Output(logits=x)])
def test_logits_are_found_in_every_usual_output_and_resized_when_asked(wrap):
    small = images(2, 5, 4, 6)
    assert torch.equal(segmentation_logits(lambda x: wrap(small), images(2, 3, 4, 6)), small)
    large = segmentation_logits(lambda x: wrap(small), images(2, 3, 8, 12))
    torch.testing.assert_close(large, F.interpolate(small, (8, 12), mode="bilinear"))
    # Between pixel centres: the second of eight rows lies a quarter of the way down.
    torch.testing.assert_close(large[..., 1, 0], 0.75 * small[..., 0, 0] + 0.25 * small[..., 1, 0])
    assert segmentation_logits(lambda x: wrap(small), images(2, 3, 8, 12), resize=False) is small


@pytest.mark.parametrize("output", [torch.zeros(2, 5), [torch.zeros(2, 5, 4, 6)], None,
                                    {"aux": torch.zeros(2, 5, 4, 6)}])
def test_any_other_output_is_refused(output):
    with pytest.raises(ValueError, match=f"got {type(output).__name__}"):
        segmentation_logits(lambda x: output, images(2, 3, 8, 12))


def test_the_normalisation_is_applied_and_travels_with_the_weights():
    model = SegmentationModel(nn.Identity(), "any", 3, (0.5, 0.25, 0), (0.5, 0.25, 2))
    x = torch.tensor([1, 0.5, 1]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert model(x)[0, :, 0, 0].tolist() == [1, 1, 0.5]
    assert model.state_dict()["mean"].flatten().tolist() == [0.5, 0.25, 0]
    usual = build_model("resnet_tiny", 3)
    assert usual.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert usual.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert build_model("resnet_tiny", 3, std=(1, 2, 4)).std.flatten().tolist() == [1, 2, 4]


# ---------------------------------------------------------------- shapes and costs

@pytest.mark.parametrize(("c_out", "stride"), [(4, 1), (8, 1), (8, 2)])
def test_a_residual_block_is_the_sum_of_body_and_shortcut(c_out, stride):
    block, x = ResidualBlock(4, c_out, stride).eval(), torch.randn(2, 4, 7, 9)
    assert block(x).shape == (2, c_out, -(-7 // stride), -(-9 // stride))
    nn.init.zeros_(block.body[1][1].weight)                      # the body is silent: shortcut only
    expected = x
    if c_out != 4:
        averaged = F.avg_pool2d(x, stride, ceil_mode=True) if stride > 1 else x
        expected = block.shortcut[1](averaged)
    torch.testing.assert_close(block(x), expected.relu())


@pytest.mark.parametrize("size", [(8, 12), (7, 12), (9, 5), (1, 2)])
def test_half_size_is_average_pooling_that_keeps_an_odd_edge(size):
    x = torch.rand(2, 3, *size)
    torch.testing.assert_close(HalfSize()(x), nn.AvgPool2d(2, ceil_mode=True)(x))


@pytest.mark.parametrize("output_stride", [8, 16])
def test_mobilenet_v2_reaches_its_output_stride_and_dilates_behind_it(output_stride):
    features = MobileNetV2Features(output_stride, None).eval()
    with torch.inference_mode():
        assert features(images(1, 3, 64, 96)).shape == (1, 320, 64 // output_stride,
                                                        96 // output_stride)
    for conv in (m for m in features.modules() if isinstance(m, nn.Conv2d)):
        if conv.kernel_size == (3, 3) and conv.stride == (1, 1):                 # keeps the size
            assert conv.padding == conv.dilation
    dilations = [conv.dilation[0] for conv in features.modules()
                 if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)]
    # The stem and 17 blocks. The stride of block 8 (at 8) and 15 goes; the next blocks dilate.
    assert dilations == {8: 8 * [1] + 7 * [2] + 3 * [4], 16: 15 * [1] + 3 * [2]}[output_stride]


def test_removing_a_stride_keeps_what_each_pixel_sees():
    # At stride 16 and 8 the same weights look at the same pixels: every second value agrees.
    torch.manual_seed(0)
    coarse, fine = (MobileNetV2Features(stride, None).eval() for stride in (16, 8))
    fine.load_state_dict(coarse.state_dict())
    x = images(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(coarse.features[:9](x), fine.features[:9](x)[..., ::2, ::2])


def test_cost_equals_a_hand_count():
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)               # 5 x 6 places, 8 x 3 x 9 products
    assert cost(conv, (10, 12)) == (8 * 3 * 9 + 8, 5 * 6 * 8 * 3 * 9)
    grouped = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6, bias=False)).train()
    assert cost(grouped, (5, 7)) == (3 * 6 + 6 + 6 * 9, 35 * 18 + 3 * 5 * 6 * 9)
    assert grouped.training and not grouped[0]._forward_hooks


def test_the_tiny_network_is_at_least_ten_times_cheaper_than_the_small_one():
    small, tiny = (cost(build_model(f"resnet_{size}", 11), (96, 128)) for size in ("small", "tiny"))
    assert small[1] >= 10 * tiny[1] and small[0] >= 10 * tiny[0]


# ---------------------------------------------------------------- what does not fit together

def test_published_weights_bring_their_classes_and_normalisation(monkeypatch):
    random = torchvision.models.get_model("deeplabv3_mobilenet_v3_large", weights=None,
                                          weights_backbone=None, num_classes=21, aux_loss=True)
    with monkeypatch.context() as patch:                         # what the download would build
        patch.setattr(torchvision.models, "get_model", lambda name, weights: random)
        model = build_model("deeplabv3_mobilenet_v3_large", weights="DEFAULT").eval()
    assert model.num_classes == 21 and model.class_names[15] == "person"
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    with torch.inference_mode():
        assert model(images(1, 3, 64, 64)).shape == (1, 21, 64, 64)
    # No auxiliary head is left, so its weights fit the network that is built without a download.
    plain = build_model("deeplabv3_mobilenet_v3_large", 21)
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"name": "resnet_huge", "num_classes": 3}, "model 'resnet_huge' is unknown.*resnet_small"),
    ({"name": "resnet_tiny"}, "needs a number of classes"),
    ({"name": "resnet_tiny", "weights": "DEFAULT"}, "no published segmentation weights for resnet"),
    ({"name": "fcn_resnet50", "num_classes": 11, "weights": "DEFAULT"}, "has 21 classes, not 11"),
    ({"name": "fcn_resnet50", "weights": "BEST"}, "no published weights 'BEST'.*COCO_WITH_VOC"),
    ({"name": "resnet_tiny", "num_classes": 3, "weights_backbone": "DEFAULT"}, "backbone weights")])
def test_what_does_not_fit_together_is_refused_before_any_download(monkeypatch, arguments, message):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)             # calling it fails
    with pytest.raises(ValueError, match=message):
        build_model(**arguments)
