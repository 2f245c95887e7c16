"""images.py: what is found and read in a wild pool, crops computed by hand, colours."""

import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from pictures import coordinates, write
from PIL import Image

from colours import match_colours
from models import build_model, freeze
from support.images import (as_input, colour_matcher, drop_copies, find_images, hold_out,
                            load_image, recolour, resize_to_cover, resized_crop, to_tensor)
from support.records import write_csv


def test_images_are_found_sorted_through_links_each_folder_once_and_dead_links_left_to_the_reader(
        tmp_path):
    pool, other = tmp_path / "pool", tmp_path / "other"
    for path in (pool / "sub/c.JPeG", pool / "sub/.d.png", pool / ".e/f.png", pool / "notes.txt",
                 pool / "b.PNG", pool / "sub-2/g.heic", other / "deeper/h.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name, target in (("second", other), ("first", other), ("round", pool),
                         ("self.png", pool / "self.png"), ("nowhere.png", tmp_path / "nowhere")):
        (pool / name).symlink_to(target)
    (other / "back").symlink_to(pool)
    files = find_images(str(pool))
    assert [path.relative_to(pool).as_posix() for path in files] == [
        "b.PNG", "first/deeper/h.png", "nowhere.png", "self.png", "sub/c.JPeG", "sub-2/g.heic"]
    for path in files[2:4]:
        with pytest.raises(ValueError, match=path.name):
            load_image(path)
    assert drop_copies(files[2:4], files[3:4]) == (files[2:4], [])


def test_a_table_stands_for_a_folder_in_its_own_order_and_may_come_from_windows(tmp_path):
    files = [tmp_path / os.fsdecode(b"caf\xe9 \n.jpg"), tmp_path / "a.jpg"]
    write_csv(tmp_path / "list.csv", ("file", "distance"), [[path, 1] for path in files])
    assert find_images(tmp_path / "list.csv") == files                      # names of any bytes
    (tmp_path / "list.csv").write_text(f"\ufefffile,note\r\n{files[1]},x\r\n", encoding="utf-8")
    assert find_images(tmp_path / "list.csv") == files[1:]
    for content in ("file\n", "name\na.jpg\n", ""):
        (tmp_path / "list.csv").write_text(content)
        with pytest.raises(ValueError, match="list.csv lists no images; .* 'file'"):
            find_images(tmp_path / "list.csv")


def test_a_missing_or_an_empty_folder_is_named(tmp_path):
    for missing in (tmp_path / "nowhere", None, ""):
        with pytest.raises(FileNotFoundError, match=f"no folder {missing}"):
            find_images(missing)
    with pytest.raises(FileNotFoundError, match=f"no image below {tmp_path}.*jpg"):
        find_images(tmp_path)


def test_copies_are_dropped_by_content_not_by_name(tmp_path):
    ours = [write(tmp_path / "pool" / f"{i}.bmp", coordinates(6, 4, blue=i)) for i in range(4)]
    theirs = [write(tmp_path / "val" / name, coordinates(6, 4, blue=blue))
              for name, blue in (("x.bmp", 2), ("0.bmp", 9))]
    rest, reasons = drop_copies(ours, theirs)                    # all of one size in bytes
    assert rest == [ours[0], ours[1], ours[3]]
    assert reasons == [f"{ours[2]}: evaluated on, as {theirs[0]}"]


@pytest.mark.parametrize(("count", "held"), [(9, 1), (41, 3), (4000, 200), (10_000, 200)])
def test_every_twentieth_file_at_most_200_is_held_out_and_never_learnt_from(count, held):
    learnt, out = hold_out(list(range(count)))
    assert len(out) == held and out[0] == 0 and sorted(learnt + out) == list(range(count))


def test_every_kind_of_picture_becomes_rgb_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4999)         # beyond it, Pillow warns
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    clear = Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(30, 40) % 4)
    clear.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    tall = Image.fromarray(np.full((5000, 1, 3), 7, dtype=np.uint8))
    animated = {"save_all": True, "append_images": frames[1:]}
    with warnings.catch_warnings(action="error"):
        for suffix, picture, how, expected in (
                ("png", Image.new("L", (8, 8), 100), {}, (100, 100, 100)),
                ("png", Image.new("RGBA", (8, 8), (10, 20, 30, 0)), {}, (10, 20, 30)),
                ("jpg", Image.new("CMYK", (8, 8), (255, 0, 0, 0)), {}, (0, 255, 255)),
                ("png", clear, {"transparency": bytes([0, 128, 255, 7])}, (200, 0, 0)),
                ("gif", frames[0], animated, (255, 0, 0)),       # the first frame
                ("png", tall, {}, (7, 7, 7))):
            image = load_image(write(tmp_path / f"a.{suffix}", picture, **how), (20, 30))
            assert image.mode == "RGB" and resized_crop(image, (20, 30)).size == (30, 20)
            assert np.abs(np.subtract(image.getpixel((0, 0)), expected)).max() <= 2


def test_the_camera_s_orientation_is_applied_unless_a_label_belongs_to_the_pixels(tmp_path):
    stored = Image.new("RGB", (64, 32), "blue")
    stored.paste("red", (0, 0, 32, 32))                          # the stored left is the true top
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write(tmp_path / "a.jpg", stored, exif=exif)
    image = load_image(path)
    (red, _, _), (_, _, blue) = image.getpixel((16, 8)), image.getpixel((16, 56))
    assert image.size == (32, 64) and min(red, blue) > 200
    assert load_image(path, upright=False).size == (64, 32)
    for name in ("a.png", "a.webp"):
        assert load_image(write(tmp_path / name, stored, exif=b"damaged")).size == (64, 32)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    path = write(tmp_path / "a.jpg", coordinates(250, 200).resize((1000, 800)), quality=95)
    small, whole = load_image(path, (90, 150)), load_image(path)
    # At least twice the longer side both ways, because the file may have to be turned.
    assert small.size == (500, 400) and whole.size == (1000, 800)
    a, b = (to_tensor(resized_crop(image, (90, 150))).int() for image in (small, whole))
    assert (a - b).abs().max() <= 4


def test_a_file_that_cannot_be_read_is_a_value_error_that_names_it_and_says_why(tmp_path):
    whole = write(tmp_path / "whole.png", coordinates(50, 50)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.HEIC").write_bytes(b"hello")
    for kind in (np.float32, np.int32, np.uint16):               # not clipped to white
        write(tmp_path / f"{kind.__name__}.tif", np.array([[0, 1]], dtype=kind))
    for name, reason in (("cut.png", "OSError|SyntaxError"), ("text.HEIC", "cannot identify"),
                         ("missing.png", "FileNotFoundError"), ("float32.tif", "more than 8 bits"),
                         ("int32.tif", "more than 8"), ("uint16.tif", "more than 8 .*convert it")):
        with pytest.raises(ValueError, match=f"{name}: .*({reason})"):
            load_image(tmp_path / name)


@pytest.mark.parametrize(("picture", "how", "box"), [
    ((200, 100), {}, (25, 0, 175, 100)), ((200, 100), {"u": 1, "v": 0.3}, (50, 0, 200, 100)),
    ((200, 100), {"scale": 2, "u": 0, "v": 1}, (0, 50, 75, 100)),
    ((100, 200), {}, (0, 200 / 3, 100, 400 / 3)), ((20, 10), {"u": 1}, (5, 0, 20, 10)),
    ((29, 60), {}, (0, 61 / 3, 29, 119 / 3)), ((60, 31), {}, (6.75, 0, 53.25, 31))])
def test_a_crop_is_the_one_computed_by_hand(picture, how, box):
    H, W = 30, 45                  # 45 (29 / 45) > 29 and 30 (31 / 30) > 31: a crop has to fit
    seen = np.asarray(resized_crop(coordinates(*picture), (H, W), **how)).astype(float)
    left, top, right, bottom = box
    # The filter keeps a ramp where it does not reach over the edge of the picture.
    x = left + (np.arange(W) + 0.5) * (right - left) / W - 0.5
    y = top + (np.arange(H) + 0.5) * (bottom - top) / H - 0.5
    assert seen.shape == (H, W, 3)
    assert np.abs(seen[1:-1, 1:-1, 0] - x[1:-1]).max() <= 0.51
    assert np.abs(seen[1:-1, 1:-1, 1] - y[1:-1, None]).max() <= 0.51


def test_bytes_become_float_in_0_to_1_and_floats_stay_as_they_are():
    image = to_tensor(coordinates(6, 4, blue=255))
    assert image.shape == (3, 4, 6) and image[:, 2, 5].tolist() == [5, 2, 255]
    x = as_input(image, "cpu")
    assert torch.equal(x, image / 255) and x.max() == 1 and as_input(x, "cpu") is x


@pytest.fixture
def photo():
    """Return a smooth picture with fine grain, which is gone at half its size."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(60, 180, (6, 8, 3), dtype=np.uint8))
    grain = 50 * (np.indices((64, 96)).sum(0) % 2)[..., None]
    return Image.fromarray(np.asarray(small.resize((96, 64))) + grain.astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 96), (32, 48)])
def test_a_recoloured_picture_is_that_of_match_colours_within_rounding(photo, size):
    mean = torch.tensor([0.6, 0.45, 0.4])
    cov = 0.004 * torch.tensor([[1.5, 0.8, 0.4], [0.8, 1.2, 0.5], [0.4, 0.5, 0.6]])
    recoloured = recolour(photo, size, mean, cov)
    assert recoloured.size == photo.size
    before, after = (to_tensor(resize_to_cover(image, size)) for image in (photo, recoloured))
    expected = 255 * match_colours(before.unsqueeze(0) / 255, mean, cov)[0]
    assert (after - expected).abs().max() <= 1.5                 # colours are measured at this size


def test_the_teachers_colours_are_given_to_every_picture_whatever_it_had(photo):
    torch.manual_seed(0)
    teacher = freeze(build_model("resnet_tiny", 4))
    scene = torch.rand(8, 3, 32, 48) * torch.tensor([0.5, 0.3, 0.2]).view(3, 1, 1) + 0.2
    stem = teacher.net.stem
    response = stem[0]((scene - teacher.mean) / teacher.std)     # what its first layer remembers
    stem[1].running_mean, stem[1].running_var = response.mean((0, 2, 3)), response.var((0, 2, 3))
    matcher = pickle.loads(pickle.dumps(colour_matcher(teacher, (32, 48))))      # for workers
    for image in (photo, photo.point(lambda value: value // 4)):
        colours = to_tensor(matcher(image)).float().mean((1, 2)) / 255
        assert (colours - scene.mean((0, 2, 3))).abs().max() < 0.05
