"""Command lines from frozen dataclasses: each option is declared once, with its help.

Idea
    A program's Config is a dataclass whose fields carry their own help; the parser, `--help` and
    the record of a run all come from it, so none of them can disagree. It checks itself wherever
    it is made. Options that several programs share are declared here and inherited.

Use it
    @dataclass(frozen=True)
    class Config(Running):
        steps: int = option(900, "number of updates")
    cfg = parse(Config, ["--steps", "10"], "What the program does.")
"""

import argparse
import math
import os
import signal
import sys
import typing
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch

GROUPS = ("inputs", "labels", "method", "training", "output", "options", "running")  # of --help


def option(default, help, choices=None, group="options", min=0, metavar=None, required=False):
    """Return a dataclass field with its help, allowed values and the group it is listed under.

    min: the smallest number that is allowed. metavar: FILE, FOLDER or what else a word stands for.
    required: the command line must give it.
    """
    return field(default=default, metadata={
        "help": help, "choices": choices, "group": group, "min": min, "metavar": metavar,
        "required": required})


def flag(name):
    return "--" + name.replace("_", "-")


class Options:
    """A dataclass of options that refuses values they cannot take, with one ValueError."""

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in (*choices, f.default):
                expected = f"one of {', '.join(choices)}"
            elif isinstance(value, tuple) and min(value) < 1:
                expected = "a height and a width of 1 or more"
            elif isinstance(value, int | float) and not f.metadata["min"] <= value < math.inf:
                expected = f"a number of at least {f.metadata['min']}"
            else:
                continue
            raise ValueError(f"{flag(f.name)} takes {expected}; got {value!r}")


running = partial(option, group="running")


@dataclass(frozen=True)
class Running(Options):
    """Where and how a program runs, and its seed."""

    seed: int = running(0, "seed of weights, crops, order and random selection")
    device: str = running("auto", "cpu, cuda, cuda:1 ...; auto: a GPU if there is one")
    amp: str = running("auto", "mixed precision; auto: bfloat16 where the hardware has it",
                       ("auto", "bfloat16", "float16", "off"))
    workers: int | None = running(None, "processes that load images (default: 4 with a GPU)")
    deterministic: bool = running(False, "the same result to the bit on a GPU, but slower")
    out: str | None = running(None, "folder of the run", metavar="FOLDER")
    resume: bool = running(False, "resume the interrupted run in --out")


def add_option(group, f, default):
    """Give an argparse group the option that a dataclass field declares."""
    kind = next(iter(typing.get_args(f.type)), f.type)                   # int of `int | None`
    meta, text = f.metadata, f.metadata["help"]
    if kind is not bool and f.default not in (None, ""):
        text += f" (default: {f.default})"
    if meta["choices"]:
        text += "; one of: " + ", ".join(meta["choices"])
    if kind is bool:
        settings = {"action": "store_true"}
    elif f.type == (tuple[int, int] | None):
        settings = {"nargs": 2, "type": int, "metavar": ("H", "W")}
    else:
        settings = {"type": kind, "choices": meta["choices"], "required": meta["required"],
                    "metavar": meta["metavar"] or {int: "N", float: "X", str: "NAME"}[kind]}
    group.add_argument(flag(f.name), help=text, default=default, **settings)


def parse(config_class, argv, description, recorded=None):
    """Return a `config_class` made of the words `argv` (None: sys.argv).

    recorded: {name: value} of an earlier run, for the options that the words do not name.
    """
    parser = argparse.ArgumentParser(description=description, usage="%(prog)s [options]")
    groups = {"options": parser}                               # argparse's own group, with --help
    for f in sorted(fields(config_class), key=lambda f: GROUPS.index(f.metadata["group"])):
        name = f.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        add_option(groups[name], f, (recorded or {}).get(f.name, f.default))
    values = vars(parser.parse_args(argv))
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def with_defaults(cfg, **defaults):
    """Return a config in which those of these options that are None have these values."""
    return replace(cfg, **{k: v for k, v in defaults.items() if getattr(cfg, k) is None})


# ---------------------------------------------------------------- where a run computes

def pick_device(name):
    """Return the torch.device that "auto", "cpu", "cuda" or "cuda:1" stands for.

    Under torchrun each process gets a GPU of its own. ValueError if torch cannot compute there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if name.startswith("cuda") and processes > 1:
        if processes > gpus or ":" in name:
            raise ValueError(f"{processes} processes need {processes} GPUs, but --device {name} "
                             f"has {1 if ':' in name else gpus}; lower --nproc-per-node, or use "
                             "--device cpu")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"torch cannot compute on --device {name} here "
                         f"({str(error).splitlines()[0]}); use --device cpu") from error
    return device


def set_deterministic():
    """Make torch compute the same to the bit each time, on a GPU, too; before the first operation.

    RuntimeError follows from an operation that has no such form.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"        # cuBLAS is only deterministic with it
    torch.use_deterministic_algorithms(True)


def warn_if_busy():
    """Print a line if other programs keep the cores busy: threads then wait for each other."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0, os.cpu_count()
    if load > 0.75 * cores and torch.get_num_threads() > 1:
        print(f"warning: this machine is busy (load {load:.1f} on {cores} cores); this run may be "
              "several times faster with OMP_NUM_THREADS=1")


def pick_workers(workers, device):
    """Return the number of loading processes: by default enough to keep a GPU busy."""
    if workers is not None:
        return workers
    return min(4, os.cpu_count()) if device.type == "cuda" else 0


def pick_amp(name, device):
    """Return the autocast dtype that "auto", "bfloat16", "float16" or "off" stands for, or None.

    "auto" is bfloat16 where the hardware computes in it, which about doubles the speed.
    """
    native = (torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda"
              else torch.cpu.get_capabilities().get("avx512_bf16"))
    if name == "bfloat16" and device.type == "cuda" and not native:
        raise ValueError(f"{torch.cuda.get_device_name(device)} does not compute in bfloat16; use "
                         "--amp float16 or --amp off")
    if name == "auto":
        name = "bfloat16" if native else "off"
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "off": None}[name]


# ---------------------------------------------------------------- errors of a user

# What torch raises as a RuntimeError, and what to do about it.
CAUSES = {
    "DataLoader worker (pid": "a process that loads images died; use fewer --workers, or 0",
    "not enough memory": "out of memory; lower --batch-size, --image-size or --views",
    "out of memory": "out of memory; lower --batch-size, --image-size or --views",
    "Too many open files": "too many open files; raise `ulimit -n`, or use fewer --workers",
    "deterministic implementation": "a network cannot be computed so; leave out --deterministic",
    "unexpected EOF": "a downloaded file is cut off; delete it from torch's cache and start again",
    "invalid hash value": "a downloaded file is damaged; start again to fetch it anew"}


def explain(error):
    """Return one sentence for an error that a user can cause or overcome, else None."""
    causes = [advice for cause, advice in CAUSES.items() if cause in str(error)]
    if isinstance(error, KeyboardInterrupt):
        sentence = "interrupted"
    elif causes and not isinstance(error, ValueError):
        # It strikes at any moment, also while a progress bar is drawn: begin a line.
        sentence = f"\nerror: {causes[0]}"
    elif isinstance(error, ValueError | OSError):
        sentence = f"error: {error}"
    else:
        return None
    return "; ".join([sentence, *getattr(error, "__notes__", [])])


def one_sentence(main):
    """Make errors that a user can cause one sentence on stderr and exit code 2, not a traceback.

    SIGTERM is taken like Ctrl-C. With the environment variable DFSS_TRACEBACK the traceback shows.
    """
    def interrupt(*_):
        raise KeyboardInterrupt

    def program():
        signal.signal(signal.SIGTERM, interrupt)
        try:
            main()
        except (Exception, KeyboardInterrupt) as error:
            sentence = explain(error)
            if sentence is None or os.environ.get("DFSS_TRACEBACK"):
                raise
            print(sentence, file=sys.stderr)
            raise SystemExit(130 if sentence.startswith("interrupted") else 2) from None
    return program
