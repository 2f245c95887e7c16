"""Files that are never half written, and checkpoints that cannot run code.

Idea
    Write under a temporary name, then rename: whoever looks sees the old file or the new one. Load
    with `weights_only=True`: tensors and plain values, no pickled code.

Use it
    from support.checkpoint import load_model, save_model
    save_model(model, "student.pt", image_size=[96, 128])
    model, state = load_model("student.pt")
"""

import io
import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch

from models import build_model

FORMAT = "dfss-1"


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; rename it if the body succeeds, else delete it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror or error}; the file that was there "
                      "before, if any, is intact; free some space, or see who may write "
                      "there") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(state, path):
    """Write a dict of tensors and plain values."""
    # By way of memory: on a full disk torch.save raises a RuntimeError that says nothing of disks.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def save_json(value, path):
    """Write a JSON file that people can read."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def load(path):
    """Return what `save` wrote, on the CPU. Raises FileNotFoundError, or ValueError if unsafe."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                 # the unpickler raises nearly anything on bad input
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint of tensors and plain values "
                         f"(nothing in it was run): {reason}") from error


def save_model(model, path, **extra):
    """Write a SegmentationModel with all it takes to build it again, and `extra` plain values."""
    save({"format": FORMAT, "model": model.name, "num_classes": model.num_classes,
          "class_names": model.class_names, "mean": model.mean.flatten().tolist(),
          "std": model.std.flatten().tolist(), "output_stride": model.output_stride,
          "state_dict": model.state_dict(), **extra}, path)


def load_model(path, name=None, num_classes=None):
    """Return (SegmentationModel, checkpoint dict). Raises ValueError that says what does not match.

    name, num_classes: what the caller expects, if anything.
    """
    state = load(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a model of this repository (format {FORMAT!r}); "
                         "train_teacher.py and distill.py write such files, and networks of your "
                         "own enter through the Python API (README)")
    for what, expected in (("model", name), ("num_classes", num_classes)):
        if expected is not None and state[what] != expected:
            raise ValueError(f"{path} holds {what} {state[what]}, but {expected} was asked for")
    model = build_model(state["model"], state["num_classes"], mean=state["mean"],
                        std=state["std"], class_names=state["class_names"],
                        output_stride=state.get("output_stride", 16))
    try:
        model.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit {state['model']}: "
                         f"{str(error).splitlines()[-1].strip()}") from error
    return model, state
