"""checkpoint.py: what is written comes back bit for bit, safely, and is never half written."""

import json
import os
import pickle

import pytest
import torch
from conftest import with_random_statistics
from torch import nn

from models import build_model
from support.checkpoint import atomic, fingerprint, load, load_model, save, save_json, save_model


def trained(**how):
    return with_random_statistics(build_model("resnet_tiny", 4, **how))


@pytest.fixture
def saved(tmp_path):
    save_model(trained(), tmp_path / "m.pt")
    return tmp_path / "m.pt"


def test_a_model_comes_back_with_all_that_belongs_to_it(tmp_path):
    model = trained(mean=(0.1, 0.2, 0.3), std=(1, 0.5, 0.2), class_names="abcd",
                    image_size=(64, 96))
    save_model(model, tmp_path / "new" / "m.pt")
    back = load_model(tmp_path / "new" / "m.pt")
    assert (back.name, back.num_classes, back.class_names) == ("resnet_tiny", 4, list("abcd"))
    assert back.image_size == (64, 96) and not back.training
    assert fingerprint(back) == fingerprint(model)


def test_one_bit_of_one_buffer_changes_the_fingerprint():
    model = trained()
    mark, mean = fingerprint(model), model.net.stem[1].running_mean
    before = mean[5].item()
    mean[5] = torch.nextafter(mean[5], torch.tensor(9.0))
    assert fingerprint(model) != mark
    mean[5] = before
    assert fingerprint(model) == mark == fingerprint(model.to(memory_format=torch.channels_last))


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo > '{self.marker}'",)


@pytest.mark.parametrize(("write", "read"), [
    (torch.save, lambda path: torch.load(path, weights_only=False)),
    (lambda x, path: path.write_bytes(pickle.dumps(x, 2)),
     lambda path: pickle.loads(path.read_bytes()))])
def test_a_file_that_holds_code_is_refused_and_the_code_is_not_run(tmp_path, write, read):
    path, marker = tmp_path / "evil.pt", tmp_path / "it ran"
    write({"format": "dfss-1", "model": Malicious(marker)}, path)
    message = r"evil\.pt is damaged, or holds code \(.*\) \(nothing in it was run"
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path)
    assert "weights_only" not in str(caught.value)       # torch's way around the safeguard
    assert "\n" not in str(caught.value) and not marker.exists()
    read(path)
    assert marker.exists()                                       # so the danger was real


def test_a_file_of_another_program_is_named_for_what_it_is(tmp_path):
    network, x = nn.Conv2d(3, 2, 1), torch.rand(1, 3, 4, 4)
    torch.jit.trace(network, x).save(tmp_path / "script.pt")
    torch.export.save(torch.export.export(network, (x,)), tmp_path / "exported.pt2")
    program = r".*holds code \(a whole network, a TorchScript or exported program\)"
    for path, kind in ((tmp_path / "script.pt", program), (tmp_path, "not a readable file"),
                       (tmp_path / "exported.pt2", program)):
        with pytest.raises(ValueError, match=f"{path.name} is {kind} .*expected a student.pt, a t"):
            load_model(path, "resnet_tiny")


@pytest.mark.parametrize("content", [0, 100, 30_000, -200, b"GIF89a", b"\x80\x02", b"}q", b"I1\na"])
def test_a_truncated_file_or_one_of_another_kind_is_one_clear_sentence(saved, content):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:content] if isinstance(content, int) else content)
    with pytest.raises(ValueError, match=r"m\.pt is damaged, or holds code") as caught:
        load(saved)
    assert "\n" not in str(caught.value)


def test_a_new_file_appears_only_when_it_is_whole_and_an_error_leaves_the_old_one(tmp_path):
    path = tmp_path / "deeper" / "f.json"
    with atomic(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    save_json({"old": 1}, path)
    with pytest.raises(KeyError), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert json.loads(path.read_text()) == {"old": 1} and list(path.parent.iterdir()) == [path]


def test_a_disk_that_fills_up_keeps_the_old_checkpoint(saved):
    resource = pytest.importorskip("resource")                   # not on Windows
    before, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))          # bytes a file
        with pytest.raises(OSError, match=r"could not write .*m\.pt: "):
            save({"new": torch.ones(100_000)}, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]
