"""options.py: command lines made from dataclasses that check themselves, devices, errors."""

import dataclasses
import errno
import math
import os
import re
import signal
from dataclasses import dataclass

import pytest
import torch

from support import options, records
from support.options import (Running, one_sentence, option, parse, pick_amp, pick_device,
                             pick_workers, warn_if_busy, with_defaults)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@dataclass(frozen=True)
class Config(Running):
    steps: int = option(900, "number of updates", group="training")
    lr: float = option(0.1, "learning rate", group="training")
    batch_size: int = option(16, "images per update", group="training", min=1)
    name: str = option("a", "one of two", choices=("a", "b"))
    size: tuple[int, int] | None = option(None, "height and width")
    root: str | None = option(None, "a folder", metavar="FOLDER")
    share: float | None = option(None, "part of the pool")


@dataclass(frozen=True)
class Needy(Config):
    file: str | None = option(None, "what to read", metavar="FILE", required=True)


# ---------------------------------------------------------------- command lines

def test_words_become_values_of_the_declared_types():
    words = "--steps 10 --lr 1e-3 --name b --size 64 96 --root data --share 4 --resume --out x"
    values = {"steps": 10, "lr": 0.001, "name": "b", "size": (64, 96), "root": "data",
              "share": 4.0, "resume": True, "out": "x"}
    cfg = parse(Config, words.split(), "")
    assert cfg == Config(**values) and isinstance(cfg.share, float)
    assert parse(Config, [], "") == Config()


def test_a_record_gives_the_options_that_the_words_do_not_name():
    recorded = {"steps": 10, "size": [64, 96], "name": "b", "resume": True, "of_an_old_version": 1}
    cfg = parse(Config, ["--name", "a"], "", recorded)
    assert cfg == Config(steps=10, size=(64, 96), name="a", resume=True)
    hash(cfg)                                                    # as a frozen dataclass promises


def test_a_default_is_given_to_options_that_are_none():
    assert with_defaults(Config(share=0.1), share=0.5, root="x") == Config(share=0.1, root="x")


@pytest.mark.parametrize(("config", "words"), [
    (Config, "--name c"), (Config, "--steps 1.5"), (Config, "--size 64"), (Config, "--x 1"),
    (Needy, "--steps 1")])
def test_words_that_do_not_fit_are_refused_with_exit_code_2(config, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(config, words.split(), "")
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "error:" in said
    assert config is Config or "required: --file" in said


def test_the_help_lists_groups_in_order_with_defaults_choices_and_what_words_stand_for(capsys):
    with pytest.raises(SystemExit):
        parse(Needy, ["--help"], "What it does.")
    text = " ".join(capsys.readouterr().out.split())
    assert re.search("What it does. options: -h.* training: .* running: ", text)
    for line in ("--steps N number of updates (default: 900)", "--seed N seed of weights, crops, "
                 "order and random selection (default: 0)", "--size H W height and width",
                 "--name NAME one of two (default: a); one of: a, b", "--root FOLDER a folder"):
        assert line in text


@pytest.mark.parametrize(("values", "said"), [
    ({"amp": "fp16"}, "--amp takes one of auto, bfloat16, float16, off; got 'fp16'"),
    ({"batch_size": 0}, "--batch-size takes a number of at least 1; got 0"),
    ({"lr": math.nan}, "--lr takes a number of at least 0; got nan"),
    ({"lr": math.inf}, "--lr takes a number"),
    ({"size": (64, 0)}, r"--size takes a height and a width of 1 or more; got \(64, 0\)")])
def test_a_config_refuses_what_an_option_cannot_take_wherever_it_is_made(values, said):
    for make in (Config, lambda **values: dataclasses.replace(Config(), **values)):
        with pytest.raises(ValueError, match=f"^{said}"):
            make(**values)


# ---------------------------------------------------------------- where a run computes

def test_the_tests_compute_on_the_cpu():
    """conftest.py hides the GPUs from them."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and pick_device("auto") == CPU


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"torch cannot compute on --device {name} here .*; use"):
        pick_device(name)


def test_under_torchrun_each_process_gets_a_gpu_of_its_own_or_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, gpus in (("cuda", 1), ("cuda:0", 1)):
        with pytest.raises(ValueError, match=f"^2 processes need 2 GPUs, but --device {name} has "
                                             f"{gpus}; lower --nproc-per-node"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    assert pick_device("cuda") == torch.device("cuda:1") and pick_device("cpu") == CPU


def test_the_precision_is_bfloat16_where_the_hardware_has_it_and_refused_elsewhere(monkeypatch):
    assert [pick_amp(name, CPU) for name in ("bfloat16", "float16", "off")] == [
        torch.bfloat16, torch.float16, None]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, dtype in (((8, 0), torch.bfloat16), ((7, 5), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, now=capability: now)
        assert pick_amp("auto", CUDA) == dtype
    with pytest.raises(ValueError, match="^Tesla T4 does not compute in bfloat16; use --amp float"):
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
        for words, expected in (([], (False, "")), (["--deterministic"], (True, ":4096:8"))):
            words = [*words, "--out", str(tmp_path / str(len(words)))]
            assert records.in_folder(state, Config, words, "") == expected
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("load", "threads", "busy"), [(2.1, 2, True), (2.1, 1, False),
                                                       (0.4, 2, False)])
def test_a_busy_machine_is_named_at_the_start_unless_there_is_one_thread(
        tmp_path, monkeypatch, capsys, load, threads, busy):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    records.in_folder(lambda *_: None, Config, ["--out", str(tmp_path)], "")
    said = capsys.readouterr().out
    assert ("this machine is busy (load 2.1 on 2 cores)" in said) == busy
    assert ("OMP_NUM_THREADS=1" in said) == busy
    monkeypatch.delattr(os, "getloadavg")                        # as on Windows
    warn_if_busy()
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- errors of a user

@pytest.fixture(autouse=True)
def own_signal():
    """Put back the handler that a program of one_sentence sets."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def ended(error, capsys):
    """Return (exit code, stderr) of a program whose main raises an error."""
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        one_sentence(main)()
    said = capsys.readouterr()
    assert said.out == ""
    return caught.value.code, said.err


def test_an_error_of_the_user_is_one_line_with_its_notes_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.delenv("DFSS_TRACEBACK", raising=False)
    error = ValueError("a is 1, b is 2")
    assert ended(error, capsys) == (2, "error: a is 1, b is 2\n")
    error.add_note("resume with: python x.py")
    assert ended(error, capsys) == (2, "error: a is 1, b is 2; resume with: python x.py\n")
    assert ended(FileNotFoundError("no folder x"), capsys) == (2, "error: no folder x\n")
    monkeypatch.setenv("DFSS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="a is 1"):
        ended(error, capsys)


def test_an_interruption_has_its_exit_code_and_sigterm_is_one(capsys):
    assert ended(KeyboardInterrupt(), capsys) == (130, "interrupted\n")
    with pytest.raises(SystemExit) as caught:
        one_sentence(lambda: signal.raise_signal(signal.SIGTERM))()
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted\n"


MEMORY = "out of memory; lower --batch-size, --image-size or --views"


@pytest.mark.parametrize(("error", "sentence"), [
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), MEMORY),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), MEMORY),
    (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "too many open files; raise `ulimit -n`"),
    (RuntimeError("unable to open shared memory object: Too many open files (24)"),
     "too many open files; raise `ulimit -n`"),
    (RuntimeError("DataLoader worker (pid 9) is killed by signal: Killed"),
     "a process that loads images died; use fewer --workers"),
    (RuntimeError("unexpected EOF, expected 9 more bytes"), "a downloaded file is cut off; delete"),
    (RuntimeError("invalid hash value"), "a downloaded file is damaged"),
    (RuntimeError("nll_loss2d does not have a deterministic implementation"),
     "a network cannot be computed so; leave out --deterministic")])
def test_what_torch_raises_is_explained_by_its_cause(error, sentence, capsys):
    code, said = ended(error, capsys)
    assert code == 2 and said.strip().startswith(f"error: {sentence}")
    assert said.strip().count("\n") == 0


def test_a_bug_keeps_its_traceback(capsys):
    for bug in (TypeError("a bug"), KeyError("Caught KeyError in DataLoader worker process 0."),
                RuntimeError("CUDA error: an illegal memory access was encountered")):
        with pytest.raises(type(bug)):
            ended(bug, capsys)


def test_a_program_without_an_error_returns_quietly(capsys):
    assert one_sentence(lambda: {"miou": 1})() is None           # a value would be an exit code
    assert capsys.readouterr() == ("", "") and options.explain(TypeError()) is None
