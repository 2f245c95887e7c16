"""A progress bar, which moves every second on a terminal and every 30 seconds in a log file.

Use it
    from support.progress import progress
    for batch in progress(loader, "scoring"):
        ...
"""

import sys

from tqdm import tqdm


def progress(iterable, name, **options):
    """Return a tqdm bar over `iterable`."""
    pause = 1 if sys.stderr.isatty() else 30
    return tqdm(iterable, name, mininterval=pause, ncols=79, ascii=True, **options)
