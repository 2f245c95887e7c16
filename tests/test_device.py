"""device.py: names of devices and of precisions."""

import pytest
import torch

from support.device import pick_amp, pick_device


def test_devices_and_precisions_are_picked_by_name(monkeypatch):
    cpu = torch.device("cpu")
    assert pick_device("cpu") == cpu
    assert [pick_amp(name, cpu) for name in ("bfloat16", "float16", "off")] == [
        torch.bfloat16, torch.float16, None]
    assert pick_amp("auto", cpu) in (torch.bfloat16, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == cpu
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"--device {name} .*no CUDA device.*--device cpu"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: None)
    assert pick_device("auto") == torch.device("cuda")
    for capability, dtype in (((7, 5), None), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, now=capability: now)
        assert pick_amp("auto", torch.device("cuda")) == dtype


def test_a_device_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(ValueError, match="no device 'gpu'; expected cpu, cuda"):
        pick_device("gpu")

    def absent(device):
        raise AssertionError("Invalid device id")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", absent)
    with pytest.raises(ValueError, match="no device 'cuda:9'"):
        pick_device("cuda:9")
