"""Files that are never half written, and checkpoints that cannot run code.

Idea
    Write under a temporary name, then rename: whoever looks sees the old file or the new one. Load
    with `weights_only=True`: tensors and plain values, no pickled code.

Use it
    from support.checkpoint import load_model, save_model
    save_model(model, "student.pt")
    model = load_model("student.pt")
"""

import hashlib
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
    temporary = path.with_name(f".{os.getpid()}.{hash(path.name):x}")     # short, whatever the name
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror or error}; free some space, or "
                      "see who may write there; what was there is intact") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(state, path, write=torch.save):
    """Write a dict of tensors and plain values, or what else torch can write to a file."""
    # By way of memory: on a full disk torch.save raises a RuntimeError that says nothing of disks,
    # and torch.export.save ends the process.
    buffer = io.BytesIO()
    write(state, buffer)
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
        raise ValueError(f"{path} is damaged or not a checkpoint of tensors and plain values "
                         "(nothing in it was run); make it anew, or name another file") from error


def save_model(model, path):
    """Write a SegmentationModel with all it takes to build it again."""
    save({"format": FORMAT, "model": model.name, "num_classes": model.num_classes,
          "class_names": model.class_names, "image_size": model.image_size,
          "mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist(),
          "state_dict": model.state_dict()}, path)


def load_model(path, name=None, num_classes=None):
    """Return the SegmentationModel in a file, in eval mode. ValueError says what does not match.

    name, num_classes: what the caller expects, if anything.
    """
    state = load(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a model of this repository (format {FORMAT!r}); networks "
                         "of your own enter through the Python API (README)")
    for what, expected in (("model", name), ("num_classes", num_classes)):
        if expected not in (None, state[what]):
            raise ValueError(f"{path} holds {what} {state[what]}, but {expected} was asked for")
    model = build_model(state["model"], state["num_classes"], **{
        key: state[key] for key in ("mean", "std", "class_names", "image_size")})
    model.load_state_dict(state["state_dict"])
    return model.eval()


def fingerprint(model):
    """Return a hash of all parameters and buffers, equal only if all bits are."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
