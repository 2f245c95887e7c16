"""models.py: the contract of every network, and the rules of a frozen teacher."""

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import (MODELS, TORCHVISION, ResidualBlock, build_model, freeze,
                    mobilenet_v2_features, wrap)
from support.checkpoint import fingerprint


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_every_network_maps_rgb_to_logits_at_its_own_stride(name):
    stride = 4 if "tiny" in name or "small" in name else 16 if "deeplabv3_mobile" in name else 8
    model = build_model(name, 3).eval()
    with torch.inference_mode():
        logits = model(images(1, 3, 64, 96))
    assert logits.shape == (1, 3, 64 // stride, 96 // stride)
    assert logits.isfinite().all() and logits.std() > 0
    assert (model.name, model.num_classes, model.image_size) == (name, 3, None)
    assert model.class_names == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize("name", [name for name in TORCHVISION if "101" not in name])
def test_torchvisions_networks_lose_nothing_but_their_resizing_of_the_logits(name):
    theirs = torchvision.models.get_model(name, weights_backbone=None, num_classes=5).eval()
    ours, x = wrap(theirs), images(1, 3, 70, 93)
    with torch.inference_mode():
        resized = F.interpolate(ours(x), (70, 93), mode="bilinear")
        torch.testing.assert_close(resized, theirs(x)["out"], rtol=0, atol=0)
        # What build_model makes of the name has the same weights, normalised like ImageNet.
        built = build_model(name, 5).eval()
        built.net.load_state_dict(ours.net.state_dict())
        assert torch.equal(built(x), ours((x - built.mean) / built.std))


def test_a_frozen_network_and_a_copy_of_it_stay_so_whoever_asks_them_to_train():
    frozen, x = freeze(build_model("resnet_tiny", 3)), images(4, 3, 32, 48).requires_grad_()
    before = fingerprint(frozen)
    for teacher in (frozen, copy.deepcopy(frozen)):
        parent = nn.ModuleDict({"teacher": teacher, "student": nn.BatchNorm2d(3)}).train()
        assert parent["student"].training and not any(m.training for m in teacher.modules())
        parent["teacher"](parent["student"](x)).square().sum().backward()
        assert fingerprint(teacher) == before and parent["student"].num_batches_tracked == 1
        assert x.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())
        assert teacher.net.stem.train() is teacher.net.stem
    teacher.net.stem[1].running_mean += 1                        # the copy is independent
    assert fingerprint(frozen) == before


def test_a_frozen_network_can_be_pickled_and_stays_frozen():
    frozen = pickle.loads(pickle.dumps(freeze(build_model("resnet_tiny", 3))))
    assert not any(module.training for module in frozen.train().modules())


class Returns(nn.Module):
    """A network that returns what a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.mark.parametrize("output", [
    lambda x: x, lambda x: {"out": x, "aux": x[:, :1]}, lambda x: {"logits": x},
    lambda x: SimpleNamespace(logits=x)])
def test_logits_are_found_in_every_usual_output_and_keep_their_size(output):
    small = images(2, 5, 4, 6)
    assert wrap(Returns(lambda x: output(small)))(images(2, 3, 8, 12)) is small


@pytest.mark.parametrize("output", [torch.zeros(2, 5), [torch.zeros(2, 5, 4, 6)], None,
                                    {"aux": torch.zeros(2, 5, 4, 6)}])
def test_any_other_output_is_refused(output):
    with pytest.raises(ValueError, match=f"got {type(output).__name__}"):
        wrap(Returns(lambda x: output))(images(2, 3, 8, 12))


def test_anybodys_network_is_wrapped_once_with_its_normalisation_and_shares_its_weights():
    conv, x = nn.Conv2d(3, 2, 1), images(1, 3, 4, 4)
    mine = wrap(conv, mean=(0.5, 0.5, 0.5), std=(0.5, 1, 0.2), class_names=["road", "sky"])
    assert wrap(mine) is mine and (mine.name, mine.num_classes) == ("Conv2d", 2)
    assert mine.net is conv and {"mean", "std"} < mine.state_dict().keys()
    torch.testing.assert_close(mine(x), conv((x - 0.5) / mine.std))
    assert torch.equal(wrap(conv, num_classes=2)(x), conv(x))    # by default it takes RGB in [0, 1]


@pytest.mark.parametrize(("mean", "std"), [
    ((0.5, 0.5, 0.5), (58.395, 57.12, 57.375)), ((123.675, 116.28, 103.53), (1, 1, 1)),
    ((0.5, 0.5, 0.5), (0.5, 0.0, 0.5)), ((-0.5, -0.5, -0.5), (0.5, 0.5, 0.5))])
def test_a_normalisation_for_images_in_0_to_255_is_refused(mean, std):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], because images do; divide"):
        wrap(nn.Conv2d(3, 2, 1), 2, mean, std)


@pytest.mark.parametrize("size", [(49, 61), (8, 9), (7, 16), (1, 3)])
def test_a_network_of_fixed_stride_takes_any_size_and_sees_every_pixel_in_its_place(size):
    network, x = nn.Conv2d(3, 2, 8, stride=8), images(2, 3, *size)
    model = wrap(network, multiple=8)
    H, W = (8 * math.ceil(side / 8) for side in size)
    rows, columns = torch.arange(H).clamp(max=size[0] - 1), torch.arange(W).clamp(max=size[1] - 1)
    padded = x[:, :, rows][..., columns]                          # the edge, repeated
    whole = F.interpolate(network(padded), (H, W), mode="bilinear")
    assert torch.equal(model(x), whole[..., :size[0], :size[1]])
    fits = images(1, 3, 16, 24)                                  # keeps the network's own stride
    assert torch.equal(model(fits), network(fits))


def test_one_output_channel_is_two_classes_with_the_probabilities_of_a_sigmoid():
    conv, x = nn.Conv2d(3, 1, 1), images(2, 3, 5, 6)
    model = wrap(conv, 1)
    assert (model.num_classes, model.class_names) == (2, ["class 0", "class 1"])
    torch.testing.assert_close(model(x).softmax(dim=1)[:, 1:], conv(x).sigmoid())
    assert wrap(conv, class_names=["background", "crack"]).num_classes == 2


def test_what_a_network_says_of_itself_is_used_unless_something_else_is_asked_for():
    network = nn.Conv2d(3, 2, 1)
    network.class_names, network.image_size, network.multiple = ("road", "sky"), [40, 56], 32
    model = wrap(network)
    assert (model.class_names, model.image_size) == (["road", "sky"], (40, 56))
    assert (model.num_classes, model.multiple) == (2, 32)
    other = wrap(network, class_names=["a", "b"], image_size=(8, 9), multiple=4)
    assert (other.class_names, other.image_size, other.multiple) == (["a", "b"], (8, 9), 4)


@pytest.mark.parametrize(("c_out", "stride"), [(4, 1), (8, 1), (8, 2)])
def test_a_residual_block_is_the_sum_of_body_and_shortcut(c_out, stride):
    block, x = ResidualBlock(4, c_out, stride).eval(), torch.randn(2, 4, 7, 9)
    averaged = F.avg_pool2d(x, stride, ceil_mode=True)
    shortcut = x if c_out == 4 else block.shortcut[1](averaged)
    torch.testing.assert_close(block(x), (block.body(x) + shortcut).relu())
    first, second = block.body                                   # an activation in between alone
    torch.testing.assert_close(block.body(x), second[1](second[0](first[1](first[0](x)).relu())))


def test_mobilenet_v2_without_its_last_stride_keeps_what_each_pixel_sees():
    # torchvision's own, at stride 32, and ours look at the same pixels: every second one agrees.
    torch.manual_seed(0)
    coarse, fine = torchvision.models.mobilenet_v2().features[:-1], mobilenet_v2_features(None)
    fine.features.load_state_dict(coarse.state_dict())
    x = images(1, 3, 96, 96)
    with torch.inference_mode():
        theirs, ours = coarse.eval()(x), fine.eval()(x)[..., ::2, ::2]
    torch.testing.assert_close(ours / theirs.std(), theirs / theirs.std())             # about 1e-9


def test_published_weights_bring_their_classes_and_normalisation(monkeypatch):
    name = "deeplabv3_mobilenet_v3_large"
    random = torchvision.models.get_model(name, weights_backbone=None, aux_loss=True)
    with monkeypatch.context() as patch:                         # what the download would build
        patch.setattr(torchvision.models, "get_model", lambda name, **how: random)
        model = build_model(name, weights="DEFAULT").eval()
    assert model.num_classes == 21 and model.class_names[15] == "person"
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert model.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    # No auxiliary head is left, so its weights fit the network that is built without a download.
    assert model.state_dict().keys() == build_model(name, 21).state_dict().keys()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"name": "resnet_huge", "num_classes": 3}, "model 'resnet_huge' is unknown.*resnet_small"),
    ({"name": "resnet_tiny"}, "needs a number of classes"),
    ({"name": "resnet_tiny", "weights": "DEFAULT"}, "weights 'DEFAULT' for resnet_tiny; expected"),
    ({"name": "fcn_resnet50", "num_classes": 11, "weights": "DEFAULT"}, "21 but got 11"),
    ({"name": "fcn_resnet50", "weights": "BEST"}, "weights 'BEST' for fcn_resnet50; expected DEF"),
    ({"name": "resnet_tiny", "num_classes": 3, "weights_backbone": "DEFAULT"}, "backbone weights")])
def test_what_does_not_fit_together_is_refused_before_any_download(monkeypatch, arguments, message):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)             # calling it fails
    with pytest.raises(ValueError, match=message):
        build_model(**arguments)


def test_more_classes_than_a_mask_has_values_are_refused():
    with pytest.raises(ValueError, match="has 300 classes.*at most 255"):
        wrap(nn.Conv2d(3, 300, 1), num_classes=300)
