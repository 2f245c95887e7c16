"""networks.py: a network of a Python file, and state dicts as torchvision and others save them."""

import argparse
from contextlib import suppress

import pytest
import torch
import torchvision
from torch import nn

from models import build_model, wrap
from support.checkpoint import fingerprint, load_model, save, save_model
from support.networks import load_file, load_network

NETS = """
import neighbour
from torch import nn

def crack():
    network = nn.Conv2d(3, 1, 1)
    network.class_names, network.image_size = ("background", "crack"), (40, 56)
    return network

def street():
    return neighbour.Network(3, 3, 8, stride=8)

def unnamed():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

def broken():
    raise KeyError("weights\\nare not here")

def auxiliary():
    network = nn.Sequential(nn.Conv2d(3, 4, 1))
    network.aux_classifier = nn.Sequential(nn.Conv2d(4, 4, 1))
    return network

def odd():
    network = nn.Conv2d(3, 3, 1)
    network.class_names = ["road", "sky"]
    return network
"""
NEIGHBOUR = """
from torch import nn

class Network(nn.Conv2d):
    multiple, image_size = 8, (33, 44)
"""
WEIGHTS = build_model("resnet_tiny", 3).net.state_dict()


@pytest.fixture
def nets(tmp_path):
    """Return the path of a user's file with networks, which imports another file next to it."""
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path / "nets.py"


def test_a_function_of_a_file_gives_a_network_with_what_it_says_of_itself(nets):
    crack, street = (load_file(f"{nets}:{function}") for function in ("crack", "street"))
    x = torch.rand(1, 3, 5, 6)
    assert (crack.name, crack.num_classes, crack.image_size) == (f"{nets}:crack", 2, (40, 56))
    assert crack.class_names == ["background", "crack"] and not crack.training
    torch.testing.assert_close(crack(x)[:, 1:], crack.net(x))          # it takes RGB in [0, 1]
    assert (street.multiple, street.num_classes, street(x).shape) == (8, 3, (1, 3, 5, 6))
    assert load_file(f"{nets}:unnamed").class_names == [f"class {k}" for k in range(4)]


def test_a_student_takes_the_teachers_names_and_size_but_from_a_file_not_its_normalisation(nets):
    for spec, mean in ((f"{nets}:street", 0), ("resnet_tiny", 0.5)):
        student = load_network(spec, ["a", "b", "c"], (64, 96), mean=(0.5,) * 3)
        assert student.class_names == ["a", "b", "c"] and student.image_size == (64, 96)
        assert student.mean.unique().tolist() == [mean]
    with pytest.raises(ValueError, match=r"street has 3 classes, expected 2 \(a, b\)"):
        load_network(f"{nets}:street", ["a", "b"], (64, 96))


@pytest.mark.parametrize(("function", "message"), [
    ("unett", r"nets\.py:unett: NameError: there is no function 'unett'"),
    ("broken", r"nets\.py:broken: KeyError: .*weights"),
    ("odd", r"nets\.py:odd has 3 classes, expected 2 \(road, sky\)")])
def test_what_is_wrong_in_a_users_file_is_one_sentence(nets, function, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_file(f"{nets}:{function}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["nowhere.py:unet", "README.md:unet", "C:/nets.py", ":unet"])
def test_a_file_that_is_not_there_is_said_with_what_was_expected(spec):
    with pytest.raises(FileNotFoundError, match=r"there is no Python file .*file\.py:function"):
        load_file(spec)


@pytest.mark.parametrize(("name", "auxiliary"), [
    ("deeplabv3_mobilenet_v3_large", True), ("lraspp_mobilenet_v3_large", False)])
def test_a_checkpoint_of_torchvisions_training_script_is_loaded(tmp_path, capsys, name, auxiliary):
    theirs = torchvision.models.get_model(name, weights_backbone=None, num_classes=5,
                                          **{"aux_loss": True} if auxiliary else {}).eval()
    state = dict(reversed(theirs.state_dict().items()))        # the auxiliary head comes first
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
                "args": argparse.Namespace(model=name, lr=0.1, amp=False)}, tmp_path / "model.pth")
    model, x = load_model(tmp_path / "model.pth", name), torch.rand(1, 3, 64, 64)
    assert ("left out" in capsys.readouterr().out) == auxiliary
    assert (model.name, model.num_classes, model.training) == (name, 5, False)
    with torch.inference_mode():
        assert torch.equal(model(x), wrap(theirs)((x - model.mean) / model.std))


@pytest.mark.parametrize(("prefix", "place", "classes"), [
    ("", None, 7), ("", "model", 1), ("", "model_state_dict", 3), ("module.", "ema", 3),
    ("module._orig_mod.", "state_dict", 3), ("model.net.", "state_dict", 3)])
def test_a_state_dict_is_found_wherever_programs_put_it_and_whatever_they_prefix(
        tmp_path, capsys, prefix, place, classes):
    theirs = build_model("resnet_tiny", classes).net
    state = {"n_averaged": torch.tensor(3)} if place == "ema" else {}             # AveragedModel's
    state |= {prefix + key: value for key, value in theirs.state_dict().items()}
    torch.save({place: state, "epoch": 3} if place else state, tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth", "resnet_tiny")
    assert model.num_classes == max(classes, 2)             # one output makes two classes
    assert fingerprint(model.net) == fingerprint(theirs)
    said = "left out 1 values that the network does not have: n_averaged"         # and no others
    assert (said in capsys.readouterr().out) == (place == "ema")


def test_a_network_with_an_auxiliary_head_of_its_own_keeps_it(tmp_path, nets):
    model = load_file(f"{nets}:auxiliary")
    save_model(model, tmp_path / "m.pt")
    assert fingerprint(load_model(tmp_path / "m.pt", f"{nets}:auxiliary")) == fingerprint(model)


def test_a_file_without_a_dict_is_no_state_dict(tmp_path):
    save(torch.zeros(3), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w.pt holds no state dict.*holds \['Tensor'\]"):
        load_model(tmp_path / "w.pt", "resnet_tiny")


def test_weights_fill_the_empty_network_of_a_file(tmp_path, nets):
    old = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict()
    del old["1.num_batches_tracked"]                               # as before torch 0.4.1
    torch.save({"state_dict": old}, tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth", f"{nets}:unnamed")
    assert torch.equal(model.net[0].weight, old["0.weight"]) and model.num_classes == 4


def test_a_safetensors_file_is_loaded_or_its_package_is_asked_for(tmp_path):
    path, kind = tmp_path / "w.safetensors", "for the package safetensors: install it"
    with suppress(ImportError):
        from safetensors.torch import save_file
        save_file(WEIGHTS, path)
        model = load_model(path, "resnet_tiny")
        assert torch.equal(model.net.head.weight, WEIGHTS["head.weight"])
        kind = "damaged"
    path.write_bytes(b"tensors")
    with pytest.raises(ValueError, match=f"w.safetensors is {kind}"):
        load_model(path, "resnet_tiny")


def test_a_classes_file_next_to_a_state_dict_names_its_classes(tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.pth")
    assert load_model(tmp_path / "w.pth", "resnet_tiny").class_names[2] == "class 2"
    (tmp_path / "classes.txt").write_text("road\nsky\nvoid\n")
    assert load_model(tmp_path / "w.pth", "resnet_tiny").class_names == ["road", "sky", "void"]
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    with pytest.raises(ValueError, match=r"has 3 classes, expected 2 \(road, sky\)"):
        load_model(tmp_path / "w.pth", "resnet_tiny")


@pytest.mark.parametrize(("key", "value", "message"), [
    ("head.weight", torch.zeros(3, 9, 1, 1), "size mismatch for head.weight.*9, 1, 1.*24, 1, 1"),
    ("extra.weight", torch.ones(1), 'Unexpected key.*"extra.weight"')])
def test_a_key_that_does_not_fit_is_named_with_what_was_expected(tmp_path, key, value, message):
    torch.save({**WEIGHTS, key: value}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"w.pth does not fit the network: {message}") as found:
        load_model(tmp_path / "w.pth", "resnet_tiny")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("state", [[1, 2], {"state_dict": {}}, {"format": "dfss-0", "net": {}}])
def test_a_file_without_weights_or_without_the_name_of_its_network_is_refused(tmp_path, state):
    save(state, tmp_path / "m.pt")
    for name, message in ((None, "no model of this repository; name its network"),
                          ("resnet_tiny", "no state dict, neither bare nor as model")):
        with pytest.raises(ValueError, match=rf"m\.pt holds {message}"):
            load_model(tmp_path / "m.pt", name)


def test_a_network_of_a_file_comes_back_if_the_caller_names_the_file_and_not_else(tmp_path, nets):
    model = load_network(f"{nets}:street", ["a", "b", "c"], (64, 96))
    nn.init.normal_(model.net.bias)
    save_model(model, tmp_path / "student.pt")
    nets.write_text(NETS + f"\nopen({str(tmp_path / 'it ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"holds .*nets\.py:street; name its network as well"):
        load_model(tmp_path / "student.pt")
    assert not (tmp_path / "it ran").exists()
    back = load_model(tmp_path / "student.pt", f"{nets}:street")
    assert torch.equal(back.net.bias, model.net.bias) and back.multiple == 8
    assert back.class_names == ["a", "b", "c"] and back.image_size == (64, 96)


def test_a_network_that_nobody_could_build_again_is_refused_when_saving(tmp_path):
    with pytest.raises(ValueError, match=r"Conv2d cannot be built again .*file\.py:function"):
        save_model(wrap(nn.Conv2d(3, 2, 1), 2), tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []
