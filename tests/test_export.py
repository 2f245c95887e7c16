"""export.py: the file must run where this repository is not, and give the same masks."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import export
from models import build_model, wrap
from support.checkpoint import save_model

ELSEWHERE = """
import torch
try:
    import models
except ImportError:
    student = torch.export.load("student.pt2").module()
    torch.save([student(images).argmax(dim=1) for images in torch.load("images.pt")], "masks.pt")
"""


def scenery(*shape):
    """Return smooth random images: (B, H, W) -> (B, 3, H, W)."""
    return F.interpolate(torch.rand(shape[0], 3, 4, 4), shape[1:], mode="bilinear")


def masks(path, images):
    return torch.export.load(path).module()(images).argmax(dim=1)


@torch.no_grad()
def masks_of(model, images):
    return F.interpolate(model(images), images.shape[-2:], mode="bilinear").argmax(dim=1)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="exports ceil_mode for some sizes only")
def test_the_file_runs_without_this_repository_at_any_batch_and_size(tmp_path, capsys):
    torch.manual_seed(0)
    model = build_model("resnet_tiny", 5, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=(40, 56))
    nn.init.normal_(model.eval().net.head.weight)
    with torch.no_grad():                                        # no class is the usual one
        model.net.head.bias -= model(scenery(1, 96, 96)).mean((0, 2, 3))
    save_model(model, tmp_path / "student.pt")
    away = tmp_path / "away"
    export.main(["--checkpoint", str(tmp_path / "student.pt"), "--out", str(away / "student.pt2")])
    assert "same masks as the network, for any batch and any size" in capsys.readouterr().out
    images = [scenery(1, 40, 56), scenery(3, 65, 47)]
    torch.save(images, away / "images.pt")
    # -I: neither the folder of a script nor PYTHONPATH is searched, and no package is installed.
    done = subprocess.run([sys.executable, "-I", "-c", ELSEWHERE], cwd=away, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    for x, mask in zip(images, torch.load(away / "masks.pt"), strict=True):
        assert torch.equal(mask, masks_of(model, x)) and len(mask.unique()) > 1
    assert b"models.py" not in (away / "student.pt2").read_bytes()     # no trace of where it ran


class PadsInPython(nn.Conv2d):
    """A network that computes with the size of its input in Python numbers."""

    def forward(self, x):
        rows = 2 if int(x.shape[2]) % 3 else 5
        return super().forward(F.pad(x, (1, 1, rows, 2)))[..., rows - 1:-1, :]


class Draws(nn.Module):
    """A network that computes something else in each pass."""

    def forward(self, x):
        return torch.rand(x.shape[0], 4, *x.shape[2:]) + 0 * x[:, :1]


def test_a_network_that_only_exports_at_a_fixed_size_is_exported_so_and_this_is_said(tmp_path):
    model = wrap(PadsInPython(3, 4, 3), 4).eval()
    assert export.export(model, tmp_path / "s.pt2", (40, 56)) == "the size 40x56 only"
    images = scenery(3, 40, 56)
    assert torch.equal(masks(tmp_path / "s.pt2", images), masks_of(model, images))
    with pytest.raises(AssertionError, match="Guard failed"):
        masks(tmp_path / "s.pt2", scenery(1, 41, 56))


def test_a_file_that_gives_other_masks_is_not_written_and_replaces_none(tmp_path):
    (tmp_path / "s.pt2").write_text("a good one")
    with pytest.raises(ValueError, match=r"s.pt2 is not written: .*\(other masks in \d\d"):
        export.export(wrap(Draws(), 4), tmp_path / "s.pt2", (40, 56))
    assert (tmp_path / "s.pt2").read_text() == "a good one" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("size", [(40, 56), (33, 50)])
def test_a_padded_network_is_exported_for_any_size_from_any_size(tmp_path, size):
    torch.manual_seed(0)
    model = wrap(nn.Conv2d(3, 1, 8, stride=8), 1, multiple=8).eval()
    assert export.export(model, tmp_path / "s.pt2", size) == "any size"
    for images in (scenery(1, 48, 64), scenery(2, 47, 65)):
        assert torch.equal(masks(tmp_path / "s.pt2", images), masks_of(model, images))


def test_a_network_of_a_file_is_exported_with_and_without_a_checkpoint(tmp_path):
    (tmp_path / "nets.py").write_text("""
from torch import nn

def conv():
    network = nn.Conv2d(3, 2, 1).requires_grad_(False)
    network.weight[:], network.image_size = 0, (32, 40)
    return network
""")
    network, images = nn.Conv2d(3, 2, 1), torch.rand(2, 3, 32, 40)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "w.pth")
    line = f"--model {tmp_path}/nets.py:conv --out {tmp_path}/s.pt2"
    export.main(line.split())
    assert len(masks(tmp_path / "s.pt2", images).unique()) == 1
    export.main(f"{line} --checkpoint {tmp_path}/w.pth".split())
    assert torch.equal(masks(tmp_path / "s.pt2", images), masks_of(network, images))


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="name a checkpoint .*or --teacher-weights"):
        export.main([])
    save_model(build_model("resnet_tiny", 5), tmp_path / "sizeless.pt")
    with pytest.raises(ValueError, match="does not say its image size; give --image-size"):
        export.main(["--checkpoint", str(tmp_path / "sizeless.pt")])
