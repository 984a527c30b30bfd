"""Image data sets: what a folder, a saved data set or an odd file becomes, and what is refused."""

import hashlib
import io
import json
import os
import pickle
import resource
import signal
import tarfile
import tracemalloc
import zlib
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from helpers import end_workers
from PIL import Image, ImageOps

import evaluate
from dit import InputError
from evaluate import (
    BrokenImage,
    ImageData,
    center_crop_arr,
    decode_image,
    image_batches,
    load_data,
    load_folder,
    read_batches,
)

RNG = np.random.default_rng(0)
RED, BLUE = (200, 30, 40), (20, 60, 210)
ALONE = SimpleNamespace(process_index=0, num_processes=1)  # what image_batches needs to know


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps what it converts in a folder of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def halves(width=12, height=8, left=RED, right=BLUE):
    """An RGB picture, its left half red, its right half blue."""
    array = np.zeros((height, width, 3), np.uint8)
    array[:, : width // 2], array[:, width // 2 :] = left, right
    return Image.fromarray(array)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def decoded(path, upright=True):
    image = decode_image(dict(path=str(path), bytes=None), path.name, upright)
    return np.asarray(image).astype(int)


def tree(folder, *names):
    """Make files in a folder, pictures or by other suffixes a word of text; "b/" is a folder."""
    for name in names:
        if name.endswith("/"):
            (folder / name).mkdir(parents=True)
        elif name.lower().endswith((".png", ".gif", ".jfif", ".avif")):
            save(halves(), folder / name)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("text")
    return folder


# -------------------------------------------------------------------------------- decoding


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


@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, RED), (3, BLUE), (6, RED), (8, BLUE), (2, BLUE)])
def test_exif_rotation_is_applied(tmp_path, orientation, corner):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(halves(), tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    array = decoded(tmp_path / "a.jpg")
    assert array.shape[:2] == ((12, 8) if orientation in (6, 8) else (8, 12))
    assert abs(array[0, 0] - corner).max() < 12


EXIF_BROKEN = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\xff\xff\xff\0\x06"


@pytest.mark.parametrize("exif", [EXIF_BROKEN, b"Exif\0\0nonsense", b"Exif\0\0", b"x"])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_whole_pixels_with_a_broken_exif_are_read(tmp_path, exif, name):
    save(halves(), tmp_path / name, exif=exif)
    assert decoded(tmp_path / name).shape == (8, 12, 3)


def odd_pictures(folder):
    """Pictures of many kinds, named after them, all of which PIL opens."""
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = halves().convert("RGBA")
    clear.putalpha(77)
    palette = halves().quantize(4)
    save(halves(), folder / "turned.jpg", exif=exif)
    save(halves(), folder / "turned.png", exif=exif)
    save(halves(), folder / "turned.webp", exif=exif)
    save(halves(), folder / "turned.tif", exif=exif)
    save(halves(), folder / "broken_exif.jpg", exif=EXIF_BROKEN)
    save(halves().convert("CMYK"), folder / "cmyk.jpg")
    save(clear, folder / "clear.png")
    save(palette, folder / "palette.png", transparency=bytes([255, 128, 0, 255]))
    save(palette, folder / "one.gif", transparency=1)
    save(halves().convert("L"), folder / "gray.jpg")
    save(halves().convert("1"), folder / "bits.png")
    save(Image.fromarray(RNG.integers(0, 65536, (8, 9), dtype=np.uint16)), folder / "sixteen.png")
    return sorted(folder.iterdir())


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PIL, about the odd ones
def test_not_upright_is_what_other_evaluators_read(tmp_path):
    """clean-fid's input, and ADM's and torch-fidelity's, is PIL's convert("RGB"), bit for bit."""
    for path in odd_pictures(tmp_path):
        theirs = np.array(Image.open(path).convert("RGB"))
        np.testing.assert_array_equal(decoded(path, upright=False), theirs, err_msg=path.name)
    data = load_data(str(tmp_path), upright=False)
    shapes = {tuple(image.shape[1:]) for image, _ in data}
    assert shapes == {(8, 12), (12, 8), (8, 9)}  # PIL itself turns TIFF


def test_turned_pictures_are_counted(tmp_path):
    odd_pictures(tmp_path)
    for upright, workers, turned in ((True, 0, 3), (True, 2, 3), (False, 0, 0)):
        data = load_data(str(tmp_path), upright=upright)
        batches = list(image_batches(data, ALONE, 5, workers))
        assert [len(batch) for batch in batches] == [5, 5, 2] and data.turned == turned
    for path in tmp_path.glob("turned.*"):
        upright = np.array(ImageOps.exif_transpose(Image.open(path)))
        np.testing.assert_array_equal(decoded(path), upright)


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
    end_workers()


def golden_image(name, width, height, seed=130):
    """The picture of the golden crops: two ramps and six bits of hash, by integers alone."""
    x, y = np.arange(width)[None, :, None], np.arange(height)[:, None, None]
    c, seed = np.arange(3)[None, None, :], zlib.crc32(f"{seed}:{name}".encode())
    h = ((x * 73856093) ^ (y * 19349663) ^ (c * 83492791) ^ seed) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 2654435761 & 0xFFFFFFFF) >> 26
    ramps = x * 255 // width * (c + 1) + y * 255 // height * 2
    return Image.fromarray(((ramps + h) % 256).astype(np.uint8))


@pytest.mark.parametrize(("name", "width", "height", "digest"), [  # the official code's, to 64 px
    ("landscape", 400, 275, "1a8ae2785da0b3a0"),
    ("portrait", 101, 173, "c32a7ea8b31714e5"),
    ("small", 37, 50, "a827c8749365c4a4"),
])
def test_crop_equals_the_official_one(name, width, height, digest):
    crop = np.ascontiguousarray(center_crop_arr(golden_image(name, width, height), 64))
    assert hashlib.sha256(crop.tobytes()).hexdigest().startswith(digest)


# -------------------------------------------------------------------------------- folders


def test_class_folders(tmp_path):
    names = "cat/10.png", "cat/2.png", "ant/deep/x.JPEG", "cat/.hidden.png"
    for value, name in enumerate(names, 1):
        save(Image.new("RGB", (20, 30), (value, 0, 0)), tmp_path / name, format="PNG")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    data = load_data(str(tmp_path), 16)
    assert (data.class_names, data.num_classes) == (["ant", "cat"], 2)
    assert (len(data), data.channels) == (3, 3)
    assert [(int(data[i][0][0, 0, 0]), data[i][1]) for i in range(3)] == [(3, 0), (1, 1), (2, 1)]
    assert data[0][0].shape == (3, 16, 16) and data[0][0].dtype == torch.uint8
    assert data.name == tmp_path.name


def test_a_folder_of_splits_gives_the_one_asked_for(tmp_path):
    for split, names in dict(train="ab", val="abc").items():
        tree(tmp_path, *(f"{split}/{name}/0.png" for name in names))
    assert load_data(str(tmp_path), 8).class_names == ["a", "b"]
    assert load_data(str(tmp_path), 8, split="val").class_names == ["a", "b", "c"]
    save(halves(), tmp_path / "bus" / "0.png")  # then train is a class, as in "trains and buses"
    assert load_data(str(tmp_path), 8).class_names == ["bus", "train", "val"]


UNDERSTOOD = {  # the files, the split asked for, and what the line says after the name
    "classes": ("a/0.png b/0.png b/1.png", None, "2 classes: a, b; 3 images"),
    "one class": ("a/0.png", None, "1 class: a; 1 image"),
    "many": ("1/0.png 2/0.png 3/0.png 4/0.png 5/0.png 6/0.png", None,
             "6 classes: 1, 2, 3, ..., 6; 6 images"),
    "flat": ("0.png 1.png", None, "no classes; 2 images"),
    "flat with one below": ("a.png deep/b.png", None, "no classes; 2 images"),
    "flat beside text": ("0.png logs/x.txt", None, "no classes; 1 image; left out: 1 .txt"),
    "other suffixes": ("a/0.png a/x.heic a/README b/1.gif b/2.avif b/3.jfif b/4.heic", None,
                       "2 classes: a, b; 4 images; left out: 2 .heic, 1 without suffix"),
    "hidden": ("a/0.png b/0.png .cache/0.png __MACOSX/a/0.png @eaDir/0.png a/._0.png", None,
               "2 classes: a, b; 2 images"),
    "splits": ("train/a/0.png test/a/0.png", None,
               "split train of test, train; 1 class: a; 1 image"),
    "capitals": ("Training/0.png VALID/0.png", "val",
                 "split VALID of Training, VALID; no classes; 1 image"),
    "years": ("train2017/0.png val2017/0.png", None,
              "split train2017 of train2017, val2017; no classes; 1 image"),
    "synonym": ("dev/a/0.png evaluation/a/0.png", "validation",
                "split dev of dev, evaluation; 1 class: a; 1 image"),
    "the only split": ("test/0.png", None, "no classes; 1 image"),
    "things beside splits": ("train/a/0.png test/a/0.png .cache/x.png .ipynb_checkpoints/0.png "
                             "logs/x.txt", None, "split train of test, train; 1 class: a; 1 image"),
    "the one split of classes": ("a/0.png b/0.png", "train", "2 classes: a, b; 2 images"),
    "output": ("a/0.png b/0.png results/run/config.json results/run/checkpoints/x "
               "results/run/samples/0.png", None,
               "2 classes: a, b; 2 images; left out: own output in results/run"),
    "output beside images": ("0.png run/config.json run/checkpoints/x run/samples/0.png", None,
                             "no classes; 1 image; left out: own output in run"),
    "img2dataset's files": ("00000/0.png 00000/0.json 00000.parquet 00000_stats.json 00001/1.png "
                            "00001/2.png 00001.parquet 00001_stats.json", None,
                            "no classes; 3 images; left out: 3 .json, 2 .parquet"),
    "archives of what is there": ("a/0.png a/1.png b/0.png a.tar b.tar", None,
                                  "2 classes: a, b; 3 images; left out: 2 .tar"),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_what_a_folder_is_understood_as_is_one_line(tmp_path, capsys, name):
    names, split, words = UNDERSTOOD[name]
    data = load_data(str(tree(tmp_path / "birds", *names.split())), 8, split=split)
    if "no classes" in words:
        assert (data.class_names, data.num_classes, data.labels.any()) == (None, 1, False)
    assert capsys.readouterr().out == f"data birds: {words}\n"


REFUSED = {  # the files, arguments of load_data, and what the error says
    "empty": ("", {}, ["no images"]),
    "unreadable": ("x.heic y.heic", {}, ["no images", "2 .heic"]),
    "mixture": ("x.png a/0.png b/0.png", {}, ["x.png", "a, b", "move"]),
    "mixture with splits": ("x.png train/a/0.png test/a/0.png", {}, ["x.png", "test, train"]),
    "nothing in a class": ("a/0.png b/ c/0.png", {}, ["/b has no image"]),
    "empty class": ("a/0.png b/notes.txt c/0.png", {}, ["/b has no image", "1 .txt"]),
    "class of other files": ("a/0.png b/0.heic b/1.heic", {}, ["/b has no image", "2 .heic"]),
    "no such split": ("train/0.png val/0.png", dict(split="test"), ["--split test", "train, val"]),
    "a split of classes": ("a/0.png b/0.png", dict(split="test"), ["--split test", "has train"]),
    "no default split": ("val/0.png test/0.png", {}, ["--split", "test, val"]),
    "two train splits": ("train1/0.png train2/0.png", {}, ["--split", "train1, train2"]),
    "a label column": ("a/0.png", dict(label_column="kind"), ["--label-column kind", "metadata"]),
    "an image column": ("a/0.png", dict(image_column="photo"), ["--image-column photo"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_unclear_is_one_line(tmp_path, name):
    names, options, words = REFUSED[name]
    tree(tmp_path, *names.split())
    with pytest.raises(InputError) as raised:
        load_data(str(tmp_path), 8, **options)
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value)


def test_classes_have_torchvisions_numbers_and_order(tmp_path):
    from torchvision.datasets import ImageFolder

    names = "b/x.png B/9.png a-b/0.png a/deep/1.png a/z.png 10/a.png 9/a.png"
    tree(tmp_path, *names.split())
    theirs, ours = ImageFolder(tmp_path), load_data(str(tmp_path), 8)
    assert ours.class_names == theirs.classes and ours.labels.tolist() == theirs.targets
    paths = [ours.images[i]["path"] for i in range(len(ours))]
    assert paths == [path for path, _ in theirs.samples]


def test_circular_links_add_nothing_and_other_links_stand_for_their_pictures(tmp_path):
    tree(tmp_path, "a/0.png", "b/1.png", "b/2.png")
    links = {"a/back": ".", "b/itself": "b", "c": "b", "d": "a", "b/loop": "b/loop"}
    for link, to in links.items():
        (tmp_path / link).symlink_to(tmp_path / to)
    data = load_data(str(tmp_path), 8)
    assert data.class_names == ["a", "b", "c", "d"] and data.labels.tolist() == [0, 1, 1, 2, 2, 3]


def test_listing_takes_no_more_memory_than_torchvisions(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in "abcdefghij":
        (tmp_path / name).mkdir()
        for i in range(500):
            (tmp_path / name / f"{name}_{i:08d}.JPEG").touch()
    load_data(str(tmp_path), 8)  # with what is imported at the first use
    sizes = []
    for load in (ImageFolder, load_folder):
        tracemalloc.start()
        data = load(str(tmp_path))
        sizes.append(tracemalloc.get_traced_memory())
        tracemalloc.stop()
        assert len(data) == 5000
    assert all(ours < theirs for theirs, ours in zip(*sizes, strict=True)), sizes


def test_digits_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tree(tmp_path, "digits/a/0.png").parent / tmp_path.name)
    with pytest.raises(InputError, match=r"\./digits"):
        load_data("digits")
    assert load_data("./digits", 8).class_names == ["a"]


ODD_NAMES = [
    "a b", "a[1]", "a*b", "a?b", "a#b", "a%20b", "a{b}", "a::b", "a'b\"c", "a\nb", "caf\udce9",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
@pytest.mark.parametrize("kind", ["classes", "parquet", "tar", "disk", "files"])
def test_paths_of_any_characters(tmp_path, name, kind):
    folder = tmp_path / "plain"
    if kind in ("classes", "files"):
        tree(folder, "b/0.png", "c/2.png", *([f"{name}/1.png"] if kind == "files" else []))
    elif kind == "parquet":
        table([0, 1]).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    elif kind == "disk":
        table([0, 1]).save_to_disk(folder)
    else:
        write_tar(folder / "00000.tar", 2)
    tree(tmp_path, "a b/bait/5.png", "axb/bait/5.png")  # which a pattern might find
    path = tmp_path / "odd" / name
    path.parent.mkdir()
    folder.rename(path)
    data = load_data(str(path), 8)
    assert len(data) == 2 + (kind == "files") and data[1][0].shape == (3, 8, 8)
    assert data.name == os.fsencode(name).decode(errors="backslashreplace")
    if kind == "files":
        assert data.name in data.class_names and "\udce9" not in "".join(data.class_names)
    json.dumps([data.name, data.class_names], ensure_ascii=False).encode()  # for files


def test_mirror_and_size(tmp_path):
    save(halves(8, 8), tmp_path / "a" / "0.png")
    data = load_data(str(tmp_path), 8)
    assert data[0][0][:, 0, 0].tolist() == list(RED)
    assert data[0, True][0][:, 0, 0].tolist() == list(BLUE)
    assert torch.equal(data[0, True][0], data[0, False][0].flip(2))
    assert load_folder(tmp_path, None)[0][0].shape == load_data(tmp_path)[0][0].shape == (3, 8, 8)


def test_digits():
    data = load_data("digits")
    assert (len(data), data.num_classes, data.channels, data.image_size) == (1797, 10, 1, 8)
    image, label = data[3]
    assert image.shape == (3, 8, 8) and image.max() <= 255 and label == 3
    assert torch.equal(image[0], image[2]) and data.all_gray()
    for options in (dict(split="test"), dict(label_column="x"), dict(image_column="x")):
        with pytest.raises(InputError):
            load_data("digits", **options)


@pytest.mark.parametrize(("kinds", "gray"), [
    ("L L", True), ("1 LA I;16", True), ("L P", False), ("RGB L", False), ("L broken", True),
    ("broken", False)])
@pytest.mark.parametrize("saved", [False, True])
def test_gray_is_told_by_the_headers(tmp_path, monkeypatch, kinds, gray, saved):
    for i, kind in enumerate(kinds.split()):
        path = tmp_path / "x" / f"{i}.png"
        if kind == "broken":
            path.parent.mkdir(exist_ok=True)
            path.write_text("no picture")
        elif kind == "I;16":
            save(Image.fromarray(np.zeros((8, 8), np.uint16)), path)
        else:
            save(halves().convert(kind), path)
    path = tmp_path / "x"
    if saved:
        content = [dict(bytes=path.read_bytes(), path=None) for path in sorted(path.iterdir())]
        rows = datasets.Dataset.from_dict(dict(image=content))
        rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "table")
        path = tmp_path / "table"
    data = load_data(str(path), 8)
    monkeypatch.setattr(Image.Image, "load", None)  # no pixel is decoded
    assert data.all_gray() == gray


# -------------------------------------------------------------------------------- metadata


METADATA = {  # file and content; names and labels that come of it; what the line says
    "csv": ("metadata.csv", "file_name,label\n1.png,cat\ndeep/2.png,ant\n",
            [1, 2], [1, 0], "ant, cat"),
    "jsonl": ("metadata.jsonl",
              '{"file_name": "2.png", "label": 1}\n{"file_name": "0.png", "label": 0}',
              [2, 0], [1, 0], "0, 1"),
    "no label": ("metadata.csv", "file_name,text\n0.png,a cat\n", [0], [0], "columns text"),
    "windows": ("metadata.csv", "file_name,label\n.\\deep\\2.png,x\n", [2], [0], "1 class: x"),
}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("below", ["", "train/"])
def test_metadata_beside_images_gives_the_labels(tmp_path, capsys, name, below):
    file, content, values, labels, words = METADATA[name]
    for i, place in enumerate(["0.png", "1.png", "deep/2.png" if "deep" in content else "2.png"]):
        save(Image.new("RGB", (9, 9), (i, 0, 0)), tmp_path / below / place)
    (tmp_path / below / file).write_text(content)
    data = load_data(str(tmp_path), 8)
    assert [int(image[0, 0, 0]) for image, _ in data] == values and data.labels.tolist() == labels
    said = capsys.readouterr().out
    assert words in said and file in said
    assert f"{3 - len(values)} images that it does not name" in said


def test_metadata_with_columns_and_splits(tmp_path):
    tree(tmp_path, "train/a.png", "train/b.png", "test/c.png")
    rows = datasets.Dataset.from_dict(dict(
        file_name=["train/a.png", "train/b.png", "test/c.png"], kind=["x", "y", "z"],
        age=[1, 0, 2]))
    rows.to_parquet(tmp_path / "metadata.parquet")  # above the splits
    assert load_data(str(tmp_path), 8).class_names is None
    assert load_data(str(tmp_path), 8, label_column="kind").class_names == ["x", "y"]
    assert load_data(str(tmp_path), 8, label_column="age", split="test").labels.tolist() == [2]
    with pytest.raises(InputError, match="kind, age"):
        load_data(str(tmp_path), 8, label_column="sort")


@pytest.mark.parametrize(("content", "words"), [
    ("file_name,label\nnowhere.png,1\n", "nowhere.png"), ("name,label\n0.png,1\n", "file_name"),
    ("file_name,label\n0.png\n", "metadata.csv"), ("", "metadata.csv"),
    ("file_name,label\n", "no image"),
    ("file_name,label\n../other.png,1\n", "other.png"), ("file_name,label\n0.png,0.5\n", "label"),
])
def test_metadata_that_is_wrong_is_one_line(tmp_path, content, words):
    tree(tmp_path, "set/0.png")
    (tmp_path / "set" / "metadata.csv").write_text(content)
    with pytest.raises(InputError, match=words) as raised:
        load_data(str(tmp_path / "set"), 8)
    assert "\n" not in str(raised.value)


# -------------------------------------------------------------------------------- identity


CHANGES = {
    "a class renamed": lambda folder: (folder / "b").rename(folder / "bee"),
    "a file renamed": lambda folder: (folder / "b/0.png").rename(folder / "b/9.png"),
    "a file moved": lambda folder: (folder / "b/1.png").rename(folder / "a/1.png"),
    "other pixels": lambda folder: save(halves(left=(1, 2, 3)), folder / "a/0.png"),
    "a file more": lambda folder: save(halves(), folder / "b/2.png"),
}


@pytest.mark.parametrize("name", [None, *CHANGES])
def test_the_identity_of_data_is_their_content(tmp_path, monkeypatch, name):
    folder = tree(tmp_path / "v1" / "d", "a/0.png", "b/0.png", "b/1.png")
    before = load_data(str(folder), 8).identity()
    if name is None:
        monkeypatch.chdir(folder.parent)
        folder.rename(tmp_path / "moved")
        (tmp_path / "v1" / "d").symlink_to(tmp_path / "moved")
        for path in ("d", "d/", "./d", f"{tmp_path}/v1/../v1/d", tmp_path / "moved"):
            assert load_data(path, 16, upright=False).identity() == before
    else:
        CHANGES[name](folder)
        assert load_data(str(folder), 8).identity() != before


def test_the_identity_of_tables(tmp_path):
    found = []
    for name, labels, classes in (("a", [0, 1], "xy"), ("b", [0, 1], "xy"), ("c", [1, 0], "xy"),
                                  ("d", [0, 1], "xz")):
        table(labels, datasets.ClassLabel(names=list(classes))).save_to_disk(tmp_path / name)
        found.append(load_data(str(tmp_path / name), 8).identity())
    assert found[0] == found[1] and len(set(found)) == 3
    digits = load_data("digits")
    assert digits.identity() == load_data("digits", 16).identity() != digits.without([3]).identity()


def test_rows_left_out(tmp_path):
    for i in range(6):
        save(Image.new("RGB", (9, 9), (i, 0, 0)), tmp_path / "ab"[i % 2] / f"{i}.png")
    data = load_data(str(tmp_path), 8)  # 0, 2, 4 of a and 1, 3, 5 of b
    part = data.without([1, 4]).without([0])
    assert [(int(image[0, 0, 0]), label) for image, label in part] == [(4, 0), (1, 1), (5, 1)]
    assert (part.num_classes, part.class_names, len(data)) == (2, ["a", "b"], 6)
    assert data.select([5, 0]).labels.tolist() == [1, 0]
    assert int(data.select([5, 0])[0][0][0, 0, 0]) == 5 and part.identity() != data.identity()
    with pytest.raises(InputError, match="left"):
        data.without(range(6))


# -------------------------------------------------------------------------------- workers


def sizes(folder, count):
    """Pictures that have all different sizes."""
    for i in range(count):
        save(Image.new("RGB", (4 + i % 7, 4 + i)), folder / f"{i:03d}.png")
    return folder


def test_workers_send_no_file_descriptors(tmp_path):
    data = load_data(str(sizes(tmp_path, 150)))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        (batch,) = image_batches(data, ALONE, 150, 2)
        kept = [images for images, _ in read_batches(data, [[i] for i in range(150)], 2)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(torch.equal(image, data[i][0]) for i, image in enumerate(batch))
    assert all(torch.equal(images[0], data[i][0]) for i, images in enumerate(kept))


def test_workers_use_no_shared_memory(tmp_path, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("No space left on device")

    data = load_data(str(sizes(tmp_path, 4)), 8)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    ((images, labels),) = read_batches(data, [range(4)], 1)
    assert images.shape == (4, 3, 8, 8) and labels.dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_torchs_loader(tmp_path, workers):
    save(halves(8, 8), tmp_path / "a" / "0.png")
    save(halves(8, 8, BLUE, RED), tmp_path / "b" / "0.png")
    data, keys = load_data(str(tmp_path), 8), [[(0, True), (1, False)], [(1, True)]]
    theirs = torch.utils.data.DataLoader(data, batch_sampler=keys)
    for (x, y), (images, labels) in zip(theirs, read_batches(data, keys, workers), strict=True):
        assert torch.equal(x, images) and torch.equal(y, labels) and images.dtype == torch.uint8


class Dying(torch.utils.data.Dataset):
    """A data set whose reader is killed, as by the system that is short of memory."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(InputError, match="--num-workers than 1") as raised:
        list(read_batches(Dying(), [[0]], 1))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["digits", "folder", "table"])
def test_what_workers_get_can_be_sent_to_a_new_process(tmp_path, kind):
    tree(tmp_path, "a/0.png")
    table([0]).save_to_disk(tmp_path / "table")
    path = dict(digits="digits", folder=tmp_path / "a", table=tmp_path / "table")[kind]
    data = load_data(path, 8)
    arrived = pickle.loads(pickle.dumps(evaluate.WithTurns(data)))
    assert arrived[0][0].equal(data[0][0]) and arrived[0][1:] == (data[0][1], False)


# -------------------------------------------------------------------------------- saved data sets


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def table(labels, feature=None, **others):
    images = [Image.new("RGB", (9, 9), (i, 0, 0)) for i in range(len(labels))]
    images = [dict(bytes=png(image), path=None) for image in images]
    data = datasets.Dataset.from_dict(dict(image=images, label=labels) | others)
    data = data.cast_column("image", datasets.Image())
    return data.cast_column("label", feature) if feature else data


def write_tar(path, count, **others):
    """A tar as webdataset and img2dataset write it: members of one name are one example."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            content = dict(jpg=png(Image.new("RGB", (9, 9), (i, 0, 0)))) | others
            for suffix, value in content.items():
                member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                member.size = len(value)
                tar.addfile(member, io.BytesIO(value))


@pytest.mark.parametrize("kind", ["disk", "disk_splits", "parquet", "arrow_splits", "plain_text",
                                  "default/train", "beside a picture", "configs"])
def test_saved_data_sets(tmp_path, kind):
    feature = datasets.ClassLabel(names=["no", "yes"])
    data, other, folder = table([1, 0, 1], feature), table([0], feature), tmp_path / "x"
    test = "test"
    if kind == "disk":
        data.save_to_disk(folder)
    elif kind == "disk_splits":
        datasets.DatasetDict(train=data, test=other).save_to_disk(folder)
    elif kind == "default/train":
        data.to_parquet(folder / "default" / "train" / "0.parquet")
        other.to_parquet(folder / "default" / "test" / "0.parquet")
    elif kind == "configs":
        data.to_parquet(folder / "one.parquet")
        other.to_parquet(folder / "two.parquet")
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
            "    path: one.parquet\n  - split: extra\n    path: two.parquet\n---\n")
        test = "extra"
    else:
        inside = folder / ("plain_text" if kind == "plain_text" else "data")
        data.to_parquet(inside / "train-00000-of-00001.parquet")
        other.to_parquet(inside / "test-00000-of-00001.parquet")
        if kind == "beside a picture":
            tree(folder, "logo.png")
    loaded = load_data(str(folder), 8)
    assert (loaded.class_names, loaded.labels.tolist()) == (["no", "yes"], [1, 0, 1])
    assert loaded.name == "x"
    assert [int(loaded[i][0][0, 0, 0]) for i in range(3)] == [0, 1, 2]
    if kind != "disk":
        assert len(load_data(str(folder), 8, split=test)) == 1
    with pytest.raises(InputError, match="nosuch.*train"):
        load_data(str(folder), 8, split="nosuch")


def test_tars_and_img2datasets_output(tmp_path):
    write_tar(tmp_path / "classes" / "0.tar", 3, cls=b"2")
    data = load_data(str(tmp_path / "classes"), 8)
    assert (data.labels.tolist(), data.num_classes, int(data[2][0][0, 0, 0])) == ([2, 2, 2], 3, 2)
    for shard in range(2):
        path = tmp_path / "found" / f"{shard:05d}.tar"
        write_tar(path, 2, txt=b"a cat", json=b'{"caption": "a cat", "width": 9, "exif": null}')
        datasets.Dataset.from_dict(dict(url=["x"] * 2)).to_parquet(path.with_suffix(".parquet"))
        path.with_name(f"{shard:05d}_stats.json").write_text("{}")
    data = load_data(str(tmp_path / "found"), 8)
    assert (len(data), data.class_names, data[3][0].shape) == (4, None, (3, 8, 8))
    assert len(load_data(str(path), 8)) == 2  # one file


def test_a_part_of_a_split(tmp_path):
    table([0, 1, 0, 1]).to_parquet(tmp_path / "x" / "train.parquet")
    assert load_data(str(tmp_path / "x"), 8, split="train[:50%]").labels.tolist() == [0, 1]


def test_labels_of_other_kinds(tmp_path):
    for name, labels, expected, names in (("ints", [2, 0, 2], [2, 0, 2], ["0", "1", "2"]),
                                          ("texts", ["b", "a", "b"], [1, 0, 1], ["a", "b"])):
        table(labels).save_to_disk(tmp_path / name)
        data = load_data(str(tmp_path / name), 8)
        assert (data.labels.tolist(), data.class_names) == (expected, names)
    table([0, 1]).remove_columns("label").save_to_disk(tmp_path / "none")
    assert load_data(str(tmp_path / "none"), 8).class_names is None


def test_columns_are_chosen_or_asked_for(tmp_path):
    data = table([0, 1], coarse=[5, 5], fine=["x", "y"])
    data.rename_columns(dict(image="picture", label="kind")).save_to_disk(tmp_path / "x")
    assert load_data(str(tmp_path / "x"), 8, label_column="fine").class_names == ["x", "y"]
    assert load_data(str(tmp_path / "x"), 8, image_column="picture").class_names is None
    wrong = dict(image_column="photo"), dict(label_column="labels"), dict(image_column="coarse")
    for asked in wrong:
        with pytest.raises(InputError, match="picture, kind, coarse, fine"):
            load_data(str(tmp_path / "x"), 8, **asked)


def test_columns_that_are_not_used_are_named(tmp_path, capfd):
    table([0, 1], fine=["x", "y"]).rename_column("label", "kind").to_parquet(tmp_path / "x.parquet")
    load_data(str(tmp_path / "x.parquet"), 8)
    line = "data x.parquet: no classes; 2 images; column image; unused: kind, fine\n"
    assert capfd.readouterr() == (line, "")


def test_what_is_no_image_is_named_when_it_is_read(tmp_path):
    tree(tmp_path, "a/0.png")
    os.mkfifo(tmp_path / "a" / "1.png")  # reading from it would never end
    (tmp_path / "a" / "2.png").symlink_to("gone.png")
    pictures = load_data(str(tmp_path), 8)
    column = datasets.Dataset.from_dict(dict(image=[None])).cast_column("image", datasets.Image())
    column.to_parquet(tmp_path / "b" / "0.parquet")
    for data, index, name in ((pictures, 1, "1.png"), (pictures, 2, "2.png"),
                              (load_data(str(tmp_path / "b"), 8), 0, "image 0")):
        assert data.identity() and not data.all_gray()
        with pytest.raises(BrokenImage, match=name):
            data[index]


@pytest.mark.parametrize(("labels", "words"), [
    ([0, -1], "label -1"), ([0.5, 1.0], "double"), ([None, 1], "no value"), (["", "a"], "no value"),
    ([[0, 1], [1, 0]], "one-hot"),
    ([[1], [2, 3]], "lists"), ([dict(a=1), dict(a=2)], "lists"), ([5, 1_999_999_999], "1999999999"),
    ([5, 2**40], "identifier"), ([True, False], "bool"),
])
@pytest.mark.parametrize("kind", ["disk", "metadata"])
def test_labels_that_are_none_are_refused(tmp_path, labels, words, kind):
    rows = table(labels)
    if kind == "disk":
        rows.save_to_disk(tmp_path / "x")
    else:
        tree(tmp_path, "x/0.png", "x/1.png")
        rows = rows.remove_columns("image").add_column("file_name", ["0.png", "1.png"])
        rows.to_parquet(tmp_path / "x" / "metadata.parquet")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="label") as raised:
        load_data(str(tmp_path / "x"), 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(InputError, match="label 2.*0 to 1"):
        ImageData("x", [None] * 3, [0, 2, 1], ["a", "b"], 8)


def test_nothing_there_is_one_line(tmp_path):
    tree(tmp_path, "a.txt", "cut.parquet")
    names = "nowhere", "somebody/something", tmp_path / "a.txt", tmp_path / "cut.parquet"  # offline
    for name in names:
        with pytest.raises(InputError, match=str(name)) as raised:
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
