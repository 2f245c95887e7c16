"""figures.py: every run gets its figure, whatever the classes are called and the scores are."""

import warnings

import pytest
import torch
from conftest import with_random_statistics
from PIL import Image

from distill import Config
from evaluate import predict
from models import build_model
from support import figures
from support.data import open_pool
from support.figures import save_png
from support.labelled import class_colours


@pytest.fixture
def result(pool_folder):
    """Return what distill() does for four of thirty files, one of which is broken."""
    scores = torch.linspace(1, 2, 30)
    scores[7] = torch.nan
    return {"pool": open_pool(pool_folder, None, (32, 48)), "scores": scores,
            "selected": torch.arange(4), "weights": torch.linspace(1, 0, 4)}


@pytest.fixture
def drawn(monkeypatch):
    """Return the list of the figures that would be written from here on."""
    written = []
    monkeypatch.setattr(figures, "save_png", lambda figure, path: written.append(figure))
    return written


@pytest.mark.parametrize("sampling", ["nearest", "confidence", "random"])
def test_figures_say_what_the_scores_are_and_show_the_first_and_the_last(result, drawn, sampling):
    figures.pool_figure(result, (32, 48), sampling, "pool.png")
    (figure,), (axis, first, last) = drawn, figures.SCORES[sampling]
    assert figure.axes[0].get_xlabel() == f"{axis} (last bin: all beyond)"
    rows = [part.get_suptitle() for part in figure.subfigs[1:]]
    assert rows == [f"{first} in the pool", f"{last} in the pool"]
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "pool, 29 images"
    titles = [ax.get_title() for ax in figure.axes[1:]]                      # scores, in order
    assert (len(titles), titles[0], titles[-1]) == (20, "1", "2")


def test_masks_have_the_legends_colours_whatever_classes_are_called(result, drawn, tmp_path):
    names = ["$\\unknown$", "a_$", "\\$5 {"]
    teacher = build_model("resnet_tiny", 3, class_names=names, image_size=(32, 48))
    result["scores"] = torch.ones(30)                            # a histogram of equal scores
    masks = {"Truth": [torch.tensor([[0, 1, 2, 255]])]}
    with warnings.catch_warnings(action="error"):
        figures.run_figure(result, teacher, Config(), masks, "figure.png")
        (figure,) = drawn
        save_png(figure, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size[0] == 11 * 110
    colours = [list(colour) for colour in (*class_colours(names), (255, 255, 255))]
    assert figure.axes[-1].images[0].get_array()[0].tolist() == colours          # void is white
    (legend,) = figure.legends
    assert [text.get_text().replace("\\$", "$") for text in legend.get_texts()] == [*names, "void"]
    assert [[round(255 * c) for c in patch.get_facecolor()[:3]]
            for patch in legend.get_patches()] == colours
    last = figure.axes[1].lines[-1].get_ydata()                  # the weight of the farthest image
    assert last[0] == 0 and last[-1] == 1


def test_examples_are_spread_evenly_and_few_images_are_not_shown_twice():
    model = with_random_statistics(build_model("resnet_tiny", 3))
    labelled = [(torch.full((3, 16, 16), i / 100), torch.full((8, 8), i)) for i in range(99)]
    rows = figures.examples(labelled, {"Student": model}, predict)
    assert [int(mask[0, 0]) for mask in rows["Truth"]] == [16, 32, 49, 65, 81]
    assert rows["Input"][0].shape == (16, 16, 3) and rows["Input"][0].mean() == pytest.approx(0.16)
    assert torch.equal(rows["Student"][0], predict(model, labelled[16][0][None], (8, 8))[0])
    rows = figures.examples([(x.unsqueeze(0), None) for x, _ in labelled[:3]], {}, predict)
    assert list(rows) == ["Input"] and len(rows["Input"]) == 2
