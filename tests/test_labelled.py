"""labelled.py against the data sets' own layouts, in miniature."""

import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from pictures import coordinates, folder, mask, write
from PIL import Image

from support.labelled import CAMVID, CITYSCAPES, VOC, check_labels, class_colours, open_labelled


def labelled(root, *rows, classes=None, names=(), name="a.png"):
    """Write a picture with a mask of these rows, and a classes.txt; return the folder opened."""
    folder(root, coordinates(len(rows[0]), len(rows)), mask(*rows), name)
    if names:
        (root / "classes.txt").write_text("\n".join(names))
    return open_labelled("folder", root, "val", (len(rows), len(rows[0])), classes)


def counts(data):
    """Return {class: pixels} over all labels of a data set."""
    values, numbers = torch.cat([target.flatten() for _, target in data]).unique(return_counts=True)
    return dict(zip(values.tolist(), numbers.tolist(), strict=True))


def test_camvid_is_read_with_its_void_and_by_sequence(tmp_path):
    for name in ("0001TP_006690.png", "0006R0_f00930.jpg", "0016E5_00390.png"):
        write(tmp_path / "train" / name, coordinates(6, 2))
        write(tmp_path / "trainannot" / f"{name[:-4]}.png", mask(range(6), range(6, 12)))
    data = open_labelled("camvid", tmp_path, "train", (4, 12))
    assert len(data) == 3 and data.class_names[3] == "road" and data.class_names[10] == "bicyclist"
    for image, target in data:
        assert image.shape == (3, 4, 12) and image.dtype == torch.uint8
        assert target.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 255]]
    for split in ("train:0001TP,0016E5", "train:,0001TP,0016E5,"):
        part = open_labelled("camvid", tmp_path, split, (4, 12))
        assert [path.name[:6] for path in part.images] == ["0001TP", "0016E5"]
    with pytest.raises(ValueError, match="no image in split 'train:0005VD'"):
        open_labelled("camvid", tmp_path, "train:0005VD", (4, 12))


def test_a_folder_is_read_with_and_without_a_split_and_paired_below_subfolders(tmp_path):
    for root in (tmp_path, tmp_path / "val"):
        for k, name in enumerate(("street/1.jpg", "yard/1.jpg")):
            write(root / "images" / name, coordinates(2, 2))
            write(root / "labels" / name.replace("jpg", "png"), mask([k, k], [k, 255]))
    for split, where in (("val", tmp_path / "val"), ("train", tmp_path)):
        data = open_labelled("folder", tmp_path, split, (2, 2), 2)
        assert data.images[0] == where / "images" / "street" / "1.jpg"
        assert [target.tolist() for _, target in data] == [[[0, 0], [0, 255]], [[1, 1], [1, 255]]]


def test_pascal_voc_is_read_by_split_from_palette_masks_at_each_images_own_size(voc_tree):
    data = open_labelled("voc", voc_tree, "trainval", (24, 24))
    sizes = [(64, 90), (64, 90), (48, 80), (120, 96)]
    assert [tuple(target.shape) for _, target in data] == sizes
    assert counts(data) == {0: sum(h * w - 640 for h, w in sizes), 15: 4 * 512, 255: 4 * 128}
    assert data.class_names[0] == "background" and data.class_names[15] == "person"
    assert data[2][0].shape == (3, 24, 40) and data[3][0].shape == (3, 30, 24)   # covers 24 x 24


def test_trainaug_takes_the_added_masks_however_its_list_is_written(voc_tree):
    (voc_tree / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt").write_text(
        "2007_000032\n/JPEGImages/2008_000002.jpg /SegmentationClassAug/2008_000002.png\n")
    data = open_labelled("voc", voc_tree, "trainaug", (24, 24))
    assert [path.name for path in data.images] == ["2007_000032.jpg", "2008_000002.jpg"]
    assert {path.parent.name for path in data.labels} == {"SegmentationClassAug"}
    assert counts(data) == {0: 2 * (64 * 90 - 640), 15: 1024, 255: 256}


def test_download_fetches_pascal_voc_only_if_it_is_not_there(voc_tree, tmp_path, monkeypatch):
    fetch = Mock(side_effect=lambda root, download: shutil.copytree(voc_tree, root))
    monkeypatch.setattr("support.labelled.VOCSegmentation", fetch)
    for _ in range(2):
        assert len(open_labelled("voc", tmp_path / "new", "val", (24, 24), download=True)) == 2
    fetch.assert_called_once_with(tmp_path / "new", download=True)


def test_cityscapes_is_read_in_file_order_by_the_official_table_that_no_train_id_passes(
        cityscapes_tree):
    data = open_labelled("cityscapes", cityscapes_tree, "val", (32, 64))
    assert [path.name for path in data.labels] == ["frankfurt_000000_000294_gtFine_labelIds.png",
                                                   "munster_000000_000019_gtFine_labelIds.png"]
    assert counts(data) == {0: 2 * 1280, 13: 2 * 256, 255: 2 * 512}
    assert data.class_names[::9] == ["road", "terrain", "bicycle"]
    # The official table: the id of each of the nineteen classes.
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    expected = [ids.index(i) if i in ids else 255 for i in range(34)]
    assert data.classes(Image.fromarray(mask(range(34))), 0).flatten().tolist() == expected
    write(data.labels[0], np.array(expected, dtype=np.uint8)[np.asarray(data.mask(0))])
    with pytest.raises(ValueError, match=r"Ids.png holds .*\[255\].*docs/data.md for classes.txt"):
        data[0]


@pytest.mark.parametrize("dataset", ["scenes", "camvid", "voc", "cityscapes", "folder"])
def test_data_that_is_not_there_is_a_file_not_found_error(tmp_path, dataset):
    for root in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(root)):
            open_labelled(dataset, root, "val", (4, 4), 3 if dataset == "folder" else None)


@pytest.mark.parametrize(("extra", "found"), [("labels/a.bmp", 2), ("images/b.png", 0)])
def test_an_image_without_a_label_or_with_two_is_named(tmp_path, extra, found):
    write(tmp_path / extra, mask([0, 1]))
    with pytest.raises(ValueError, match=rf"{extra[7]}\.png has {found} labels of its name.*not 1"):
        labelled(tmp_path, [0, 1], classes=2)


def test_a_classes_txt_names_the_values_with_void_wherever_it_is(tmp_path):
    # NYUv2's 13 classes as they are commonly distributed: 0 is void, classes count from 1.
    nyu, row = [f"thing {k}" for k in range(1, 14)], range(14)
    data = labelled(tmp_path, row, names=["void", *nyu, ""])
    assert data.class_names == nyu and data[0][1].tolist() == [[255, *range(13)]]
    merged = labelled(tmp_path, row, names=["wall", "", "floor", "void", "wall"])
    assert merged.class_names == ["wall", "floor"]
    assert merged.table[:6].tolist() == [0, 255, 1, 255, 0, -1] and merged.table[255] == 255


def test_a_classes_txt_from_windows_is_read_and_one_that_is_no_utf_8_is_named(tmp_path):
    (tmp_path / "classes.txt").write_text("\ufeffVoid\r\nroad\r\nsky\r\n", encoding="utf-8")
    data = labelled(tmp_path, [0, 1, 2])
    assert data.class_names == ["road", "sky"] and data[0][1].tolist() == [[255, 0, 1]]
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "classes.txt").write_text("rue\nforêt\n", encoding=encoding)
        with pytest.raises(ValueError, match=r"classes\.txt is no UTF-8 text; save it again"):
            labelled(tmp_path, [0, 1])


def test_masks_of_8_bits_have_room_for_2_to_255_classes(tmp_path):
    for count in (300, 1, 0):
        with pytest.raises(ValueError, match=rf"folder has {count} classes.*classes\.txt"):
            labelled(tmp_path, [0, 254], classes=count)
    names = [f"thing {k}" for k in range(255)]
    for more in ([], ["void", "void"]):
        assert labelled(tmp_path, [0, 254], names=names + more)[0][1].tolist() == [[0, 254]]
    for wrong in (["void", *names], [*names, "more", "and more"]):
        with pytest.raises(ValueError, match=r"folder has 25. classes, expected 2 to 255 .* below"):
            labelled(tmp_path, [0, 254], names=wrong)


def test_a_network_with_other_or_fewer_classes_is_noticed_but_may_have_more(tmp_path, capsys):
    data = labelled(tmp_path, [0, 1], names=["road", "sky"])
    for names in (None, ["Road", "_sky_", "background"], ["class 0", "class 1"], ["sky", "road"]):
        assert capsys.readouterr().out == ""
        check_labels(data, names)
    assert "classes are road, sky, the network's sky, road" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the labels have 2 classes, but the network has 1"):
        check_labels(data, ["road"])


@pytest.mark.parametrize(("labels", "how", "message"), [
    (coordinates(2, 1), {}, r"a.png is PNG \(RGB\); expected an 8-bit index PNG"),
    (mask([0, 1]), {"format": "JPEG"}, r"is JPEG \(L\); expected an 8-bit index PNG"),
    (mask([0, 1, 2]), {}, r"a.png has size \(3, 1\), its image \(2, 1\)"),
    (None, {}, r"a\.png: Unidentified")])
def test_a_label_that_cannot_be_trusted_is_named_with_its_file(tmp_path, labels, how, message):
    data = labelled(tmp_path, [0, 1], classes=3)
    data.labels[0].write_bytes(b"damaged")
    if labels is not None:
        write(data.labels[0], labels, **how)
    with pytest.raises(ValueError, match=message):
        data[0]


def test_a_mask_whose_classes_an_image_editor_renumbered_is_refused(voc_tree, tmp_path):
    picture = Image.fromarray(mask([0, 1, 2]))
    picture.putpalette([0, 0, 0, 250, 0, 0, 0, 250, 0])
    folder(tmp_path, coordinates(3, 1), picture)
    folder(tmp_path, coordinates(3, 1), picture, "b.png")
    for dataset, root, values, colours in (
            ("voc", voc_tree, [0, 15, 255], r"\(192, 128, 128\), not \(128, 0, 0\)"),    # known
            ("folder", tmp_path, [0, 2, 1], r"\(0, 250, 0\), not \(250, 0, 0\)")):  # must agree
        data = open_labelled(dataset, root, "val", (24, 24), 3)
        check_labels(data)
        with Image.open(data.labels[-1]) as picture:                        # the same colours
            picture.remap_palette(values).save(data.labels[-1])
        with pytest.raises(ValueError, match=f"gives the value 1 the colour {colours}; has an ed"):
            check_labels(data)


def test_classes_that_no_label_has_are_warned_of_and_0_and_255_for_two_classes_refused(
        tmp_path, capsys):
    for values, classes, message in (([0, 1, 0, 255], 2, ""), ([0, 2, 0, 255], 4, (
            "warning: no label read has class 1, class 3; classes found: 0, 2, 255 (255: void)\n"
            ))):
        check_labels(labelled(tmp_path, values, classes=classes))
        assert capsys.readouterr().out == message
    with pytest.raises(ValueError, match=r"no label read has crack; .*: 0, 255 .*; are two"):
        check_labels(labelled(tmp_path, [0, 255, 0], names=["background", "crack"]))


def test_some_labels_of_a_large_data_set_are_checked_all_of_a_small_one(tmp_path):
    labelled(tmp_path, [0, 1], classes=3)
    data = labelled(tmp_path, [2, 7], classes=3, name="b.png")
    check_labels(data, most=1)
    with pytest.raises(ValueError, match=r"b\.png holds the label values \[7\].* 3 classes"):
        check_labels(data)


def test_classes_have_their_data_sets_colours_else_those_of_pascal_voc():
    known = {0: (0, 0, 0), 4: (0, 0, 128), 15: (192, 128, 128), 20: (0, 64, 128)}
    colours = class_colours(VOC)
    assert len(colours) == 21 and {k: colours[k] for k in known} == known
    assert class_colours([])[:21] == colours and len(set(class_colours([]))) == 256
    assert len(set(class_colours(CAMVID))) == 11 and (255, 255, 255) not in class_colours(CAMVID)
    assert class_colours(CITYSCAPES)[::9] == ((128, 64, 128), (152, 251, 152), (119, 11, 32))
