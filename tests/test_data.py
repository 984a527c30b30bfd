"""Image data sets: what a folder, a saved data set or an odd file becomes, and what is refused."""

import hashlib
import io
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from dit import InputError
from evaluate import BrokenImage, ImageData, center_crop_arr, decode_image, load_data, load_folder

RNG = np.random.default_rng(0)
RED, BLUE = (200, 30, 40), (20, 60, 210)


def halves(width=12, height=8, left=RED, right=BLUE):
    """An RGB picture, its left half red, its right half blue."""
    array = np.zeros((height, width, 3), np.uint8)
    array[:, : width // 2], array[:, width // 2 :] = left, right
    return Image.fromarray(array)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def decoded(path):
    return np.asarray(decode_image(dict(path=str(path), bytes=None), path.name)).astype(int)


# ------------------------------------------------------------------------------------------------ decoding


def test_cmyk_keeps_its_colours(tmp_path):
    save(halves().convert("CMYK"), tmp_path / "a.jpg", quality=95, subsampling=0)
    array = decoded(tmp_path / "a.jpg")
    assert abs(array[2, 1] - RED).max() < 12 and abs(array[2, 10] - BLUE).max() < 12


def test_palettes_give_colours_also_with_transparency(tmp_path):
    image = halves().quantize(4)
    save(image, tmp_path / "plain.png")
    save(image, tmp_path / "clear.png", transparency=image.getpixel((11, 0)))
    save(image, tmp_path / "bytes.png", transparency=bytes([255, 128, 0, 255]))
    for path in tmp_path.iterdir():
        np.testing.assert_allclose(decoded(path)[[0, 0], [0, 11]], [RED, BLUE], atol=2)


def test_transparency_is_dropped_as_other_evaluators_do(tmp_path):
    image = halves().convert("RGBA")
    image.putalpha(77)
    save(image, tmp_path / "a.png")
    np.testing.assert_array_equal(decoded(tmp_path / "a.png")[0, [0, -1]], [RED, BLUE])


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, name):
    values = np.array([[0, 128, 257, 32896, 65535]], dtype=np.uint16)
    save(Image.fromarray(values), tmp_path / name)
    assert decoded(tmp_path / name)[0, :, 1].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_gray_becomes_three_equal_channels(tmp_path, mode):
    save(Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode), tmp_path / "a.png")
    assert decoded(tmp_path / "a.png").tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize(("orientation", "corner"), [(1, RED), (3, BLUE), (6, RED), (8, BLUE), (2, BLUE)])
def test_exif_rotation_is_applied(tmp_path, orientation, corner):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(halves(), tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    array = decoded(tmp_path / "a.jpg")
    assert array.shape[:2] == ((12, 8) if orientation in (6, 8) else (8, 12))
    assert abs(array[0, 0] - corner).max() < 12


@pytest.mark.parametrize("kind", ["cut", "text", "bomb", "float"])
def test_broken_images_are_named(tmp_path, monkeypatch, kind):
    path = tmp_path / "n01" / "bad.png"
    save(Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)), path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:900])
    if kind == "text":
        path.write_text("no picture")
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    if kind == "float":
        path = path.with_suffix(".tif")
        save(Image.fromarray(np.ones((4, 4), np.float32)), path)
    with pytest.raises(BrokenImage, match=path.name.replace(".", r"\.")) as raised:
        data = load_folder(tmp_path / "n01")
        data[len(data) - 1], data[0]
    assert "\n" not in str(raised.value)


def test_a_broken_image_comes_out_of_a_worker_in_one_line(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "bad.png").write_text("no picture")
    with pytest.raises(BrokenImage) as raised:
        next(iter(torch.utils.data.DataLoader(load_folder(tmp_path), num_workers=1)))
    assert str(raised.value).startswith("cannot read image") and "bad.png" in str(raised.value)
    assert "\n" not in str(raised.value)


def golden_image(name, width, height, seed=130):
    """The picture of the golden crops: two ramps and six bits of hash, by integers alone."""
    x, y, c = np.arange(width)[None, :, None], np.arange(height)[:, None, None], np.arange(3)[None, None, :]
    h = ((x * 73856093) ^ (y * 19349663) ^ (c * 83492791) ^ zlib.crc32(f"{seed}:{name}".encode())) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 2654435761 & 0xFFFFFFFF) >> 26
    return Image.fromarray(((x * 255 // width * (c + 1) + y * 255 // height * 2 + h) % 256).astype(np.uint8))


@pytest.mark.parametrize(("name", "width", "height", "digest"), [  # of the official code's crops to 64 px
    ("landscape", 400, 275, "1a8ae2785da0b3a0"),
    ("portrait", 101, 173, "c32a7ea8b31714e5"),
    ("small", 37, 50, "a827c8749365c4a4"),
])
def test_crop_equals_the_official_one(name, width, height, digest):
    crop = np.ascontiguousarray(center_crop_arr(golden_image(name, width, height), 64))
    assert hashlib.sha256(crop.tobytes()).hexdigest().startswith(digest)


# ------------------------------------------------------------------------------------------------ folders


def test_class_folders(tmp_path):
    for name, value in (("cat/10.png", 1), ("cat/2.png", 2), ("ant/deep/x.JPEG", 3), ("cat/.hidden.png", 4)):
        save(Image.new("RGB", (20, 30), (value, 0, 0)), tmp_path / name, format="PNG")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    data = load_data(str(tmp_path), 16)
    assert (data.class_names, data.num_classes, len(data), data.channels) == (["ant", "cat"], 2, 3, 3)
    assert [(int(data[i][0][0, 0, 0]), data[i][1]) for i in range(3)] == [(3, 0), (1, 1), (2, 1)]
    assert data[0][0].shape == (3, 16, 16) and data[0][0].dtype == torch.uint8 and data.name == tmp_path.name


@pytest.mark.parametrize("names", [["a.png", "b.png"], ["a.png", "deep/b.png"]])
def test_a_folder_of_images_is_unconditional(tmp_path, names):
    for name in names:
        save(halves(), tmp_path / name)
    data = load_data(str(tmp_path), 8)
    assert (data.class_names, data.num_classes, data.labels.tolist()) == (None, 1, [0, 0])


def test_a_folder_of_splits_gives_the_one_asked_for(tmp_path):
    for split, names in dict(train="ab", val="abc").items():
        for name in names:
            save(halves(), tmp_path / split / name / "0.png")
    assert load_data(str(tmp_path), 8).class_names == ["a", "b"]
    assert load_data(str(tmp_path), 8, split="val").class_names == ["a", "b", "c"]
    save(halves(), tmp_path / "bus" / "0.png")  # then train is a class, as in "trains and buses"
    assert load_data(str(tmp_path), 8).class_names == ["bus", "train", "val"]


def test_mirror_and_size(tmp_path):
    save(halves(8, 8), tmp_path / "a" / "0.png")
    data = load_data(str(tmp_path), 8)
    assert data[0][0][:, 0, 0].tolist() == list(RED) and data[0, True][0][:, 0, 0].tolist() == list(BLUE)
    assert torch.equal(data[0, True][0], data[0, False][0].flip(2))
    assert load_folder(tmp_path, None)[0][0].shape == (3, 8, 8)


def test_digits():
    data = load_data("digits")
    assert (len(data), data.num_classes, data.channels, data.image_size) == (1797, 10, 1, 8)
    image, label = data[3]
    assert image.shape == (3, 8, 8) and image.max() <= 255 and label == 3 and torch.equal(image[0], image[2])


# ------------------------------------------------------------------------------------------------ saved data sets


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def table(labels, feature=None, **others):
    columns = dict(image=[dict(bytes=png(Image.new("RGB", (9, 9), (i, 0, 0))), path=None) for i in range(len(labels))])
    data = datasets.Dataset.from_dict(columns | dict(label=labels) | others).cast_column("image", datasets.Image())
    return data.cast_column("label", feature) if feature else data


@pytest.mark.parametrize("kind", ["disk", "disk_splits", "parquet", "arrow_splits"])
def test_saved_data_sets(tmp_path, kind):
    data = table([1, 0, 1], datasets.ClassLabel(names=["no", "yes"]))
    other = table([0], datasets.ClassLabel(names=["no", "yes"]))
    if kind == "disk":
        data.save_to_disk(tmp_path / "x")
    elif kind == "disk_splits":
        datasets.DatasetDict(train=data, test=other).save_to_disk(tmp_path / "x")
    else:
        data.to_parquet(tmp_path / "x" / "data" / "train-00000-of-00001.parquet")
        other.to_parquet(tmp_path / "x" / "data" / "test-00000-of-00001.parquet")
    loaded = load_data(str(tmp_path / "x"), 8)
    assert (loaded.class_names, loaded.labels.tolist(), loaded.name) == (["no", "yes"], [1, 0, 1], "x")
    assert [int(loaded[i][0][0, 0, 0]) for i in range(3)] == [0, 1, 2]
    if kind != "disk":
        assert len(load_data(str(tmp_path / "x"), 8, split="test")) == 1
        with pytest.raises(InputError, match="nosuch"):
            load_data(str(tmp_path / "x"), 8, split="nosuch")


def test_labels_of_other_kinds(tmp_path):
    for name, labels, expected, names in (("ints", [2, 0, 2], [2, 0, 2], ["0", "1", "2"]),
                                          ("texts", ["b", "a", "b"], [1, 0, 1], ["a", "b"])):
        table(labels).save_to_disk(tmp_path / name)
        data = load_data(str(tmp_path / name), 8)
        assert (data.labels.tolist(), data.class_names) == (expected, names)
    table([0, 1]).remove_columns("label").save_to_disk(tmp_path / "none")
    assert load_data(str(tmp_path / "none"), 8).class_names is None


def test_columns_are_chosen_or_asked_for(tmp_path):
    data = table([0, 1], coarse=[5, 5], fine=["x", "y"]).rename_columns(dict(image="picture", label="kind"))
    data.save_to_disk(tmp_path / "x")
    assert load_data(str(tmp_path / "x"), 8, label_column="fine").class_names == ["x", "y"]
    assert load_data(str(tmp_path / "x"), 8, image_column="picture").class_names is None
    for asked in (dict(image_column="photo"), dict(label_column="labels")):
        with pytest.raises(InputError, match="picture, kind, coarse, fine"):
            load_data(str(tmp_path / "x"), 8, **asked)


@pytest.mark.parametrize("labels", [[0, -1], [0.5, 1.0], [None, 1]])
def test_labels_that_are_none_are_refused(tmp_path, labels):
    table(labels).save_to_disk(tmp_path / "x")
    with pytest.raises(InputError, match="label"):
        load_data(str(tmp_path / "x"), 8)


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(InputError, match="label 2.*0 to 1"):
        ImageData("x", [None] * 3, [0, 2, 1], ["a", "b"], 8)


def test_nothing_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no images"):
        load_data(str(tmp_path), 8)
    for name in ("nowhere", "somebody/something"):  # offline
        with pytest.raises(InputError, match=name) as raised:
            load_data(name, 8)
        assert "\n" not in str(raised.value)


def test_images_are_decoded_when_asked_for_and_not_before(tmp_path):
    for i in range(3):
        save(halves(), tmp_path / "a" / f"{i}.png")
    data = load_data(str(tmp_path), 8)
    (tmp_path / "a" / "1.png").write_text("broken meanwhile")
    assert data[0][1] == data[2][1] == 0
    with pytest.raises(BrokenImage, match="1.png"):
        data[1]
