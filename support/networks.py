"""Networks that others wrote: a function of a Python file, and weights as others save them.

Idea
    `--teacher-model nets.py:unet` runs nets.py, which is the user's own code, and calls unet(). It
    takes no argument and returns an nn.Module from RGB in [0, 1] to logits (B, K, h, w), or what
    `models.wrap` makes of one. The module may have the attributes class_names, image_size (H, W)
    and multiple.

Use it
    # nets.py, with a network that wants ImageNet's normalisation and multiples of 32
    import segmentation_models_pytorch as smp
    import torch
    from models import IMAGENET_MEAN, IMAGENET_STD, wrap

    def unet():
        network = smp.Unet("resnet18", encoder_weights=None, classes=3)
        network.load_state_dict(torch.load("unet.pth", weights_only=True))
        return wrap(network, mean=IMAGENET_MEAN, std=IMAGENET_STD, multiple=32,
                    class_names=["road", "sky", "other"], image_size=(256, 512))
"""

import runpy
import sys
from pathlib import Path

import torch

from models import build_model, wrap

PLACES = ("model", "state_dict", "model_state_dict", "ema")      # where others keep a state dict


def load_file(spec):
    """Run a Python file; return the network of a function in it, wrapped and in eval mode.

    spec: path/to/file.py:function. Its output for an empty image gives the number of classes.
    Raises FileNotFoundError, or ValueError with what went wrong in the file.
    """
    path, _, function = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise FileNotFoundError(f"there is no Python file {path!r}; expected file.py:function")
    sys.path.append(str(Path(path).resolve().parent))            # the file may import neighbours
    try:
        names = runpy.run_path(path)
        if function not in names:
            raise NameError(f"there is no function {function!r} in it")
        model = wrap(names[function]()).cpu().eval()
        with torch.no_grad():
            K = model(torch.zeros(1, 3, *(model.image_size or (256, 256)))).shape[1]
    except Exception as error:                                   # of any kind: the code is not ours
        raise ValueError(f"{spec}: {type(error).__name__}: {error}".split("\n")[0]) from error
    model.name, model.num_classes = spec, K
    return model.with_names(model.class_names or [f"class {k}" for k in range(K)])


def load_network(name, class_names, image_size, **more):
    """Return the network of a name in models.MODELS, or of a path/to/file.py:function.

    more: see `models.build_model`; a network of a file keeps its own mean and std.
    """
    model = load_file(name) if ":" in name else build_model(name, len(class_names), **more)
    model.image_size = image_size
    return model.with_names(class_names)


def find_weights(state, path):
    """Return the state dict in what others save, bare or in one of PLACES; ValueError if none."""
    state = state if isinstance(state, dict) else {type(state).__name__: None}
    places = [state[key] for key in PLACES if key in state] + [state]
    found = next((place for place in places if isinstance(place, dict)), {})
    weights = {key: value for key, value in found.items() if torch.is_tensor(value)}
    if not weights:
        raise ValueError(f"{path} holds no state dict, neither bare nor as {', '.join(PLACES)}; it "
                         f"holds {list(state)[:8]}")
    return weights


def count_outputs(name, weights):
    """Return how many outputs the last layer of one of MODELS has in a state dict; 2 without it."""
    with torch.device("meta"):
        last = list(build_model(name, 2).net.state_dict())[-1]
    return next((len(value) for key, value in weights.items() if key.endswith(last)), 2)


def fit_weights(network, weights, path):
    """Load a state dict into a network, whatever prefix its keys have (module., _orig_mod. ...).

    Keys without that prefix, and auxiliary heads that the network does not have, are left out,
    which is printed.
    Raises ValueError with the first key that does not fit, and what was expected.
    """
    keys = list(network.state_dict())
    # What precedes the last key is a candidate; of several, the one that fits most keys.
    prefixes = [key.removesuffix(keys[-1]) for key in weights if key.endswith(keys[-1])] or [""]
    prefix = max(prefixes, key=lambda p: sum(p + key in weights for key in keys))
    left = [key for key in weights if not key.startswith(prefix)
            or "aux_classifier." in key and key.removeprefix(prefix) not in keys]
    fitting = {key.removeprefix(prefix): weights[key] for key in weights if key not in left}
    try:
        network.load_state_dict(fitting)
    except RuntimeError as error:
        reason = str(error).split("\n")[1].strip()
        raise ValueError(f"{path} does not fit the network: {reason:.200} ... (its first key is "
                         f"{next(iter(weights))!r})") from error
    if left:
        print(f"{path}: left out {len(left)} values that the network does not have: {left[0]} ...")
