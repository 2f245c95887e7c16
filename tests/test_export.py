"""export.py: the file must run where this repository is not, and give the same masks."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import export
from models import build_model
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


def checkpoint(path, name="resnet_tiny", classes=5):
    """Write a network whose untrained head does not call every pixel the same; return it."""
    torch.manual_seed(0)
    model = build_model(name, classes, mean=(0.5,) * 3, std=(0.25,) * 3, image_size=(40, 56)).eval()
    nn.init.normal_(model.net.head.weight)
    with torch.no_grad():                                        # no class is the usual one
        model.net.head.bias -= model(scenery(1, 96, 96)).mean((0, 2, 3))
    save_model(model, path)
    return model


def test_the_file_runs_without_this_repository_at_any_batch_and_size(tmp_path, capsys):
    model = checkpoint(tmp_path / "student.pt")
    away = tmp_path / "away"
    away.mkdir()
    rows = export.main(["--checkpoint", str(tmp_path / "student.pt"), "--device", "cpu",
                        "--out", str(away / "student.pt2")])
    images = [scenery(1, 40, 56), scenery(3, 65, 47)]
    torch.save(images, away / "images.pt")
    # -I: neither the folder of a script nor PYTHONPATH is searched, and no package is installed.
    done = subprocess.run([sys.executable, "-I", "-c", ELSEWHERE], cwd=away, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = [F.interpolate(model(x), x.shape[-2:], mode="bilinear").argmax(dim=1)
                    for x in images]
    found = torch.load(away / "masks.pt")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(len(mask.unique()) > 1 for mask in expected)
    assert b"models.py" not in (away / "student.pt2").read_bytes()     # no trace of where it ran
    assert list(rows) == ["student"] and "same masks" in capsys.readouterr().out


def test_the_cost_of_teacher_and_student_stands_side_by_side(tmp_path, capsys):
    for name in ("resnet_small", "resnet_tiny"):
        checkpoint(tmp_path / f"{name}.pt", name)
    rows = export.main(["--checkpoint", str(tmp_path / "resnet_tiny.pt"), "--teacher",
                        str(tmp_path / "resnet_small.pt"), "--device", "cpu",
                        "--image-size", "96", "128"])
    parameters, macs, ms = rows["student"]
    assert rows["teacher"][0] > 10 * parameters and rows["teacher"][1] > 10 * macs
    assert rows["teacher"][2] > ms > 0
    lines = capsys.readouterr().out.splitlines()
    assert "96x128 on cpu" in lines[0] and len({len(line) for line in lines[1:]}) == 1
    assert lines[3].split() == ["student", f"{parameters / 1e6:.2f}", "M", f"{macs / 1e6:.0f}",
                                "M", f"{ms:.1f}", "ms"]


def test_a_file_that_gives_other_masks_is_reported(tmp_path, monkeypatch):
    model = checkpoint(tmp_path / "student.pt")

    other = export.AtImageSize(model)
    program = SimpleNamespace(graph=SimpleNamespace(nodes=[]),
                              module=lambda: lambda images: -other(images))
    monkeypatch.setattr(torch.export, "export", lambda *args, **how: program)
    monkeypatch.setattr(torch.export, "save", lambda program, file: None)
    monkeypatch.setattr(torch.export, "load", lambda path: program)
    with pytest.raises(ValueError, match=r"s.pt2 gives other masks .*\(1, 3, 40, 56\)"):
        export.export(model, tmp_path / "s.pt2", (40, 56))


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(SystemExit):
        export.main([])                                          # --checkpoint is required
    model = checkpoint(tmp_path / "student.pt")
    with pytest.raises(ValueError, match=r"\(32, 24\) is too small"):
        export.export(model, tmp_path / "s.pt2", (32, 24))
    model.image_size = None
    save_model(model, tmp_path / "sizeless.pt")
    with pytest.raises(ValueError, match="sizeless.pt does not say its image size"):
        export.main(["--checkpoint", str(tmp_path / "sizeless.pt")])
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        export.main(["--checkpoint", str(tmp_path / "none.pt")])
