"""Whole programs on a GPU; all other tests compute on the CPU, wherever they run.

`test_these_programs_on_a_gpu` runs this file in a process that sees the GPU, or skips. Without one,
the same programs can be tried: DFSS_TEST_DEVICE=cpu python -m pytest tests/test_gpu.py
"""

import copy
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
from bn_stats import METRICS, bn_distance, bn_layers, capture_bn_inputs, image_distances
from kd_loss import channelwise_kd, pixelwise_kd
from models import build_model
from priority import SCHEDULES, progressive_weights, weighted_loss
from support import checkpoint, scenes, scoring, teacher_cache, training
from support.data import Pool
from support.images import find_images, read_csv

REPOSITORY = Path(__file__).parent.parent
DEVICE = os.environ.get("DFSS_TEST_DEVICE")
needs_device = pytest.mark.skipif(not DEVICE, reason="see test_these_programs_on_a_gpu")
pytestmark = pytest.mark.gpu


def started(*words, cwd=REPOSITORY, environment=os.environ, **variables):
    """Run Python in another process; return what subprocess.run returned."""
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False,
        env={**environment, "PYTHONPATH": str(REPOSITORY), **variables})


@pytest.mark.skipif(bool(DEVICE), reason="this is the process with the device")
def test_these_programs_on_a_gpu():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": VISIBLE_GPUS}
    environment = {name: value for name, value in environment.items() if value is not None}
    there = started("-c", "import torch; torch.zeros(1).cuda()", environment=environment)
    if there.returncode:
        pytest.skip(f"no GPU here: {there.stderr.strip().splitlines()[-1]}")
    done = started("-m", "pytest", "-q", __file__, environment=environment, DFSS_TEST_DEVICE="cuda")
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(bool(DEVICE), reason="this process does not hide the device")
def test_all_other_tests_compute_on_the_cpu_where_there_is_a_gpu(tmp_path):
    (tmp_path / "gpu.py").write_text(                             # a GPU, if it is not hidden
        "import os, torch\n"
        "torch.cuda.is_available = lambda: os.environ.get('CUDA_VISIBLE_DEVICES') != ''\n")
    done = started("-m", "pytest", "-q", "-p", "gpu", "tests/test_options.py", "-k",
                   "compute_on_the_cpu", CUDA_VISIBLE_DEVICES="0",
                   PYTHONPATH=f"{REPOSITORY}{os.pathsep}{tmp_path}")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


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
@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_the_default_run_in_mixed_precision(tmp_path, monkeypatch, amp):
    if DEVICE == "cuda" and amp == "bfloat16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU does not compute in bfloat16")
    monkeypatch.chdir(tmp_path)
    write, config = scenes.write_scenes, train_teacher.Config         # the same path, but short
    few, short = {"train": 16, "val": 4, "pool": 24}, {"steps": 5, "batch_size": 4}
    monkeypatch.setattr(scenes, "write_scenes", lambda root, size: write(root, size=size, **few))
    monkeypatch.setattr(train_teacher, "Config", lambda **given: config(**given | short))
    monkeypatch.setattr(training, "CHECK_EVERY", 10)
    metrics = distill.main(f"--image-size 32 48 --budget 8 --steps 20 --batch-size 4 --device "
                           f"{DEVICE} --amp {amp}".split())
    assert metrics["environment"]["precision"] == f"torch.{amp}"
    assert metrics["environment"]["device"].endswith("CPU") == (DEVICE == "cpu")
    assert all(0 <= metrics[f"{name}_miou"] <= 1 for name in ("teacher", "student", "agreement"))
    first, last = read_csv(tmp_path / "runs/001/curve.csv")[1:]
    assert 0 < float(last[1]) < float(first[1])
    assert all(x.isfinite().all() and x.dtype in (torch.float32, torch.int64)
               for x in checkpoint.load("runs/001/student.pt")["state_dict"].values())


@needs_device
@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_those_of_the_cpu_within_rounding_and_so_is_the_selection(world, metric):
    teacher = checkpoint.load_model(world / "teacher.pt")
    pool = Pool(find_images(world / "pool"), (32, 48))

    def scores(device):
        network = copy.deepcopy(teacher).to(device, memory_format=torch.channels_last)
        return scoring.cached_scores(lambda images, _: image_distances(
            network, images, None, metric), pool, torch.device(device), workers=2)[0]

    cpu, gpu = scores("cpu"), scores(DEVICE)
    torch.testing.assert_close(gpu, cpu, rtol=1e-2, atol=0)           # convolutions use TF32
    ordered = cpu.sort().values
    budget = 5 + (ordered[6:16] / ordered[5:15]).argmax() + 1         # where the gap is widest
    assert ordered[budget] / ordered[budget - 1] > 1.02
    assert set(gpu.argsort()[:budget].tolist()) == set(cpu.argsort()[:budget].tolist())


@needs_device
def test_a_run_with_scores_of_torchrun_and_logits_in_a_file_is_that_of_the_cpu_within_rounding(
        world, tmp_path, monkeypatch, capsys):
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
    cpu, *others = ([float(loss) for _, loss in read_csv(tmp_path / name / "curve.csv")[1:]]
                    for name in ("cpu", "memory", "file"))
    assert all(losses == pytest.approx(cpu, rel=0.02) for losses in others)


@needs_device
def test_evaluation_and_masks_are_those_of_the_cpu_and_the_model_is_exported(world, tmp_path):
    results, checkpoint_of = {}, ["--checkpoint", f"{world}/teacher.pt", "--device"]
    for device in ("cpu", DEVICE):
        words = [*checkpoint_of, device, "--num-classes", "8"]
        results[device] = evaluate.main([*words, "--dataset", "folder", "--data-root", str(world)])
        evaluate.main([*words, "--images", f"{world}/pool", "--out", str(tmp_path / device)])
    assert results[DEVICE]["miou"] == pytest.approx(results["cpu"]["miou"], abs=0.01)
    for path in find_images(tmp_path / "cpu"):
        same = np.asarray(Image.open(path)) == np.asarray(Image.open(tmp_path / DEVICE / path.name))
        assert same.mean() > 0.98
    export.main([*checkpoint_of[:2], "--out", str(tmp_path / "s.pt2")])
    masks = torch.export.load(tmp_path / "s.pt2").module().to(DEVICE)(
        torch.rand(2, 3, 64, 96, device=DEVICE))
    assert masks.shape[-2:] == (64, 96)


KILLED_AT_STEP_5 = """
import os, sys, distill
from support import training

def deadly(*args, weighted_loss=distill.weighted_loss, calls=[]):
    calls.append(args)
    return weighted_loss(*args) if len(calls) < 6 else os._exit(9)

distill.weighted_loss, training.SAVE_EVERY = deadly, 2
distill.main(sys.argv[1:])
"""


@needs_device
def test_deterministic_runs_are_equal_to_the_bit_also_if_killed_and_resumed(world, tmp_path):
    teachers, students = ([tmp_path / f"{kind} {i}" for i in "12"] for kind in ("t", "s"))
    words = (f"--dataset folder --data-root {world} --split val --num-classes 8 --steps 6 "
             f"--image-size 32 48 --batch-size 4 --device {DEVICE} --deterministic --out").split()
    done = [started(REPOSITORY / "train_teacher.py", *words, out) for out in teachers]
    program, teacher = REPOSITORY / "distill.py", teachers[0] / "teacher.pt"
    words = options(world, ".", "--deterministic", "--teacher", teacher, "--out")
    done.append(started(program, *words, students[0], cwd=tmp_path))
    killed = started("-c", KILLED_AT_STEP_5, *words, students[1], cwd=tmp_path)
    assert killed.returncode == 9 and checkpoint.load(students[1] / "state.pt")["step"] == 4
    done.append(started(program, "--resume", "--out", students[1], cwd=tmp_path))
    assert not any(run.returncode for run in done), [run.stderr for run in done]
    for pair, name in ((teachers, "teacher.pt"), (students, "student.pt")):
        a, b = (checkpoint.load(out / name)["state_dict"] for out in pair)
        assert all(torch.equal(value, b[key]) for key, value in a.items())
