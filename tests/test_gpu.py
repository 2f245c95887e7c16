"""Whole programs on a GPU; all other tests compute on the CPU, wherever they run.

`test_these_programs_on_a_gpu` asks another process whether there is a GPU, and runs this file in a
third, which sees it. A machine without a GPU skips it. There, the same programs can be tried:

    DFSS_TEST_DEVICE=cpu python -m pytest tests/test_gpu.py
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
import train_teacher
from bn_stats import METRICS, bn_distance, bn_layers, capture_bn_inputs, image_distances
from kd_loss import channelwise_kd, pixelwise_kd
from models import build_model
from priority import SCHEDULES, progressive_weights, weighted_loss
from support import checkpoint, scenes, scoring, teacher_cache, training
from support.data import Pool
from support.images import find_images, read_csv

REPOSITORY = Path(__file__).parent.parent
PROGRAM = REPOSITORY / "distill.py"
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
    environment = dict(os.environ)
    del environment["CUDA_VISIBLE_DEVICES"]                       # set by conftest.py
    if VISIBLE_GPUS is not None:
        environment["CUDA_VISIBLE_DEVICES"] = VISIBLE_GPUS
    there = started("-c", "import torch; torch.zeros(1).cuda()", environment=environment)
    if there.returncode:
        pytest.skip(f"no GPU here: {there.stderr.strip().splitlines()[-1]}")
    done = started("-m", "pytest", "-q", __file__, environment=environment, DFSS_TEST_DEVICE="cuda")
    assert done.returncode == 0, done.stdout


A_GPU_IF_IT_IS_NOT_HIDDEN = """
import os, torch
torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""
"""


@pytest.mark.skipif(bool(DEVICE), reason="this process does not hide the device")
def test_all_other_tests_compute_on_the_cpu_where_there_is_a_gpu(tmp_path):
    (tmp_path / "gpu.py").write_text(A_GPU_IF_IT_IS_NOT_HIDDEN)
    done = started("-m", "pytest", "-q", "-p", "gpu", "tests/test_options.py", "-k",
                   "compute_on_the_cpu", CUDA_VISIBLE_DEVICES="0",
                   PYTHONPATH=f"{REPOSITORY}{os.pathsep}{tmp_path}")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


# ---------------------------------------------------------------- without a GPU

@pytest.mark.parametrize("name", ["resnet_tiny", "deeplabv3_mobilenet_v2"])
def test_formulas_stay_on_the_device_of_their_inputs(name):
    """Fake tensors have a shape and a device, but no values. To mix devices is an error."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model, images = build_model(name, 4).eval(), torch.rand(2, 3, 64, 64)
            weights, index = torch.rand(5), torch.tensor([0, 3])
        with capture_bn_inputs(model) as captured:
            logits = model(images)
        results = [bn_distance(captured, bn_layers(model), metric) for metric in METRICS]
        teacher_logits = teacher_cache.resize(logits.detach(), logits.shape[-2:])
        losses = pixelwise_kd(logits, teacher_logits) + channelwise_kd(logits, teacher_logits)
        for schedule in SCHEDULES:
            w = progressive_weights(weights, 0.5, schedule)
            results.append(weighted_loss(losses, w[index], w.mean()))
        assert {result.device.type for result in results} == {"cuda"}


# ---------------------------------------------------------------- on the device

def options(world, out, *more):
    """Return the words of a short run without labels on the small world, in float32."""
    line = (f"--dataset none --pool {world}/pool --teacher {world}/teacher.pt --device {DEVICE} "
            f"--budget 8 --steps 6 --batch-size 4 --views 3 --amp off --out {out}")
    return [*line.split(), *more]


def losses(out):
    return [float(loss) for _, loss in read_csv(out / "curve.csv")[1:]]


@needs_device
@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_the_default_run_in_mixed_precision(tmp_path, monkeypatch, amp):
    if DEVICE == "cuda" and amp == "bfloat16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU does not compute in bfloat16")
    monkeypatch.chdir(tmp_path)
    write, config = scenes.write_scenes, train_teacher.Config         # the same path, but short
    monkeypatch.setattr(scenes, "write_scenes", lambda root, size: write(
        root, size=size, train=16, val=4, pool=24))
    monkeypatch.setattr(train_teacher, "Config", lambda **given: config(**given | {
        "steps": 5, "batch_size": 4}))
    monkeypatch.setattr(training, "CHECK_EVERY", 10)
    words = f"--image-size 32 48 --budget 8 --steps 20 --batch-size 4 --device {DEVICE} --amp {amp}"
    metrics = distill.main(words.split())
    assert metrics["environment"]["precision"] == f"torch.{amp}"
    assert metrics["environment"]["device"].endswith("CPU") == (DEVICE == "cpu")
    assert all(0 <= metrics[f"{name}_miou"] <= 1 for name in ("teacher", "student", "agreement"))
    first, last = losses(tmp_path / "runs/001")
    assert 0 < last < first
    assert all(x.isfinite().all() and x.dtype in (torch.float32, torch.int64)
               for x in checkpoint.load("runs/001/student.pt")["state_dict"].values())
    assert (tmp_path / "runs/001/figure.png").exists()


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
def test_a_run_is_that_of_the_cpu_within_rounding_also_with_logits_in_a_file(
        world, tmp_path, monkeypatch):
    monkeypatch.setattr("support.figures.run_figure", lambda *_: None)
    distill.main(options(world, tmp_path / "cpu", "--device", "cpu"))
    distill.main(options(world, tmp_path / "memory"))
    monkeypatch.setattr(teacher_cache, "MEMORY", 0)
    distill.main(options(world, tmp_path / "file", "--workers", "2"))
    for name in ("memory", "file"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "cpu"), rel=0.02)


@needs_device
def test_evaluation_and_masks_are_those_of_the_cpu(world, tmp_path):
    results = {}
    for device in ("cpu", DEVICE):
        words = ["--checkpoint", f"{world}/teacher.pt", "--num-classes", "8", "--device", device]
        results[device] = evaluate.main([*words, "--dataset", "folder", "--data-root", str(world)])
        evaluate.main([*words, "--images", f"{world}/pool", "--out", str(tmp_path / device)])
    assert results[DEVICE]["miou"] == pytest.approx(results["cpu"]["miou"], abs=0.01)
    for path in find_images(tmp_path / "cpu"):
        same = np.asarray(Image.open(path)) == np.asarray(Image.open(tmp_path / DEVICE / path.name))
        assert same.mean() > 0.98


@needs_device
def test_torchrun_scores_a_pool_that_distil_then_reads(world, tmp_path, monkeypatch, capsys):
    words = options(world, tmp_path / "run", "--dry-run")
    scored = started("-m", "torch.distributed.run", "--nproc-per-node", "1", "-m",
                     "support.scoring", *words[:8], cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    monkeypatch.setattr(scoring, "STORE", tmp_path / "runs/scores")
    distill.main(words)
    assert "the scores of this pool are read from" in capsys.readouterr().out


KILLED_AT_STEP_5 = """
import os, signal, sys
import distill
from support import training

weighted_loss, calls = distill.weighted_loss, []

def deadly(*args):
    calls.append(args)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return weighted_loss(*args)

distill.weighted_loss, training.SAVE_EVERY = deadly, 2
distill.main(sys.argv[1:])
"""


@needs_device
def test_deterministic_runs_are_equal_to_the_bit_also_if_killed_and_resumed(world, tmp_path):
    teachers, students = ([tmp_path / f"{kind} {i}" for i in "12"] for kind in ("t", "s"))
    for out in teachers:
        words = (f"--dataset folder --data-root {world} --split val --num-classes 8 --steps 6 "
                 f"--image-size 32 48 --batch-size 4 --device {DEVICE} --deterministic").split()
        done = started("train_teacher.py", *words, "--out", out)
        assert done.returncode == 0, done.stderr
    words = options(world, ".", "--deterministic", "--teacher", teachers[0] / "teacher.pt", "--out")
    whole = started(PROGRAM, *words, students[0], cwd=tmp_path)
    killed = started("-c", KILLED_AT_STEP_5, *words, students[1], cwd=tmp_path)
    assert killed.returncode < 0 and checkpoint.load(students[1] / "state.pt")["step"] == 4
    resumed = started(PROGRAM, "--resume", "--out", students[1], cwd=tmp_path)
    assert whole.returncode == resumed.returncode == 0, whole.stderr + resumed.stderr
    for pair, name in ((teachers, "teacher.pt"), (students, "student.pt")):
        a, b = (checkpoint.load(out / name)["state_dict"] for out in pair)
        assert all(torch.equal(value, b[key]) for key, value in a.items())
