"""DFSS from end to end: a teacher and a folder of unlabelled photos in, a small student out.

    python distill.py                                              # drawn scenes, no download
    python distill.py --teacher T.pt --pool DIR --dataset none     # no labels anywhere
    python distill.py ... --dry-run                                # does the pool fit the teacher?
    python distill.py --teacher T.pt --pool DIR --dataset camvid --data-root DIR
    python distill.py --teacher-model deeplabv3_resnet50 --teacher-weights DEFAULT --pool DIR \\
                      --dataset voc --data-root DIR --download

Idea
    1 read the teacher's BatchNorm statistics, 2 score the pool, 3 sample the nearest (ADS),
    4 weight them (WDPD), 5 distil: all of it is the function `distill`. The command adds step 6,
    evaluate: labels, if there are any, are used for the report and for nothing else.

Paper and symbols
    DFSS (Sun & Wu, arXiv 2512.13175); the README lists what is the paper's and what is ours.
    B images of a batch, K classes, H W pixels, h w of the logits, N pool images.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ads_sampler import sample
from bn_stats import bn_layers, image_distances, select_layers
from evaluate import evaluate, predict, report
from kd_loss import channelwise_kd, pixelwise_kd
from models import freeze, wrap
from priority import SCHEDULES, progressive_weights, sample_weights, weighted_loss
from support import checkpoint, command, figures, records
from support.checks import check_inputs
from support.data import Batches, Views, open_pool
from support.options import inputs, method, one_sentence, running, training, with_defaults
from support.scoring import cached_scores, score_file
from support.teacher_cache import TeacherCache, comparison_size, resize
from support.training import Training, warmup_poly
from train_teacher import builtin_teacher

DEFAULTS = {"steps": 7200, "views": 24}        # for options that are None (scenes: see `run`)


def selection_score(teacher, layers, cfg, count):
    """Return the score of cfg.sampling, lower is better, as a function (images, index) -> (B,).

    images: (B, 3, H, W) in [0, 1]. index: (B,), their indices in the pool. count: N.
    """
    if cfg.sampling == "random":
        drawn = torch.rand(count, generator=torch.Generator().manual_seed(cfg.seed))
        return lambda images, index: drawn[index.cpu()]
    if cfg.sampling == "confidence":         # 1 - mean over pixels of the largest probability
        return lambda images, index: 1 - teacher(images).float().softmax(1).amax(1).mean((1, 2))
    # The teacher normalises: see models.py.
    return lambda images, index: image_distances(teacher, images, layers, cfg.metric)


@torch.no_grad()
def compute_teacher_logits(teacher, autocast, size, cfg, images):
    """Return the teacher's logits at `size` = (h, w): (B, 3, H, W) -> (B, K, h, w), float32.

    A temperature below 1 sharpens them (as DINO does, arXiv 2104.14294).
    """
    with autocast():
        return resize(teacher(images).float(), size) / cfg.teacher_temperature


def distill(teacher, student, pool, size, cfg=None, out=None):
    """Distil one segmentation network into another on unlabelled photos: the Python API.

    teacher, student: modules on one device, from RGB in [0, 1] to logits of the same classes (see
    `models.wrap`, also for normalisation); the teacher is frozen for good, the student trained in
    place. pool: a folder or a list of files. size: (H, W). cfg: a Config, of which the options for
    files and device are ignored. out: a folder for records; a second call with the same arguments
    and initial weights resumes an interrupted run. Returns a dict, `result` below.
    """
    cfg = with_defaults(cfg or Config(), **DEFAULTS)
    out, timer = Path(out) if out else None, records.Timer()
    teacher, student = freeze(wrap(teacher)), wrap(student)       # `wrap` keeps wrapped networks
    device = next(teacher.parameters()).device
    # match_colours: scoring and training see each photo in the colours of the teacher's data.
    pool = open_pool(pool, teacher, size, cfg.match_colours)

    # 1. Read the teacher's BatchNorm statistics.
    layers = select_layers(bn_layers(teacher), cfg.layers)
    check_inputs(teacher, student, layers, pool, cfg)       # tries a training step, with a copy

    # 2. Score the pool, as score_pool of ads_sampler.py does. Unreadable files are `skipped`. If
    #    records are written (`out`), scores also go to runs/scores, where later runs find them.
    score = selection_score(teacher, layers, cfg, len(pool))
    cache_file = score_file(teacher, layers, pool, cfg) if out else None
    scores, skipped = cached_scores(score, pool, device, cfg.workers, cache_file)         # (N,)

    # 3. Sample the nearest (ADS); budget 0: all that could be read.
    selected = sample(scores, cfg.budget or len(pool) - len(skipped))                # (budget,)

    # 4. Weight them (WDPD): the best score 1, the worst 0. Random scores mean nothing: all get 1.
    weights = sample_weights(scores[selected], cfg.weighting)                        # (budget,)
    if cfg.sampling == "random":
        weights = torch.ones_like(weights)
    timer("scoring")
    result = {"files": [pool.files[i] for i in selected.tolist()], "selected": selected,
              "distances": scores[selected], "weights": weights, "pool": pool, "scores": scores,
              "skipped": skipped, "layers": layers, "timer": timer}
    command.record_selection(result, cfg, out)
    if cfg.dry_run:
        return result

    # 5. Distil on random views. Each photo has cfg.views of them, whose teacher logits are computed
    #    here, once. With 0, each step draws new views and runs the teacher.
    optimizer = torch.optim.AdamW(student.parameters(), cfg.lr, weight_decay=0.01, fused=True)
    scheduler = warmup_poly(optimizer, cfg.steps)     # 50 steps up, then (1 - step/steps)^0.9
    # A state in `out` is resumed if it has the same teacher, student, size and options.
    trainer = Training(student, optimizer, scheduler, cfg, out, resume_with=(teacher, size))
    # Logits are compared at max(student's size, min(teacher's size, H/4 x W/4)).
    logit_size = comparison_size(teacher, student, size)                                  # (h, w)
    teacher_pass = partial(compute_teacher_logits, teacher, trainer.autocast, logit_size, cfg)
    views = Views(result["files"], size, cfg.seed, pool.transform)    # transform: match_colours
    cache = TeacherCache(teacher_pass, views, cfg, device, out) if cfg.views else None
    weights = weights.to(device)
    batches = Batches(views, cfg.batch_size, cache)
    # An epoch has every selected photo once, in random order, each with its next view. A resumed
    # run starts at a later step. The student is in training mode. index (B,): into `selected`.
    for step, images, index, teacher_logits in trainer.steps(batches):
        if teacher_logits is None:
            teacher_logits = teacher_pass(images)                                  # (B, K, h, w)
        with trainer.autocast():
            student_logits = resize(student(images), logit_size)                   # (B, K, h, w)
        losses = (cfg.pixelwise * pixelwise_kd(student_logits, teacher_logits)
                  + cfg.channelwise * channelwise_kd(student_logits, teacher_logits))     # (B,)
        w = progressive_weights(weights, step / cfg.steps, cfg.schedule)             # (budget,)
        loss = weighted_loss(losses, w[index], w.mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        trainer.log(loss)
    timer("distillation")
    return {**result, "curve": trainer.curve}                         # [(step, mean loss), ...]


# ---------------------------------------------------------------- options and command
# inputs, method, training, running: the groups of options in --help.

@dataclass(frozen=True)
class Config(command.Inputs):     # with teacher, pool, metric, layers, match_colours, seed ...
    student_model: str = inputs("resnet_tiny", "student network, named like --teacher-model")
    student_weights: str = inputs("none", "pretrained on ImageNet", ("none", "imagenet"))
    budget: int = inputs(400, "pool images to learn from; 0 takes all")
    sampling: str = method("nearest", "select by distance, by the teacher's confidence, at random",
                           ("nearest", "confidence", "random"))
    weighting: str = method("minmax", "weights from distances or ranks", ("minmax", "rank"))
    schedule: str = method("linear", "relax weights to 1, keep them fixed, or use none", SCHEDULES)
    pixelwise: float = method(1.0, "factor of the pixel-wise KD loss")
    channelwise: float = method(1.0, "factor of the channel-wise KD loss")
    teacher_temperature: float = method(1.0, "below 1 sharpens the teacher's logits", min=0.01)
    views: int | None = training(None, "cached views per photo, 0: fresh (default: 24; scenes: 8)")
    steps: int | None = training(None, "updates (default: 7200; scenes: 500)", min=1)
    batch_size: int = training(16, "images per update", min=1)
    lr: float = training(0.01, "highest learning rate (large students: 0.001)")
    dry_run: bool = running(False, "score the pool, say whether it fits, and stop")


def run(cfg, out):
    """Run the method as the options say, in the folder `out`; return the metrics it prints."""
    timer = records.Timer()
    named = (cfg.data_root, cfg.pool, cfg.teacher, cfg.teacher_model, cfg.teacher_weights)
    if cfg.dataset == "scenes" and not any(named):
        root, file = builtin_teacher(cfg.image_size, cfg.device, cfg.amp)
        cfg = with_defaults(cfg, data_root=root, pool=f"{root}/pool", teacher=file, steps=500,
                            views=8)
    cfg = with_defaults(cfg, **DEFAULTS)
    teacher, files, eval_data = command.open_inputs(cfg, out)
    timer("scenes and teacher")
    student = command.build_student(cfg, teacher)
    # An image of a size that a network cannot take should fail now, not after the training.
    evaluate(student, [next(iter(eval_data))], teacher.num_classes, reference=teacher)
    result = distill(teacher, student, files, teacher.image_size, cfg, out)
    if cfg.dry_run:
        return command.report_dry_run(result, teacher, cfg, out)
    checkpoint.save_model(student, out / "student.pt")
    print(f"5 distilled {cfg.steps} updates of {cfg.batch_size} images")
    results = {}
    if cfg.dataset != "none":
        K = len(eval_data.dataset.class_names)      # the teacher's further classes: wrong
        results["teacher"] = evaluate(teacher, eval_data, K)
        results["student"] = evaluate(student, eval_data, K)
    results["agreement"] = evaluate(student, eval_data, teacher.num_classes, reference=teacher)
    print("6 evaluated\n" + report(results, teacher.class_names))
    examples = figures.examples(eval_data, {"Teacher": teacher, "Student": student}, predict)
    return command.save_report(cfg, out, teacher, result, results, examples, timer)


def main(argv=None):
    """Run the method from the command line; return the metrics it prints."""
    return records.in_folder(run, Config, argv, __doc__.split("\n")[0])      # calls run(cfg, out)


if __name__ == "__main__":
    one_sentence(main)()                          # errors of the user in a sentence, no traceback
