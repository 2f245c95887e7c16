"""distill() against the README's equations: selection, weights and the loss of each step by hand.

`by_hand` uses nothing that distill.py computes. It takes from support/ only what turns a file into
an image (Pool, Views, Batches, the teacher's colours), which has tests of its own.
"""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distill
from models import wrap
from support.data import Batches, Views, open_pool

SIZE, CLASSES, STEPS, LR = (32, 48), 5, 2, 0.01


def network(width, strides, seed):
    """Return three convolutions with BatchNorm and a head, whose statistics are of smooth images.
    """
    torch.manual_seed(seed)
    layers, c_in = [], 3
    for stride in strides:
        layers += [nn.Conv2d(c_in, width, 3, stride, 1, bias=False),
                   nn.BatchNorm2d(width, momentum=1.0), nn.ReLU()]
        c_in = width
    net = nn.Sequential(*layers, nn.Conv2d(width, CLASSES, 1))
    net(F.interpolate(0.2 + 0.5 * torch.rand(16, 3, 4, 6), SIZE, mode="bilinear"))
    return wrap(net.eval())


# Every option of the method at values that are not its default.
OPTIONS = {"metric": ["kl"], "layers": ["late", "0,1"], "weighting": ["rank"],
           "schedule": ["fixed", "uniform"], "sampling": ["random", "confidence"],
           "match_colours": [True], "pixelwise": [3.0], "channelwise": [0.0, 10.0],
           "teacher_temperature": [0.4], "budget": [0, 5], "views": [3], "seed": [7],
           "batch_size": [2], "lr": [0.02], "steps": [3]}
DEFAULT = {"metric": "l2", "layers": "all", "weighting": "minmax", "schedule": "linear",
           "sampling": "nearest", "match_colours": False, "pixelwise": 1.0, "channelwise": 1.0,
           "teacher_temperature": 1.0, "budget": 8, "views": 0, "seed": 0, "batch_size": 4,
           "lr": LR, "steps": STEPS}
EACH = [{name: value} for name, values in OPTIONS.items() for value in values]
TOGETHER = [
    {"metric": "kl", "match_colours": True, "channelwise": 10.0, "teacher_temperature": 0.4,
     "schedule": "uniform", "seed": 3},
    {"metric": "kl", "layers": "0,1", "weighting": "rank", "match_colours": True, "pixelwise": 3.0,
     "channelwise": 10.0, "teacher_temperature": 0.4, "budget": 5, "views": 3, "seed": 7},
    {"sampling": "random", "views": 3, "pixelwise": 0.0, "seed": 2},
    {"sampling": "confidence", "weighting": "rank", "match_colours": True, "views": 3}]


def config(options):
    """Return the Config with these options, the others at the defaults of this file."""
    return distill.Config(**DEFAULT | options, amp="off")


def run(pool_folder, options, monkeypatch):
    """Return distill's result and (student, loss) of each step, at the moment of backward()."""
    teacher, student = network(16, (2, 1, 1), seed=1), network(4, (2, 2, 1), seed=2)
    steps, backward = [], torch.Tensor.backward

    def recorded(loss, *args, **kwargs):
        steps.append((copy.deepcopy(student), loss.item()))
        return backward(loss, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", recorded)
        result = distill.distill(teacher, student, pool_folder, SIZE, config(options))
    return result, steps


def distances_by_hand(teacher, images, metric, layers):
    """Return d(x), the sum over the layers: (N,)."""
    norms = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    norms = [norms[i] for i in {"all": (0, 1, 2), "late": (2,), "0,1": (0, 1)}[layers]]
    d, hooks = torch.zeros(len(images)), []

    def add(bn, inputs):
        mu, var = inputs[0].mean(dim=(2, 3)), inputs[0].var(dim=(2, 3), correction=0)      # (N, C)
        s2 = bn.running_var + bn.eps
        if metric == "l2":
            d.add_(((mu - bn.running_mean) ** 2).sum(1).sqrt()
                   + ((var - bn.running_var) ** 2).sum(1).sqrt())
        else:
            v = (var + bn.eps) / s2
            d.add_(((v + (mu - bn.running_mean) ** 2 / s2 - 1 - torch.log(v)) / 2).mean(1))

    for bn in norms:
        hooks.append(bn.register_forward_pre_hook(add))
    with torch.no_grad():
        teacher(images)
    for hook in hooks:
        hook.remove()
    return d


def scores_by_hand(teacher, images, o):
    if o["sampling"] == "random":
        return torch.rand(len(images), generator=torch.Generator().manual_seed(o["seed"]))
    if o["sampling"] == "confidence":
        with torch.no_grad():
            return 1 - teacher(images).softmax(dim=1).amax(dim=1).mean(dim=(1, 2))
    return distances_by_hand(teacher, images, o["metric"], o["layers"])


def weights_by_hand(d, o):
    """Return w_i of the selected, nearest first: 1 for the nearest, 0 for the farthest."""
    if o["sampling"] == "random":
        return torch.ones(len(d))
    d = torch.arange(len(d)).float() if o["weighting"] == "rank" else d
    return (d.max() - d) / (d.max() - d.min())


def kl_by_hand(student, teacher, temperature, dim):
    s = torch.softmax(student / temperature, dim)
    t = torch.softmax(teacher / temperature, dim)
    return temperature ** 2 * (t * (t.log() - s.log())).sum(dim)


def loss_by_hand(student, teacher_logits, index, weights, progress, o):
    """Return mean_b w_b(p) l_b / mean_i w_i(p), l: both losses with their factors: a scalar."""
    losses = (o["pixelwise"] * kl_by_hand(student, teacher_logits, 1, 1).mean(dim=(1, 2))
              + o["channelwise"] * kl_by_hand(student.flatten(2), teacher_logits.flatten(2), 4, 2
                                              ).mean(dim=1))                               # (B,)
    r = {"linear": progress, "fixed": 0.0, "uniform": 1.0}[o["schedule"]]
    w = weights + (1 - weights) * r
    return sum(w[i] * loss for i, loss in zip(index.tolist(), losses, strict=True)) / len(
        losses) / w.mean()


def by_hand(pool_folder, options, steps):
    """Return (files, distances, weights, losses) as the README has them."""
    o, teacher = DEFAULT | options, network(16, (2, 1, 1), seed=1)
    pool = open_pool(pool_folder, teacher, SIZE, o["match_colours"])
    images = torch.stack([pool.view(i) for i in range(len(pool))]) / 255
    scores = scores_by_hand(teacher, images, o)
    order = scores.argsort()[:o["budget"] or len(pool)]
    weights = weights_by_hand(scores[order], o)

    files, losses = [pool.files[i] for i in order.tolist()], []
    batches = Batches(Views(files, SIZE, o["seed"], pool.transform), o["batch_size"])
    for t, (student, _) in enumerate(steps):
        views, index, _ = batches[t]
        with torch.no_grad():
            logits = teacher(views / 255)                                # (B, K, H/2, W/2)
        student_logits = student.train()(views / 255)                    # (B, K, H/4, W/4)
        logits = F.interpolate(logits, student_logits.shape[-2:], mode="bilinear", antialias=True)
        losses.append(loss_by_hand(student_logits, logits / o["teacher_temperature"], index,
                                   weights, t / o["steps"], o))
    return files, scores[order], weights, losses


@pytest.mark.parametrize("options", [{}, *EACH, *TOGETHER], ids=str)
def test_selection_weights_and_losses_are_those_of_the_equations(
        pool_folder, options, monkeypatch):
    result, steps = run(pool_folder, options, monkeypatch)
    files, distances, weights, losses = by_hand(pool_folder, options, steps)
    assert result["files"] == files
    torch.testing.assert_close(result["distances"], distances, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result["weights"], weights, rtol=1e-3, atol=1e-4)
    assert len(steps) == (DEFAULT | options)["steps"]
    close = 3e-3 if options.get("views") else 1e-4                # cached logits are float16
    for (_, loss), expected in zip(steps, losses, strict=True):
        assert loss == pytest.approx(expected.item(), rel=close)


def test_a_step_is_one_of_adamw_down_the_gradient_of_that_loss(pool_folder, monkeypatch):
    """The learning rate of step 0 is a fiftieth: the warm-up."""
    _, ((before, _), (after, _)) = run(pool_folder, {}, monkeypatch)
    *_, losses = by_hand(pool_folder, {}, [(before, None)])
    optimizer = torch.optim.AdamW(before.parameters(), LR / 50, weight_decay=0.01)
    optimizer.zero_grad()                                  # the copy has its own gradients
    losses[0].backward()
    optimizer.step()
    for expected, parameter in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=2e-6)


def test_no_option_of_the_method_is_ignored(pool_folder, monkeypatch):
    """Each value that is not the default changes the selection, a loss, or the second student."""
    def trace(options):
        result, steps = run(pool_folder, options, monkeypatch)
        return ([str(file) for file in result["files"]], [round(loss, 7) for _, loss in steps],
                steps[-1][0].net[0].weight.flatten().tolist())

    default = trace({})
    ignored = [options for options in EACH if trace(options) == default]
    assert not ignored


def test_every_option_of_the_method_is_in_this_file():
    declared = {f.name for f in dataclasses.fields(distill.Config)
                if f.metadata["group"] in ("method", "training")}
    assert declared | {"budget", "seed"} == set(OPTIONS) == set(DEFAULT)
