"""Several processes score one pool and answer its views: what `torchrun` adds to distill.py.

Idea
    All processes run the same program, and what is dealt out are batches, whole: a photograph gets
    the same score in whichever process it falls. The first process has the folder of the run; it
    alone reads the options, prints, writes and trains, while the others wait.

Use it
    torchrun --nproc-per-node 8 distill.py ...     # tensors go by gloo from CPUs, by nccl from GPUs
    with joined() as rank: ...                     # 0: the first process, or the only one
"""

import os
import signal
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from datetime import timedelta

import torch
import torch.distributed as dist

# (which of the processes this is, how many there are). Not what torch.distributed says: a program
# that calls `distill` may have processes of its own, which know nothing of this.
place = ContextVar("place", default=(0, 1))


@contextmanager
def meeting():
    """Say in one sentence that another process is gone, where they wait for each other."""
    try:
        yield
    except RuntimeError as error:
        if place.get()[0] == 0:          # torchrun is about to end this one, too: speak first
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise OSError("another process of this run is gone, or cannot be reached; what was scored "
                      "is kept, for any number of processes") from error


@contextmanager
def joined():
    """Join the processes that torchrun started, if it did, while the body runs; yield the rank.

    What others than the first print is dropped. An error of theirs is most often one of all
    processes, such as a bad teacher, and the first one's to say: torchrun ends them meanwhile. If
    it does not, the first of them to wake up speaks for all.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield 0
        return
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for number in (signal.SIGINT, signal.SIGTERM) if rank else ():
        signal.signal(number, signal.SIG_DFL)   # end at once: nothing to save, nothing to say
    if gpus := torch.cuda.device_count():       # this is what "cuda" means from now on
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    place.set((rank, count))
    try:
        with meeting():
            dist.init_process_group(timeout=timedelta(days=365))     # a death shows at once
        if rank == 0:
            yield rank
            place.set((rank, count))
            told(None)                          # the others, which wait in `leave`, may end, too
        else:
            with open(os.devnull, "w") as none, redirect_stdout(none), redirect_stderr(none):
                yield rank
    except Exception:
        time.sleep(rank and 10 + rank)
        raise
    finally:
        place.set((0, 1))
    dist.destroy_process_group()


def told(value):
    """Return the first process's value in all of them."""
    box = [value]
    if place.get()[1] > 1:
        with meeting():
            dist.broadcast_object_list(box)
    return box[0]


def gathered(x, rows):
    """Return in the first process a list of the x (b, ...) of each, in the others an empty one.

    With several processes all have to come, and x is padded to `rows`, as shapes must agree.
    """
    rank, count = place.get()
    if count == 1:
        return [x]
    x = torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])]).contiguous()     # (rows, ...)
    parts = [] if rank else [torch.empty_like(x) for _ in range(count)]
    with meeting():
        dist.gather(x, parts or None)
    return parts


def leave():
    """Have all processes but the first wait for its end; from here on it works alone."""
    # All end together: a torchrun whose processes have ended gives those of other machines five
    # minutes, and may then take all with it.
    if place.get()[0]:
        told(None)
        dist.destroy_process_group()
        raise SystemExit
    place.set((0, 1))
