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
import os
import signal
import sys
import typing
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from tqdm import tqdm

GROUPS = ("inputs", "labels", "method", "training", "output", "running")     # in --help's order


def option(default, help, choices=None, group="options", min=0, metavar=None):
    """Return a dataclass field with its help, allowed values and the group it is listed under.

    min: the smallest number that is allowed. metavar: FILE, FOLDER or what else a word stands for.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "group": group,
                                            "min": min, "metavar": metavar})


inputs, labels, method, training, output, running = (partial(option, group=g) for g in GROUPS)


def flag(name):
    return "--" + name.replace("_", "-")


class Options:
    """A dataclass of options that refuses values they cannot take, with one ValueError."""

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in (*choices, f.default):
                raise ValueError(f"{flag(f.name)} takes one of {', '.join(choices)}; got {value!r}")
            # A tuple is a size (H, W), of one pixel or more.
            numbers, low = (value, 1) if type(value) is tuple else ((value,), f.metadata["min"])
            if any(isinstance(x, int | float) and not low <= x < torch.inf for x in numbers):
                raise ValueError(f"{flag(f.name)} takes a number of at least {low}; got {value!r}")


@dataclass(frozen=True)
class Running(Options):
    """Where and how a program runs, and its seed."""

    seed: int = running(0, "seed of weights, crops, order and random selection")
    device: str = running("auto", "cpu, cuda, cuda:1 ...; auto: a GPU if there is one")
    amp: str = running("auto", "mixed precision; auto: bfloat16 where the hardware has it",
                       ("auto", "bfloat16", "off"))
    workers: int | None = running(None, "processes that load images (default: 4 with a GPU)")
    deterministic: bool = running(False, "the same result to the bit on a GPU, but slower")
    out: str | None = running(None, "folder of the run", metavar="FOLDER")
    resume: bool = running(False, "resume the interrupted run in --out")


def parse(config_class, argv, description, recorded=None):
    """Return a `config_class` made of the words `argv` (None: sys.argv).

    recorded: {name: value} of an earlier run, for the options that the words do not name.
    """
    parser = argparse.ArgumentParser(description=description, usage="%(prog)s [options]")
    groups = {name: parser.add_argument_group(name) for name in GROUPS}     # empty: not in --help
    for f in fields(config_class):
        # int of `int | None`. An option that is a size is therefore `tuple[int, int] | None`.
        kind = next(iter(typing.get_args(f.type)), f.type)
        meta, text = f.metadata, f.metadata["help"]
        if kind is not bool and f.default not in (None, ""):
            text += f" (default: {f.default})"
        if meta["choices"]:
            text += "; one of: " + ", ".join(meta["choices"])
        if kind is bool:
            settings = {"action": "store_true"}
        elif kind == tuple[int, int]:
            settings = {"nargs": 2, "type": int, "metavar": ("H", "W")}
        else:
            word = meta["metavar"] or {int: "N", float: "X", str: "NAME"}[kind]
            settings = {"type": kind, "metavar": word}
        default = (recorded or {}).get(f.name, f.default)
        group = groups.get(meta["group"], parser)
        group.add_argument(flag(f.name), help=text, default=default, **settings)
    values = vars(parser.parse_args(argv))
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def with_defaults(cfg, **defaults):
    """Return a config in which those of these options that are None have these values."""
    return replace(cfg, **{k: v for k, v in defaults.items() if getattr(cfg, k) is None})


# ---------------------------------------------------------------- where a run computes

def pick_device(name):
    """Return the torch.device that "auto", "cpu", "cuda" or "cuda:1" stands for.

    Under torchrun each process gets a GPU of its own, unless an index is named. ValueError if torch
    cannot compute there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if name == "cuda" and processes > 1:
        if processes > gpus:
            raise ValueError(f"too few GPUs ({gpus}); lower --nproc-per-node, or use --device cpu")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"torch cannot compute on --device {name}: {reason}; use cpu") from error


def set_deterministic():
    """Make torch compute the same to the bit each time, on a GPU, too; before the first operation.

    RuntimeError follows from an operation that has no such form.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"        # cuBLAS is only deterministic with it
    torch.use_deterministic_algorithms(True)


def pick_workers(workers, device):
    """Return the number of loading processes: by default enough to keep a GPU busy."""
    default = min(4, os.cpu_count()) if device.type == "cuda" else 0
    return default if workers is None else workers


def pick_amp(name, device):
    """Return torch.bfloat16 or None, the dtype of autocast, for "auto", "bfloat16" or "off".

    "auto" is bfloat16 where the hardware computes in it, which about doubles the speed.
    """
    native = (torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda"
              else torch.cpu.get_capabilities().get("avx512_bf16"))
    if name == "bfloat16" and device.type == "cuda" and not native:
        raise ValueError("this GPU does not compute in bfloat16; use --amp off")
    return torch.bfloat16 if name == "bfloat16" or name == "auto" and native else None


def progress(iterable, name, **options):
    """Return a tqdm bar over `iterable`: every second on a terminal, every 30 s in a log file."""
    pause = 1 if sys.stderr.isatty() else 30
    return tqdm(iterable, name, mininterval=pause, ncols=79, ascii=True, **options)


# ---------------------------------------------------------------- errors of a user

# What torch raises as a RuntimeError, and what to do about it.
CAUSES = {
    "DataLoader worker (pid": "a process that loads images died; use fewer --workers, or 0",
    "not enough memory": "out of memory; lower --batch-size, --image-size or --views",
    "out of memory": "out of memory; lower --batch-size, --image-size or --views",
    "must match": "a network cannot take this image size; give it `multiple` (docs/networks.md)",
    "Too many open files": "too many open files; raise `ulimit -n`, or use fewer --workers",
    "deterministic implementation": "a network cannot be computed so; leave out --deterministic"}


def explain(error):
    """Return one sentence for an error that a user can cause or overcome, else None."""
    causes = [advice for cause, advice in CAUSES.items() if cause in str(error)]
    if isinstance(error, KeyboardInterrupt):
        sentence = "interrupted; what is done is kept"
    elif causes and not isinstance(error, ValueError):
        # It strikes at any moment, also while a progress bar is drawn: begin a line.
        sentence = f"\nerror: {causes[0]}"
    elif isinstance(error, ValueError | OSError):
        # A process that loads images wraps the reason in its own traceback.
        sentence = "error: " + str(error).split("\nValueError: ")[-1].strip()
    else:
        return None
    return "; ".join([sentence, *getattr(error, "__notes__", [])])


def one_sentence(main):
    """Make errors that a user can cause one sentence on stderr and exit code 2, not a traceback.

    SIGTERM is taken like Ctrl-C. With the environment variable DFSS_TRACEBACK the traceback shows.
    """
    def program():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            main()
        except (Exception, KeyboardInterrupt) as error:
            sentence = explain(error)
            if sentence is None or os.environ.get("DFSS_TRACEBACK"):
                raise
            print(sentence, file=sys.stderr)
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
    return program
