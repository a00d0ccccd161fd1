"""Images that stay in their files: folders and TFRecord files that are streamed."""

from __future__ import annotations

import io
import os
import pathlib
import pickle

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_experiments import asked_to_end

from tscnc_tf.datasets import StoredImages, load
from tscnc_tf.experiments import Recipe, open_stage, run

CLASSES = ("ant", "bee", "cat")


def pictures(count, seed=0, shape=(10, 12, 3)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def encoded(pixels, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def example(content, label, names=("image", "label")):
    features = {
        names[0]: tf.train.Feature(bytes_list=tf.train.BytesList(value=[content])),
        names[1]: tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        "file": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"unknown"])),
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write_records(path, examples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for each in examples:
            writer.write(each)
    return path


def folder_of(root, train=30, test=9):
    for part, count, seed in (("train", train, 0), ("test", test, 1)):
        for index, pixels in enumerate(pictures(count, seed)):
            path = root / part / CLASSES[index % 3] / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(pixels, "JPEG" if index % 2 else "PNG"))
    return root


def records_of(root, train=30, test=9, names=("image", "label")):
    """Write shards whose records are of different sizes, as TensorFlow Datasets calls them."""
    for part, count, seed, shards in (("train", train, 0, 3), ("test", test, 1, 2)):
        content = [
            example(encoded(pixels, "JPEG" if index % 2 else "PNG"), index % 3, names)
            for index, pixels in enumerate(pictures(count, seed))
        ]
        for shard, span in enumerate(np.array_split(np.arange(count), shards)):
            path = root / f"mine-{part}.tfrecord-{shard:05d}-of-{shards:05d}"
            write_records(path, [content[index] for index in span])
    (root / "label.labels.txt").write_text("\n".join(CLASSES) + "\n")
    return root


SOURCES = {"folder": folder_of, "records": records_of}
every_source = pytest.mark.parametrize("write", SOURCES.values(), ids=SOURCES)


def collected(batches):
    return [(x.numpy(), y.numpy()) for x, y in batches]


def assert_equal(ones, others):
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        for array, expected in zip(one, other, strict=True):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)


@every_source
@pytest.mark.parametrize("size", [None, (8, 8)])
def test_everything_that_is_made_of_it_is_what_arrays_give(write, size, tmp_path):
    root = write(tmp_path / "set")
    held, stored = (
        load(root, validation=6, seed=3, image_size=size, stream=stream) for stream in (False, True)
    )
    assert isinstance(held.x_train, np.ndarray)
    for part in ("train", "validation", "test"):
        assert isinstance(getattr(stored, f"x_{part}"), StoredImages)
        np.testing.assert_array_equal(getattr(stored, f"y_{part}"), getattr(held, f"y_{part}"))
        assert_equal([stored.arrays(part)], [held.arrays(part)])
        assert_equal(
            collected(stored.evaluation(part, 4)), collected(held.evaluation(part, batch_size=4))
        )
    options = {"batch_size": 5, "seed": 7, "epochs": 2, "augment": "crop_and_flip"}
    assert_equal(collected(stored.training(**options)), collected(held.training(**options)))
    assert stored.training(5).element_spec == held.training(5).element_spec
    assert stored.channel_statistics() == held.channel_statistics()
    assert stored.class_names == held.class_names == CLASSES
    small, expected = (data.subset(12, 5, seed=2) for data in (stored, held))
    assert isinstance(small.x_test, StoredImages)
    assert_equal([small.arrays("test")], [expected.arrays("test")])
    assert "read from their files" in stored.provenance[0]


@every_source
def test_a_stopped_run_goes_on_with_the_very_batches(write, tmp_path):
    data = load(write(tmp_path / "set"), validation=0, stream=True)
    whole = collected(data.training(7, seed=1, epochs=4))
    steps = data.steps_per_epoch(7)
    rest = collected(data.training(7, seed=1, first_epoch=2, epochs=2).skip(1))
    assert_equal(rest, whole[2 * steps + 1 :])


def test_both_names_of_the_features_are_known(tmp_path):
    usual = load(records_of(tmp_path / "set"), validation=0)
    names = ("image/encoded", "image/class/label")
    other = load(records_of(tmp_path / "imagenet", names=names), validation=0)
    np.testing.assert_array_equal(usual.x_train, other.x_train)
    np.testing.assert_array_equal(usual.y_train, np.arange(30) % 3)
    np.testing.assert_array_equal(usual.x_train[::2], pictures(30)[::2])  # PNG files
    assert usual.fingerprint == other.fingerprint


def test_a_single_file_is_all_training_part(tmp_path):
    content = [example(encoded(p), i % 3) for i, p in enumerate(pictures(30))]
    data = load(write_records(tmp_path / "all.tfrecord", content), validation=0, test=0.2)
    assert len(data.y_test) == 6
    assert data.name == "all"
    assert data.class_names == ("0", "1", "2")
    folder = load(tmp_path, validation=0, test=0.2)
    assert folder.fingerprint == data.fingerprint


def test_validation_files_are_the_test_where_there_is_no_other(tmp_path):
    content = [example(encoded(p), i % 3) for i, p in enumerate(pictures(9))]
    for name in ("train-00000-of-00001", "validation-00000-of-00001"):
        write_records(tmp_path / name, content)
    data = load(tmp_path, validation=0)
    np.testing.assert_array_equal(data.x_test, data.x_train)
    write_records(tmp_path / "test-00000-of-00001", content[:6])
    assert len(load(tmp_path, validation=0).y_test) == 6


def test_the_fingerprint_is_of_encoded_images_labels_and_parts(tmp_path):
    root = records_of(tmp_path / "set")
    stored = load(root, validation=6, stream=True)
    assert stored.fingerprint == load(root, validation=6, stream=True).fingerprint
    others = [
        load(root, validation=6),
        load(root, validation=6, stream=True, seed=1),
        load(root, validation=6, stream=True, image_size=(8, 8)),
        load(records_of(tmp_path / "more", train=33), validation=6, stream=True),
    ]
    assert len({stored.fingerprint, *(data.fingerprint for data in others)}) == 5


@every_source
def test_nothing_is_kept_of_what_was_read(write, tmp_path):
    stored = load(write(tmp_path / "set"), validation=0, stream=True)
    size = len(pickle.dumps(stored.x_train))
    stored.arrays("train")
    collected(stored.training(5, epochs=2))
    assert len(pickle.dumps(stored.x_train)) == size < 5000  # of 30 * 360 bytes


def test_an_iterator_that_is_let_go_of_does_not_hang(tmp_path):
    data = load(folder_of(tmp_path / "set"), validation=0, stream=True)
    for _ in range(20):
        next(iter(data.training(2)))


RECIPE = {
    "sparsity": 0.5,
    "data": {"validation": 6, "train_examples": 24, "test_examples": 6, "stream": True},
    "network": {"architecture": "small-cnn", "options": {"width": 4}},
    "adversary": {"epsilon": "8/255", "step_size": "2/255", "steps": 1},
    "train": {"epochs": 1, "batch_size": 8},
    "prune": {"epochs": 1, "batch_size": 8},
    "finetune": {"epochs": 1, "batch_size": 8, "recalibrate": True},
    "evaluate": {"attack": "pgd", "steps": 1, "restarts": 1, "validation_steps": 1},
}


def test_an_experiment_ends_with_the_weights_that_arrays_give(tmp_path, monkeypatch):
    """Also if it is stopped within an epoch and goes on."""
    root = folder_of(tmp_path / "set", train=36)
    ends = []
    for stream in (True, False):
        changes = {"data.dataset": str(root), "data.stream": stream}
        settings = Recipe.from_dict(RECIPE).override(changes)
        if stream:
            with asked_to_end(monkeypatch, "train", 0, 1):
                run(settings, tmp_path / str(stream), progress=False)
            assert (tmp_path / str(stream) / "1-train" / "state-0-2").exists()
        folder = run(settings, tmp_path / str(stream), until="finetune", progress=False)
        ends.append(open_stage(folder / "3-finetune"))
    for one, other in zip(*(end.model.get_weights() for end in ends), strict=True):
        np.testing.assert_array_equal(one, other)
    assert ends[0].metrics == ends[1].metrics


# What is wrong is said


def changed_record(root):
    path = next(root.glob("*train*"))
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)


def compressed(root):
    root.mkdir()
    with tf.io.TFRecordWriter(str(root / "train.tfrecord"), "GZIP") as writer:
        writer.write(example(encoded(pictures(1)[0]), 0))


def of_something_else(root):
    write_records(root / "train.tfrecord", [example(b"", 0, ("picture", "kind"))])


def of_no_image(root):
    write_records(root / "train.tfrecord", [example(b"text", 0)])


def without_labels(root):
    good, bad = (
        example(encoded(pictures(1)[0]), 0),
        example(encoded(pictures(1)[0]), 0, ("image", "l")),
    )
    write_records(root / "train.tfrecord", [good, bad])


def of_no_records(root):
    write_records(root / "train.tfrecord", [])


def named(*names):
    """Return a function that writes files of these names, of three images each."""

    def write(root):
        for name in names:
            content = [example(encoded(p), i % 3) for i, p in enumerate(pictures(3))]
            write_records(root / name, content)

    return write


def linked(root):
    elsewhere = write_records(root.parent / "train.tfrecord", [example(b"", 0)])
    root.mkdir()
    (root / "train.tfrecord").symlink_to(elsewhere)


def linked_to_nothing(root):
    named("train.tfrecord-00000-of-00002")(root)
    (root / "train.tfrecord-00001-of-00002").symlink_to(root / "nothing")


def linked_names(root):
    named("train.tfrecord")(root)
    (root.parent / "secret").write_text("a\nb\nc\n")
    (root / "label.labels.txt").symlink_to(root.parent / "secret")


def beside_folders(root):
    folder_of(root)
    named("train.tfrecord")(root)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: changed_record(records_of(root)), r"mine-train.*is damaged, compressed"),
        (compressed, "train.tfrecord is damaged, compressed.*without compression"),
        (of_something_else, "'image' with 'label' or 'image/encoded'.*got 'file', 'kind', 'pic"),
        (of_no_image, r"train.tfrecord: record 0 can't be read as an image"),
        (without_labels, "train.tfrecord is damaged"),
        (of_no_records, "train.tfrecord holds no records"),
        (named("more.tfrecord", "train.tfrecord"), r"more.tfrecord: .*must say which part"),
        (named("one.tfrecord", "two.tfrecord"), r"one.tfrecord: .*got the sets one, two"),
        (named("a_test-train.tfrecord", "b-train.tfrecord"), r"a_test-train.*must say which part"),
        (named("a-train.tfrecord", "b-train.tfrecord"), r"b-train.*must say which part"),
        (named("test.tfrecord"), "must have TFRecord files of train; got test"),
        (named("train-00000-of-00003"), "there must be all shards of the set, 0 to 2 of 3"),
        (named("train-00000-of-00001", "train-00001-of-00002"), "and none of another number"),
        (named("train.tfrecord", "train.tfrecords"), "differ in the ending"),
        pytest.param(
            *(linked, r"train.tfrecord leads to .*outside of"), marks=pytest.mark.strangers
        ),
        (linked_to_nothing, r"train.tfrecord-00001-of-00002 is not a file, or a broken link"),
        pytest.param(
            *(linked_names, r"label.labels.txt leads to .*outside of"), marks=pytest.mark.strangers
        ),
        (beside_folders, "has both TFRecord files and the folder te|has both .* the folder tr"),
    ],
)
def test_what_is_wrong_with_records_is_said(write, message, tmp_path):
    root = tmp_path / "set"
    write(root)
    with pytest.raises(ValueError, match=message):
        load(root)


def test_parts_are_words_and_what_is_left_out_is_noted(tmp_path):
    root = tmp_path / "set"
    named("training.tfrecord", "testing.tfrecord", "dev.tfrecord", ".train.tfrecord.x1")(root)
    (root / "make_tfrecords.py").write_text("")
    data = load(root, validation=0)
    assert (len(data.y_train), len(data.y_test)) == (3, 3)
    assert data.provenance == ("dev is not read, as there is a test part",)


def test_labels_of_the_imagenet_scripts_may_begin_at_1(tmp_path):
    content = [
        example(encoded(p), 1 + i % 3, ("image/encoded", "image/class/label"))
        for i, p in enumerate(pictures(9))
    ]
    for part in ("train", "validation"):
        write_records(tmp_path / f"{part}-00000-of-00001", content)
    data = load(tmp_path, validation=0)
    np.testing.assert_array_equal(data.y_train, np.arange(9) % 3)
    assert data.provenance == ("labels: counted from 1 in the files",)


def fifo(root):
    os.mkfifo(root / "train" / "ant" / "x.png")


def link_to_nothing(root):
    (root / "train" / "ant" / "x.png").symlink_to(root / "nothing")


def class_that_is_nothing(root):
    (root / "train" / "dog").symlink_to(root / "nothing")


def part_that_is_nothing(root):
    (root / "val").symlink_to(root / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fifo, "x.png is not a file, or a broken link"),
        (link_to_nothing, "x.png is not a file, or a broken link"),
        (class_that_is_nothing, "dog is a broken link: remove it"),
        (part_that_is_nothing, "val is a broken link: remove it"),
    ],
)
def test_what_is_no_image_in_a_folder_of_images_is_said(change, message, tmp_path):
    root = folder_of(tmp_path / "set")
    change(root)
    with pytest.raises(ValueError, match=message):
        load(root)


def test_what_is_left_out_of_a_folder_of_images_is_noted(tmp_path):
    root = folder_of(tmp_path / "set")
    (root / "val" / "ant").mkdir(parents=True)
    (root / "train" / "ant" / "notes.txt").write_text("")
    assert load(root, validation=0).provenance == (
        "val/ is not read, as there is test/",
        "1 files are left out, not named as images: train/ant/notes.txt ...",
    )


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    root = folder_of(tmp_path / "set")
    (root / "train" / "ant" / "inner").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="inner"):
        load(root)


def test_images_are_taken_by_slices_and_indices(tmp_path):
    images = load(folder_of(tmp_path / "set"), validation=0, stream=True).x_train
    pixels = np.asarray(images)
    some = images[5:20][np.array([3, -1, 0])]
    np.testing.assert_array_equal(np.asarray(some), pixels[[8, 19, 5]])
    np.testing.assert_array_equal(np.asarray(images[np.arange(30) < 4]), pixels[:4])
    assert np.asarray(images[:2], dtype=np.float32).dtype == np.float32
    assert len(images[:0]) == 0
    assert np.asarray(images[:0]).shape == (0, 10, 12, 3)
    for wrong in (0, np.array([[0, 1]])):
        with pytest.raises(TypeError, match=r"by a slice or an array of indices, got .*i : i \+ 1"):
            images[wrong]
    with pytest.raises(TypeError, match="not iterable"):
        iter(images)
    with pytest.raises(ValueError, match="copy must not be False"):
        np.asarray(images, copy=False)


def test_relative_paths_are_those_of_the_moment(tmp_path, monkeypatch):
    folder_of(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    data = load("set", validation=0, stream=True)
    monkeypatch.chdir("/")
    assert len(data.arrays("test")[0]) == 9


def test_a_part_that_does_not_fit_in_memory_is_refused(tmp_path, monkeypatch):
    root = folder_of(tmp_path / "set", train=36)
    data = load(root, validation=0, stream=True)
    monkeypatch.setattr("tscnc_tf._files.memory", lambda: 10_000)
    with pytest.raises(ValueError, match=r"the test part of set, 9 images, takes .*take a sample"):
        data.arrays("test")
    changes = {"data.dataset": str(root), "data.test_examples": None}
    with pytest.raises(ValueError, match=r"data.test_examples: the test part, 9 images"):
        run(Recipe.from_dict(RECIPE).override(changes), tmp_path / "run", progress=False)


@pytest.mark.strangers
@pytest.mark.parametrize("link", ["file", "class", "inner"])
def test_links_that_lead_out_of_a_folder_of_images_are_refused(link, tmp_path):
    root, elsewhere = folder_of(tmp_path / "set"), folder_of(tmp_path / "else")
    if link == "file":
        (root / "train" / "ant" / "x.png").symlink_to(elsewhere / "train" / "ant" / "000.png")
        message = r"x.png leads to .*else.*outside of"
    elif link == "class":
        (root / "train" / "dog").symlink_to(elsewhere / "train" / "ant")
        message = r"dog leads to .*else.*outside of"
    else:
        (root / "train" / "ant" / "more").symlink_to(elsewhere / "train" / "ant")
        message = "more is a symbolic link to a folder"
    with pytest.raises(ValueError, match=message):
        load(root)


def test_links_inside_of_a_folder_are_followed(tmp_path):
    root = folder_of(tmp_path / "set")
    (root / "train" / "ant" / "x.png").symlink_to(root / "train" / "ant" / "000.png")
    assert len(load(root, validation=0).y_train) == 31


@pytest.mark.strangers
@pytest.mark.parametrize("path", ["../../../secret.png", "{absolute}"])
def test_annotations_do_not_lead_out_of_tiny_imagenet(path, tmp_path):
    root, secret = tmp_path / "tiny-imagenet-200", tmp_path / "secret.png"
    secret.write_bytes(encoded(pictures(1)[0]))
    for wnid in ("n01", "n02"):
        (root / "train" / wnid).mkdir(parents=True)
        (root / "train" / wnid / "0.png").write_bytes(encoded(pictures(1)[0]))
    (root / "val" / "images").mkdir(parents=True)
    line = f"{path.format(absolute=secret)}\tn01\n"
    (root / "val" / "val_annotations.txt").write_text(line)
    with pytest.raises(ValueError, match=r"secret.png leads to .*outside of"):
        load("tiny-imagenet", folder=root)
    (root / "val" / "val_annotations.txt").write_text("")
    with pytest.raises(ValueError, match=r"val_annotations.txt is empty"):
        load("tiny-imagenet", folder=root)
    (root / "val" / "val_annotations.txt").write_text("0.png\tn01\n")
    (tmp_path / "secret").write_text("a\tn01\n")
    for name in ("words.txt", "val/val_annotations.txt"):
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(tmp_path / "secret")
        with pytest.raises(ValueError, match=rf"{name} leads to .*outside of"):
            load("tiny-imagenet", folder=root)
        (root / name).unlink()
        (root / "val" / "val_annotations.txt").write_text("0.png\tn01\n")


@every_source
def test_files_that_change_later_are_named(write, tmp_path):
    root = write(tmp_path / "set")
    data = load(root, validation=0, stream=True)
    for path in root.rglob("*"):
        if path.is_file() and "train" in str(path.relative_to(root)):
            path.write_bytes(encoded(pictures(1, shape=(5, 5, 3))[0]))
    with pytest.raises(
        ValueError, match=r"(png is .* now|record \d+ .*it has changed since).*: load it again"
    ):
        data.arrays("train")
    with pytest.raises(tf.errors.InvalidArgumentError, match="load it again"):
        collected(data.training(5, epochs=1))
    if write is records_of:
        with pytest.raises(ValueError, match=r"mine-train.*: record \d+ can't be read: .*again"):
            _ = data.fingerprint


def test_files_that_are_gone_are_named(tmp_path):
    root = folder_of(tmp_path / "set")
    data = load(root, validation=0, stream=True)
    pathlib.Path(root / "train" / "ant" / "000.png").unlink()
    with pytest.raises(ValueError, match=r"000.png can't be read: .*No such file"):
        data.arrays("train")


@pytest.mark.parametrize("what", ["digits", "npz"])
def test_arrays_are_not_streamed(what, tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(
        path, x_train=pictures(6), y_train=np.arange(6) % 3, x_test=pictures(6), y_test=[0] * 6
    )
    with pytest.raises(ValueError, match="stream is for folders of images and TFRecord files"):
        load("digits" if what == "digits" else path, stream=True)
