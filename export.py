"""Export a student to one file that runs with torch alone.

Idea
    `torch.export` records what the network computes, normalisation included. The file needs torch
    but not this repository. Before it is written, it must give the same masks as the network.

Use it, anywhere
    student = torch.export.load("student.pt2").module()
    masks = student(images).argmax(dim=1)   # (B, 3, H, W) RGB in [0, 1] -> logits -> (B, H, W)

Run it
    python export.py --checkpoint runs/001/student.pt --out student.pt2
    python export.py --model nets.py:unet --out unet.pt2
"""

import copy
import io
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from support.checkpoint import atomic, load_model
from support.options import Options, one_sentence, option, parse


@dataclass(frozen=True)
class Config(Options):
    checkpoint: str | None = option(None, "student.pt, teacher.pt or a state dict", metavar="FILE")
    model: str | None = option(None, "its network, if it is your own: file.py:function, or a name")
    out: str = option("student.pt2", "file to write", metavar="FILE")
    image_size: tuple[int, int] | None = option(None, "size to try it at (default: its own)")


class AtImageSize(torch.nn.Module):
    """A network whose logits are resized to the image: (B, 3, H, W) -> (B, K, H, W)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return F.interpolate(self.model(images), images.shape[-2:], mode="bilinear")


@torch.no_grad()
def export(model, path, size):
    """Write a copy of `model`, on the CPU and in eval mode, to `path`; return the sizes it takes.

    These are any (H, W), or `size` alone where the network computes with sizes in Python numbers.
    ValueError, and no file, if the program does not give the same masks as the network.
    """
    model, auto = AtImageSize(copy.deepcopy(model).cpu().eval()), torch.export.Dim.AUTO
    for dynamic, sizes in ((0, 2, 3), "any size"), ((0,), f"the size {size[0]}x{size[1]} only"):
        other_size = (size[0] + 33, size[1] + 18) if 2 in dynamic else size
        file = io.BytesIO()              # in memory: on a full disk torch.export.save ends Python
        try:
            program = torch.export.export(model, (torch.rand(2, 3, *size),),
                                          dynamic_shapes=(dict.fromkeys(dynamic, auto),))
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)               # names folders of this machine
            torch.export.save(program, file)
            program = torch.export.load(io.BytesIO(file.getvalue())).module()
            for images in torch.rand(1, 3, *size), torch.rand(3, 3, *other_size):
                other = program(images).argmax(dim=1) != model(images).argmax(dim=1)   # (B, H, W)
                if other.float().mean() > 1e-4:          # rounding may decide where classes tie
                    raise ValueError(f"other masks in {other.float().mean():.2%} of the pixels")
        except Exception as error:                       # a network can break export in many ways
            reason = str(error).strip().split("\n")[0]
            continue
        with atomic(path) as temporary:
            temporary.write_bytes(file.getvalue())
        return sizes
    raise ValueError(f"{path} is not written: the network cannot be exported ({reason})")


def main(argv=None):
    """Export a checkpoint; return the sizes that the file takes, in words."""
    cfg = parse(Config, argv, __doc__.split("\n")[0])
    model = load_model(cfg.checkpoint, cfg.model)
    size = cfg.image_size or model.image_size
    if size is None:
        raise ValueError("the network does not say its image size; give --image-size")
    sizes = export(model, cfg.out, size)
    print(f"{cfg.out} gives the same masks as the network, for any batch and {sizes}")
    return sizes


if __name__ == "__main__":
    one_sentence(main)()
