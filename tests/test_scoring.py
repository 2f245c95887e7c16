"""scoring: a scan goes on where it stopped, is never done twice, and names what it cannot read."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import with_random_statistics

from bn_stats import bn_layers, image_distances
from distill import Config
from evaluate import as_input
from models import build_model
from support import scoring
from support.data import Pool, find_images

SIZE = (32, 48)


@pytest.fixture
def teacher():
    return with_random_statistics(build_model("resnet_tiny", 5))


def scan(teacher, files, *where, **options):
    return scoring.score(teacher, bn_layers(teacher), files, SIZE, Config(**options), *where)


def test_scores_are_the_distances_in_pool_order(teacher, pool_folder):
    files = find_images(pool_folder)
    scores, skipped = scan(teacher, files)
    images = as_input(torch.stack([Pool(files, SIZE)[i][0] for i in range(30)]), "cpu")
    torch.testing.assert_close(scores[:, 0], image_distances(teacher, images))
    assert scores.shape == (30, 2) and skipped == []


@pytest.mark.parametrize(("sampling", "passes"), [("nearest", 0), ("random", 0), ("herding", 0),
                                                  ("confidence", 2), ("entropy", 2)])
def test_only_a_rule_that_needs_the_prediction_runs_the_teacher_to_its_end(teacher, pool_folder,
                                                                           sampling, passes):
    ends = []
    teacher.net.head.register_forward_hook(lambda *_: ends.append(1))
    scores, _ = scan(teacher, find_images(pool_folder), sampling=sampling)
    assert len(ends) == passes and scores.isfinite().all()


@pytest.mark.parametrize("done", [0, 1, 16, 17, 30])
@pytest.mark.parametrize("sampling", ["nearest", "herding"])
def test_an_interrupted_scan_goes_on_to_the_same_bits(teacher, pool_folder, tmp_path, done,
                                                      sampling, monkeypatch):
    files, part = find_images(pool_folder), tmp_path / "part"
    whole, _ = scan(teacher, files, sampling=sampling)
    half_a_row = b"abcde" if done < 30 else b""
    part.write_bytes(whole[:done].numpy().tobytes() + half_a_row)
    read = []
    item = Pool.__getitem__
    monkeypatch.setattr(Pool, "__getitem__", lambda self, i: read.append(i) or item(self, i))
    scores, _ = scan(teacher, files, part, sampling=sampling)
    assert torch.equal(scores, whole) and not part.exists()
    assert read == list(range(done // 16 * 16, 30))


def test_the_scan_is_written_as_it_goes(teacher, pool_folder, tmp_path, monkeypatch):
    files, part = find_images(pool_folder), tmp_path / "part"
    whole, _ = scan(teacher, files)
    item = Pool.__getitem__

    def failing(self, i):
        if i == 20:
            raise KeyboardInterrupt
        return item(self, i)

    monkeypatch.setattr(Pool, "__getitem__", failing)
    with pytest.raises(KeyboardInterrupt):
        scan(teacher, files, part)
    rows = torch.from_numpy(np.fromfile(part, dtype=np.float32)).view(-1, 2)
    assert torch.equal(rows, whole[:16])


def test_a_second_run_reads_the_scores_and_computes_nothing(teacher, pool_folder, tmp_path,
                                                            monkeypatch):
    files, store = find_images(pool_folder), tmp_path / "store"
    first, _ = scan(teacher, files, None, store)
    monkeypatch.setattr(scoring, "score_pool", lambda *_: pytest.fail("scanned again"))
    second, skipped = scan(teacher, files, None, store)
    assert torch.equal(first, second) and skipped == []


def test_the_store_knows_teacher_layers_files_size_and_settings(teacher, pool_folder):
    files, layers = find_images(pool_folder), bn_layers(teacher)
    few = dict(list(layers.items())[:2])
    paths = [scoring.store_path(teacher, layers, files, SIZE, Config()),
             scoring.store_path(teacher, few, files, SIZE, Config()),
             scoring.store_path(teacher, layers, files[1:], SIZE, Config()),
             scoring.store_path(teacher, layers, files, (32, 32), Config()),
             scoring.store_path(teacher, layers, files, SIZE, Config(metric="kl")),
             scoring.store_path(teacher, layers, files, SIZE, Config(sampling="entropy"))]
    files[3].write_bytes(files[3].read_bytes() + b" ")
    paths.append(scoring.store_path(teacher, layers, files, SIZE, Config()))
    next(iter(layers.values())).running_mean[0] += 1
    paths.append(scoring.store_path(teacher, layers, files, SIZE, Config()))
    assert len(set(paths)) == len(paths)
    same = Config(seed=3, steps=7, budget=2, workers=1)
    assert scoring.store_path(teacher, layers, files, SIZE, same) == paths[-1]


def test_scores_made_by_other_code_are_not_used_again(teacher, pool_folder, tmp_path, monkeypatch):
    files, layers = find_images(pool_folder), bn_layers(teacher)
    before = scoring.store_path(teacher, layers, files, SIZE, Config())
    for name in scoring.CODE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(Path(scoring.__file__).parents[1] / f"{name}.py", tmp_path / f"{name}.py")
    monkeypatch.setattr(scoring, "__file__", str(tmp_path / "support" / "scoring.py"))
    assert scoring.store_path(teacher, layers, files, SIZE, Config()) == before
    with open(tmp_path / "bn_stats.py", "a") as file:
        file.write("# a distance of my own\n")
    assert scoring.store_path(teacher, layers, files, SIZE, Config()) != before


def test_a_broken_and_a_vanished_file_score_nan_and_are_named(teacher, pool_folder, tmp_path):
    files = find_images(pool_folder)
    files[4].write_bytes(b"not a picture")
    files[7].unlink()
    for store in (tmp_path / "store", tmp_path / "store"):                # computed, then read
        scores, skipped = scan(teacher, files, None, store)
        assert scores[:, 0].isnan().nonzero().flatten().tolist() == [4, 7]
        assert len(skipped) == 2 and files[4].name in skipped[0] and files[7].name in skipped[1]
    scoring.store_path(teacher, bn_layers(teacher), files, SIZE, Config())  # does not raise


def test_workers_do_not_change_a_score(teacher, pool_folder):
    files = find_images(pool_folder)
    assert torch.equal(scan(teacher, files)[0], scan(teacher, files, workers=2)[0])
