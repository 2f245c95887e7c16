"""data.py against hand-computed geometry; what is found in a wild pool; what batches promise."""

import os
import warnings

import numpy as np
import pytest
import torch
from pictures import coordinates, write
from PIL import Image

from support.data import (
    Batches,
    Pool,
    Views,
    find_images,
    hold_out,
    leave_out,
    load_image,
    loaded,
    to_tensor,
    view,
    whole_view,
)
from support.records import write_csv

# ---------------------------------------------------------------- files and single images

def test_images_are_found_below_the_folder_sorted_and_whatever_the_case_of_their_suffix(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/c.JPeG", "sub/.d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(str(tmp_path)) == [tmp_path / "a.jpg", tmp_path / "b.PNG",
                                          tmp_path / "sub" / "c.JPeG"]


def test_a_missing_or_an_empty_folder_is_named(tmp_path):
    for missing in (tmp_path / "nowhere", None, ""):
        with pytest.raises(FileNotFoundError, match=f"no folder {missing}"):
            find_images(missing)
    with pytest.raises(FileNotFoundError, match=f"no image below {tmp_path}.*jpg"):
        find_images(tmp_path)


PALETTE = Image.fromarray(np.ones((8, 8), dtype=np.uint8))
PALETTE.putpalette([9, 9, 9, 1, 2, 3])


@pytest.mark.parametrize(("picture", "suffix", "expected"), [
    (Image.new("L", (8, 8), 100), "png", (100, 100, 100)),
    (Image.new("1", (8, 8), 1), "png", (255, 255, 255)),
    (Image.new("RGBA", (8, 8), (10, 20, 30, 0)), "png", (10, 20, 30)),
    (Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "jpg", (0, 255, 255)),
    (PALETTE, "png", (1, 2, 3))])
def test_every_kind_of_picture_becomes_rgb(tmp_path, picture, suffix, expected):
    loaded = load_image(write(tmp_path / f"a.{suffix}", picture))
    assert (loaded.mode, loaded.size) == ("RGB", (8, 8))
    assert np.abs(np.asarray(loaded, dtype=int) - expected).max() <= 2          # JPEG rounds


def test_a_picture_that_its_camera_held_sideways_is_turned_upright(tmp_path):
    stored = Image.new("RGB", (64, 32), "blue")
    stored.paste("red", (0, 0, 32, 32))                          # the stored left is the true top
    exif = Image.Exif()
    exif[0x0112] = 6
    loaded = load_image(write(tmp_path / "a.jpg", stored, exif=exif))
    top, bottom = loaded.getpixel((16, 8)), loaded.getpixel((16, 56))
    assert loaded.size == (32, 64) and top[0] > 200 > top[2] and bottom[2] > 200 > bottom[0]


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    path = write(tmp_path / "a.jpg", coordinates(250, 200).resize((1000, 800)), quality=95)
    small, whole = load_image(path, (90, 150)), load_image(path)
    # At least twice the longer side both ways, because the file may have to be turned.
    assert small.size == (500, 400) and whole.size == (1000, 800)
    difference = to_tensor(view(small, (90, 150))).int() - to_tensor(view(whole, (90, 150))).int()
    assert difference.abs().max() <= 4


def test_a_file_that_cannot_be_read_is_a_value_error_that_names_it(tmp_path):
    whole = write(tmp_path / "whole.png", coordinates(50, 50)).read_bytes()
    for name, content in (("cut.png", whole[:len(whole) // 2]), ("text.png", b"hello"),
                          ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_image(tmp_path / name)
    with pytest.raises(ValueError, match="missing.png"):
        load_image(tmp_path / "missing.png")


@pytest.mark.parametrize(("picture", "how", "box"), [
    ((200, 100), {}, (25, 0, 175, 100)),
    ((200, 100), {"u": 0, "v": 0}, (0, 0, 150, 100)),
    ((200, 100), {"u": 1, "v": 0.3}, (50, 0, 200, 100)),
    ((200, 100), {"scale": 2}, (62.5, 25, 137.5, 75)),
    ((200, 100), {"scale": 2, "u": 0, "v": 1}, (0, 50, 75, 100)),
    ((100, 200), {}, (0, 200 / 3, 100, 400 / 3)),
    ((20, 10), {"u": 1}, (5, 0, 20, 10))])
def test_a_view_is_the_crop_computed_by_hand(picture, how, box):
    H, W = 20, 30
    seen = np.asarray(view(coordinates(*picture), (H, W), **how)).astype(float)
    left, top, right, bottom = box
    # The filter keeps a ramp where it does not reach over the edge of the picture.
    x = left + (np.arange(W) + 0.5) * (right - left) / W - 0.5
    y = top + (np.arange(H) + 0.5) * (bottom - top) / H - 0.5
    assert seen.shape == (H, W, 3)
    assert np.abs(seen[1:-1, 1:-1, 0] - x[1:-1]).max() <= 0.51
    assert np.abs(seen[1:-1, 1:-1, 1] - y[1:-1, None]).max() <= 0.51


def test_a_view_fits_into_the_picture_however_the_division_rounds():
    for width in range(1, 1001):                                 # 480 (500 / 480) > 500
        assert view(Image.new("L", (width, 1000)), (3, 480)).size == (480, 3)
        assert view(Image.new("L", (1000, width)), (480, 3)).size == (3, 480)


@pytest.mark.parametrize(("picture", "expected"), [((200, 100), (40, 20)), ((100, 200), (30, 60)),
                                                   ((15, 10), (30, 20))])
def test_a_whole_view_covers_the_size_and_keeps_the_shape(picture, expected):
    assert whole_view(Image.new("RGB", picture), (20, 30)).size == expected


def why(pool, index):
    """Return why a file of a pool cannot be read, or '' if it can."""
    number, image, readable = pool[index]
    assert number == index and image.dtype == torch.uint8 and image.shape == (3, *pool.size)
    if readable:
        assert torch.equal(image, pool.view(index))
        return ""
    assert not image.any()
    with pytest.raises(ValueError) as caught:
        pool.view(index)
    return str(caught.value)


def test_the_pool_gives_centre_views_and_says_what_cannot_be_read(tmp_path):
    (tmp_path / "bad.png").write_text("not an image")
    files = [write(tmp_path / "good.png", coordinates(60, 40)), tmp_path / "bad.png"]
    pool = Pool(files, (20, 30))
    assert len(pool) == 2 and why(pool, 0) == "" and "bad.png: Unidentified" in why(pool, 1)
    assert torch.equal(pool.view(0), to_tensor(view(coordinates(60, 40), (20, 30))))


def test_pictures_are_prepared_where_they_are_read(tmp_path):
    path = write(tmp_path / "a.png", coordinates(60, 40))
    turned = Pool([path], (20, 30), lambda image: image.transpose(Image.ROTATE_180)).view(0)
    torch.testing.assert_close(turned.int(), Pool([path], (20, 30)).view(0).flip(1, 2).int(),
                               atol=1, rtol=0)
    red = Views([path], (20, 30), 0, jitter=0,
                prepare=lambda image: Image.new("RGB", image.size, "red"))[0, 0]
    assert (red[0] == 255).all() and not red[1:].any()


# ---------------------------------------------------------------- what is found in a wild pool

def test_odd_pictures_are_read_without_a_warning_and_always_the_same(tmp_path):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    clear = Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(30, 40) % 4)
    clear.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    tall = Image.fromarray(np.arange(5000 * 3, dtype=np.uint8).reshape(5000, 1, 3))
    odd = [write(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:]),
           write(tmp_path / "a.webp", frames[0], save_all=True, append_images=frames[1:]),
           write(tmp_path / "clear.png", clear, transparency=bytes([0, 128, 255, 7])),
           write(tmp_path / "clear.gif", clear, transparency=2),
           write(tmp_path / "dot.png", Image.new("RGB", (1, 1), "red")),
           write(tmp_path / "tall.png", tall),
           write(tmp_path / "wide.png", tall.transpose(Image.ROTATE_90)),
           write(tmp_path / os.fsdecode(b"caf\xe9 \n.jpg"), frames[0])]
    with warnings.catch_warnings(action="error"):
        pool = Pool(odd, (20, 30))
        assert [why(pool, i) for i in range(len(odd))] == [""] * len(odd)
        batches = Batches(Views(odd, (20, 30), 0), len(odd))
        assert batches[0][0].shape == (len(odd), 3, 20, 30) and find_images(tmp_path) == sorted(odd)
    write_csv(tmp_path / "list.csv", ("file",), [[path] for path in odd])
    assert find_images(tmp_path / "list.csv") == odd                        # names of any bytes
    for path, red in zip(odd, (1, 1, 0, 0, 1, 0, 0, 1), strict=True):
        assert np.array_equal(load_image(path), load_image(path))
        assert not red or load_image(path).getpixel((0, 0))[0] > 250         # the first frame
    assert pool.view(2).unique(dim=1).numel() > 3                # transparent, yet with its colours


def test_a_decompression_bomb_is_skipped_and_a_large_picture_is_read_small(tmp_path, monkeypatch):
    jpeg = write(tmp_path / "large.jpg", Image.new("RGB", (4000, 3000), "red"))
    png = write(tmp_path / "bomb.png", Image.new("1", (4000, 3000)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000 * 3000 - 1)       # beyond it, a warning
    with warnings.catch_warnings(action="error"):
        assert load_image(jpeg, (90, 150)).size == (500, 375)
        assert load_image(png).size == (4000, 3000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000 * 3000 // 2 - 1)  # beyond twice, an error
    assert "bomb.png: DecompressionBombError" in why(Pool([png], (20, 30)), 0)


def test_links_in_a_circle_and_to_nowhere_are_named_not_followed(tmp_path):
    good = write(tmp_path / "pool" / "good.png", coordinates(60, 40))
    (tmp_path / "pool" / "round").symlink_to(tmp_path / "pool")
    (tmp_path / "pool" / "self.png").symlink_to(tmp_path / "pool" / "self.png")
    (tmp_path / "pool" / "nowhere.png").symlink_to(tmp_path / "nowhere")
    files = find_images(tmp_path / "pool")
    assert [path.name for path in files] == ["good.png", "nowhere.png", "self.png"]
    errors = [why(Pool(files, (20, 30)), i) for i in range(3)]
    assert errors[0] == "" and "nowhere.png: FileNotFound" in errors[1] and "self.png" in errors[2]
    assert leave_out(files, [files[2], good])[0] == files[1:]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = write(tmp_path / "a.png", coordinates(60, 40))
    path.chmod(0)
    assert "a.png: PermissionError" in why(Pool([path], (20, 30)), 0)


def mutations(folder, count, seed):
    """Yield `count` files made from good pictures: bytes changed, cut, doubled or zeroed."""
    good, rng = [], np.random.default_rng(seed)
    for suffix in ("jpg", "png", "gif", "webp", "bmp", "tif"):
        path = write(folder / f"good.{suffix}", coordinates(64, 48))
        good.append((suffix, np.frombuffer(path.read_bytes(), dtype=np.uint8)))
    for i in range(count):
        suffix, content = good[rng.integers(len(good))]
        content, at = content.copy(), np.sort(rng.integers(0, len(content), 2))
        if rng.random() < 0.3:                                   # most of a format is in its head
            at //= 16
        match rng.integers(4):
            case 0:
                where = rng.integers(0, len(content), rng.integers(1, 20))
                content[where] = rng.integers(0, 256, len(where))
            case 1:
                content = content[:at[1]]
            case 2:
                content = np.concatenate([content[:at[1]], content[at[0]:]])
            case 3:
                content[at[0]:at[1]] = 0
        path = folder / f"{i}.{suffix}"
        path.write_bytes(content.tobytes())
        yield path


def test_damaged_pictures_are_read_or_named_and_nothing_else(tmp_path):
    files = list(mutations(tmp_path, 200, seed=3))               # not all errors are OSErrors
    pool = Pool(files, (20, 30))
    errors = [why(pool, i) for i in range(200)]
    assert 20 < sum(map(bool, errors)) < 180
    assert all(not error or str(path) in error for path, error in zip(files, errors, strict=True))


def test_files_of_the_same_content_as_others_are_left_out_by_content_not_by_name(tmp_path):
    ours = [write(tmp_path / "pool" / f"{i}.bmp", coordinates(6, 4, blue=i)) for i in range(4)]
    theirs = [write(tmp_path / "val" / name, coordinates(6, 4, blue=blue))
              for name, blue in (("x.bmp", 2), ("0.bmp", 9))]
    kept, twins = leave_out(ours, theirs)                        # all of one size in bytes
    assert kept == [ours[0], ours[1], ours[3]]
    assert twins == [f"{ours[2]}: the same image as {theirs[0]}, which is evaluated on"]
    assert leave_out(ours[:1], [tmp_path / "gone.bmp"]) == (ours[:1], [])


@pytest.mark.parametrize(("count", "held"), [(20, 1), (41, 3), (4000, 200), (10_000, 200)])
def test_some_of_the_pool_is_held_out_and_never_learnt_from(count, held):
    learnt, out = hold_out(list(range(count)))
    assert len(out) == held and set(learnt).isdisjoint(out)
    assert out[0] == 0 and sorted(learnt + out) == list(range(count))


def test_a_pool_too_small_to_hold_any_out_is_refused():
    with pytest.raises(ValueError, match="the pool has 19 images; .* at least 20"):
        hold_out(list(range(19)))


# ---------------------------------------------------------------- loading

def test_what_goes_wrong_in_loading_is_one_sentence(monkeypatch):
    monkeypatch.setattr("support.data.time.sleep", lambda seconds: None)

    def failing(error):
        yield 1
        raise error

    wrapped = ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback\n"
                         "  File ...\nValueError: a\nb.jpg: cut off\n")
    for error in (wrapped, ValueError("a\nb.jpg: cut off")):
        with pytest.raises(OSError, match=r"^a\nb\.jpg: cut off; put this file right and resume$"):
            list(loaded(failing(error)))
    for error in (ConnectionResetError(104, "Connection reset by peer"), EOFError()):
        with pytest.raises(RuntimeError, match="DataLoader worker"):             # options.sentence
            list(loaded(failing(error)))
