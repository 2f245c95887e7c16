"""DFSS from end to end: a teacher and a folder of photographs in, a small student out.

    python distill.py                                              # built-in scenes, no download
    python distill.py --teacher T.pt --pool DIR --dataset none     # no labels anywhere
    python distill.py ... --dry-run                                # does the pool fit the teacher?
    python distill.py --dataset camvid --data-root DIR --pool DIR --teacher T.pt
    python distill.py --dataset voc --data-root DIR --download --pool DIR \\
                      --teacher-model deeplabv3_resnet50 --teacher-weights DEFAULT

Idea
    1 read what the teacher remembers, 2 score the pool by it, 3 sample a budget of images (ADS),
    4 weight them (WDPD), 5 distil: all of it is the function `distill`. The command below adds
    labels, where there are any: to report on, after the training, and for nothing else.

Paper
    DFSS (Sun & Wu, arXiv 2512.13175); the README lists what is the paper's and what is ours.

Symbols
    B images of a batch, K classes, H W pixels, h w of the logits, N pool images.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ads_sampler import sample
from bn_stats import METRICS, bn_layers, image_distances, select_layers
from kd_loss import channelwise_kd, pixelwise_kd
from models import MODELS, build_model, freeze, wrap
from priority import SCHEDULES, progressive_weights, sample_weights, weighted_loss
from support import checkpoint, command, records
from support.teacher_cache import answers_of, folded, keep, resized
from support.recolour import private_colours
from support.data import Batches, Pool, Views, find_images
from support.labelled import DATASETS, Labels, labels
from support.options import Running, filled, one_sentence, option, parse_losses, pick_amp
from support.scoring import look_over, scan, score_key
from support.training import Training

DEFAULTS = {"steps": 7200, "views": 24}


def rule_of_choice(teacher, layers, cfg, count):
    """Return the score of cfg.sampling, a function of images (B, 3, H, W) and their places in the
    pool (B,): (B,), small is good.
    """
    if cfg.sampling == "random":
        drawn = torch.rand(count, generator=torch.Generator().manual_seed(cfg.seed))
        return lambda images, places: drawn[places.cpu()]
    if cfg.sampling == "confidence":         # 1 - mean over pixels of the largest probability
        return lambda images, places: 1 - teacher(images).float().softmax(1).amax(1).mean((1, 2))
    return lambda images, places: image_distances(teacher, images, layers, cfg.metric)


def distill(teacher, student, pool, size, cfg=None, out=None):
    """Distil one segmentation network into another on unlabelled photographs: the Python API.

    teacher, student: modules on one device, from RGB in [0, 1] to logits of the same classes (see
    `models.wrap`). pool: a folder, or a list of files. size: (H, W). out: folder for a record from
    which an interrupted run goes on. Freezes `teacher`, trains `student` in place and leaves it in
    eval mode. Returns a dict: files, distances and weights of the chosen, nearest first, and their
    places in the pool (chosen); pool, scores, skipped (why), layers, laps; curve, but for dry runs.
    """
    cfg, out, laps = filled(cfg or Config(), **DEFAULTS), out and Path(out), records.Laps()
    teacher, student = freeze(wrap(teacher)), wrap(student)
    pixel_weight, channel_weight, temperature = parse_losses(cfg.kd)
    # --align: photographs are read in the private colours, here and in every later step.
    prepare = private_colours(teacher, size) if cfg.align == "transfer-first" else None
    pool = Pool(pool if isinstance(pool, list) else find_images(pool), size, prepare)
    device = next(teacher.parameters()).device

    # 1. Read what the teacher remembers of its training data.
    layers = select_layers(bn_layers(teacher), cfg.layers)
    logit_size = look_over(teacher, student, layers, pool, cfg)    # stops here if they do not fit

    # 2. Score the pool: how far is each photograph from that? `scan` is ads_sampler.score_pool,
    #    with scores kept on disk, so that a stopped run goes on.
    rule = rule_of_choice(teacher, layers, cfg, len(pool))
    key = out and score_key(teacher, layers, pool, cfg)
    scores, skipped = scan(rule, pool, device, cfg.workers, out, key)              # (N,)

    # 3. Sample a budget of the nearest (ADS).
    chosen = sample(scores, cfg.budget or int(scores.isfinite().sum()))            # (budget,)

    # 4. Weight them (WDPD): the nearest 1, the farthest 0 (random: all 1). In step 5 all move to 1.
    weights = sample_weights(scores[chosen] * (cfg.sampling != "random"), cfg.weighting)
    found = {"files": [pool.files[i] for i in chosen.tolist()], "chosen": chosen, "scores": scores,
             "distances": scores[chosen], "weights": weights, "pool": pool, "layers": layers,
             "skipped": skipped, "laps": laps}
    laps("scoring")
    command.tell_choice(found, cfg, out)
    if cfg.dry_run:
        return found

    # 5. Distil: the student learns to answer as the teacher does. The teacher answers each view of
    #    a photograph (a crop, a flip, a change of light) once, before; with --views 0, each time.
    weights = weights.to(device)
    trainer = Training(student, cfg.steps, cfg.lr, cfg.seed, pick_amp(cfg.amp, device),
                       out and out / "state.pt", about=records.about(cfg, teacher))
    ask = partial(answers_of, folded(teacher, size), like=logit_size, temperature=temperature,
                  precision=trainer.precision())
    views = Views(found["files"], size, cfg.seed, prepare=prepare)
    batches = Batches(views, cfg.batch_size, keep(ask, views, cfg, device, out))
    for progress, images, slots, answers in trainer.batches(batches, cfg.workers):
        if answers is None:                                # slots: which of the chosen files (B,)
            answers = ask(images)                                                  # (B, K, h, w)
        with trainer.precision():
            logits = resized(student(images), logit_size)                          # (B, K, h, w)
        losses = (pixel_weight * pixelwise_kd(logits, answers)
                  + channel_weight * channelwise_kd(logits, answers))              # (B,), float32
        now = progressive_weights(weights, progress, cfg.schedule)                 # (budget,)
        trainer.step(weighted_loss(losses, now[slots], now.mean()))     # backward, AdamW, schedule
    laps("distillation")
    return {**found, "curve": trainer.curve}


# ---------------------------------------------------------------- options and command

nets, method, training, running = (partial(option, group=g) for g in (
    "networks", "method", "training", "running"))


@dataclass(frozen=True)
class Config(Labels, Running):      # and: data_root, download, num_classes; seed, device, amp, ...
    dataset: str = labels("scenes", "labels to evaluate on; none: no labels", tuple(DATASETS))
    split: str = labels("val", "part to evaluate on; 'val:A,B' keeps files that begin so")
    pool: str | None = option(None, "unlabelled photographs: a folder, or a run's chosen.csv",
                              kind="PATH", group="labels")
    teacher: str | None = nets(None, "teacher.pt of train_teacher.py", kind="FILE")
    teacher_model: str | None = nets(None, "or a torchvision network", MODELS)
    teacher_weights: str | None = nets(None, "with its published weights: DEFAULT")
    student_model: str = nets("resnet_tiny", "student network", MODELS)
    student_weights: str = nets("none", "pretrained on auxiliary images", ("none", "imagenet"))
    budget: int = method(400, "pool images to learn from; 0 takes all")
    sampling: str = method("nearest", "choose by distance, by the teacher's confidence, at random",
                           ("nearest", "confidence", "random"))
    layers: str = method("all", "BatchNorm layers: all, early, middle, late, names, indices")
    metric: str = method("l2", "distance to their statistics: the paper's l2, or kl", METRICS)
    weighting: str = method("minmax", "weights from distances, or from their ranks",
                            ("minmax", "rank"))
    schedule: str = method("linear", "relax weights to 1, keep them, or have none", SCHEDULES)
    align: str = method("none", "give photographs the private colours before choosing (ours)",
                        ("none", "transfer-first"))
    kd: str = method("pixelwise+channelwise", "losses, as in pixelwise+10*channelwise; @0.4 "
                     "behind them makes the teacher's answers surer (its temperature)")
    views: int | None = training(None, "views of a photograph, answered once each; 0: always new "
                                 "(default: 24; 8 for the built-in scenes)")
    steps: int | None = training(None, "number of updates (default: 7200; 500 for the built-in "
                                 "scenes)", least=1)
    batch_size: int = training(16, "images an update", least=1)
    lr: float = training(0.01, "highest learning rate")
    image_size: tuple[int, int] | None = training(None, "crop size (default: the teacher's)")
    dry_run: bool = running(False, "score the pool, say whether it fits, and stop")


def new_student(cfg, teacher):
    """Return the student that `cfg` names, with the teacher's classes and normalisation."""
    torch.manual_seed(cfg.seed)
    return build_model(
        cfg.student_model, teacher.num_classes, class_names=teacher.class_names,
        weights_backbone="DEFAULT" if cfg.student_weights == "imagenet" else None,
        mean=teacher.mean.flatten().tolist(), std=teacher.std.flatten().tolist(),
        image_size=teacher.image_size).to(teacher.mean.device)


def run(cfg, out):
    """Run the method as the options say, in the folder `out`; return the metrics it prints."""
    cfg, teacher, files, held_out, laps = command.opened(cfg, out, DEFAULTS)
    size, student = teacher.image_size, new_student(cfg, teacher)
    found = distill(teacher, student, files, size, cfg, out)
    if cfg.dry_run:
        return command.shown(found, teacher, out, cfg.sampling)
    checkpoint.save_model(student, out / "student.pt")
    records.write_csv(out / "curve.csv", ("step", "loss"), found["curve"])
    return command.reported(cfg, out, teacher, student, found, held_out, laps)


def main(argv=None):
    """Run the method from the command line; return the metrics it prints."""
    return records.in_folder(run, Config, argv, __doc__.split("\n")[0])


if __name__ == "__main__":
    one_sentence(main)()
