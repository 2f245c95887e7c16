"""Checkpoints that cannot run code, and files that are never half written.

Idea
    Loading uses `weights_only=True`: tensors and plain values, no pickled code. Files are written
    under a temporary name and then renamed, so that a reader sees the old file or the new one.

Use it
    from support.checkpoint import load_model, save_model
    save_model(model, "student.pt")
    model = load_model("student.pt")
    theirs = load_model("weights.pth", "deeplabv3_resnet50")     # a state dict of somebody else
"""

import argparse
import hashlib
import io
import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch

from models import MODELS, SPECS, build_model
from support import networks
from support.labelled import read_class_names

FORMAT = "dfss-1"


@contextmanager
def atomic(path):
    """Yield a temporary path next to `path`; rename it if the body succeeds, else delete it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{hash(path.name):x}")     # short, whatever the name
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror or error}; free some space or "
                      "choose another folder; what was there is intact") from error
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
    """Return the tensors and plain values of a .pt, .pth or .safetensors file, on the CPU.

    Raises FileNotFoundError, or ValueError that says what the file is instead.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file          # an optional package
            return load_file(path)
        # torchvision's training script saves its options as well: a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                 # the unpickler raises nearly anything on bad input
        kind = ("not a readable file" if isinstance(error, IsADirectoryError | PermissionError) else
                "for the package safetensors: install it" if isinstance(error, ImportError) else
                "damaged, or holds code (a whole network, a TorchScript or exported program)")
        raise ValueError(f"{path} is {kind} (nothing in it was run); expected a student.pt, a "
                         "teacher.pt or a state dict") from error


def save_model(model, path):
    """Write a SegmentationModel with all it takes to build it again; else ValueError."""
    if model.name not in MODELS and ":" not in model.name:
        raise ValueError(f"{model.name} cannot be built again from its name; expected {SPECS}")
    save({"format": FORMAT, "model": model.name, "num_classes": model.num_classes,
          "class_names": model.class_names, "image_size": model.image_size,
          "state_dict": model.state_dict()}, path)


def load_model(path, model=None):
    """Return the SegmentationModel in a file, in eval mode.

    path: a file of `save_model`, or a state dict as others save it; None if `model` is a Python
    file whose network has its weights. model: one of models.MODELS, or path/to/file.py:function.
    A state dict needs it. So does a checkpoint of a Python file's network: that file is only run if
    `model` names it. The class names of a state dict are those of a classes.txt next to it, if any.
    Raises FileNotFoundError, or ValueError that says what does not fit.
    """
    if path is None and ":" not in (model or ""):
        raise ValueError("name a checkpoint (--teacher, --checkpoint), a network with its weights "
                         "(file.py:function) or --teacher-weights DEFAULT")
    if path is None:
        return networks.load_file(model)
    state = load(path)
    saved = state["model"] if isinstance(state, dict) and state.get("format") == FORMAT else None
    if model is None and (saved is None or ":" in saved):
        raise ValueError(f"{path} holds {saved or 'no model of this repository'}; name its network "
                         f"as well (--model, --teacher-model): {SPECS}")
    name, weights = model or saved, networks.find_weights(state, path)
    network = (networks.load_file(name) if ":" in name else
               build_model(name, networks.count_outputs(name, weights)))
    # Our files hold the mean and std as well; others hold the state of the network inside.
    networks.fit_weights(network if saved else network.net, weights, path)
    names = state["class_names"] if saved else read_class_names(Path(path).with_name("classes.txt"))
    network.image_size = state["image_size"] if saved else network.image_size
    return network.with_names(names or network.class_names).eval()


def fingerprint(model):
    """Return a hash of all parameters and buffers, equal only if all bits are."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
