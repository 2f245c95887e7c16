"""experiments/baselines.py and generators.py: selections, synthetic images, tiles."""

import copy
import math

import pytest
import torch
from conftest import with_random_statistics
from PIL import Image

import distill
from bn_stats import bn_distance, bn_layers, capture_bn_inputs, image_distances
from experiments import baselines, generators
from models import build_model, freeze
from support import checkpoint, command
from support.checkpoint import fingerprint
from support.data import Pool
from support.images import find_images, hold_out

SIZE = (32, 48)


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return freeze(with_random_statistics(build_model("resnet_tiny", 5, image_size=SIZE)))


@pytest.fixture
def teacher_file(teacher, tmp_path):
    checkpoint.save_model(teacher, tmp_path / "teacher.pt")
    return tmp_path / "teacher.pt"


def make(teacher_file, method, out, *words):
    return generators.main(["--method", method, "--teacher", str(teacher_file), "--out", str(out),
                            "--device", "cpu", "--amp", "off", *map(str, words)])


def pictures(files):
    """Return the views of images in which they are scored: (N, 3, H, W), uint8."""
    pool = Pool(files, SIZE)
    return torch.stack([pool.view(i) for i in range(len(pool))])


def bn_inputs(model, images):
    """Return {layer: its whole input}, by hooks of our own."""
    inputs = {}
    handles = [layer.register_forward_pre_hook(
        lambda module, args, name=name: inputs.__setitem__(name, args[0].detach().clone()))
        for name, layer in bn_layers(model).items()]
    model(images)
    for handle in handles:
        handle.remove()
    return inputs


def distance_of_set(layers, inputs, members=slice(None), metric="l2"):
    """Return d of the pooled pixels of some images, layer by layer, from whole inputs: (L,)."""
    pooled = {name: (x[members].mean((0, 2, 3)).unsqueeze(0),
                     x[members].var((0, 2, 3), correction=0).unsqueeze(0))
              for name, x in inputs.items()}
    return bn_distance(pooled, layers, metric)[0]


# ---------------------------------------------------------------- selections

def test_the_mean_entropy_is_that_of_a_loop_over_pixels():
    logits = torch.randn(2, 3, 4, 5)
    for image, entropy in zip(logits, baselines.mean_entropy(logits), strict=True):
        total = 0
        for pixel in image.flatten(1).T:                                            # (K,)
            p = [math.exp(v) / sum(math.exp(u) for u in pixel) for v in pixel]
            total -= sum(v * math.log(v) for v in p)
        assert entropy.item() == pytest.approx(total / 20, rel=1e-5)


def test_k_centre_adds_the_image_that_is_farthest_from_all_selected_ones():
    features = torch.randn(12, 3)
    rows, mean = features.tolist(), features.mean(dim=0).tolist()
    selected = [min(range(12), key=lambda i: math.dist(rows[i], mean))]
    while len(selected) < 6:
        selected.append(max(range(12), key=lambda i: min(math.dist(rows[i], rows[j])
                                                         for j in selected)))
    assert baselines.k_centre(features, 6).tolist() == selected
    assert sorted(baselines.k_centre(torch.ones(4, 3), 4).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("metric", ["l2", "kl"])
def test_herding_adds_the_image_that_brings_the_set_nearest_to_the_statistics(teacher, metric):
    images, layers = torch.rand(8, 3, *SIZE) * torch.rand(8, 3, 1, 1), bn_layers(teacher)
    with capture_bn_inputs(teacher) as captured:
        inputs = bn_inputs(teacher, images)
    selected = []
    while len(selected) < 4:
        selected.append(min(set(range(8)) - set(selected), key=lambda i: distance_of_set(
            layers, inputs, [*selected, i], metric).sum()))
    assert baselines.herding(captured, layers, 4, metric).tolist() == selected
    assert selected[0] == image_distances(teacher, images, metric=metric).argmin()


@pytest.mark.parametrize("method", ["entropy", "k-centre", "herding"])
def test_the_program_lists_the_selected_ones_of_the_readable_images(teacher, teacher_file, tmp_path,
                                                                    pool_folder, method):
    (pool_folder / "01.png").write_bytes(b"no picture")
    words = f"--method {method} --dataset none --teacher {teacher_file} --pool {pool_folder}"
    baselines.main(f"{words} --budget 5 --device cpu --out {tmp_path}/out".split())
    files = find_images(tmp_path / "out/chosen.csv")                  # as distill.py reads --pool
    readable = [file for file in hold_out(find_images(pool_folder))[0] if file.name != "01.png"]
    with torch.no_grad(), capture_bn_inputs(teacher) as captured:
        entropies = baselines.mean_entropy(teacher(pictures(readable) / 255))
    last = list(captured)[-1]
    expected = {"entropy": entropies.argsort(descending=True)[:5],
                "k-centre": baselines.k_centre(captured[last][0], 5),
                "herding": baselines.herding(captured, bn_layers(teacher), 5)}[method]
    assert files == [readable[i] for i in expected]
    with pytest.raises(ValueError, match="budget must be between 1 and 27"):
        baselines.main(f"{words} --budget 28 --device cpu --out {tmp_path}/more".split())


# ---------------------------------------------------------------- DeepInversion and tiles

def test_the_bn_loss_is_that_of_all_pixels_of_a_batch_with_the_first_layer_ten_times(teacher):
    images, layers = torch.rand(6, 3, *SIZE) * torch.rand(6, 3, 1, 1), bn_layers(teacher)
    with capture_bn_inputs(teacher) as captured:
        d = distance_of_set(layers, bn_inputs(teacher, images))
    torch.testing.assert_close(generators.bn_loss(captured, layers), d.sum() + 9 * d[0])


def test_deepinversion_brings_noise_nearer_to_the_statistics(pool_folder):
    torch.manual_seed(1)
    teacher = build_model("resnet_tiny", 5, image_size=SIZE)
    for layer in bn_layers(teacher).values():
        layer.momentum = 1                              # its statistics are those of the pictures
    teacher.train()(pictures(find_images(pool_folder)) / 255)
    freeze(teacher)

    def distance(images):
        with torch.no_grad(), capture_bn_inputs(teacher) as captured:
            teacher(images)
        return generators.bn_loss(captured, bn_layers(teacher)).item()

    torch.manual_seed(0)
    noise, before = torch.rand(4, 3, *SIZE), fingerprint(teacher)
    images = generators.deepinversion(teacher, noise, steps=60)
    assert distance(images) < 0.8 * distance(noise)
    assert images.shape == noise.shape and images.min() >= 0 and images.max() <= 1
    assert fingerprint(teacher) == before and not images.requires_grad


def test_deepinversion_writes_as_many_images_as_asked_for(teacher_file, tmp_path):
    metrics = make(teacher_file, "deepinversion", tmp_path / "a", "--count", 5, "--batch-size", 3,
                   "--steps", 2)
    assert metrics["processor_seconds"] > 0 and len(find_images(tmp_path)) == 5


def test_tiles_are_those_of_the_image_in_another_order():
    def cut(image):
        return [image[:, y:y + 3, x:x + 4] for y in range(0, 12, 3) for x in range(0, 16, 4)]

    torch.manual_seed(0)
    image = torch.rand(3, 13, 18)                                       # 12x16 of it in 4x4 tiles
    shuffled = generators.shuffle_tiles(image, 4)
    order = [next(i for i, tile in enumerate(cut(image)) if torch.equal(tile, piece))
             for piece in cut(shuffled)]
    assert shuffled.shape == (3, 12, 16) and sorted(order) == list(range(16)) != order


def test_tiles_of_a_list_of_photos_have_twice_the_working_size(teacher_file, pool_folder, tmp_path):
    files, csv = [pool_folder / "03.png", pool_folder / "01.png"], tmp_path / "list.csv"
    csv.write_text(f"file\n{files[0]}\n{files[1]}\n")
    for out, grid in (("whole", 1), ("tiles", 4), ("again", 4)):
        make(teacher_file, "tiles", tmp_path / out, "--images", csv, "--grid", grid)
    whole, tiles, again = (pictures(find_images(tmp_path / out)) for out in (
        "whole", "tiles", "again"))
    assert Image.open(tmp_path / "whole/0001.png").size == (96, 64)
    expected = pictures(files).float()
    assert (whole - expected).abs().mean() < 4 < (tiles - expected).abs().mean()
    assert torch.equal(tiles, again)                                    # they depend on the seed


# ---------------------------------------------------------------- DFAD

def train(teacher, steps=10, lr=0.01):
    """Train by DFAD from seed 0; return (student, generator), copies from before, and the curve."""
    torch.manual_seed(0)
    networks = build_model("resnet_tiny", 5), generators.new_generator(SIZE, width=4)
    before = copy.deepcopy(networks)
    cfg = generators.Config(teacher="", steps=steps, batch_size=4, lr=lr, amp="off")
    return networks, before, generators.dfad(teacher, *networks, SIZE, cfg)


@pytest.mark.parametrize("size", [(96, 128), (128, 128), (12, 41)])
def test_the_generator_makes_images_of_any_size(size):
    images = generators.new_generator(size, width=2)(torch.randn(3, generators.NOISE, 1, 1))
    assert images.shape == (3, 3, *size) and images.abs().max() <= 1
    assert images.std() > 0.3                                       # not grey at the start


def test_dfad_trains_student_and_generator_and_leaves_the_teacher_alone(teacher):
    memory = fingerprint(teacher)
    networks, before, curve = train(teacher)
    assert [step for step, _ in curve] == [10] and not networks[0].training
    for model, old in zip(networks, before, strict=True):
        assert not any(torch.equal(p, q) for p, q in zip(
            model.parameters(), old.parameters(), strict=True) if p.dim() == 4)
    assert fingerprint(teacher) == memory
    with pytest.raises(ValueError, match="the loss became infinite or NaN .* lower --lr"):
        train(teacher, lr=1e20)


def test_dfad_alternates_five_updates_of_the_student_and_one_of_the_generator(teacher, monkeypatch):
    """The student's loss is the mean of |t - s|, the generator's is -log of that plus 1."""
    updates = []

    def watch(optimizer, *_):                                      # instead of an update
        (group,) = optimizer.param_groups
        updates.append((type(optimizer).__name__, group["lr"], group["params"][0].grad.clone()))

    monkeypatch.setattr("torch.optim.SGD.step", watch)
    monkeypatch.setattr("torch.optim.Adam.step", watch)
    (student, generator), _, curve = train(teacher)
    assert [name for name, _, _ in updates] == (["SGD"] * 5 + ["Adam"]) * 2
    assert updates[5][1] == pytest.approx(updates[4][1] / 10)       # 0.001 where the other is 0.01
    losses = []
    for step in range(10):                                         # the same noise, by hand
        torch.manual_seed(step)
        noise = torch.randn(4, generators.NOISE, 1, 1)
        for network in (student, generator) if step % 5 == 4 else (student,):
            images = (generator.train()(noise) + 1) / 2
            gap = (student.train()(images) - teacher(images)).abs().mean()
            loss = gap if network is student else -torch.log(gap + 1)
            (slope,) = torch.autograd.grad(loss, next(network.parameters()))
            torch.testing.assert_close(updates.pop(0)[2], slope)
            losses += [gap.item()] if network is student else []
    assert curve[0][1] == pytest.approx(sum(losses) / 10, rel=1e-4)


def test_a_dfad_run_depends_on_the_seed_alone_and_starts_from_the_student_of_distill(
        teacher, teacher_file, tmp_path, monkeypatch):
    monkeypatch.setattr(generators, "SNAPSHOT", 2)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(teacher_file, "dfad", tmp_path / name, "--steps", 2, "--batch-size", 2, "--seed", seed)
    a, b, c = (checkpoint.load_model(tmp_path / name / "student.pt") for name in "abc")
    assert fingerprint(a) == fingerprint(b) != fingerprint(c)
    assert a.image_size == SIZE and a.num_classes == 5
    assert (tmp_path / "a/curve.csv").read_text().startswith("step,loss\n2,")
    assert checkpoint.load_model(tmp_path / "a/student-2.pt").num_classes == 5
    monkeypatch.setattr(generators, "dfad", lambda *_: [])
    make(teacher_file, "dfad", tmp_path / "d", "--seed", 7)
    start = command.build_student(distill.Config(seed=7), teacher)
    assert fingerprint(checkpoint.load_model(tmp_path / "d/student.pt")) == fingerprint(start)
