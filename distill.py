"""DFSS from end to end: a teacher and a folder of photographs in, a small student out.

    python distill.py                                              # built-in scenes, no download
    python distill.py --teacher T.pt --pool DIR --dataset none     # no labels anywhere
    python distill.py ... --dry-run                                # does the pool fit the teacher?
    python distill.py --dataset camvid --data-root DIR --pool DIR --teacher T.pt
    python distill.py --dataset voc --data-root DIR --download --pool DIR \\
                      --teacher-model deeplabv3_resnet50 --teacher-weights DEFAULT

Idea
    1 read what the teacher remembers, 2 score the pool by it, 3 sample a budget of images (ADS),
    4 weight them (WDPD), 5 distil on whole scenes, 6 evaluate and report. Labels, where there are
    any, are checked before the start and used in paragraph 6, nowhere else.

Paper
    DFSS (Sun & Wu, arXiv 2512.13175); the README lists what is the paper's and what is ours.
"""

import dataclasses
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import alignment
from ads_sampler import sample
from bn_stats import METRICS, bn_distance, bn_layers, capture_bn_inputs, select_layers
from evaluate import as_input, evaluate, report
from experiments import baselines
from kd_loss import LOSSES, parse_losses
from models import MODELS, build_model, cost, fingerprint, freeze, segmentation_logits
from priority import (
    SCHEDULES,
    effective_sample_size,
    progressive_weights,
    sample_weights,
    weighted_loss,
)
from support import checkpoint, plots, records
from support.data import Batches, Pool, find_images, hold_out, leave_out
from support.device import pick_amp, pick_device
from support.labelled import DATASETS, check_labels, open_labelled
from support.options import one_sentence, option, parse
from support.scoring import score, store_path, verdict
from support.training import fit
from train_teacher import builtin_teacher

data, nets, method = (partial(option, group=g) for g in ("data", "networks", "method"))
training, running = (partial(option, group=g) for g in ("training", "running"))


@dataclass(frozen=True)
class Config:
    dataset: str = data("scenes", "labels to evaluate on; none: no labels", tuple(DATASETS))
    data_root: str | None = data(None, "folder of the labelled data")
    split: str = data("val", "part to evaluate on; 'val:A,B' keeps files that begin so")
    download: bool = data(False, "let torchvision fetch Pascal VOC")
    num_classes: int | None = data(None, "classes, for --dataset folder")
    pool: str | None = data(None, "folder of unlabelled photographs, or a run's chosen.csv")
    teacher: str | None = nets(None, "teacher.pt of train_teacher.py")
    teacher_model: str | None = nets(None, "or a torchvision network", MODELS)
    teacher_weights: str | None = nets(None, "with its published weights: DEFAULT")
    student_model: str = nets("resnet_tiny", "student network", MODELS)
    student_weights: str = nets("none", "pretrained on auxiliary images", ("none", "imagenet"))
    budget: int = method(400, "pool images to learn from; 0 takes all")
    sampling: str = method("nearest", "choice",
                           ("nearest", "herding", "random", *baselines.PREDICTION_SCORES))
    layers: str = method("all", "BatchNorm layers: all, early, middle, late, names, indices")
    metric: str = method("l2", "distance to their statistics", METRICS)
    weighting: str = method("minmax", "weights from distances", ("minmax", "rank"))
    schedule: str = method("linear", "relax weights to 1", SCHEDULES)
    align: str = method("none", "bend colours towards the teacher's statistics (ours)",
                        ("none", "transfer", "transfer-first", "fit"))
    kd: str = method("pixelwise+channelwise", "losses joined by +, as in pixelwise+10*channelwise: "
                     + ", ".join(LOSSES))
    temperature: float | None = method(None, "softening (default: the loss's own)")
    steps: int = training(1500, "number of updates")
    batch_size: int = training(16, "images an update", least=1)
    lr: float = training(0.01, "highest learning rate")
    image_size: tuple[int, int] | None = training(None, "crop size (default: the teacher's)")
    seed: int = running(0, "seed of weights, crops, order and random choice")
    device: str = running("auto", "cpu, cuda or auto")
    amp: str = running("auto", "mixed precision", ("auto", "bfloat16", "float16", "off"))
    workers: int = running(0, "processes that load images; a GPU wants four or more")
    out: str | None = running(None, "folder of the run (default: next number below runs)")
    resume: bool = running(False, "go on where an interrupted run stopped")
    dry_run: bool = running(False, "score the pool, say whether it fits, and stop")


def load_teacher(cfg):
    """Return (teacher, its image size) as the options say."""
    classes = cfg.num_classes or len(DATASETS[cfg.dataset][0] or ()) or None
    if cfg.teacher:
        model, state = checkpoint.load_model(cfg.teacher, cfg.teacher_model, classes)
        return model, cfg.image_size or tuple(state["image_size"])
    if not (cfg.teacher_model and cfg.teacher_weights):
        raise ValueError("no teacher: give --teacher FILE, or --teacher-model NAME together with "
                         "--teacher-weights DEFAULT")
    model = build_model(cfg.teacher_model, classes, weights=cfg.teacher_weights)
    return model, cfg.image_size or DATASETS[cfg.dataset][1]


def choose(scores, cfg):
    """Return the indices of the chosen images, nearest first: (N, D) -> (budget,)."""
    distances, usable = scores[:, 0], scores[:, :2].isfinite().all(dim=1)
    budget = cfg.budget or int(usable.sum())
    if cfg.sampling == "random":
        drawn = baselines.random_sample(usable, budget, cfg.seed)
        return drawn[distances[drawn].sort(stable=True).indices]
    if cfg.sampling == "herding":
        return sample(distances, budget, "herding", scores[:, 2:])
    return sample(distances, budget)


def colour_mapper(teacher, size, align):
    """Return the function from images (B, 3, H, W) to colour maps (B, 3, 4) that `align` names."""
    layers = bn_layers(teacher)
    early = select_layers(layers, "early") if align == "fit" else dict([next(iter(layers.items()))])

    def statistics(images):
        with capture_bn_inputs(teacher, early, stop=True) as captured:
            segmentation_logits(teacher, images)
        return captured

    if align == "fit":
        return partial(alignment.fit, distance=lambda images: bn_distance(
            statistics(images), early, "kl").sum(dim=1))
    (name, first), = early.items()
    mean, cov = alignment.colour_target(lambda images: statistics(images)[name][0],
                                        first.running_mean, first.running_var, size)
    return partial(alignment.transfer, mean=mean, cov=cov)


def train_student(teacher, student, chosen, size, cfg, state_path=None):
    """Train `student` in place on what `select` chose, paragraph 5; return the loss curve."""
    device = next(student.parameters()).device
    factors = parse_losses(cfg.kd)
    softened = {} if cfg.temperature is None else {"temperature": cfg.temperature}
    weights = chosen["weights"].to(device)

    def batch_loss(progress, images, slots):
        with torch.no_grad():
            target = segmentation_logits(teacher, images)                         # (B, K, H, W)
        output = segmentation_logits(student, images)                             # (B, K, H, W)
        terms = {name: factor * LOSSES[name](
            output, target, **({} if name == "pairwise" else softened))
            for name, factor in factors.items()}                                  # (B,) each
        now = progressive_weights(weights, progress, cfg.schedule)                # (N,)
        return weighted_loss(sum(terms.values()), now[slots], now.mean()), terms

    batches = Batches(chosen["files"], size, cfg.batch_size, cfg.seed, colours=chosen["colours"])
    return fit(student, batch_loss, batches, cfg.steps, cfg.lr, cfg.seed,
               pick_amp(cfg.amp, device), cfg.workers, state_path, "distilling")


def select(teacher, files, size, cfg, out=None):
    """Read the teacher, score the pool, choose, and weight: paragraphs 1 to 4 of the method.

    Returns a dict: files, distances and weights of the chosen images, nearest first; the files of
    the pool, their scores (N, D), the chosen indices, the reasons why files were skipped, and the
    colour maps (budget, 3, 4) of the chosen images, or None.
    out: folder of the run; with it the scan can be resumed, and its scores are kept for other runs.
    """
    # 1. The teacher, and what it remembers of its training data.
    layers = select_layers(bn_layers(teacher), cfg.layers)
    print(f"1 teacher   {sum(p.numel() for p in teacher.parameters()) / 1e6:.1f} M parameters, "
          f"{len(layers)} BatchNorm layers read, images {size[0]}x{size[1]}")

    # 2. Score the pool by it.
    store = store_path(teacher, layers, files, size, cfg) if out else None
    part = store and out / f"{store.stem}.part"       # goes on only with this pool and this teacher
    mapper = None if cfg.align == "none" else colour_mapper(teacher, size, cfg.align)
    aligned = None if cfg.align != "transfer-first" else (
        lambda images: alignment.apply_colours(images, mapper(images)))
    scores, skipped = score(teacher, layers, files, size, cfg, part, store, aligned)    # (N, D)
    print(f"2 scored    {len(files) - len(skipped)} images" + (
        f"; {len(skipped)} unreadable ones are named in skipped.csv" if skipped else ""))

    # 3. Sample a budget of images (ADS).
    chosen = choose(scores, cfg)                                                  # (budget,)
    distances = scores[chosen, 0]                                                 # nearest first
    print(f"3 chosen    {len(chosen)} ({cfg.sampling}), distance {distances[0]:.4g} to "
          f"{distances[-1]:.4g}, median of the pool {scores[:, 0].nanmedian():.4g}\n"
          f"            {verdict(scores, chosen)}")

    # 4. Weight them (WDPD): nearest 1, farthest 0, all of them 1 in the end.
    weights = sample_weights(distances, cfg.weighting)                            # (budget,)
    n = [effective_sample_size(progressive_weights(weights, p, cfg.schedule)) for p in (0, 1)]
    print(f"4 weighted  {cfg.schedule}; as many as {n[0]:.0f} equally weighted images at the "
          f"start, {n[1]:.0f} at the end")
    found = {"files": [files[i] for i in chosen.tolist()], "distances": distances,
             "weights": weights, "scores": scores, "chosen": chosen, "skipped": skipped,
             "pool": files, "colours": None}
    if mapper:                                    # the one step here that is not the paper's
        device = next(teacher.parameters()).device
        views = tqdm(DataLoader(Pool(found["files"], size), 16), desc="aligning", mininterval=1)
        found["colours"] = torch.cat([mapper(as_input(x, device)).cpu() for x, _ in views])
    return found


def distill(teacher, student, pool, size, cfg=None):
    """Distil any segmentation network into another, both from RGB in [0, 1]: the Python API.

    teacher, student: modules on one device, from (B, 3, H, W) to logits (B, K, H, W) of the same
    classes (or what `models.segmentation_logits` understands). pool: a folder. size: (H, W).
    Trains `student` and freezes `teacher` in place; returns the dict of `select` and the "curve".
    """
    cfg = cfg or Config()
    chosen = select(freeze(teacher), find_images(pool), size, cfg)
    return {**chosen, "curve": train_student(teacher, student, chosen, size, cfg)}


def prepare(cfg):
    """Return (teacher, size, pool files, those left out, loader of images to evaluate on)."""
    if not cfg.pool:
        raise ValueError("--pool is missing; name a folder of unlabelled photographs")
    teacher, size = load_teacher(cfg)
    freeze(teacher).to(pick_device(cfg.device), memory_format=torch.channels_last)
    files = find_images(cfg.pool)
    if cfg.dataset == "none":
        files, held_out = hold_out(files)
        views = [(x, None) for x, error in DataLoader(Pool(held_out, size)) if not error[0]]
        if not views:
            raise ValueError(f"no image held out for agreement is readable: {held_out[0]}, for one")
        return teacher, size, *leave_out(files, held_out), views
    labelled = open_labelled(cfg.dataset, cfg.data_root, cfg.split, size, teacher.num_classes,
                             cfg.download)
    check_labels(labelled, teacher.class_names)  # a bad one is found before hours of training
    # Only the built-in scenes are sure to have one size, and a batch needs one.
    loader = DataLoader(labelled, 16 if cfg.dataset == "scenes" else 1)
    return teacher, size, *leave_out(files, labelled.images), loader


def new_student(cfg, teacher):
    """Return the student that `cfg` names, with the teacher's classes and normalisation."""
    torch.manual_seed(cfg.seed)
    return build_model(
        cfg.student_model, teacher.num_classes, class_names=teacher.class_names,
        weights_backbone="DEFAULT" if cfg.student_weights == "imagenet" else None,
        mean=teacher.mean.flatten().tolist(), std=teacher.std.flatten().tolist(),
    ).to(teacher.mean.device)


def run(cfg, out):
    """Run the method as the options say, in the folder `out`; return the metrics it prints."""
    laps = [("start", time.perf_counter())]
    parse_losses(cfg.kd)                         # a typing error is found before the pool is read
    if cfg.dataset == "scenes":
        if (cfg.pool or cfg.teacher_model) and not cfg.data_root:
            raise ValueError("--dataset is missing; say which labels there are, or none")
        root, teacher = builtin_teacher(cfg.image_size, cfg.device, cfg.amp)
        cfg = dataclasses.replace(cfg, data_root=cfg.data_root or root,
                                  pool=cfg.pool or f"{root}/pool", teacher=cfg.teacher or teacher)
        laps.append(("scenes and teacher", time.perf_counter()))
    teacher, size, files, left_out, held_out = prepare(cfg)
    untouched = fingerprint(teacher)

    chosen = select(teacher, files, size, cfg, out)
    records.write_choice(out, chosen, left_out)
    laps.append(("scoring", time.perf_counter()))
    if cfg.dry_run:
        plots.pool_check(chosen, size, out / "pool.png")
        print(f"dry run: nothing was trained; see {out / 'pool.png'}")
        return {"pool_images": len(files) - len(chosen["skipped"]), "out": str(out)}

    # 5. Distil, on whole scenes.
    student = new_student(cfg, teacher)
    ratio = cost(teacher, size)[1] / cost(student, size)[1]
    print(f"5 student   {student.name}, {ratio:.0f} times fewer multiply-adds than the teacher")
    curve = train_student(teacher, student, chosen, size, cfg, out / "state.pt")
    checkpoint.save_model(student, out / "student.pt", image_size=list(size))
    records.write_csv(out / "curve.csv", ("step", "loss"), curve)
    laps.append(("distillation", time.perf_counter()))

    # 6. Evaluate and report.
    results = {}
    if cfg.dataset != "none":
        results["teacher"] = evaluate(teacher, held_out, teacher.num_classes)
        results["student"] = evaluate(student, held_out, teacher.num_classes)
    results["agreement"] = evaluate(student, held_out, teacher.num_classes, reference=teacher)
    laps.append(("evaluation", time.perf_counter()))
    print("6 evaluated\n" + report(results, teacher.class_names))
    if fingerprint(teacher) != untouched:
        raise ValueError("the teacher changed during the run; please report this as a bug")

    metrics = records.metrics(cfg, results, teacher, chosen, laps)
    checkpoint.save_json(metrics, out / "metrics.json")
    (out / "state.pt").unlink(missing_ok=True)
    plots.story(chosen, size, cfg.schedule, teacher, student, held_out, out / "figure.png")
    print(records.closing(metrics, out))
    return metrics


def main(argv=None):
    """Run the method from the command line; return the metrics it prints."""
    return records.in_folder(run, parse(Config, argv, __doc__.split("\n")[0]))


if __name__ == "__main__":
    one_sentence(main)()
