"""Command lines from frozen dataclasses: each option is declared once, with its help.

Idea
    A program's Config is a dataclass whose fields carry their own help; the parser, `--help` and
    the record of a run all come from it, so that none of them can disagree.

Use it
    @dataclass(frozen=True)
    class Config:
        steps: int = option(900, "number of updates")
    cfg = parse(Config, ["--steps", "10"], "What the program does.")
"""

import argparse
import os
import signal
import sys
import typing
from dataclasses import field, fields
from functools import partial, wraps

import torch


def option(default, help, choices=None, group="options", least=0):
    """Return a dataclass field with its help, allowed values and the group it is listed under.

    least: the smallest integer that is allowed; for a height and a width it is 1.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "group": group,
                                            "least": least})


def parse(config_class, argv, description):
    """Return a `config_class` made of the words `argv` (None: sys.argv).

    A bool becomes a switch, a tuple[int, int] takes two integers, `None` means not set. Raises
    ValueError for an integer that is too small.
    """
    parser = argparse.ArgumentParser(
        description=description, usage="%(prog)s [options]",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=26, width=100))
    groups, long = {"options": parser}, {}           # argparse's own heading, also over --help
    for f in fields(config_class):
        group = f.metadata["group"]
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        kind = next(t for t in (typing.get_args(f.type) or [f.type]) if t is not type(None))
        choices = f.metadata["choices"]
        flag = "--" + f.name.replace("_", "-")
        allowed = f" [{', '.join(choices)}]" if choices else ""
        if len(allowed) > 70:                               # once, below, for all that share it
            long.setdefault(allowed, []).append(flag)
            allowed = " [see below]"
        unset = f.default in (None, "") or f.default is False
        shown = "" if unset else f" (default: {f.default})"
        how = {"help": (f.metadata["help"] + allowed + shown).strip(), "default": f.default}
        if kind is bool:
            how["action"] = "store_true"
        elif f.type == (tuple[int, int] | None):
            how |= {"nargs": 2, "type": int, "metavar": ("H", "W")}
        else:
            how |= {"type": kind, "choices": choices,
                    "metavar": {int: "N", float: "X", str: "NAME"}[kind]}
        groups[group].add_argument(flag, **how)
    parser.epilog = "; ".join(f"{', '.join(flags)}: {names[2:-1]}" for names, flags in long.items())
    values = vars(parser.parse_args(argv))
    leasts = {f.name: f.metadata["least"] for f in fields(config_class)}
    for name, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        least = 1 if isinstance(value, list) else leasts[name]
        if any(isinstance(number, int) and number < least for number in numbers):
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got "
                             f"{' '.join(map(str, numbers))}")
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def sentence(error):
    """Return (what to say, exit code) for an error that a user can cause or cure, else None."""
    if isinstance(error, KeyboardInterrupt):
        words, code = "interrupted", 128 + (error.args or (signal.SIGINT,))[0]
    elif isinstance(error, torch.OutOfMemoryError | MemoryError):
        words, code = ("error: out of memory; lower --batch-size or --image-size, where there is "
                       "one, and start again"), 2
    elif "DataLoader worker" in str(error):
        # It strikes at any moment, also while a progress bar is drawn: begin a line.
        words, code = ("\nerror: a process that loads images died, perhaps for want of memory; use "
                       "fewer --workers, or 0"), 2
    elif isinstance(error, ValueError | OSError):
        words, code = f"error: {error}", 2
    else:
        return None
    return "; ".join([words, *getattr(error, "__notes__", [])]), code


def one_sentence(main):
    """Make errors a user can cause one sentence on stderr and exit code 2, not a traceback.

    SIGTERM is taken like Ctrl-C; the exit code of both is 128 + the signal's number. Set the
    environment variable DFSS_TRACEBACK to see where an error arose.
    """
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    @wraps(main)
    def program():
        signal.signal(signal.SIGTERM, interrupt)
        try:
            main()
        except (Exception, KeyboardInterrupt) as error:
            said = sentence(error)
            if said is None or os.environ.get("DFSS_TRACEBACK"):
                raise
            print(said[0], file=sys.stderr)
            raise SystemExit(said[1]) from None
    return program
