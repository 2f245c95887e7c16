"""networks.py: a network of a Python file, and state dicts as torchvision and others save them."""

import argparse

import pytest
import torch
import torchvision
from torch import nn

from models import build_model, wrap
from support.checkpoint import load_model, save, save_model
from support.networks import load_network

NETS = """
import neighbour
from torch import nn

def crack():
    network = nn.Conv2d(3, 1, 1)
    network.class_names, network.image_size = ("background", "crack"), (40, 56)
    return network

def street():
    return neighbour.Network(multiple=8)

def unnamed():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

def text():
    return "a network"

def tuples():
    class Pair(nn.Conv2d):
        def forward(self, x):
            return x, x
    return Pair(3, 2, 1)

def broken():
    raise KeyError("weights\\nare not here")

def odd():
    network = nn.Conv2d(3, 3, 1)
    network.class_names = ["road", "sky"]
    return network
"""
NEIGHBOUR = """
from torch import nn

class Network(nn.Conv2d):
    def __init__(self, multiple):
        super().__init__(3, 3, 8, stride=8)
        self.multiple, self.image_size = multiple, (33, 44)
"""


@pytest.fixture
def nets(tmp_path):
    """Return the path of a user's file with networks, which imports another file next to it."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "neighbour.py").write_text(NEIGHBOUR)
    (tmp_path / "code" / "nets.py").write_text(NETS)
    return tmp_path / "code" / "nets.py"


def test_a_function_of_a_file_gives_a_network_with_what_it_says_of_itself(nets):
    crack = load_network(f"{nets}:crack")
    assert (crack.name, crack.num_classes, crack.image_size) == (f"{nets}:crack", 2, (40, 56))
    assert crack.class_names == ["background", "crack"] and not crack.training
    x = torch.rand(1, 3, 5, 6)
    torch.testing.assert_close(crack(x)[:, 1:], crack.net(x))          # it takes RGB in [0, 1]
    street = load_network(f"{nets}:street")
    assert (street.multiple, street.num_classes) == (8, 3)
    assert street(torch.rand(1, 3, 9, 17)).shape == (1, 3, 9, 17)
    assert load_network(f"{nets}:unnamed").class_names == [f"class {k}" for k in range(4)]


def test_a_student_of_a_file_takes_the_teachers_names_and_size_but_not_its_normalisation(nets):
    student = load_network(f"{nets}:street", 3, ["a", "b", "c"], mean=(0.5,) * 3, std=(0.1,) * 3,
                           image_size=(64, 96))
    assert student.class_names == ["a", "b", "c"] and student.image_size == (64, 96)
    assert student.mean.abs().max() == 0 and student.std.unique().tolist() == [1]
    built = load_network("resnet_tiny", 3, ["a", "b", "c"], mean=(0.5,) * 3, image_size=(64, 96))
    assert built.mean.unique().tolist() == [0.5] and built.image_size == (64, 96)


@pytest.mark.parametrize(("function", "message"), [
    ("unett", r"nets\.py:unett failed: NameError: there is no function 'unett'"),
    ("text", r"nets\.py:text failed: TypeError: 'str' object is not callable"),
    ("tuples", r"nets\.py:tuples failed: .*must return logits .*got tuple"),
    ("broken", r"nets\.py:broken failed: KeyError: .*weights"),
    ("odd", r"nets\.py:odd has 3 classes, expected 2 \(road, sky\)")])
def test_what_is_wrong_in_a_users_file_is_one_sentence(nets, function, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_network(f"{nets}:{function}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["nowhere.py:unet", "README.md:unet", "C:/nets.py", ":unet"])
def test_a_file_that_is_not_there_is_said_with_what_was_expected(spec):
    with pytest.raises(FileNotFoundError, match=r"there is no Python file .*file\.py:function"):
        load_network(spec)


def test_another_number_of_classes_than_expected_is_said(nets):
    with pytest.raises(ValueError, match="street has 3 classes, expected 11"):
        load_network(f"{nets}:street", 11)


# ---------------------------------------------------------------- state dicts of others

@pytest.mark.parametrize(("name", "auxiliary"), [
    ("deeplabv3_mobilenet_v3_large", True), ("lraspp_mobilenet_v3_large", False)])
def test_a_checkpoint_of_torchvisions_training_script_is_loaded(tmp_path, capsys, name, auxiliary):
    theirs = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5,
                                          **{"aux_loss": True} if auxiliary else {}).eval()
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    state = dict(reversed(theirs.state_dict().items()))        # the auxiliary head comes first
    torch.save({"model": state, "optimizer": optimiser.state_dict(), "epoch": 29,
                "args": argparse.Namespace(model=name, lr=0.1, amp=False)}, tmp_path / "model.pth")
    model, x = load_model(tmp_path / "model.pth", name), torch.rand(1, 3, 64, 64)
    assert ("left out" in capsys.readouterr().out) == auxiliary
    assert (model.name, model.num_classes, model.training) == (name, 5, False)
    with torch.inference_mode():
        assert torch.equal(model(x), wrap(theirs)((x - model.mean) / model.std))


@pytest.mark.parametrize(("prefix", "place", "classes"), [
    ("", None, 7), ("", "model", 1), ("", "ema", 3), ("", "model_state_dict", 3),
    ("module.", None, 3), ("module._orig_mod.", "state_dict", 3), ("model.net.", "state_dict", 3)])
def test_a_state_dict_is_found_wherever_programs_put_it_and_whatever_they_prefix(
        tmp_path, prefix, place, classes):
    theirs = build_model("resnet_tiny", classes).net.state_dict()
    state = {prefix + key: value for key, value in theirs.items()}
    torch.save({place: state, "epoch": 3} if place else state, tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth", "resnet_tiny")
    assert model.num_classes == max(classes, 2)             # one output makes two classes
    assert all(torch.equal(model.net.state_dict()[key], value) for key, value in theirs.items())


def test_averaged_weights_lose_only_their_count_which_is_said(tmp_path, capsys):
    ema = torch.optim.swa_utils.AveragedModel(build_model("resnet_tiny", 3).net)
    torch.save({"ema": ema.state_dict()}, tmp_path / "w.pth")
    load_model(tmp_path / "w.pth", "resnet_tiny")
    assert "left out 1 values that the network does not have: n_averaged" in capsys.readouterr().out


def test_weights_fill_the_empty_network_of_a_file(tmp_path, nets):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    old = {key: value for key, value in network.state_dict().items()
           if not key.endswith("num_batches_tracked")}             # as before torch 0.4.1
    torch.save({"state_dict": old}, tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth", f"{nets}:unnamed")
    assert torch.equal(model.net[0].weight, network[0].weight) and model.num_classes == 4


def test_a_safetensors_file_is_loaded_or_its_package_is_asked_for(tmp_path, monkeypatch):
    weights = build_model("resnet_tiny", 3).net.state_dict()
    try:
        from safetensors.torch import save_file
    except ImportError:
        (tmp_path / "w.safetensors").write_bytes(b"tensors")
        with pytest.raises(ValueError, match="w.safetensors is a file for the package safet"):
            load_model(tmp_path / "w.safetensors", "resnet_tiny")
        return
    save_file(weights, tmp_path / "w.safetensors")
    model = load_model(tmp_path / "w.safetensors", "resnet_tiny")
    assert torch.equal(model.net.head.weight, weights["head.weight"])
    (tmp_path / "w.safetensors").write_bytes(b"tensors")
    with pytest.raises(ValueError, match="w.safetensors is damaged"):
        load_model(tmp_path / "w.safetensors", "resnet_tiny")


def test_a_classes_file_next_to_a_state_dict_names_its_classes(tmp_path):
    torch.save(build_model("resnet_tiny", 3).net.state_dict(), tmp_path / "w.pth")
    assert load_model(tmp_path / "w.pth", "resnet_tiny").class_names[2] == "class 2"
    (tmp_path / "classes.txt").write_text("road\nsky\nvoid\n")
    assert load_model(tmp_path / "w.pth", "resnet_tiny").class_names == ["road", "sky", "void"]
    named = load_model(tmp_path / "w.pth", "resnet_tiny", class_names=["a", "b", "c"])
    assert named.class_names == ["a", "b", "c"]
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    with pytest.raises(ValueError, match=r"has 3 classes, expected 2 \(road, sky\)"):
        load_model(tmp_path / "w.pth", "resnet_tiny")


def test_a_key_that_does_not_fit_is_named_with_what_was_expected(tmp_path):
    weights = build_model("resnet_tiny", 3).net.state_dict()
    other = {"head.weight": torch.zeros(3, 9, 1, 1)}
    for name, change, message in (
            ("resnet_tiny", other, "size mismatch for head.weight.*3, 9, 1, 1.*3, 24, 1, 1"),
            ("resnet_tiny", {"extra.weight": torch.ones(1)}, 'Unexpected key.*"extra.weight"')):
        torch.save({**weights, **change}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=f"w.pth does not fit the network: {message}") as found:
            load_model(tmp_path / "w.pth", name)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("state", [[1, 2], {"state_dict": {}}, {"epoch": 3, "net": {"a": 1}}])
def test_a_file_without_weights_says_what_it_holds(tmp_path, state):
    save(state, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m\.pt holds no state dict, neither bare nor as model"):
        load_model(tmp_path / "m.pt", "resnet_tiny")


# ---------------------------------------------------------------- our checkpoints of their networks

def test_a_network_of_a_file_comes_back_if_the_caller_names_the_file_and_not_else(tmp_path, nets):
    model = load_network(f"{nets}:street", 3, ["a", "b", "c"], image_size=(64, 96))
    nn.init.normal_(model.net.bias)
    save_model(model, tmp_path / "student.pt")
    nets.write_text(NETS + f"\nopen({str(tmp_path / 'it ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"holds .*nets\.py:street; name its network as well"):
        load_model(tmp_path / "student.pt")
    assert not (tmp_path / "it ran").exists()
    back = load_model(tmp_path / "student.pt", f"{nets}:street")
    assert (tmp_path / "it ran").exists()
    assert torch.equal(back.net.bias, model.net.bias) and back.multiple == 8
    assert back.class_names == ["a", "b", "c"] and back.image_size == (64, 96)
    with pytest.raises(ValueError, match="does not fit the network: Missing key"):
        load_model(tmp_path / "student.pt", "resnet_tiny")


def test_a_network_that_nobody_could_build_again_is_refused_when_saving(tmp_path):
    with pytest.raises(ValueError, match=r"Conv2d cannot be built again .*file\.py:function"):
        save_model(wrap(nn.Conv2d(3, 2, 1), 2), tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []
