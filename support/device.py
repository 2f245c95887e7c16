"""Where a run computes, and in which precision.

Use it
    from support.device import pick_amp, pick_device
    device = pick_device("auto")                 # CUDA where there is one, else the CPU
    amp = pick_amp("auto", device)               # torch.bfloat16 where the hardware has it, or None
"""

import torch


def pick_device(name):
    """Return the torch.device that "auto", "cpu", "cuda" or "cuda:1" stands for."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name} was asked for, but torch sees no CUDA device; "
                         "use --device cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r}; expected cpu, cuda, cuda:0 or the like, or "
                         "auto") from error
    return device


def pick_amp(name, device):
    """Return the autocast dtype that "auto", "bfloat16", "float16" or "off" stands for, or None.

    "auto" is bfloat16 where the hardware computes in it, which about doubles the speed.
    """
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "off": None}[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        able = getattr(torch.cpu, "get_capabilities", dict)()
        native = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    return torch.bfloat16 if native else None
