"""options.py: command lines made from dataclasses that check themselves, devices, errors."""

import dataclasses
import math
import signal
from dataclasses import dataclass

import pytest
import torch

from support.options import (
    Running,
    one_sentence,
    option,
    parse,
    parse_losses,
    pick_amp,
    pick_device,
)


@dataclass(frozen=True)
class Config(Running):
    steps: int = option(900, "number of updates", group="training")
    lr: float = option(0.1, "learning rate", group="training")
    batch_size: int = option(16, "images an update", group="training", least=1)
    name: str = option("a", "one of two", choices=("a", "b"))
    size: tuple[int, int] | None = option(None, "height and width")
    root: str | None = option(None, "a folder", kind="FOLDER")
    share: float | None = option(None, "part of the pool")


@dataclass(frozen=True)
class Needy(Config):
    file: str | None = option(None, "what to read", kind="FILE", required=True)


# ---------------------------------------------------------------- command lines

def test_no_words_give_the_defaults():
    assert parse(Config, [], "") == Config()


def test_a_record_stands_for_the_words_that_are_not_given():
    kept = {"steps": 10, "size": [64, 96], "name": "b", "resume": True, "of_another_version": 1}
    cfg = parse(Config, ["--name", "a"], "", kept)
    assert cfg == Config(steps=10, size=(64, 96), name="a", resume=True)
    hash(cfg)


def test_words_become_values_of_the_declared_types():
    words = "--steps 10 --lr 1e-3 --name b --size 64 96 --root data --share 4 --resume --out x"
    values = {"steps": 10, "lr": 0.001, "name": "b", "size": (64, 96), "root": "data",
              "share": 4.0, "resume": True, "out": "x"}
    cfg = parse(Config, words.split(), "")
    assert cfg == Config(**values) and isinstance(cfg.share, float)
    hash(cfg)                                                    # as a frozen dataclass promises


@pytest.mark.parametrize(("config", "words"), [
    (Config, "--name c"), (Config, "--steps 1.5"), (Config, "--size 64"), (Config, "--resume yes"),
    (Config, "--unknown 1"), (Config, "--step 1"), (Needy, "--steps 1")])
def test_words_that_do_not_fit_are_refused_with_exit_code_2(config, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(config, words.split(), "")
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "error:" in said
    assert config is Config or "required: --file" in said


def test_the_help_shows_groups_kinds_choices_and_every_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Needy, ["--help"], "What it does.")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "What it does." in text and "\ntraining:\n" in text
    lines = " ".join(text.split())
    for line in ("--steps N number of updates (default: 900)",
                 "--lr X learning rate (default: 0.1)",
                 "--seed N seed of weights, crops, order and random choice (default: 0)",
                 "--name NAME one of two (default: a); one of: a, b", "--file FILE what to read",
                 "--size H W height and width", "--resume go on where"):
        assert line in lines
    assert text.count("\noptions:\n") == 1 and max(map(len, text.splitlines())) <= 79


@pytest.mark.parametrize(("values", "said"), [
    ({"amp": "fp16"}, "--amp takes one of auto, bfloat16, float16, off; got 'fp16'"),
    ({"batch_size": 0}, "--batch-size takes a number of at least 1; got 0"),
    ({"seed": -1}, "--seed takes a number of at least 0; got -1"),
    ({"lr": math.nan}, "--lr takes a number of at least 0; got nan"),
    ({"lr": math.inf}, "--lr takes a number of at least 0; got inf"),
    ({"size": (64, 0)}, r"--size takes a height and a width of 1 or more; got \(64, 0\)")])
def test_a_config_refuses_what_an_option_cannot_take_wherever_it_is_made(values, said):
    for make in (Config, lambda **values: dataclasses.replace(Config(), **values)):
        with pytest.raises(ValueError, match=f"^{said}"):
            make(**values)


def test_whole_numbers_may_stand_for_others_and_none_where_it_is_declared():
    assert Config(lr=1, share=None, size=None, root=None, out=None) == Config(lr=1)
    with pytest.raises(ValueError, match="--batch-size takes a number of at least 1; got 0"):
        parse(Config, ["--batch-size", "0"], "")


def test_a_sum_of_losses_gives_a_factor_for_each():
    assert parse_losses("pixelwise") == (1, 0, 1) and parse_losses("0.5*channelwise") == (0, 0.5, 1)
    assert parse_losses("pixelwise+10*channelwise@0.4") == (1, 10, 0.4)
    assert parse_losses("channelwise+pixelwise") == (1, 1, 1)
    for text in ("", "telepathy", "pixelwise+", "-1*pixelwise", "pixelwise+pixelwise", "2pixelwise",
                 "pixelwise*2", "pixelwise@", "pixelwise@0", "pixelwise@-1", "@2", "pixelwise@1@1"):
        with pytest.raises(ValueError, match="is no sum of losses, such as pixelwise"):
            parse_losses(text)


# ---------------------------------------------------------------- where a run computes

def test_devices_and_precisions_are_picked_by_name(monkeypatch):
    cpu = torch.device("cpu")
    assert pick_device("cpu") == cpu
    assert [pick_amp(name, cpu) for name in ("bfloat16", "float16", "off")] == [
        torch.bfloat16, torch.float16, None]
    assert pick_amp("auto", cpu) in (torch.bfloat16, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == cpu
    for capability, dtype in (((7, 5), None), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, now=capability: now)
        assert pick_amp("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"torch cannot compute on --device {name} here; use cpu"):
        pick_device(name)


# ---------------------------------------------------------------- errors of a user

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.fixture(autouse=True)
def own_signals():
    """Put back the handlers that a program of one_sentence sets."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
    error.add_note("go on with: python x.py")
    assert ended(error, capsys) == (2, "error: a is 1, b is 2; go on with: python x.py\n")
    assert ended(FileNotFoundError("no folder x"), capsys) == (2, "error: no folder x\n")
    monkeypatch.setenv("DFSS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="a is 1"):
        ended(error, capsys)


def test_an_interruption_has_its_exit_code_and_a_bug_keeps_its_traceback(capsys):
    assert ended(KeyboardInterrupt(), capsys) == (130, "interrupted\n")
    for number in SIGNALS:
        with pytest.raises(SystemExit) as caught:
            one_sentence(lambda number=number: signal.raise_signal(number))()
        assert caught.value.code == 128 + number and capsys.readouterr().err == "interrupted\n"
    with pytest.raises(TypeError):
        ended(TypeError("a bug"), capsys)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried ..."),
                                   MemoryError()])
def test_out_of_memory_is_one_line_that_names_what_to_lower(error, capsys):
    code, said = ended(error, capsys)
    assert code == 2 and said.count("\n") == 1
    assert "out of memory; lower --batch-size or --image-size" in said


def test_a_program_without_an_error_returns_quietly(capsys):
    assert one_sentence(lambda: {"miou": 1})() is None           # a value would be an exit code
    assert capsys.readouterr() == ("", "")
