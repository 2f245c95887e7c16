"""A GPU that is not there: fake CUDA tensors that also hold values.

torch's fake tensors have a shape and a device, say "cuda:0", but no values, and refuse most of what
a GPU refuses. Each of these holds its values too, on the CPU, and all that may not be mixed is
refused: so whole runs, with all that depends on values, go as on a GPU.

A test that needs one is skipped where this torch has no fake CUDA tensors: their module is private.
"""

from contextlib import contextmanager, suppress

import pytest
import torch
from torch import nn

fake = pytest.importorskip("torch._subclasses.fake_tensor")
UNKNOWN = fake.DataDependentOutputException, fake.DynamicOutputShapeException


def need_fakes():
    """Skip a test where fake CUDA tensors do not work.

    Not on import: once there were some, a forked process can no longer run a backward pass.
    """
    try:
        with fake.FakeTensorMode():
            nn.Conv2d(3, 4, 3, device="cuda")(torch.rand(1, 3, 8, 8, device="cuda"))
    except Exception as error:                    # whatever a private module may raise one day
        pytest.skip(f"this torch has no fake CUDA tensors: {error!r}")


def each(f, tree):
    """Return nested lists, tuples and dicts with f of every leaf."""
    if isinstance(tree, dict):
        return {key: each(f, value) for key, value in tree.items()}
    return type(tree)(each(f, x) for x in tree) if type(tree) in (list, tuple) else f(tree)


def on_cpu(x):
    """Return a tensor moved to the CPU, the CPU for a device, anything else as it is."""
    x = torch.device("cpu") if isinstance(x, torch.device) else x
    return x.cpu() if torch.is_tensor(x) else x


class PretendGpu(fake.FakeTensorMode):
    """While entered, tensors on "cuda" can be made and used. They hold `values` and `array`."""

    inside = False                                # inside an operator, whose parts have no values

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        call, kwargs, leaves, out = super().__torch_dispatch__, kwargs or {}, [], None
        if self.inside:
            return call(func, types, args, kwargs)
        each(leaves.append, [args, kwargs])
        devices = [x.device for x in leaves if torch.is_tensor(x) and x.dim()]
        # A GPU copies from anywhere, and takes indices from the CPU; else nothing may be mixed.
        free = "copy_", *(("index", "index_put_") if devices and devices[0].type != "cpu" else ())
        if len(set(devices)) > 1 and func.__name__.split(".")[0] not in free:
            raise RuntimeError(f"{func} of tensors on more than one device")
        try:
            self.inside = True
            with suppress(*UNKNOWN):              # of a result, or shape, that depends on values
                out = call(func, types, args, kwargs)
        finally:
            self.inside = False
        args, kwargs = each(lambda x: x.values if isinstance(x, fake.FakeTensor) else
                            x if torch.is_tensor(x) else on_cpu(x), [args, kwargs])
        return self.filled(out, func(*args, **kwargs), devices)

    def filled(self, out, values, devices):
        """Return the fake result `out` with its values, or made from them."""
        if isinstance(values, list | tuple):
            outs = [None] * len(values) if out is None else out
            return tuple(self.filled(a, b, devices) for a, b in zip(outs, values, strict=True))
        if not torch.is_tensor(values):
            return values if out is None else out
        out = fake.FakeTensor(self, values.to("meta"), devices[0]) if out is None else out
        out.values = values
        out.array = None if values.dtype == torch.bfloat16 else values.detach().numpy()
        return out


def to_numpy(x, numpy=torch.Tensor.numpy):
    """Do what Tensor.numpy does, also with a fake tensor."""
    if x.device.type != "cpu":
        raise TypeError("can't convert a tensor on this device to numpy; use Tensor.cpu()")
    seen = x.view(x.shape)                        # a fake one while a PretendGpu is entered
    return seen.array if isinstance(seen, fake.FakeTensor) else numpy(x)


def keep_layout(old, new):
    """Replace swap_tensors: a fake network cannot take another layout, and need not, nor move."""
    assert old.device == new.device, "move networks before a PretendGpu is entered"


@contextmanager
def surroundings(monkeypatch):
    """Yield a PretendGpu to enter, with what it needs around it."""
    need_fakes()
    monkeypatch.setattr(torch.Tensor, "numpy", to_numpy)
    monkeypatch.setattr(torch.Tensor, "__format__", lambda x, how: format(x.item(), how))
    monkeypatch.setattr("torch.utils.swap_tensors", keep_layout)
    monkeypatch.setattr(fake.FakeTensor, "__deepcopy__", lambda x, memo: x.detach().clone())
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)         # no pinned memory
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    with torch.backends.cudnn.flags(enabled=False):              # its operators know no CPU
        yield PretendGpu(allow_non_fake_inputs=True)
