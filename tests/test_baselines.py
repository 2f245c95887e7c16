"""experiments/baselines.py and generators.py: made-up images, choices used again."""

import copy
import csv

import pytest
import torch
from conftest import with_random_statistics
from PIL import Image

import distill
from bn_stats import bn_layers, capture_bn_inputs
from experiments import baselines, generators
from models import build_model, freeze
from support import checkpoint
from support.checkpoint import fingerprint
from support.data import Pool, find_images

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
                            "--device", "cpu", *map(str, words)])


def pictures(folder):
    """Return all images of a folder in the view in which they are scored: (N, 3, H, W), uint8."""
    pool = Pool(find_images(folder), SIZE)
    return torch.stack([pool.view(i) for i in range(len(pool))])


def bn_inputs(model, images):
    """Return {layer: its whole input}, by hooks of our own."""
    found = {}
    handles = [layer.register_forward_pre_hook(
        lambda module, args, name=name: found.__setitem__(name, args[0].detach().clone()))
        for name, layer in bn_layers(model).items()]
    model(images)
    for handle in handles:
        handle.remove()
    return found


# ---------------------------------------------------------------- a choice used again

def test_a_csv_gives_back_its_files_in_its_order(pool_folder, tmp_path):
    files = find_images(pool_folder)
    chosen = [files[7], files[2], files[29]]
    with open(tmp_path / "chosen.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "distance"), *((path, 1.5) for path in chosen)])
    assert find_images(tmp_path / "chosen.csv") == chosen
    assert find_images(str(tmp_path / "chosen.csv")) == chosen


@pytest.mark.parametrize("text", ["distance,file\n1,00.png\n", "file,distance\n", ""])
def test_a_csv_that_lists_no_images_is_refused(pool_folder, monkeypatch, text):
    monkeypatch.chdir(pool_folder)
    (pool_folder / "list.csv").write_text(text)
    with pytest.raises(ValueError, match="lists no images; .* first column is 'file'"):
        find_images("list.csv")
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere.csv"):
        find_images("nowhere.csv")


def test_a_choice_is_a_pool(teacher_file, pool_folder, tmp_path):
    def chosen(out, pool, budget):
        distill.main(f"--dataset none --teacher {teacher_file} --pool {pool} --budget {budget} "
                     f"--dry-run --out {tmp_path}/{out}".split())
        return find_images(tmp_path / out / "chosen.csv")

    first = chosen("a", pool_folder, 22)
    assert chosen("b", tmp_path / "a/chosen.csv", 0) == [*first[1:20], first[21]]   # 2 held out


# ---------------------------------------------------------------- made-up images

def test_the_entropy_of_two_pixels_is_that_by_hand():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])                             # pixels, classes
    assert baselines.entropy(p.log().T.view(1, 2, 1, 2)).item() == pytest.approx(
        (0.6931 + 0.3251) / 2, abs=1e-4)


def test_batch_statistics_from_those_of_single_images_are_the_pooled_ones(teacher):
    images = torch.rand(6, 3, *SIZE) * torch.rand(6, 3, 1, 1)
    with capture_bn_inputs(teacher) as captured:
        inputs = bn_inputs(teacher, images)
    pooled = baselines.batch_statistics(captured)
    assert list(pooled) == list(inputs)
    for name, x in inputs.items():
        torch.testing.assert_close(pooled[name][0][0], x.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pooled[name][1][0], x.var((0, 2, 3), correction=0),
                                   rtol=1e-5, atol=1e-5)


def test_the_bn_loss_is_a_sum_of_norms_with_the_first_layer_ten_times(teacher):
    with capture_bn_inputs(teacher) as captured:
        inputs = bn_inputs(teacher, torch.rand(4, 3, *SIZE))
    expected = 0
    for i, (name, layer) in enumerate(bn_layers(teacher).items()):
        x = inputs[name]
        d = ((x.mean((0, 2, 3)) - layer.running_mean).norm()
             + (x.var((0, 2, 3), correction=0) - layer.running_var).norm())
        expected += 10 * d if i == 0 else d
    torch.testing.assert_close(baselines.bn_loss(captured, bn_layers(teacher)), expected)


def test_deepinversion_brings_noise_nearer_to_the_statistics(pool_folder):
    torch.manual_seed(1)
    teacher = build_model("resnet_tiny", 5, image_size=SIZE)
    for layer in bn_layers(teacher).values():
        layer.momentum = 1                                   # it remembers one batch, of pictures
    teacher.train()(pictures(pool_folder) / 255)
    freeze(teacher)

    def distance(images):
        with torch.no_grad(), capture_bn_inputs(teacher) as captured:
            teacher(images)
        return baselines.bn_loss(captured, bn_layers(teacher)).item()

    torch.manual_seed(0)
    noise, before = torch.rand(4, 3, *SIZE), fingerprint(teacher)
    images = baselines.deepinversion(teacher, noise, steps=60)
    assert distance(images) < 0.8 * distance(noise)
    assert images.shape == noise.shape and images.min() >= 0 and images.max() <= 1
    assert fingerprint(teacher) == before and not images.requires_grad


def test_deepinversion_writes_as_many_images_as_asked_for(teacher_file, tmp_path):
    make(teacher_file, "deepinversion", tmp_path / "a", "--count", 5, "--batch-size", 3,
         "--steps", 2)
    assert [path.name for path in find_images(tmp_path / "a")] == [f"{i:04d}.png" for i in range(5)]


# ---------------------------------------------------------------- DFAD

@pytest.mark.parametrize("size", [(96, 128), (128, 128), (12, 41)])
def test_the_generator_makes_images_of_any_size(size):
    images = baselines.new_generator(size, width=2)(torch.randn(3, baselines.NZ, 1, 1))
    assert images.shape == (3, 3, *size) and images.abs().max() <= 1
    assert images.std() > 0.3                                       # not grey at the start


def test_dfad_trains_student_and_generator_and_leaves_the_teacher_alone(teacher):
    student, generator = build_model("resnet_tiny", 5), baselines.new_generator(SIZE, width=4)
    before = [copy.deepcopy(dict(model.named_parameters())) for model in (student, generator)]
    memory = fingerprint(teacher)
    curve = baselines.dfad(teacher, student, generator, steps=10, batch_size=2)
    assert [step for step, _ in curve] == [5, 10] and not student.training
    for model, old in zip((student, generator), before, strict=True):
        assert not any(torch.equal(p, old[name]) for name, p in model.named_parameters()
                       if p.dim() == 4)
    assert fingerprint(teacher) == memory


def test_dfad_alternates_five_losses_of_the_student_and_one_of_the_generator(teacher, monkeypatch):
    losses, update = [], baselines.update

    def watch(optimiser, lr, loss, inputs=None):
        losses.append((type(optimiser).__name__, lr, loss.item()))
        update(optimiser, lr, loss, inputs)

    monkeypatch.setattr(baselines, "update", watch)
    student, generator = build_model("resnet_tiny", 5), baselines.new_generator(SIZE, width=4)
    curve = baselines.dfad(teacher, student, generator, steps=10, batch_size=8, lr=0.01)
    assert [name for name, _, _ in losses] == (["SGD"] * 5 + ["Adam"]) * 2
    for (_, lr, l1), (_, generator_lr, loss) in (losses[4:6], losses[10:12]):
        # Of other noise, hence about: -log(L1 + 1).
        assert l1 > 0 and loss == pytest.approx(-torch.tensor(l1 + 1).log().item(), rel=0.2)
        assert generator_lr == pytest.approx(lr / 10) and l1 in [value for _, value in curve]


def test_a_dfad_run_depends_on_the_seed_alone_and_can_be_evaluated(teacher, teacher_file, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(teacher_file, "dfad", tmp_path / name, "--steps", 5, "--batch-size", 2,
             "--seed", seed, "--amp", "off")
    a, b, c = (checkpoint.load_model(tmp_path / name / "student.pt") for name in "abc")
    assert fingerprint(a) == fingerprint(b) != fingerprint(c)
    assert a.image_size == SIZE and a.num_classes == 5
    assert (tmp_path / "a/curve.csv").read_text().startswith("step,loss\n5,")
    # With no update at all it is distill.py's student of that seed.
    make(teacher_file, "dfad", tmp_path / "d", "--steps", 0, "--seed", 7)
    start = distill.new_student(distill.Config(seed=7), teacher)
    assert fingerprint(checkpoint.load_model(tmp_path / "d/student.pt")) == fingerprint(start)


def test_a_loss_that_explodes_stops_dfad(teacher):
    with pytest.raises(ValueError, match="lower --lr"):
        baselines.dfad(teacher, build_model("resnet_tiny", 5),
                       baselines.new_generator(SIZE, width=2), steps=20, batch_size=2, lr=1e20)


# ---------------------------------------------------------------- the oracle

def test_the_oracle_remembers_exact_statistics_and_computes_the_same(teacher_file, pool_folder,
                                                                     tmp_path):
    make(teacher_file, "oracle", tmp_path / "a", "--images", pool_folder)
    oracle = checkpoint.load_model(tmp_path / "a/teacher.pt")
    teacher, images = checkpoint.load_model(teacher_file), pictures(pool_folder) / 255
    exact = copy.deepcopy(teacher).double()
    for name, x in bn_inputs(exact, images.double()).items():
        layer = oracle.get_submodule(name)
        torch.testing.assert_close(layer.running_mean.double(), x.mean((0, 2, 3)),
                                   rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.running_var.double(), x.var((0, 2, 3), correction=0),
                                   rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(oracle(images), teacher(images), rtol=1e-3, atol=1e-3)
    assert oracle.image_size == SIZE


# ---------------------------------------------------------------- what is said when it cannot

def test_every_bad_input_gets_one_sentence(teacher_file, pool_folder, tmp_path):
    (pool_folder / "broken.png").write_bytes(b"no picture")
    cases = [("tiles", tmp_path / "a", [], ValueError, "needs --images"),
             ("oracle", tmp_path / "a", ["--images", pool_folder], ValueError, "broken.png"),
             ("tiles", tmp_path / "b", ["--images", "nowhere"], FileNotFoundError, "nowhere"),
             ("deepinversion", pool_folder, [], ValueError, "not empty")]
    for method, out, words, error, message in cases:
        with pytest.raises(error, match=message):
            make(teacher_file, method, out, *words)
    with pytest.raises(SystemExit):
        generators.main([])                                      # --teacher and --out are required
    assert Image.open(pool_folder / "00.png")
