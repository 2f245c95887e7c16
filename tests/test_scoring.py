"""scoring.py: a pool is scored once, in any number of processes, and what cannot be is named.

That scores are those of the function in pool order is tested in test_method.py.
"""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import with_random_statistics, write_photos

import distill
from bn_stats import bn_layers, image_distances
from distill import Config
from models import build_model
from support import scoring
from support.data import Pool
from support.images import as_input, find_images
from support.options import one_sentence
from support.scoring import score_file

SIZE, CPU = (32, 48), torch.device("cpu")


@pytest.fixture
def teacher():
    return with_random_statistics(build_model("resnet_tiny", 5))


@pytest.fixture
def pool(pool_folder):
    return Pool(find_images(pool_folder), SIZE)


def scores_of(teacher, pool, **how):
    return scoring.cached_scores(lambda images, _: image_distances(teacher, images), pool, CPU,
                                 **how)


def test_another_teacher_pool_option_or_code_has_another_file(teacher, pool, tmp_path, monkeypatch):
    layers = bn_layers(teacher)

    def name(pool=pool, layers=layers, **options):
        return score_file(teacher, layers, pool, Config(**options))

    paths = [name(**options) for options in (
        {}, {"metric": "kl"}, {"match_colours": True}, {"sampling": "confidence"},
        {"sampling": "random"}, {"sampling": "random", "seed": 1},
        {"layers": dict(list(layers.items())[:2])}, {"pool": Pool(pool.files[1:], SIZE)},
        {"pool": Pool(pool.files, (32, 32))})]
    for change in (lambda: pool.files[3].write_bytes(b"other"), pool.files[7].unlink,
                   lambda: next(iter(layers.values())).running_mean.add_(1)):
        change()
        paths.append(name())
    (tmp_path / "support").mkdir()
    monkeypatch.setattr(scoring, "__file__", str(tmp_path / "support/scoring.py"))
    for file, code in (("bn_stats.py", "1"), ("bn_stats.py", "2"), ("support/images.py", "1")):
        (tmp_path / file).write_text(code)
        paths.append(name())
    teacher.multiple = 8
    paths.append(name())
    teacher.name = f"{tmp_path}/nets.py:unet"
    for code in ("x", "2 * x"):                                         # its forward pass
        (tmp_path / "nets.py").write_text(code)
        paths.append(name())
    # The file in which a module of the network was defined, wherever it is.
    (tmp_path / "elsewhere.py").write_text("import torch\nclass Net(torch.nn.Identity): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    teacher.net.extra = importlib.import_module("elsewhere").Net()
    for code in ("x", "2 * x"):
        (tmp_path / "elsewhere.py").write_text(code)
        paths.append(name())
    assert len(set(paths)) == 20
    assert paths[-1] == name(seed=3, steps=7, budget=2, workers=1)      # no distance depends on it


def test_unreadable_files_score_nan_are_named_and_are_tried_again(teacher, pool, tmp_path):
    path, away = tmp_path / "scores.f32", pool.files[7].rename(tmp_path / "away")
    pool.files[4].write_bytes(b"not a picture")
    for _ in ("computed", "read"):
        scores, (first, second) = scores_of(teacher, pool, path=path)
        assert scores.isnan().nonzero().flatten().tolist() == [4, 7]
        assert "04.png: Unidentified" in first and "07.png: FileNotFound" in second
    away.rename(pool.files[7])
    scores, (first,) = scores_of(teacher, pool, path=path)
    assert "04.png" in first and torch.equal(scores[5:], scores_of(teacher, pool)[0][5:])


def test_infinite_scores_are_named_kept_and_at_most_half_of_the_pool(pool, tmp_path):
    bad, batches, many = torch.tensor([torch.nan, torch.inf, -torch.inf]), [], 15

    def score(images, index):
        batches.append(index)
        return torch.where(index < many, bad[index % 3], index.float())

    for _ in ("computed", "read"):
        scores, reasons = scoring.cached_scores(score, pool, CPU, path=tmp_path / "scores.f32")
        assert scores.isinf().tolist() == 15 * [True] + 15 * [False] and len(batches) == 2
        assert reasons == [f"{file}: its score is not finite" for file in pool.files[:15]]
    many = 16
    with pytest.raises(ValueError, match=r"16 of 30 pool files are unusable: .*00\.png: its"):
        scoring.cached_scores(score, pool, CPU)


def test_a_folder_in_which_scores_cannot_be_stored_is_named(world, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(scoring, "STORE", tmp_path / "file/scores")
    with pytest.raises(OSError, match="file/scores"):
        scoring.main(f"--dataset none --pool {world}/pool --teacher {world}/teacher.pt".split())


def end_in_the_second_batch(rank, words):
    """Score as the process `rank` of two; the second is killed, then torchrun ends the first."""
    calls = count()

    def ending(images, device):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGKILL if rank else signal.SIGTERM)
        return as_input(images, device)

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    scoring.as_input = ending
    one_sentence(lambda: scoring.main(words))()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_make_the_file_of_one_even_if_killed(world, tmp_path, monkeypatch, capfd):
    """66 of 70 photos are scored, in five batches: 0, 2 and 4 by the first process."""
    write_photos(tmp_path / "pool", 70)
    words = (f"--dataset none --pool {tmp_path}/pool --teacher {world}/teacher.pt --device cpu "
             "--metric kl").split()
    scoring.main(words)
    (one,) = scoring.STORE.iterdir()
    expected = np.fromfile(one, np.float32)
    assert expected.shape == (66,) and np.isfinite(expected).all()
    monkeypatch.setattr(scoring, "STORE", tmp_path / "runs/scores")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=end_in_the_second_batch, args=(rank, words))
                 for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [130, -signal.SIGKILL]
    assert capfd.readouterr().err.endswith("interrupted; what is done is kept\n")
    path = scoring.STORE / one.name
    half = np.array([*expected[:32], *[-np.inf] * 34], np.float32)
    assert np.array_equal(np.fromfile(path, np.float32), half)

    half[16:32] += 1                              # a mark: who computes these again removes it
    half.tofile(path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, "-m", "support.scoring", *words], cwd=tmp_path, check=False,
                          env={**os.environ, "PYTHONPATH": str(Path(distill.__file__).parent)},
                          capture_output=True, text=True)
    assert done.returncode == 0 and f"scores: runs/scores/{one.name}; distill.py" in done.stdout
    assert np.array_equal(np.fromfile(path, np.float32), [*half[:32], *expected[32:]])

    monkeypatch.setattr(scoring, "as_input", lambda *_: pytest.fail("scored again"))
    distill.main([*words, "--budget", "8", "--dry-run", "--out", str(tmp_path / "run")])
    assert f"the scores of this pool are read from {path}" in capfd.readouterr().out
