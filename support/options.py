"""Command lines from frozen dataclasses: each option is declared once, with its help.

Idea
    A program's Config is a dataclass whose fields carry their own help; the parser, `--help` and
    the record of a run all come from it, so that none of them can disagree. It checks itself,
    wherever it is made. What several programs share is declared here and inherited.

Use it
    @dataclass(frozen=True)
    class Config(Running):
        steps: int = option(900, "number of updates")
    cfg = parse(Config, ["--steps", "10"], "What the program does.")
"""

import argparse
import math
import os
import re
import signal
import sys
import typing
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch


def option(default, help, choices=None, group="options", least=0, kind=None, required=False):
    """Return a dataclass field with its help, allowed values and the group it is listed under.

    least: the smallest number that is allowed (default: 0). kind: FILE, FOLDER or what else a word
    stands for. required: the command line must give it.
    """
    return field(default=default, metadata={
        "help": help, "choices": choices, "group": group, "least": least, "kind": kind,
        "required": required})


def flag(name):
    return "--" + name.replace("_", "-")


def kind_of(f):
    """Return the type of a field's values: int for `int | None`."""
    return next(t for t in (typing.get_args(f.type) or (f.type,)) if t is not type(None))


class Options:
    """A dataclass of options that refuses values they cannot take, with one ValueError."""

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in (*choices, f.default):
                expected = f"one of {', '.join(choices)}"
            elif isinstance(value, tuple) and min(value) < 1:
                expected = "a height and a width of 1 or more"
            elif isinstance(value, int | float) and not f.metadata["least"] <= value < math.inf:
                expected = f"a number of at least {f.metadata['least']}"
            else:
                continue
            raise ValueError(f"{flag(f.name)} takes {expected}; got {value!r}")


running = partial(option, group="running")


@dataclass(frozen=True)
class Running(Options):
    """Where and how a program runs, and its seed."""

    seed: int = running(0, "seed of weights, crops, order and random choice")
    device: str = running("auto", "cpu, cuda, cuda:1 ...; auto: a GPU if there is one")
    amp: str = running("auto", "mixed precision; auto: bfloat16 where the hardware has it",
                       ("auto", "bfloat16", "float16", "off"))
    workers: int = running(0, "processes that load images; a GPU wants four or more")
    out: str | None = running(None, "folder of the run", kind="FOLDER")
    resume: bool = running(False, "go on where the interrupted run in --out stopped")


def add_option(group, f, default):
    """Give an argparse group the option that a dataclass field declares."""
    meta, kind = f.metadata, kind_of(f)
    how = {"help": meta["help"], "required": meta["required"], "default": default}
    if f.default is not None and f.default is not False and f.default != "":
        how["help"] += f" (default: {f.default})"
    if kind is bool:
        how["action"] = "store_true"
    elif f.type == (tuple[int, int] | None):
        how |= {"nargs": 2, "type": int, "metavar": ("H", "W")}
    else:
        how |= {"type": kind, "choices": meta["choices"],
                "metavar": meta["kind"] or {int: "N", float: "X", str: "NAME"}[kind]}
    if meta["choices"]:
        how["help"] += "; one of: " + ", ".join(meta["choices"])
    group.add_argument(flag(f.name), **how)


def parse(config_class, argv, description, kept=None):
    """Return a `config_class` made of the words `argv` (None: sys.argv).

    kept: {name: value} of a record, for the options that the words do not name.
    """
    parser = argparse.ArgumentParser(description=description, usage="%(prog)s [options]",
                                     allow_abbrev=False)
    groups = {"options": parser}
    for f in fields(config_class):
        name = f.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        add_option(groups[name], f, (kept or {}).get(f.name, f.default))
    values = vars(parser.parse_args(argv))
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def filled(cfg, **defaults):
    """Return a config in which those of these options that were not set have these values."""
    return replace(cfg, **{k: v for k, v in defaults.items() if getattr(cfg, k) is None})


def parse_losses(text):
    """Return the factors (pixel-wise, channel-wise) of a sum, and the teacher's temperature.

    "pixelwise+10*channelwise": (1, 10, 1), "pixelwise+channelwise@0.4": (1, 1, 0.4).
    """
    total, at, temperature = text.partition("@")
    number, factors = r"(\d+(?:\.\d+)?)", {"pixelwise": 0.0, "channelwise": 0.0}
    wrong = at and not (re.fullmatch(number, temperature) and float(temperature))
    for term in total.split("+"):
        found = re.fullmatch(rf"(?:{number}\*)?(\w+)", term)
        if wrong or not found or factors.get(found[2]) != 0:
            raise ValueError(f"--kd {text!r} is no sum of losses, such as pixelwise+10*channelwise"
                             ", or pixelwise+channelwise@0.4, with the teacher's temperature")
        factors[found[2]] = float(found[1] or 1)
    return *factors.values(), float(temperature or 1)


# ---------------------------------------------------------------- where a run computes

def pick_device(name):
    """Return the torch.device that "auto", "cpu", "cuda" or "cuda:1" stands for."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))                  # processes, of torchrun
    if name.startswith("cuda") and 0 < torch.cuda.device_count() < here:
        raise ValueError(f"there are {here} processes but {torch.cuda.device_count()} GPUs here; "
                         "lower --nproc-per-node, or use --device cpu")
    if here > 1 and ":" in name and torch.cuda.device_count():
        raise ValueError(f"--device {name} is one GPU for all {here} processes; use cuda")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"torch cannot compute on --device {name} here; use cpu") from error
    return device


def pick_amp(name, device):
    """Return the autocast dtype that "auto", "bfloat16", "float16" or "off" stands for, or None.

    "auto" is bfloat16 where the hardware computes in it, which about doubles the speed.
    """
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "off": None}[name]
    native = (torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda"
              else torch.cpu.get_capabilities().get("avx512_bf16"))
    return torch.bfloat16 if native else None


# ---------------------------------------------------------------- errors of a user

def sentence(error):
    """Return (what to say, exit code) for an error that a user can cause or cure, else None."""
    words, code = f"error: {error}", 2
    if isinstance(error, KeyboardInterrupt):
        words, code = "interrupted", 128 + (error.args or (signal.SIGINT,))[0]
    elif isinstance(error, torch.OutOfMemoryError | MemoryError):
        words = "error: out of memory; lower --batch-size or --image-size and start again"
    elif "DataLoader worker" in str(error):
        # It strikes at any moment, also while a progress bar is drawn: begin a line.
        words = "\nerror: a process that loads images died; use fewer --workers, or 0"
    elif not isinstance(error, ValueError | OSError):
        return None
    return "; ".join([words, *getattr(error, "__notes__", [])]), code


def one_sentence(main):
    """Make errors a user can cause one sentence on stderr and exit code 2, not a traceback.

    SIGTERM and SIGHUP are taken like Ctrl-C; the exit code is 128 + the signal's number. Set the
    environment variable DFSS_TRACEBACK to see where an error arose.
    """
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    def program():
        for name in ("SIGTERM", "SIGHUP"):                      # Windows knows no SIGHUP
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), interrupt)
        try:
            main()
        except (Exception, KeyboardInterrupt) as error:
            said = sentence(error)
            if said is None or os.environ.get("DFSS_TRACEBACK"):
                raise
            print(said[0], file=sys.stderr)
            raise SystemExit(said[1]) from None
    return program
