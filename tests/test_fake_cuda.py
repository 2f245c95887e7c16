"""Would any line of a run on a GPU mix its tensors with the CPU's? Asked without one.

Whole runs and the other programs go through pretend_gpu.py, mixed precision too; their numbers must
be those of the CPU, and mistakes planted in each step must be found.

Not covered: backward passes, which need a real GPU (gradients of 1 stand in); pinned memory and
loading processes; float16; what is asked of the hardware; files of weights; figures;
export.py's and the benchmark's clocks.
"""

import importlib
from contextlib import nullcontext
from contextvars import ContextVar

import numpy as np
import pytest
import torch
from conftest import with_random_statistics
from PIL import Image
from pretend_gpu import each, fake, on_cpu, surroundings
from torch import nn
from torch.utils.data import DataLoader

import distill
from colours import colour_target, match_colours
from bn_stats import METRICS, bn_distance, bn_layers, capture_bn_inputs, image_distances
from evaluate import evaluate
from experiments import baselines
from models import ResidualBlock, build_model, conv_bn, wrap
from support import checkpoint, together
from support.data import find_images
from support.evaluation import write_masks
from support.options import pick_device
from support.figures import painter
from support.scoring import mean_shift
from support.training import Training
from train_teacher import cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")
SIZE = (32, 48)


@pytest.fixture
def gpu(monkeypatch):
    with surroundings(monkeypatch) as mode:
        yield mode


def networks():
    """Return a teacher and a student, the same each time."""
    torch.manual_seed(0)
    return [with_random_statistics(wrap(nn.Sequential(
        conv_bn(3, 6, stride=2), ResidualBlock(6, 8, 2), nn.Conv2d(8, 4, 1)), 4)) for _ in range(2)]


def gradients_of(network):
    """Return what stands in for Tensor.backward: gradients of 1."""
    def backward(loss):
        assert loss.device == network.mean.device
        for p in network.parameters():
            p.grad = torch.ones_like(p)
    return backward


@pytest.fixture
def work(gpu, tmp_path, monkeypatch):
    """Return a function that does on a device what the command does; it returns numbers."""
    pool, colours = tmp_path / "pool", np.random.default_rng(0)
    pool.mkdir()
    for i in range(5):
        small = Image.fromarray(colours.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        small.resize((50, 40), Image.BICUBIC).save(pool / f"{i}.png")
    data = DataLoader([(torch.rand(3, *SIZE), torch.randint(0, 5, (40, 50))) for _ in "123"], 2)

    def works(name, **options):
        (teacher, student), out = networks(), tmp_path / name
        cfg = {"budget": 4, "steps": 2, "batch_size": 4, "amp": "off"} | options
        monkeypatch.setattr(torch.Tensor, "backward", gradients_of(student))
        monkeypatch.setattr(checkpoint, "save", lambda state, path: None)
        out.mkdir()
        with gpu if name == "cuda" else nullcontext():
            device = pick_device(name)
            found = distill.distill(teacher.to(device), student.to(device), pool, SIZE,
                                    distill.Config(**cfg), out)
            results = [evaluate(student, data, 4, ignore_index=4),
                       evaluate(student, data, 4, reference=teacher, ignore_index=4),
                       evaluate(student, [(x, None) for x, _ in data], 4, reference=teacher)]
            write_masks(student, pool, out / "masks", SIZE, device)
            numbers = [*found["scores"].tolist(), *found["weights"].tolist(),
                       mean_shift(teacher, found["layers"], found["pool"], [0, 1, 2]),
                       found["curve"][-1][1], *(result["pixel_accuracy"] for result in results)]
        return numbers + [np.asarray(Image.open(p)).mean() for p in find_images(out / "masks")]
    return works


@pytest.mark.parametrize("options", [
    {"align": "transfer-first"},
    {"metric": "kl", "layers": "early,-1", "weighting": "rank", "views": 0, "budget": 0},
    {"sampling": "confidence", "schedule": "fixed", "kd": "channelwise"},
    {"sampling": "random", "schedule": "uniform", "kd": "pixelwise"}])
def test_a_run_on_a_gpu_mixes_no_devices_and_equals_one_on_the_cpu(work, options):
    assert work("cuda", **options) == pytest.approx(work("cpu", **options), rel=1e-4)


def test_a_run_in_mixed_precision_mixes_none_either_and_is_nearly_the_same(work):
    exact, mixed = work("cpu"), work("cuda", amp="bfloat16")
    assert mixed != exact and mixed == pytest.approx(exact, rel=0.1)


def test_training_goes_on_from_a_state_that_was_read_on_the_cpu(gpu, monkeypatch):
    kept, student = {}, networks()[1]
    monkeypatch.setattr(checkpoint, "save", lambda state, path: kept.update(each(on_cpu, state)))
    monkeypatch.setattr(checkpoint, "load", lambda path: kept)
    monkeypatch.setattr(torch.Tensor, "backward", gradients_of(student))
    with gpu:
        run = Training(student.to("cuda"), 9, 0.1)
        run.path = "state.pt"
        for _ in range(2):
            run.step(student(torch.rand(2, 3, *SIZE, device="cuda")).mean())
            run.save()
            run.load(run.path)
        assert [x.device for x in run.losses] == 2 * [student.mean.device]


def test_made_up_images_a_teachers_loss_and_a_painted_mask_mix_no_devices(gpu, monkeypatch):
    teacher, student, generator = *networks(), baselines.new_generator(SIZE, 2)
    monkeypatch.setattr(baselines, "update", lambda *_: None)                # backward, and a step
    with gpu:
        for network in (teacher, student, generator):
            network.to("cuda")
        images = torch.rand(2, 3, *SIZE, device="cuda")
        assert baselines.deepinversion(teacher, images, 1).device == images.device
        assert baselines.dfad(teacher, student, generator, 1, 2) == []
        target = (4 * images[:, 0, ::4, ::4]).long()                        # (B, h, w)
        assert cross_entropy(student(images), target).device == images.device
        assert painter("abcd")(target[0]).shape == (8, 12, 3)


def test_answers_go_from_process_to_process_on_the_gpu(gpu, monkeypatch):
    monkeypatch.setattr(together, "place", ContextVar("place", default=(0, 2)))
    monkeypatch.setattr(together.dist, "gather", lambda x, parts: [p.copy_(x) for p in parts])
    with gpu:
        answers = torch.rand(3, 4, 8, 8, device="cuda").to(memory_format=torch.channels_last)
        parts = together.gathered(answers, 4)
        assert [part.device for part in parts] == 2 * [answers.device]       # so by nccl
        assert all(part.is_contiguous() and torch.equal(part[:3].cpu(), answers.cpu())
                   for part in parts)


# ---------------------------------------------------------------- parts, and planted mistakes

# The other networks consist of the same parts.
@pytest.mark.parametrize("name", ["resnet_small", "deeplabv3_mobilenet_v2", "deeplabv3_resnet50",
                                  "lraspp_mobilenet_v3_large"])
def test_networks_of_each_kind_and_their_statistics_stay_on_the_gpu(name):
    with fake.FakeTensorMode():                              # no values: some networks are large
        with torch.device("cuda"):
            model, images = build_model(name, 4).eval(), torch.rand(2, 3, 64, 64)
        with capture_bn_inputs(model) as captured:
            assert model(images).device == images.device
        for metric in METRICS:
            assert bn_distance(captured, bn_layers(model), metric).device == images.device


@pytest.mark.parametrize("filters", [4, 16])                 # with 4, only the variance of grey
def test_colours_are_read_off_a_layer_and_given_on_a_gpu(gpu, filters):
    torch.manual_seed(0)
    tensors = (torch.randn(filters, 3), torch.randn(filters), torch.rand(filters) + 0.5,
               torch.rand(2, 3, 8, 8))

    def changed(device, move=lambda x: x):
        A, mean_bn, var_bn, images = (x.to(device) for x in tensors)
        mean, cov = colour_target(lambda x: x.mean((2, 3)) @ A.T, mean_bn, var_bn, (4, 4))
        return match_colours(images, move(mean), cov).flatten().tolist()

    expected = changed("cpu")
    with gpu:
        assert changed("cuda") == pytest.approx(expected, abs=1e-4)
        with pytest.raises(RuntimeError, match="device"):
            changed("cuda", move=on_cpu)


@pytest.mark.parametrize(("left", "metric"), [
    ("mean", "l2"), ("net.0.0.weight", "l2"), ("net.0.1.running_mean", "kl"),
    ("net.1.body.0.1.running_var", "kl")])
def test_a_part_of_a_network_that_is_left_on_the_cpu_is_found(gpu, left, metric):
    teacher, (module, _, name) = networks()[0], left.rpartition(".")
    with gpu:
        images = torch.rand(2, 3, *SIZE, device="cuda")
        assert image_distances(teacher.to("cuda"), images, None, metric).device == images.device
        part = teacher.get_submodule(module)
        x = getattr(part, name).cpu()
        setattr(part, name, nn.Parameter(x) if name == "weight" else x)
        with pytest.raises(RuntimeError, match="device"):
            image_distances(teacher, images, None, metric)


@pytest.mark.parametrize(("where", "place"), [
    ("bn_stats.spatial_moments", 1), ("bn_stats.bn_distance", 0), ("support.scoring.as_input", 1),
    ("support.recolour.colour_target", 1), ("support.teacher_cache.as_input", 1),
    ("support.training.as_input", 1), ("distill.progressive_weights", 0),
    ("distill.pixelwise_kd", 1), ("distill.weighted_loss", 1), ("support.scoring.run_until", 1),
    ("evaluate.confusion_matrix", 1)])
def test_an_argument_that_is_left_on_the_cpu_is_found(work, monkeypatch, where, place):
    module, name = where.rsplit(".", 1)
    f = getattr(importlib.import_module(module), name)
    monkeypatch.setattr(where, lambda *args: f(
        *args[:place], each(on_cpu, args[place]), *args[place + 1:]))
    with pytest.raises(RuntimeError, match="device"):
        work("cuda", align="transfer-first", steps=1)
