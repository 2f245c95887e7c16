"""A progress bar on a terminal; in a log file, a plain line now and then.

Use it
    from support.progress import progress
    for batch in progress(loader, "scoring"):
        ...
"""

import sys

from tqdm import tqdm


class Lines:
    """Where tqdm writes when there is no terminal: each state of the bar becomes a line."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def progress(iterable=None, name="", **options):
    """Return a tqdm bar over `iterable`; without a terminal, a line of 79 columns every 30 s."""
    if sys.stderr.isatty():
        return tqdm(iterable, name, mininterval=1, **options)
    return tqdm(iterable, name, mininterval=30, ncols=79, ascii=True, file=Lines(), **options)
