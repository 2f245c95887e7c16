"""experiments: the table's arithmetic by hand, and tiles that are all there."""

import torch

from experiments.compare import table
from experiments.shuffle_tiles import shuffle_tiles


def runs(row, values):
    return [{"row": row, "seed": seed, "student_miou": value / 100, "picks": {"sea": 3, "hills": 1}}
            for seed, value in enumerate(values)]


def test_the_table_gives_mean_deviation_and_the_paired_interval():
    record = {"runs": runs("random", [30, 32, 34]) + runs("nearest", [33, 36, 39])}
    lines = table(record).split("\n")
    assert lines[2] == "| random | 32.0 ± 2.0 |  | sea 3, hills 1 |"
    # Differences 3, 4, 5: mean 4, deviation 1, half-width 4.303 / sqrt(3) = 2.48.
    assert lines[3] == "| nearest | 36.0 ± 3.0 | +4.0 ± 2.5 | sea 3, hills 1 |"


def test_shuffled_tiles_are_a_permutation_of_whole_tiles():
    image = torch.arange(3 * 8 * 12).view(3, 8, 12)
    shuffled = shuffle_tiles(image, 4, torch.Generator().manual_seed(0))

    def tiles(x):
        return sorted(x[:, 2 * i:2 * i + 2, 3 * j:3 * j + 3].flatten().tolist()
                      for i in range(4) for j in range(4))

    assert tiles(shuffled) == tiles(image) and not torch.equal(shuffled, image)
    assert torch.equal(shuffle_tiles(image, 1, torch.Generator()), image)
