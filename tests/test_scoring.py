"""scoring: a scan goes on where it stopped, is never done twice, and names what it cannot read."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import with_random_statistics

from bn_stats import bn_layers, capture_bn_inputs, image_distances
from distill import Config
from evaluate import as_input
from models import build_model
from support import scoring
from support.data import Pool, find_images
from support.scoring import mean_shift, score_key, unusable, verdict

SIZE = (32, 48)


@pytest.fixture
def teacher():
    return with_random_statistics(build_model("resnet_tiny", 5))


@pytest.fixture
def pool(pool_folder):
    return Pool(find_images(pool_folder), SIZE)


def scan(teacher, pool, **how):
    return scoring.scan(lambda images, numbers: image_distances(teacher, images), pool,
                        torch.device("cpu"), **how)


def seen(pool):
    """Return all images of a pool as the teacher sees them: (N, 3, H, W)."""
    return as_input(torch.stack([pool.view(i) for i in range(len(pool))]), "cpu")


def test_scores_are_those_of_the_rule_in_pool_order(teacher, pool):
    scores, skipped = scan(teacher, pool)
    torch.testing.assert_close(scores, image_distances(teacher, seen(pool)))
    assert scores.shape == (30,) and skipped == []
    numbers, _ = scoring.scan(lambda images, numbers: numbers, pool, torch.device("cpu"))
    assert numbers.tolist() == list(range(30))


def test_workers_do_not_change_a_score(teacher, pool):
    assert torch.equal(scan(teacher, pool)[0], scan(teacher, pool, workers=2)[0])


@pytest.mark.parametrize("done", [0, 1, 16, 17, 30])
def test_an_interrupted_scan_goes_on_to_the_same_bits(teacher, pool, tmp_path, monkeypatch, done):
    whole, read, item = scan(teacher, pool)[0], [], Pool.__getitem__
    half_a_row = b"abc" if done < 30 else b""
    (tmp_path / "key.part").write_bytes(whole[:done].numpy().tobytes() + half_a_row)
    monkeypatch.setattr(Pool, "__getitem__", lambda self, i: read.append(i) or item(self, i))
    assert torch.equal(scan(teacher, pool, key="key", out=tmp_path)[0], whole)
    assert read == list(range(done // 16 * 16, 30)) and not (tmp_path / "key.part").exists()


def test_the_scan_is_written_as_it_goes(teacher, pool, tmp_path, monkeypatch):
    (whole, _), item = scan(teacher, pool), Pool.__getitem__

    def failing(self, i):
        if i == 20:
            raise KeyboardInterrupt
        return item(self, i)

    monkeypatch.setattr(Pool, "__getitem__", failing)
    with pytest.raises(KeyboardInterrupt):
        scan(teacher, pool, key="key", out=tmp_path)
    assert np.array_equal(np.fromfile(tmp_path / "key.part", dtype=np.float32), whole[:16])


def test_a_second_run_reads_the_scores_and_computes_nothing(teacher, pool, tmp_path, monkeypatch):
    first, _ = scan(teacher, pool, key="key", out=tmp_path)
    monkeypatch.setattr(scoring, "score_pool", lambda *_: pytest.fail("scanned again"))
    assert torch.equal(scan(teacher, pool, key="key")[0], first)
    with pytest.raises(pytest.fail.Exception):
        scan(teacher, pool, key="another")


def test_the_key_knows_teacher_layers_files_size_and_settings(teacher, pool):
    layers = bn_layers(teacher)
    few = dict(list(layers.items())[:2])
    keys = [score_key(teacher, layers, pool, Config()), score_key(teacher, few, pool, Config()),
            score_key(teacher, layers, Pool(pool.files[1:], SIZE), Config()),
            score_key(teacher, layers, Pool(pool.files, (32, 32)), Config())]
    keys += [score_key(teacher, layers, pool, Config(**options)) for options in (
        {"metric": "kl"}, {"align": "transfer-first"}, {"sampling": "confidence"},
        {"sampling": "random"}, {"sampling": "random", "seed": 1})]
    pool.files[3].write_bytes(pool.files[3].read_bytes() + b" ")
    keys.append(score_key(teacher, layers, pool, Config()))
    pool.files[7].unlink()                                       # vanished: no reason to stop
    keys.append(score_key(teacher, layers, pool, Config()))
    next(iter(layers.values())).running_mean[0] += 1
    keys.append(score_key(teacher, layers, pool, Config()))
    assert len(set(keys)) == len(keys)
    same = Config(seed=3, steps=7, budget=2, workers=1)
    assert score_key(teacher, layers, pool, same) == keys[-1]


def test_scores_made_by_other_code_are_not_used_again(teacher, pool, tmp_path, monkeypatch):
    root, layers = Path(scoring.__file__).parents[1], bn_layers(teacher)
    before = score_key(teacher, layers, pool, Config())
    for path in (*root.glob("*.py"), *root.glob("support/*.py")):
        (tmp_path / path.relative_to(root)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(root))
    monkeypatch.setattr(scoring, "__file__", str(tmp_path / "support" / "scoring.py"))
    assert score_key(teacher, layers, pool, Config()) == before
    with open(tmp_path / "bn_stats.py", "a") as file:
        file.write("# a distance of my own\n")
    assert score_key(teacher, layers, pool, Config()) != before


def test_a_broken_and_a_vanished_file_score_nan_and_are_named(teacher, pool):
    pool.files[4].write_bytes(b"not a picture")
    pool.files[7].unlink()
    for _ in ("computed", "read"):
        scores, (first, second) = scan(teacher, pool, key="key")
        assert scores.isnan().nonzero().flatten().tolist() == [4, 7]
        assert "04.png: Unidentified" in first and "07.png: FileNotFound" in second


def test_a_file_that_can_be_read_again_gets_its_score(teacher, pool, tmp_path):
    away = pool.files[4].rename(tmp_path / "away")
    assert scan(teacher, pool, key="key")[0].isnan().sum() == 1
    away.rename(pool.files[4])
    scores, skipped = scan(teacher, pool, key="key")
    assert not skipped and torch.equal(scores, scan(teacher, pool)[0])


def test_a_score_that_is_not_finite_is_named_and_more_than_half_of_them_stop(pool):
    scores = torch.arange(30.0)
    scores[:15] = torch.inf
    reasons = unusable(pool, scores)
    assert reasons == [f"{path}: it could not be scored" for path in pool.files[:15]]
    scores[15] = torch.nan
    with pytest.raises(ValueError, match=r"16 of 30 files of the pool .*first is .*00\.png: it"):
        unusable(pool, scores)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_file_without_a_finite_score_is_not_scored_again_by_the_next_run(pool, bad):
    asked = []

    def rule(images, numbers):
        asked.append(numbers)
        return torch.where(numbers == 4, bad, numbers.float())

    for _ in ("computed", "read"):
        scores, (reason,) = scoring.scan(rule, pool, torch.device("cpu"), key="key")
        assert scores.isinf().nonzero().flatten().tolist() == [4]
        assert reason == f"{pool.files[4]}: it could not be scored"
        assert len(asked) == 2                                   # batches of 30 files


def test_the_mean_shift_is_the_root_mean_square_of_standardised_channel_means(teacher, pool):
    layers, indices = bn_layers(teacher), list(range(3, 25))     # two batches, the second smaller
    with torch.no_grad(), capture_bn_inputs(teacher) as captured:
        teacher(seen(pool)[3:25])
    squares = [((mean - layer.running_mean) ** 2 / (layer.running_var + layer.eps)).mean().item()
               for mean, layer in ((captured[name][0], layers[name]) for name in layers)]
    assert mean_shift(teacher, layers, pool, indices) == pytest.approx(
        (sum(squares) / len(squares)) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(("near", "said"), [(0.2, "fits well"), (0.5, "fits in part"),
                                            (0.9, "hardly fits")])
def test_the_verdict_names_the_shift_of_the_chosen_and_of_usable_files_spread_over_the_pool(
        monkeypatch, near, said):
    looked = []
    monkeypatch.setattr(scoring, "mean_shift", lambda teacher, layers, pool, indices: looked.append(
        indices) or (near if len(looked) == 1 else 1.1))
    found = {"scores": torch.arange(30.0), "chosen": torch.tensor([5, 6, 7]), "layers": None,
             "pool": None}
    found["scores"][0] = torch.nan
    text = verdict(None, found, most=10)
    assert f"This pool {said}: the chosen images lie {near:.2f} standard" in text and "1.10" in text
    assert looked == [[5, 6, 7], list(range(1, 30, 3))]
