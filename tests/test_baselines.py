"""baselines.py: other ways to choose, and a choice used again."""

import csv

import pytest
import torch
from conftest import with_random_statistics

import checkpoint
import distill
from baselines import prediction_scores, random_sample
from data import find_images
from models import build_model, freeze

SIZE = (32, 48)


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return freeze(with_random_statistics(build_model("resnet_tiny", 5)))


@pytest.fixture
def teacher_file(teacher, tmp_path):
    checkpoint.save_model(teacher, tmp_path / "teacher.pt", image_size=list(SIZE))
    return tmp_path / "teacher.pt"


# ---------------------------------------------------------------- other ways to choose

def test_prediction_scores_agree_with_two_pixels_by_hand():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])                             # pixels, classes
    logits = p.log().T.view(1, 2, 1, 2)
    assert prediction_scores(logits, "confidence").item() == pytest.approx(1 - (0.5 + 0.9) / 2)
    assert prediction_scores(logits, "entropy").item() == pytest.approx((0.6931 + 0.3251) / 2, 1e-3)
    with pytest.raises(ValueError, match="'luck' is unknown"):
        prediction_scores(logits, "luck")


def test_a_random_sample_has_no_repeats_and_only_usable_images():
    usable = torch.arange(20) % 2 == 0
    drawn = random_sample(usable, 10, seed=3)
    assert sorted(drawn.tolist()) == list(range(0, 20, 2))
    assert torch.equal(drawn, random_sample(usable, 10, seed=3))
    with pytest.raises(ValueError, match="between 1 and 10"):
        random_sample(usable, 11, seed=0)


# ---------------------------------------------------------------- a choice used again

def test_a_csv_gives_back_its_files_in_its_order(pool_folder, tmp_path):
    files = find_images(pool_folder)
    chosen = [files[7], files[2], files[29]]
    with open(tmp_path / "chosen.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "distance"), *((path, 1.5) for path in chosen)])
    assert find_images(tmp_path / "chosen.csv") == chosen
    assert find_images(str(tmp_path / "chosen.csv")) == chosen


@pytest.mark.parametrize(("text", "error", "message"), [
    ("file\n00.png\ngone.png\n", FileNotFoundError, "lists gone.png, which is not there"),
    ("distance,file\n1,00.png\n", ValueError, "first column is headed 'file'"),
    ("file,distance\n", ValueError, "lists no images"), ("", ValueError, "lists no images")])
def test_a_csv_that_lists_no_images_is_refused(pool_folder, monkeypatch, text, error, message):
    monkeypatch.chdir(pool_folder)
    (pool_folder / "list.csv").write_text(text)
    with pytest.raises(error, match=message):
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
