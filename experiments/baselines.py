"""Other ways to select photos, to compare with: mean entropy, k-centre, and herding.

Idea
    ADS scores each photo alone. Active learning would rather take the photos that the teacher is
    least sure of (entropy) or that cover the pool (k-centre). Herding minimises the same distance
    as ADS, but for the selected set as a whole.

Equation
    entropy   the largest  H(x) = - mean over pixels of sum over k of p_k ln p_k
    k-centre  next = argmax over i of (min over j in S of || f_i - f_j ||);  the first is the image
              nearest to the mean of all f
    herding   next = argmin over i of d(S + {i}),  d as in bn_stats.py, of the statistics of all
              pixels of the set: m = mean over S of mu, and mean over S of (var + mu^2) - m^2

Paper
    k-centre: Sener & Savarese, arXiv 1708.00489. Herding: Welling, ICML 2009, there with a linear
    distance. That f is the spatial mean of what enters the last BatchNorm layer is ours.

Symbols
    N images of the pool, n of them readable, B of a batch, S the selected ones; C channels,
    K classes, h w of the logits. mu, var (n, C): spatial mean and variance of a layer's input.

Use it
    python -m experiments.baselines --method herding --teacher T.pt --pool photos \\
                                    --dataset camvid --data-root CamVid --out runs/herding
    python distill.py --teacher T.pt --pool runs/herding/chosen.csv --dataset camvid \\
                      --data-root CamVid --budget 0 --schedule uniform
"""

from dataclasses import dataclass

import torch

from ads_sampler import sample
from bn_stats import bn_distance, bn_layers, capture_bn_inputs, select_layers
from support import command, data, records, scoring
from support.options import one_sentence, option


def mean_entropy(logits):
    """Return the entropy of the class probabilities, averaged over pixels: (B, K, h, w) -> (B,)."""
    return torch.special.entr(logits.float().softmax(dim=1)).sum(dim=1).mean(dim=(1, 2))


def k_centre(features, budget):
    """Return the indices of images that cover the pool: (n, C) -> (budget,)."""
    selected = [(features - features.mean(dim=0)).norm(dim=1).argmin().item()]
    distance = torch.full_like(features[:, 0], torch.inf)           # to the nearest in S, (n,)
    while len(selected) < budget:
        newest = selected[-1]
        distance = distance.minimum((features - features[newest]).norm(dim=1))
        distance[newest] = -1                                       # never twice
        selected.append(distance.argmax().item())
    return torch.tensor(selected)


def herding(captured, layers, budget, metric="l2"):
    """Return the indices of images whose statistics as a set come near the running ones: (budget,).

    captured: {layer: (2, n, C), mean and variance of each image}. layers: {layer: module}.
    """
    moments = {name: torch.stack([m, v + m ** 2]).double()                     # E f, E f^2
               for name, (m, v) in captured.items()}
    sums = {name: torch.zeros_like(m[:, :1]) for name, m in moments.items()}   # over S, (2, 1, C)
    selected = []
    while len(selected) < budget:
        candidates = {}                                             # the statistics of S + {i}
        for name in moments:
            mean, square = (sums[name] + moments[name]) / (len(selected) + 1)             # (n, C)
            candidates[name] = mean, square - mean.square()
        distance = bn_distance(candidates, layers, metric).sum(dim=1)                     # (n,)
        distance[selected] = torch.inf
        selected.append(distance.argmin().item())
        for name in moments:
            sums[name] += moments[name][:, selected[-1:]]
    return torch.tensor(selected)


@dataclass(frozen=True)
class Config(command.Inputs):
    method: str = option("entropy", "how to select", ("entropy", "k-centre", "herding"))
    budget: int = option(400, "pool images to select", min=1)


def select(cfg, out):
    """Select images as `cfg` says and write out/chosen.csv, which distill.py takes as --pool."""
    teacher, files, _ = command.open_inputs(cfg, out)
    pool = data.open_pool(files, teacher, teacher.image_size, cfg.match_colours)
    layers = select_layers(bn_layers(teacher), cfg.layers)
    rows = {}

    def score(images, index):
        with capture_bn_inputs(teacher, layers) as captured:
            logits = teacher(images)                                           # (B, K, h, w)
        for name, statistics in captured.items():
            rows.setdefault(name, []).append(torch.stack(statistics))          # (2, B, C)
        return -mean_entropy(logits)

    scores, _ = scoring.cached_scores(score, pool, teacher.mean.device, cfg.workers)   # (N,)
    # selected: by entropy. ValueError, for every method, if the budget is too large.
    selected, usable = sample(scores, cfg.budget), scores.isfinite().nonzero().squeeze(1)
    captured = {name: torch.cat(parts, dim=1)[:, usable] for name, parts in rows.items()}
    if cfg.method == "k-centre":
        selected = usable[k_centre([*captured.values()][-1][0], cfg.budget)]  # the last layer's mu
    elif cfg.method == "herding":
        selected = usable[herding(captured, layers, cfg.budget, cfg.metric)]
    records.write_csv(out / "chosen.csv", ("file",), [[files[i]] for i in selected.tolist()])
    print(f"{cfg.method}: {cfg.budget} of {len(usable)} images, listed in {out / 'chosen.csv'}")


def main(argv=None):
    """Select photos from the command line."""
    return records.in_folder(select, Config, argv, __doc__.split("\n")[0])


if __name__ == "__main__":
    one_sentence(main)()
