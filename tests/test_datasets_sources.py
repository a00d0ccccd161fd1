"""Data sets read from files, all of them written here: no test needs the internet."""

from __future__ import annotations

import gzip
import io
import pathlib
import re
import sys
import urllib.error
import zipfile

import keras
import numpy as np
import pytest
import scipy.io
import tensorflow as tf
from keras.src.utils import file_utils
from PIL import Image

from tscnc_tf.datasets import load, resizing, sources
from tscnc_tf.experiments import folders


def arrays(train=30, test=12, shape=(8, 8, 3), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x_train": rng.integers(0, 256, (train, *shape), np.uint8),
        "y_train": np.arange(train) % classes,
        "x_test": rng.integers(0, 256, (test, *shape), np.uint8),
        "y_test": np.arange(test) % classes,
    }


@pytest.fixture
def written(tmp_path):
    """Write arrays to an .npz file, with some of them replaced (or, by None, left out)."""

    def write(**changes):
        content = {k: v for k, v in {**arrays(), **changes}.items() if v is not None}
        path = tmp_path / "mine.npz"
        np.savez(path, **content)
        return path

    return write


def save(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def class_folders(root, counts, shape=(8, 8, 3), seed=0):
    """Write images into class folders, and return them by their class, in the order of names."""
    rng = np.random.default_rng(seed)
    written = {}
    for name, count in counts.items():
        written[name] = rng.integers(0, 256, (count, *shape), np.uint8)
        for index, pixels in enumerate(written[name]):
            save(pixels, root / name / f"{index:03d}.png")
    return written


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """The folder of Debian's package, which is not installed."""
    folder = tmp_path / "share" / "fashion-mnist"
    monkeypatch.setattr(sources, "FASHION_PACKAGE", folder)
    return folder


# .npz files


def test_an_npz_file_is_read_and_the_validation_is_cut_from_its_training_part(written):
    data = load(written(), validation=6, seed=2)
    content = arrays()
    np.testing.assert_array_equal(data.x_test, content["x_test"])
    np.testing.assert_array_equal(data.y_test, content["y_test"])
    order = {image.tobytes(): index for index, image in enumerate(content["x_train"])}
    train = [order[image.tobytes()] for image in data.x_train]
    validation = [order[image.tobytes()] for image in data.x_validation]
    assert sorted(train + validation) == list(range(30))
    assert train == sorted(train)
    assert validation == sorted(validation)
    np.testing.assert_array_equal(data.y_train, content["y_train"][train])
    np.testing.assert_array_equal(data.y_validation, content["y_train"][validation])
    np.testing.assert_array_equal(np.bincount(data.y_validation), [2, 2, 2])
    assert data.name == "mine"
    assert data.class_names == ("0", "1", "2")
    assert data.augmentation == "crop_and_flip"
    assert data.x_train.dtype == np.uint8
    assert data.provenance == ("validation: 6 of 30 training images, seed 2",)


def test_no_validation_at_all(written):
    data = load(written(), validation=0)
    np.testing.assert_array_equal(data.x_train, arrays()["x_train"])
    assert data.x_validation.shape == (0, 8, 8, 3)
    assert data.provenance == ()


def test_other_forms_of_the_same_data_give_the_same(written):
    content = arrays()
    expected = load(written()).fingerprint
    one_hot = np.eye(3, dtype="float32")[content["y_train"]]
    for change in (
        {"y_train": one_hot, "y_test": content["y_test"][:, np.newaxis].astype("uint8")},
        {"x_train": content["x_train"].astype("int64"), "x_test": content["x_test"].astype(">i2")},
        {"x_train": np.asfortranarray(content["x_train"])},
    ):
        assert load(written(**change)).fingerprint == expected


def test_grey_images_get_a_channel_and_are_not_flipped(written):
    grey = arrays(shape=(8, 8))
    data = load(written(**grey), validation=0)
    np.testing.assert_array_equal(data.x_train[..., 0], grey["x_train"])
    assert data.image_shape == (8, 8, 1)
    assert data.augmentation == "crop"


def test_floats_stay_floats(written):
    x = {name: arrays()[name] / 255.0 for name in ("x_train", "x_test")}
    data = load(written(**x), validation=0)
    assert data.x_train.dtype == np.float32
    np.testing.assert_array_equal(data.x_train, x["x_train"].astype("float32"))


def test_class_names_may_be_in_the_file(written):
    names = np.array(["cat", "dog", "cow"])
    assert load(written(class_names=names)).class_names == ("cat", "dog", "cow")
    with pytest.raises(ValueError, match="y_train holds the label 2, but there are 2 classes"):
        load(written(class_names=names[:2]))


X, Y = arrays()["x_train"], arrays()["y_train"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"y_test": None},
            ValueError,
            r"must hold x_train, y_train, x_test, y_test .*got x_test, ",
        ),
        ({"y_train": Y[:-1]}, ValueError, "x_train has 30 images, but y_train has 29 labels"),
        ({"y_train": Y + 0.5}, TypeError, "y_train must hold integers .*, got float64"),
        ({"y_train": Y - 1}, ValueError, "y_train must hold class indices >= 0, got -1"),
        ({"y_train": Y % 1}, ValueError, "y_test holds the label 2, but there are 1 classes"),
        ({"y_train": Y * 2, "y_test": Y[:12]}, ValueError, r"no example of 2 of 5 classes \(1, 3"),
        ({"y_test": Y[:12] + 1}, ValueError, "y_test holds the label 3, but there are 3 classes"),
        ({"y_train": Y + 2**40}, ValueError, "holds the label 1099511627778, with 30 images: numb"),
        ({"y_train": np.full((30, 3), 0.3)}, ValueError, "y_train of shape .* must be one-hot"),
        ({"x_train": X * 1.0}, ValueError, "x_train holds floats from 0 to 255, and floats must"),
        ({"x_train": X / -255.0}, ValueError, "x_train holds floats from -1 to -?0"),
        ({"x_train": np.full(X.shape, np.nan)}, ValueError, "x_train holds floats from nan to nan"),
        ({"x_test": X[:12] + np.int16(1)}, ValueError, "x_test holds integers from 1 to 256"),
        ({"x_train": X // 255}, ValueError, "x_train holds integers up to 1, which as bytes"),
        ({"x_train": X[0]}, ValueError, "x_train has 8 images, but y_train has 30 labels"),
        ({"x_train": X[0, 0]}, ValueError, r"x_train must hold images of shape .*, got shape \(8,"),
        ({"x_train": X[:0]}, ValueError, "x_train holds no images"),
        ({"x_train": X > 9}, TypeError, "x_train must hold numbers, uint8 or floats, got bool"),
        ({"x_test": X[:12, :4]}, ValueError, r"of one shape, got \(8, 8, 3\) and \(4, 8, 3\)"),
        ({"x_test": X[:12] / 255}, ValueError, "must both hold bytes .*, got uint8 and float32"),
        ({"x_train": np.moveaxis(X, -1, 1)}, ValueError, r"np.moveaxis\(x_train, 1, -1\)"),
    ],
)
def test_what_is_wrong_with_an_npz_file_is_said(changes, error, message, written):
    with pytest.raises(error, match=message):
        load(written(**changes))


def test_damaged_npz_files_are_named(tmp_path, written):
    path = written()
    content = path.read_bytes()
    for damage in (b"", b"PK\x03\x04nothing", content[: len(content) // 2]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"mine\.npz can't be read as an \.npz file"):
            load(path)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"mine\.npz can't be read"):
        load(path)
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(ValueError, match=r"mine\.npz can't be read"):
        load(path)


@pytest.mark.strangers
def test_pickles_are_refused(written):
    with pytest.raises(ValueError, match="Arrays of Python objects are refused, as loading them"):
        load(written(x_train=np.array([1, "a"], object)))


@pytest.mark.strangers
def test_members_that_lead_elsewhere_are_not_written_there(written, tmp_path, monkeypatch):
    path = written()
    before = load(path)
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    there = set(tmp_path.rglob("*"))
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("../escaped.npy", f"{tmp_path}/escaped.npy", "../text"):
            archive.writestr(name, array.getvalue())
    after = load(path)
    np.testing.assert_array_equal(after.x_train, before.x_train)
    assert set(folders.read_arrays(path)) > {"../escaped", f"{tmp_path}/escaped"}
    assert set(tmp_path.rglob("*")) == there


@pytest.mark.strangers
def test_files_that_unpack_to_more_than_the_memory_are_refused(written, monkeypatch):
    path = written()
    load(path)
    monkeypatch.setattr("tscnc_tf._files.memory", lambda: 2000)
    with pytest.raises(ValueError, match=r"mine\.npz unpacks to 0\.0 GiB, and this machine has"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:  # 700 bytes that say that they are terabytes
        for name in ("x_train", "y_train", "x_test", "y_test"):
            header = io.BytesIO()
            kind = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 32, 32, 3)}
            np.lib.format.write_array_header_1_0(header, kind)
            archive.writestr(f"{name}.npy", header.getvalue())
    with pytest.raises(
        ValueError, match=r"mine\.npz can't be read as an \.npz file of plain arrays"
    ):
        load(path)


def packed(folder, images):
    """Image files one after the other, and where each begins."""
    contents = []
    for index, pixels in enumerate(images):
        save(pixels, folder / f"{index}.png")
        contents.append((folder / f"{index}.png").read_bytes())
    ends = np.cumsum([0, *map(len, contents)])
    return np.frombuffer(b"".join(contents), np.uint8), ends


def test_an_npz_file_of_packed_images_gives_the_pixels(tmp_path):
    content = arrays()
    train, train_offsets = packed(tmp_path / "files", content["x_train"])
    test, test_offsets = packed(tmp_path / "files", content["x_test"])
    entries = {
        "train_bytes": train,
        "train_offsets": train_offsets,
        "train_labels": content["y_train"],
        "test_bytes": test,
        "test_offsets": test_offsets,
        "test_labels": content["y_test"],
    }
    path = tmp_path / "packed.npz"
    np.savez(path, **entries)
    np.savez(tmp_path / "plain.npz", **content)
    assert load(path).fingerprint == load(tmp_path / "plain.npz").fingerprint
    small = load(path, image_size=(4, 4)).fingerprint
    assert small == load(tmp_path / "plain.npz", image_size=(4, 4)).fingerprint

    for change, message in (
        ({"train_offsets": train_offsets[:-1]}, "x_train has 29 images, but y_train has 30"),
        ({"test_offsets": test_offsets + 1}, "test_offsets must rise from 0 to the length of tes"),
        ({"test_offsets": test_offsets / 2}, "test_offsets must rise"),
        ({"train_bytes": train.astype("int32")}, "train_bytes must be a row of uint8, got int32"),
        ({"test_bytes": test[::-1]}, "packed.npz: image 0 of test_bytes can't be read as an image"),
    ):
        np.savez(path, **{**entries, **change})
        with pytest.raises(ValueError, match=message):
            load(path)


# Folders


@pytest.mark.parametrize("held_out", ["test", "val", "validation", "valid"])
def test_a_folder_with_a_test_part(held_out, tmp_path):
    train = class_folders(tmp_path / "train", {"owl": 5, "ant": 7})
    test = class_folders(tmp_path / held_out, {"owl": 2, "ant": 3}, seed=1)
    data = load(tmp_path, validation=0)
    assert data.class_names == ("ant", "owl")
    np.testing.assert_array_equal(data.x_train, np.concatenate([train["ant"], train["owl"]]))
    np.testing.assert_array_equal(data.y_train, [0] * 7 + [1] * 5)
    np.testing.assert_array_equal(data.x_test, np.concatenate([test["ant"], test["owl"]]))
    np.testing.assert_array_equal(data.y_test, [0] * 3 + [1] * 2)
    assert data.name == tmp_path.name


def test_a_test_part_without_class_folders_is_none(tmp_path):
    class_folders(tmp_path / "train", {"owl": 5, "ant": 7})
    save(np.zeros((8, 8, 3), np.uint8), tmp_path / "test" / "unlabelled.png")
    val = class_folders(tmp_path / "val", {"ant": 2}, seed=1)
    np.testing.assert_array_equal(load(tmp_path).x_test, val["ant"])


@pytest.mark.parametrize("root", [".", "train"])
def test_a_folder_without_a_test_part_is_cut(root, tmp_path):
    images = class_folders(tmp_path / root, {"owl": 20, "ant": 30, ".hidden": 1})
    data = load(tmp_path, test=0.2, validation=8, seed=1)
    np.testing.assert_array_equal(np.bincount(data.y_test), [6, 4])
    np.testing.assert_array_equal(np.bincount(data.y_validation), [5, 3])
    np.testing.assert_array_equal(np.bincount(data.y_train), [19, 13])
    pixels = np.concatenate([data.x_train, data.x_validation, data.x_test])
    labels = np.concatenate([data.y_train, data.y_validation, data.y_test])
    for label, name in enumerate(("ant", "owl")):
        found = sorted(image.tobytes() for image in pixels[labels == label])
        assert found == sorted(image.tobytes() for image in images[name])
    assert data.provenance[0] == "test: 10 of 50 images, seed 0"
    other = load(tmp_path, test=0.2, validation=8, seed=1, test_seed=5)
    assert other.provenance[0] == "test: 10 of 50 images, seed 5"
    assert not np.array_equal(other.x_test, data.x_test)
    with pytest.raises(ValueError, match="test must be > 0 where the source has no test part"):
        load(tmp_path, test=0)
    with pytest.raises(ValueError, match="test takes 49 of 50 training images, but one of each of"):
        load(tmp_path, test=49)


def test_images_of_several_kinds(tmp_path):
    grey = class_folders(tmp_path / "a", {"ant": 4, "owl": 4}, shape=(8, 8))
    data = load(tmp_path / "a", test=2, validation=0)
    assert data.image_shape == (8, 8, 1)
    every = [*grey["ant"], *grey["owl"]]
    assert {image.tobytes() for image in data.x_train} < {image.tobytes() for image in every}

    colour = np.full((8, 8, 3), (10, 20, 30), np.uint8)
    save(colour, tmp_path / "a" / "owl" / "below" / "colour.PNG")
    data = load(tmp_path / "a", test=2, validation=0)
    pixels = np.concatenate([data.x_train, data.x_test])
    assert sum(np.array_equal(image, colour) for image in pixels) == 1
    assert sum(np.array_equal(image[..., 0], image[..., 2]) for image in pixels) == 8

    deep = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    deep.save(tmp_path / "a" / "owl" / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png has pixels of the kind 'I;16', which have no"):
        load(tmp_path / "a")


def test_images_of_several_sizes_are_resized_on_request(tmp_path):
    class_folders(tmp_path, {"ant": 4, "owl": 4})
    save(np.full((20, 10, 3), 77, np.uint8), tmp_path / "owl" / "tall.png")
    with pytest.raises(
        ValueError, match=r"tall\.png is of size \(20, 10\), and .*000\.png of size "
    ):
        load(tmp_path)
    data = load(tmp_path, image_size=(6, 5), test=2, validation=0)
    pixels = np.concatenate([data.x_train, data.x_test])
    assert pixels.shape == (9, 6, 5, 3)
    assert sum(np.all(image == 77) for image in pixels) == 1


def test_jpeg_files_are_decoded_as_tensorflow_does(tmp_path):
    ramp = np.linspace(0, 255, 64).reshape(8, 8).astype(np.uint8)
    for name, shift in (("ant", 0), ("owl", 4)):
        for index in range(3):
            pixels = np.stack([ramp, np.roll(ramp, shift + index, 1), ramp.T], axis=-1)
            save(pixels, tmp_path / "train" / name / f"{index}.JPEG")
            save(pixels, tmp_path / "test" / name / f"{index}.JPEG")
    data = load(tmp_path, validation=0)
    files = sorted((tmp_path / "train").rglob("*.JPEG"))
    decoded = [tf.io.decode_jpeg(f.read_bytes(), dct_method="INTEGER_ACCURATE") for f in files]
    np.testing.assert_allclose(data.x_train.astype(int), np.stack(decoded).astype(int), atol=1)


@pytest.mark.parametrize("names", [("Training", "Testing"), ("Train", "Val")])
def test_parts_with_other_names_are_not_taken_for_classes(names, tmp_path):
    for name in names:
        class_folders(tmp_path / name, {"ant": 4, "owl": 4})
    with pytest.raises(ValueError, match=rf"{names[1]}.* look like parts.*: name them train and"):
        load(tmp_path)


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(ValueError, match="has no class folders: images belong in"):
        load(tmp_path)
    class_folders(tmp_path, {"ant": 4})
    with pytest.raises(ValueError, match="y_train must hold 2 classes or more, got 1"):
        load(tmp_path)
    (tmp_path / "owl").mkdir()
    (tmp_path / "owl" / "readme.txt").write_text("later")
    with pytest.raises(ValueError, match=r"owl holds no images \(\.bmp, .*: fill or remove it"):
        load(tmp_path)
    good = (tmp_path / "ant" / "000.png").read_bytes()
    for damage in (b"no image", b"", good[: len(good) // 2]):
        (tmp_path / "owl" / "broken.png").write_bytes(damage)
        with pytest.raises(ValueError, match=r"owl/broken\.png can't be read as an image"):
            load(tmp_path)


def test_a_test_part_with_a_class_of_its_own(tmp_path):
    class_folders(tmp_path / "train", {"ant": 2, "owl": 2})
    class_folders(tmp_path / "test", {"ant": 2, "fox": 2})
    with pytest.raises(
        ValueError, match=r"test has the class folder 'fox', which .*: its classes "
    ):
        load(tmp_path)


# tiny-imagenet and SVHN


def tiny_imagenet(root, per_class=4):
    """Write the layout of tiny-imagenet-200, with two classes of 8x8 pixels; return its images."""
    folder = root / "tiny-imagenet-200"
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (2, per_class, 8, 8, 3), np.uint8)
    val = rng.integers(0, 256, (3, 8, 8, 3), np.uint8)
    ids = ("n01", "n02")
    for wnid, images in zip(ids, train, strict=True):
        for index, pixels in enumerate(images):
            save(pixels, folder / "train" / wnid / "images" / f"{wnid}_{index}.png")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    lines = []
    for index, (pixels, wnid) in enumerate(zip(val, ("n02", "n01", "n02"), strict=True)):
        save(pixels, folder / "val" / "images" / f"val_{index}.png")
        lines.append(f"val_{index}.png\t{wnid}\t0\t0\t7\t7\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius\nn02\tnewt\nn99\tnobody\n")
    save(val[0], folder / "test" / "images" / "test_0.png")
    return folder, train.reshape(-1, 8, 8, 3), val


def test_tiny_imagenet_is_read_from_its_folder(tmp_path):
    folder, train, val = tiny_imagenet(tmp_path)
    expected = None
    for arguments in (
        {"name_or_path": "tiny-imagenet", "folder": folder},
        {"name_or_path": "tiny-imagenet", "folder": str(tmp_path)},
        {"name_or_path": folder},
    ):
        data = load(**arguments, validation=0)
        np.testing.assert_array_equal(data.x_train, train)
        np.testing.assert_array_equal(data.y_train, [0] * 4 + [1] * 4)
        np.testing.assert_array_equal(data.x_test, val)
        np.testing.assert_array_equal(data.y_test, [1, 0, 1])
        assert data.class_names == ("goldfish, Carassius", "newt")
        assert data.augmentation == "crop_and_flip"
        assert data.x_train.dtype == np.uint8
        expected = expected or data.fingerprint
        assert data.fingerprint == expected


def test_what_is_wrong_with_tiny_imagenet_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"given as folder=\.\.\.: fetch http://cs231n"):
        load("tiny-imagenet")
    with pytest.raises(
        FileNotFoundError, match="has no train: it must be the unpacked folder tiny"
    ):
        load("tiny-imagenet", folder=tmp_path)
    folder, _, _ = tiny_imagenet(tmp_path)
    annotations = folder / "val" / "val_annotations.txt"
    text = annotations.read_text()
    annotations.write_text(text + "val_9.png\tn77\t0\t0\t1\t1\n")
    with pytest.raises(
        ValueError, match=r"the line 'val_9\.png\\tn77.*names none of the 2 folders"
    ):
        load("tiny-imagenet", folder=tmp_path)
    annotations.write_text(text + "val_9.png\tn01\n")
    with pytest.raises(ValueError, match=r"val_9\.png can't be read: .*No such file"):
        load("tiny-imagenet", folder=tmp_path)
    annotations.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no val/val_annotations\.txt"):
        load("tiny-imagenet", folder=tmp_path)


@pytest.mark.strangers
def test_a_file_of_matlab_that_unpacks_to_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    content = {"X": np.zeros((32, 32, 3, 40), np.uint8), "y": np.ones((40, 1), np.uint8)}
    for name in ("train_32x32.mat", "test_32x32.mat"):
        scipy.io.savemat(tmp_path / name, content, do_compression=True)
    assert (tmp_path / "train_32x32.mat").stat().st_size < 2000
    monkeypatch.setattr("tscnc_tf._files.memory", lambda: 100_000)
    with pytest.raises(ValueError, match=r"train_32x32\.mat unpacks to 0\.0 GiB, and this machine"):
        load("svhn", folder=tmp_path)


def test_svhn_is_read_from_its_folder(tmp_path):
    rng = np.random.default_rng(0)
    written = {}
    for file, count in (("train_32x32.mat", 40), ("test_32x32.mat", 20)):
        x = rng.integers(0, 256, (32, 32, 3, count), np.uint8)
        y = (np.arange(count) % 10 + 1).astype(np.uint8)
        scipy.io.savemat(tmp_path / file, {"X": x, "y": y[:, np.newaxis]})
        written[file] = x, y
    data = load("svhn", folder=tmp_path, validation=0)
    for file, pixels, labels in (
        ("train_32x32.mat", data.x_train, data.y_train),
        ("test_32x32.mat", data.x_test, data.y_test),
    ):
        x, y = written[file]
        for n in range(len(y)):
            np.testing.assert_array_equal(pixels[n], x[:, :, :, n])
        np.testing.assert_array_equal(labels, y % 10)
    assert data.augmentation == "crop"

    (tmp_path / "test_32x32.mat").write_bytes(b"no such thing" * 20)
    with pytest.raises(ValueError, match=r"test_32x32\.mat is damaged, or not a file of SVHN"):
        load("svhn", folder=tmp_path)
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"folder='.*': fetch http.*/test_32x32\.mat"):
        load("svhn", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"folder=None: fetch .*/train_32x32\.mat"):
        load("svhn")


# IDX files


def idx(array):
    """Return the content of a file in MNIST's own format."""
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def idx_folder(folder, mark="-", packed=True, shape=(6, 5), classes=10):
    """Write the four files of such a folder, and return what is in them, by their parts."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, count in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (count, *shape), np.uint8)
        labels = (np.arange(count) % classes).astype(np.uint8)
        for kind, array in (("images", images), ("labels", labels)):
            written[split, kind] = array
            name = f"{split}-{kind}{mark}idx{array.ndim}-ubyte{'.gz' if packed else ''}"
            content = idx(array)
            (folder / name).write_bytes(gzip.compress(content) if packed else content)
    return written


def require_content(data, written):
    """Check images and labels of a data set without a validation part."""
    for split, x, y in (("train", data.x_train, data.y_train), ("t10k", data.x_test, data.y_test)):
        np.testing.assert_array_equal(x[..., 0], written[split, "images"])
        np.testing.assert_array_equal(y, written[split, "labels"])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mark", ["-", "."])
def test_a_folder_of_idx_files_is_read(mark, packed, tmp_path):
    written = idx_folder(tmp_path / "mine", mark, packed)
    data = load(tmp_path / "mine", validation=0)
    require_content(data, written)
    assert data.image_shape == (6, 5, 1)
    assert data.x_train.dtype == np.uint8
    assert (data.name, data.augmentation) == ("mine", "crop")
    assert data.class_names == tuple("0123456789")
    assert len(load(tmp_path / "mine", validation=10, image_size=(3, 3)).y_validation) == 10


def test_files_that_were_unpacked_are_read_as_what_they_are(tmp_path):
    written = idx_folder(tmp_path)
    for file in tmp_path.glob("t10k*.gz"):  # as browsers do, which keep the name
        file.write_bytes(gzip.decompress(file.read_bytes()))
    for file in tmp_path.glob("train*.gz"):  # as gunzip --keep does
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.write_bytes(b"not read")
    require_content(load(tmp_path, validation=0), written)


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
COUNTS = np.zeros(20, np.uint8)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, lambda c: c[:-1], "is cut off: .* says 40 x 6 x 5, 1,200 bytes, and 1,199 follow"),
        (IMAGES, lambda c: c[:9], "is cut off: it ends in its header, after 9 bytes"),
        (IMAGES, lambda c: c[:4], "is cut off: it ends in its header, after 4 bytes"),
        (IMAGES, lambda c: c + b"12", "is damaged: .*, 1,200 bytes, and more follow"),
        (IMAGES, lambda c: b"\0\0\xff" + c[3:], "is not an .* bytes 00 00 08 03, got 00 00 ff 03"),
        (IMAGES, lambda c: b"\1" + c[1:], r"is not an IDX file: .*got 01 00 08 03"),
        (IMAGES, lambda _: b"", r"is not an IDX file: .*got nothing"),
        (IMAGES, lambda c: b"\0\0\x0d" + c[3:], r"must hold unsigned bytes, got float32"),
        (IMAGES, lambda _: idx(COUNTS), r"must hold an array of 3 axes, got 1"),
        (LABELS, lambda _: idx(COUNTS[:, None, None]), r"must hold an array of 1 axes, got 3"),
        (LABELS, lambda c: gzip.compress(c)[:-9], r"is damaged, or cut off: "),
        (LABELS, lambda c: gzip.compress(c)[:20] + b"?" * 9, r"is damaged, or cut off: "),
    ],
)
def test_what_is_wrong_with_an_idx_file_is_said(name, content, message, tmp_path):
    idx_folder(tmp_path, packed=False)
    file = tmp_path / name
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        load(tmp_path)


def test_idx_files_that_do_not_belong_together_are_named(tmp_path):
    idx_folder(tmp_path, packed=False)
    (tmp_path / LABELS).write_bytes(idx(COUNTS[:19]))
    with pytest.raises(
        ValueError, match=r"t10k-images-idx3-ubyte holds 20 images, but \S*t10k-labels\S* 19 labels"
    ):
        load(tmp_path)
    (tmp_path / LABELS).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has no t10k-labels-idx1-ubyte, with or without \.gz: a folder of"
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", sources.IN_IDX)
def test_known_sets_are_read_from_a_folder_of_idx_files(name, tmp_path):
    written = idx_folder(tmp_path / "files")
    data = load(name, folder=str(tmp_path / "files"), validation=0)
    require_content(data, written)
    assert data.name == name
    assert data.class_names == sources.KERAS_SETS[name].class_names
    assert data.augmentation == sources.KERAS_SETS[name].augmentation
    with pytest.raises(FileNotFoundError, match="has no train-images-idx3-ubyte"):
        load(name, folder=tmp_path)


def test_fashion_mnist_of_debians_package_is_found(package, monkeypatch):
    def fails():
        raise AssertionError("the package comes first")

    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", fails)
    written = idx_folder(package)
    data = load("fashion_mnist", validation=0)
    require_content(data, written)
    assert data.class_names[:2] == ("T-shirt/top", "Trouser")
    assert data.augmentation == "crop_and_flip"


# keras.datasets


@pytest.mark.parametrize("name", sources.KERAS_SETS)
def test_what_keras_loads_is_taken(name, monkeypatch):
    classes = 100 if name == "cifar100" else 10
    content = arrays(
        2 * classes, classes, (32, 32, 3) if "cifar" in name else (28, 28), classes=classes
    )
    pairs = [(content[f"x_{s}"], content[f"y_{s}"][:, np.newaxis]) for s in ("train", "test")]
    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", lambda: tuple(pairs))
    data = load(name, validation=0)
    np.testing.assert_array_equal(data.x_train, content["x_train"].reshape(data.x_train.shape))
    np.testing.assert_array_equal(data.y_test, content["y_test"])
    assert data.classes == classes == len(set(data.class_names))
    assert data.augmentation == ("crop" if name == "mnist" else "crop_and_flip")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty home of Keras without internet; returns the list of files that Keras asks for."""
    asked = []

    def refuse(url, path, *_):
        asked.append((url, str(path)))
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(file_utils, "urlretrieve", refuse)
    monkeypatch.setattr(file_utils.config, "keras_home", lambda: str(tmp_path))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    return asked


@pytest.mark.parametrize("name", sources.KERAS_SETS)
def test_without_internet_the_error_names_the_file_and_its_place(name, offline):
    with pytest.raises(FileNotFoundError, match="Bring it from a machine with internet") as caught:
        load(name)
    assert ("apt-get install dataset-fashion-mnist" in str(caught.value)) == (
        name == "fashion_mnist"
    )
    assert ("as folder=" in str(caught.value)) == (name in sources.IN_IDX)
    # The very file that Keras wanted to fetch, and where it would have looked for it.
    (wanted,) = offline
    assert "{} as {}".format(*wanted) in str(caught.value)
    assert str(caught.value.__cause__) in str(caught.value)


def test_fashion_mnist_is_read_where_the_error_says_that_it_belongs(tmp_path, offline):
    rng = np.random.default_rng(0)
    with pytest.raises(FileNotFoundError) as caught:
        load("fashion_mnist")
    places = re.findall(r" as (\S+\.gz)", str(caught.value))
    assert len(places) == 4
    images, labels = {}, {}
    for place in places:
        part = "train" if "train-" in place else "t10k"
        count = 40 if part == "train" else 20
        if "images" in place:
            images[part] = rng.integers(0, 256, (count, 28, 28), np.uint8)
            content = gzip.compress(idx(images[part]))
        else:
            labels[part] = (np.arange(count) % 10).astype(np.uint8)
            content = gzip.compress(idx(labels[part]))
        pathlib.Path(place).write_bytes(content)
    data = load("fashion_mnist", validation=0)
    np.testing.assert_array_equal(data.x_train[..., 0], images["train"])
    np.testing.assert_array_equal(data.x_test[..., 0], images["t10k"])
    np.testing.assert_array_equal(data.y_train, labels["train"])
    assert data.class_names[9] == "Ankle boot"

    pathlib.Path(places[0]).write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match="fashion_mnist is not on this machine, or damaged"):
        load("fashion_mnist")


def test_the_classes_of_cifar100_are_in_the_order_of_the_alphabet():
    assert len(sources.CIFAR100) == 100
    assert list(sources.CIFAR100) == sorted(sources.CIFAR100)


# Resizing


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (11, 20), (32, 32), (45, 64), (1, 1)])
def test_resizing_is_that_of_tensorflow_and_pillow(size, rng):
    floats = rng.uniform(0, 1, (3, 32, 32, 3)).astype("float32")
    expected = tf.image.resize(floats, size, antialias=True)
    np.testing.assert_allclose(resizing.resized(floats, size), expected, atol=2e-6)

    pixels = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
    found = resizing.resized(pixels, size)
    assert found.dtype == np.uint8
    for image, small in zip(pixels, found, strict=True):
        pillow = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
        np.testing.assert_allclose(small.astype(int), np.asarray(pillow).astype(int), atol=1)


def test_resizing_keeps_constants_and_does_not_depend_on_chunks(rng, monkeypatch):
    from tscnc_tf.datasets import pixels as module

    white = np.full((2, 30, 17, 1), 255, np.uint8)
    np.testing.assert_array_equal(resizing.resized(white, (7, 40)), 255)
    ones = np.ones((2, 30, 17, 1), np.float32)
    assert resizing.resized(ones, (7, 40)).max() <= 1.0
    pixels = rng.integers(0, 256, (10, 9, 9, 3), np.uint8)
    expected = resizing.resized(pixels, (4, 5))
    monkeypatch.setattr(module, "CHUNK", 3)
    np.testing.assert_array_equal(resizing.resized(pixels, (4, 5)), expected)


def test_loading_resizes_all_parts_and_says_so(written):
    whole, small = load(written(), seed=1), load(written(), seed=1, image_size=(4, 6))
    for split in ("train", "validation", "test"):
        expected = resizing.resized(getattr(whole, f"x_{split}"), (4, 6))
        np.testing.assert_array_equal(getattr(small, f"x_{split}"), expected)
    assert small.provenance[0] == "resized to 4x6, antialiased"
    assert small.metadata["image_shape"] == [4, 6, 3]


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name_or_path": 5}, TypeError, "name_or_path must be a name or a path, got 5"),
        ({"name_or_path": "cifar"}, FileNotFoundError, "one of 'digits', 'mnist', .*, got 'cifar'"),
        ({"name_or_path": __file__}, ValueError, "must be a folder, an .npz file or a TFRecord"),
        (
            {"folder": "."},
            ValueError,
            "folder is for 'mnist', 'fashion_mnist', 'svhn', 'tiny-imagenet' only, got '.' with",
        ),
        ({"validation": 1.0}, ValueError, "validation must be < 1, got 1.0. It is a fraction"),
        ({"validation": -1}, ValueError, "validation must be >= 0"),
        ({"validation": "10%"}, TypeError, "validation must be a number"),
        ({"validation": True}, TypeError, "validation must be an integer, got True"),
        ({"validation": 1429}, ValueError, "validation takes 1,429 of 1,438 .*: at most 1,428"),
        ({"test": 1.5}, ValueError, "test must be < 1, got 1.5"),
        ({"seed": -1}, ValueError, "^seed must be >= 0"),
        ({"test_seed": -1}, ValueError, "test_seed must be >= 0"),
        ({"image_size": 16}, TypeError, r"image_size must be a pair \(height, width\), got 16"),
        ({"image_size": (16, 0)}, ValueError, r"image_size\[1\] must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        load(**{"name_or_path": "digits", **arguments})


def test_libraries_of_the_extra_are_imported_only_when_needed():
    for path in pathlib.Path(sources.__file__).parent.glob("*.py"):
        assert not re.search(
            r"^\s*(import|from) (sklearn|scipy|PIL)", path.read_text(), re.MULTILINE
        )


@pytest.mark.parametrize("module", ["sklearn.datasets", "PIL.Image", "scipy.io"])
def test_a_missing_library_is_named_with_its_extra(module, tmp_path, monkeypatch):
    class_folders(tmp_path, {"ant": 2, "owl": 2})
    for file in sources.SVHN_FILES:
        (tmp_path / file).write_bytes(b"")
    arguments = {
        "sklearn.datasets": {"name_or_path": "digits"},
        "PIL.Image": {"name_or_path": tmp_path},
        "scipy.io": {"name_or_path": "svhn", "folder": tmp_path},
    }
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf'{module[:3]}\w*, of the extra "datasets": pip install'
    ):
        load(**arguments[module])
