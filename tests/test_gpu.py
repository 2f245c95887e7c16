"""Whole programs on a GPU; all other tests compute on the CPU, wherever they run.

`test_these_programs_on_a_gpu` runs this file in a process that sees the GPU, or skips. Without one,
the same programs can be tried: DFSS_TEST_DEVICE=cpu python -m pytest tests/test_gpu.py
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VISIBLE_GPUS
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import distill
import evaluate
import export
import train_teacher
from bn_stats import METRICS, bn_distance, bn_layers, capture_bn_inputs
from kd_loss import channelwise_kd, pixelwise_kd
from models import build_model
from priority import SCHEDULES, progressive_weights, weighted_loss
from support import checkpoint, scenes, scoring, teacher_cache, training
from support.images import find_images, read_csv

REPOSITORY = Path(__file__).parent.parent
DEVICE = os.environ.get("DFSS_TEST_DEVICE")
needs_device = pytest.mark.skipif(not DEVICE, reason="see test_these_programs_on_a_gpu")
pytestmark = pytest.mark.gpu


def started(*words, cwd=REPOSITORY, **variables):
    """Run Python in another process with these variables (None: unset); return what came of it."""
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False,
        env={name: value for name, value in variables.items() if value is not None})


@pytest.mark.skipif(bool(DEVICE), reason="this is the process with the device")
def test_these_programs_on_a_gpu():
    gpus = {"CUDA_VISIBLE_DEVICES": VISIBLE_GPUS}
    there = started("-c", "import torch; torch.zeros(1).cuda()", **gpus)
    if there.returncode:
        pytest.skip(f"no GPU here: {there.stderr.strip().splitlines()[-1]}")
    done = started("-m", "pytest", "-q", __file__, DFSS_TEST_DEVICE="cuda", **gpus)
    assert done.returncode == 0, done.stdout


def test_formulas_stay_on_the_device_of_their_inputs():
    """Fake tensors have a shape and a device, but no values. To mix devices is an error."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model, images = build_model("resnet_tiny", 4).eval(), torch.rand(2, 3, 64, 64)
            weights, index = torch.rand(5), torch.tensor([0, 3])
        with capture_bn_inputs(model) as captured:
            logits = model(images)
        results = [bn_distance(captured, bn_layers(model), metric) for metric in METRICS]
        loss = pixelwise_kd(logits, logits) + channelwise_kd(logits, logits)
        for schedule in SCHEDULES:
            w = progressive_weights(weights, 0.5, schedule)
            results.append(weighted_loss(loss, w[index], w.mean()))
        assert {result.device.type for result in results} == {"cuda"}


def options(world, out, *more):
    """Return the words of a short run without labels on the small world, in float32."""
    line = (f"--dataset none --pool {world}/pool --teacher {world}/teacher.pt --device {DEVICE} "
            f"--budget 8 --steps 6 --batch-size 4 --views 3 --amp off --out {out}")
    return [*line.split(), *more]


@needs_device
def test_the_default_run_in_mixed_precision(tmp_path, monkeypatch):
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU does not compute in bfloat16")
    monkeypatch.chdir(tmp_path)
    scenes.write_scenes("runs/scenes-32x48", size=(32, 48), train=16, val=4, pool=24)
    config = train_teacher.Config                                     # the same path, but short
    monkeypatch.setattr(train_teacher, "Config", lambda **given: config(
        **given | {"steps": 5, "batch_size": 4}))
    monkeypatch.setattr(training, "CHECK_EVERY", 10)
    metrics = distill.main(f"--image-size 32 48 --budget 8 --steps 20 --batch-size 4 --device "
                           f"{DEVICE} --amp bfloat16".split())
    assert metrics["environment"]["precision"] == "torch.bfloat16"
    assert metrics["environment"]["device"].endswith("CPU") == (DEVICE == "cpu")
    (_, first), (_, last) = read_csv("runs/001/curve.csv")[1:]
    assert 0 < float(last) < float(first)


@needs_device
def test_a_run_is_that_of_the_cpu_within_rounding(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("support.figures.run_figure", lambda *_: None)
    distill.main(options(world, tmp_path / "cpu", "--device", "cpu"))
    words = options(world, tmp_path / "memory")
    scored = started("-m", "torch.distributed.run", "--nproc-per-node", "1", "-m",
                     "support.scoring", *words[:8], cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    monkeypatch.setattr(scoring, "STORE", tmp_path / "runs/scores")
    distill.main(words)
    assert "the scores of this pool are read from" in capsys.readouterr().out
    monkeypatch.setattr(teacher_cache, "MEMORY", 0)
    distill.main(options(world, tmp_path / "file", "--workers", "2"))
    cpu, *others = ([float(row[1]) for table in ("chosen.csv", "curve.csv")      # distances, losses
                     for row in read_csv(tmp_path / name / table)[1:]]
                    for name in ("cpu", "memory", "file"))
    assert len(cpu) == 9 and all(gpu == pytest.approx(cpu, rel=0.02) for gpu in others)    # TF32


@needs_device
def test_evaluation_and_masks_are_those_of_the_cpu_and_the_model_is_exported(world, tmp_path):
    mious, checkpoint_of = [], f"--checkpoint {world}/teacher.pt"
    for name, device in (("cpu", "cpu"), ("gpu", DEVICE)):
        words = f"{checkpoint_of} --device {device} --num-classes 8".split()
        labelled = [*words, "--dataset", "folder", "--data-root", str(world)]
        mious.append(evaluate.main(labelled)["miou"])
        evaluate.main([*words, "--images", f"{world}/pool", "--out", f"{tmp_path}/{name}"])
    assert mious[0] == pytest.approx(mious[1], abs=0.01)
    for path in find_images(tmp_path / "cpu"):
        same = np.asarray(Image.open(path)) == np.asarray(Image.open(tmp_path / "gpu" / path.name))
        assert same.mean() > 0.98
    export.main(f"{checkpoint_of} --out {tmp_path}/s.pt2".split())
    masks = torch.export.load(tmp_path / "s.pt2").module().to(DEVICE)(
        torch.rand(2, 3, 64, 96, device=DEVICE))
    assert masks.shape[-2:] == (64, 96)


KILLED_AT_STEP_5 = """
import os, sys, distill
from support import training

def deadly(self, loss, log=training.Training.log):
    return log(self, loss) if self.done < 5 else os._exit(9)

training.Training.log, training.SAVE_EVERY = deadly, 2
distill.main(sys.argv[1:])
"""


@needs_device
def test_deterministic_runs_are_equal_to_the_bit_also_if_killed_and_resumed(world, tmp_path):
    teach, program = REPOSITORY / "train_teacher.py", REPOSITORY / "distill.py"
    words = (f"--dataset folder --data-root {world} --split val --num-classes 8 --steps 6 "
             f"--image-size 32 48 --batch-size 4 --device {DEVICE} --deterministic --out").split()
    done = [started(teach, *words, out, cwd=tmp_path) for out in ("t 1", "t 2")]
    words = options(world, ".", "--deterministic", "--teacher", "t 1/teacher.pt", "--out")
    done.append(started(program, *words, "s 1", cwd=tmp_path))
    killed = started("-c", KILLED_AT_STEP_5, *words, "s 2", cwd=tmp_path)
    assert killed.returncode == 9 and checkpoint.load(tmp_path / "s 2/state.pt")["step"] == 4
    done.append(started(program, "--resume", "--out", "s 2", cwd=tmp_path))
    assert not any(run.returncode for run in done), [run.stderr for run in done]
    for name in ("t {}/teacher.pt", "s {}/student.pt"):
        a, b = (checkpoint.load(tmp_path / name.format(i))["state_dict"] for i in (1, 2))
        assert all(torch.equal(value, b[key]) for key, value in a.items())
