"""What several test files share: a small teacher with real-looking statistics, and a tiny pool."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and a test should not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory, monkeypatch):
    """Keep scores away from the user's, and from other tests'."""
    monkeypatch.setattr("scoring.STORE", tmp_path_factory.mktemp("scores"))


def with_random_statistics(model, seed=0):
    """Give every BatchNorm layer of a model running statistics as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


@pytest.fixture
def pool_folder(tmp_path):
    """Return a folder of 30 small photographs: smooth colours of many hues and sizes."""
    folder = tmp_path / "pool"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        small.resize((50 + i, 40), Image.BICUBIC).save(folder / f"{i:02d}.png")
    return folder
