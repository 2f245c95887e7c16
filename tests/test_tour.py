"""The code that is printed for readers runs: docs/tour.md and the "Use it" blocks of the ideas.

    python -m tests.test_tour        (draws the pictures of docs/tour.md again; about a minute)
"""

import importlib
import os
import re
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = [f"tour_{i}.png" for i in range(1, 6)]
SMALL = {"train=200": "train=16", "pool=300": "pool=110", "range(80)": "range(1)",
         "step in range(100)": "step in range(1)"}
PAGE = (DOCS / "tour.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(code):
    """Run code as a reader who pastes it into a Python prompt."""
    names = {}
    with matplotlib.rc_context({"backend": "Agg"}):
        exec(compile(code, "docs/tour.md", "exec"), names)
        names["plt"].close("all")


def test_the_code_of_the_tour_draws_its_five_pictures(tmp_path, monkeypatch):
    code = "\n".join(BLOCKS)
    for large, small in SMALL.items():
        assert large in code
        code = code.replace(large, small)
    monkeypatch.chdir(tmp_path)
    run(code)
    assert sorted(path.name for path in tmp_path.glob("runs/*.png")) == PICTURES


def test_the_tour_shows_its_pictures_which_are_small_and_drawn_by_at_most_ten_lines():
    assert re.findall(r"!\[[^]]+\]\((.*?)\)", PAGE) == PICTURES
    for name, block in zip(PICTURES, [b for b in BLOCKS if "savefig" in b], strict=True):
        assert name in block and block.strip()[block.index("fig, axes"):].count("\n") < 10
        assert (DOCS / name).stat().st_size < 150_000 and Image.open(DOCS / name).width <= 800


@pytest.mark.parametrize("name", ["bn_stats", "ads_sampler", "priority", "kd_loss", "colours"])
def test_the_use_it_block_of_each_idea_runs_as_printed(name):
    text = importlib.import_module(name).__doc__.split("Use it\n")[1].split("\nRun it")[0]
    exec(compile(textwrap.dedent(text), f"{name}.py, Use it", "exec"), {})


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run("\n".join(BLOCKS))
        for picture in PICTURES:
            shutil.copy(f"runs/{picture}", DOCS)
