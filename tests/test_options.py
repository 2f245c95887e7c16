"""options.py: command lines made from dataclasses that check themselves, devices, errors."""

import dataclasses
import errno
import math
import os
import re
import signal
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from support import records
from support.options import (Running, one_sentence, option, parse, pick_amp, pick_device,
                             pick_workers, training, with_defaults)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@dataclass(frozen=True)
class Config(Running):
    steps: int = training(900, "number of updates")
    lr: float = training(0.1, "learning rate")
    batch_size: int = training(16, "images per update", min=1)
    name: str = option("a", "one of two", choices=("a", "b"))
    size: tuple[int, int] | None = option(None, "height and width")
    root: str | None = option(None, "a folder", metavar="FOLDER")
    share: float | None = option(None, "part of the pool")


def test_words_become_values_of_the_declared_types_and_a_record_gives_the_others():
    words = "--steps 10 --lr 1e-3 --size 64 96 --share 4 --resume --out x"
    cfg = parse(Config, words.split(), "")
    assert cfg == Config(steps=10, lr=0.001, size=(64, 96), share=4.0, resume=True, out="x")
    assert isinstance(cfg.share, float) and isinstance(cfg.steps, int)
    assert parse(Config, [], "") == Config()
    recorded = {"steps": 10, "size": [64, 96], "name": "b", "of_an_old_version": 1}
    cfg = parse(Config, ["--name", "a"], "", recorded)
    assert cfg == Config(steps=10, size=(64, 96), name="a")
    hash(cfg)                                                    # as a frozen dataclass promises
    assert with_defaults(Config(share=0.1), share=0.5, root="x") == Config(share=0.1, root="x")


def test_the_help_lists_groups_in_order_with_defaults_choices_and_what_words_stand_for(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], "What it does.")
    text = " ".join(capsys.readouterr().out.split())
    assert re.search("What it does. options: -h.* training: .* running: ", text)
    for line in ("--steps N number of updates (default: 900)", "--seed N seed of weights, crops, "
                 "order and random selection (default: 0)", "--size H W height and width",
                 "--name NAME one of two (default: a); one of: a, b", "--root FOLDER a folder"):
        assert line in text


@pytest.mark.parametrize(("values", "said"), [
    ({"amp": "fp16"}, "--amp takes one of auto, bfloat16, off; got 'fp16'"),
    ({"batch_size": 0}, "--batch-size takes a number of at least 1; got 0"),
    ({"lr": math.nan}, "--lr takes a number of at least 0; got nan"),
    ({"lr": math.inf}, "--lr takes a number"),
    ({"size": (64, 0)}, r"--size takes a number of at least 1; got \(64, 0\)")])
def test_a_config_refuses_what_an_option_cannot_take_wherever_it_is_made(values, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        dataclasses.replace(Config(), **values)


def test_a_device_that_is_not_there_is_named_and_each_process_of_torchrun_gets_its_own(monkeypatch):
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and pick_device("auto") == CPU     # conftest.py
    for name in ("gpu", "", "cuda:99"):
        with pytest.raises(ValueError, match=f"torch cannot compute on --device {name}: .*; use"):
            pick_device(name)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"^too few GPUs \(0\); lower --nproc-per-node, or use"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch, "empty", lambda size, device: SimpleNamespace(device=device))
    assert pick_device("cuda") == "cuda:1"


def test_the_precision_is_bfloat16_where_the_hardware_has_it_and_refused_elsewhere(monkeypatch):
    assert [pick_amp(name, CPU) for name in ("bfloat16", "off")] == [torch.bfloat16, None]
    for capability, dtype in (((8, 0), torch.bfloat16), ((7, 5), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, now=capability: now)
        assert pick_amp("auto", CUDA) == dtype
    with pytest.raises(ValueError, match="^this GPU does not compute in bfloat16; use --amp off"):
        pick_amp("bfloat16", CUDA)


def test_images_are_loaded_by_other_processes_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert [pick_workers(None, device) for device in (CPU, CUDA)] == [0, 4]
    assert pick_workers(0, CUDA) == 0 and pick_workers(9, CPU) == 9


def test_deterministic_algorithms_are_set_where_a_program_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")

    def state(cfg, out):
        return torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]

    try:
        for more, expected in (([], (False, "")), (["--deterministic"], (True, ":4096:8"))):
            words = ["--out", str(tmp_path), *more]
            assert records.in_folder(state, Config, words, "") == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_sigterm_is_an_interruption_which_has_its_exit_code(capsys):
    with pytest.raises(SystemExit) as caught:
        one_sentence(lambda: signal.raise_signal(signal.SIGTERM))()
    assert caught.value.code == 130 and capsys.readouterr().err == (
        "interrupted; what is done is kept\n")


@pytest.mark.parametrize(("error", "sentence"), [
    (ValueError("a is 1, b is 2"), "a is 1, b is 2"), (OSError("no folder x"), "no folder x"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "out of memory; lower"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "out of memory; lower"),
    (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "too many open files; raise `ulimit -n`"),
    (RuntimeError("unable to open shared memory object: Too many open files (24)"), "too many op"),
    (ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback:\n  at x\n"
                "ValueError: a.png is broken\n"), "a.png is broken"),
    (RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed"),
     "a process that loads images died; use fewer --workers"),
    (RuntimeError("Sizes of tensors must match except in dimension 1. Expected 34 but got 35"),
     "a network cannot take this image size; give it `multiple`"),
    (RuntimeError("nll_loss2d does not have a deterministic implementation"),
     "a network cannot be computed so; leave out --deterministic")])
def test_what_python_and_torch_raise_is_explained_by_its_cause(error, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        one_sentence(Mock(side_effect=error))()
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.out == ""
    assert re.fullmatch(rf"\n?error: {re.escape(sentence)}.*\n", said.err)


def test_a_bug_keeps_its_traceback_as_do_all_errors_on_demand(monkeypatch):
    for bug in (TypeError("a bug"), KeyError("Caught KeyError in DataLoader worker process 0."),
                RuntimeError("CUDA error: an illegal memory access was encountered")):
        with pytest.raises(type(bug)):
            one_sentence(Mock(side_effect=bug))()
    monkeypatch.setenv("DFSS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="a is 1"):
        one_sentence(Mock(side_effect=ValueError("a is 1")))()
    assert one_sentence(lambda: {"miou": 1})() is None           # a value would be an exit code
