"""experiments/baselines.py and tiles.py of results/notes.md: other selections, photos in tiles."""

import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from bn_stats import bn_distance, bn_layers, capture_bn_inputs, image_distances
from experiments import baselines
from models import freeze
from support import checkpoint
from support.data import Pool
from support.images import find_images, hold_out

SIZE = (32, 48)


@pytest.fixture
def teacher(world):
    torch.manual_seed(1)
    return freeze(checkpoint.load_model(world / "teacher.pt"))


@pytest.fixture
def words(world):
    """Return options that name a file with this teacher."""
    return f"--teacher {world}/teacher.pt --device cpu "


def pictures(files, size=SIZE):
    """Return the views of images in which they are scored: (N, 3, H, W), uint8."""
    pool = Pool(files, size)
    return torch.stack([pool.view(i) for i in range(len(pool))])


def distance_of_set(model, images, metric="l2"):
    """Return d of the pixels of all images together, layer by layer: (L,)."""
    def pool(layer, args):
        x = args[0].transpose(0, 1).flatten(1)                                      # (C, B H W)
        pooled[names[layer]] = x.mean(1)[None], x.var(1, correction=0)[None]

    layers, pooled = bn_layers(model), {}
    names = {layer: name for name, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(pool) for layer in names]
    model(images)
    for handle in handles:
        handle.remove()
    return bn_distance(pooled, layers, metric)[0]


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
    images = torch.rand(8, 3, *SIZE) * torch.rand(8, 3, 1, 1)
    with capture_bn_inputs(teacher) as captured:
        teacher(images)
    selected = []
    while len(selected) < 4:
        selected.append(min(set(range(8)) - set(selected), key=lambda i: distance_of_set(
            teacher, images[[*selected, i]], metric).sum()))
    assert baselines.herding(captured, bn_layers(teacher), 4, metric).tolist() == selected
    assert selected[0] == image_distances(teacher, images, metric=metric).argmin()


@pytest.mark.parametrize("method", ["entropy", "k-centre", "herding"])
def test_the_program_lists_what_it_selects(teacher, words, tmp_path, pool_folder, method):
    (pool_folder / "01.png").write_bytes(b"no picture")
    words += f"--method {method} --dataset none --pool {pool_folder}"
    baselines.main(f"{words} --budget 5 --out {tmp_path}/out".split())
    files = find_images(tmp_path / "out/chosen.csv")                  # as distill.py reads --pool
    readable = [file for file in hold_out(find_images(pool_folder))[0] if file.name != "01.png"]
    with torch.no_grad(), capture_bn_inputs(teacher) as captured:
        entropies = baselines.mean_entropy(teacher(pictures(readable) / 255))
    expected = {"entropy": entropies.argsort(descending=True)[:5],
                "k-centre": baselines.k_centre([*captured.values()][-1][0], 5),
                "herding": baselines.herding(captured, bn_layers(teacher), 5)}[method]
    assert files == [readable[i] for i in expected]
    with pytest.raises(ValueError, match="27 images have a finite distance"):
        baselines.main(f"{words} --budget 28 --out {tmp_path}/more".split())


def make_tiles(monkeypatch, *words):
    """Run tiles.py, which stands in results/notes.md; return its names."""
    notes = (Path(baselines.__file__).parents[1] / "results" / "notes.md").read_text()
    (code,) = re.findall(r"```python\n(# tiles\.py.*?)```", notes, re.DOTALL)
    monkeypatch.setattr("sys.argv", ["tiles.py", *map(str, words)])
    names = {}
    exec(code, names)
    return names


def test_tiles_are_those_of_the_image_in_another_order(pool_folder, tmp_path, monkeypatch):
    def cut(image):
        return [image[:, y:y + 3, x:x + 4] for y in range(0, 12, 3) for x in range(0, 16, 4)]

    tiles = make_tiles(monkeypatch, pool_folder, 1, tmp_path / "out")
    torch.manual_seed(0)
    image = torch.rand(3, 13, 18)                                       # 12x16 of it in 4x4 tiles
    shuffled = tiles["shuffle_tiles"](image, 4)
    order = [next(i for i, tile in enumerate(cut(image)) if torch.equal(tile, piece))
             for piece in cut(shuffled)]
    assert shuffled.shape == (3, 12, 16) and sorted(order) == list(range(16)) != order


def test_tiles_of_a_list_of_photos_are_written_in_its_order(pool_folder, tmp_path, monkeypatch):
    files, made = [pool_folder / "03.png", pool_folder / "01.png"], []
    (tmp_path / "list.csv").write_text(f"file\n{files[0]}\n{files[1]}\n")
    for i, grid in enumerate((1, 4, 4)):
        make_tiles(monkeypatch, tmp_path / "list.csv", grid, tmp_path / str(i))
        made.append(pictures(find_images(tmp_path / str(i)), (192, 256)))
    assert Image.open(tmp_path / "0/0001.png").size == (256, 192)
    photos = pictures(files, (192, 256)).float()
    whole, cut = ((photos - images).abs().mean() for images in made[:2])
    assert whole < 4 < cut and torch.equal(made[1], made[2])          # they depend on the seed
