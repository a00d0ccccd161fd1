"""A data set in memory: its batches, its splits, and what is known about it."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS
from hypothesis import given, settings
from hypothesis import strategies as st

import tscnc_tf
from tscnc_tf import attacks, losses
from tscnc_tf.datasets import Dataset, augmentation, load, splits


def pictures(count, shape=(8, 8, 3), classes=3, seed=0):
    """Images whose first pixel says which one it is, as bytes, and labels of unequal frequency."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (count, *shape), np.uint8)
    x[:, 0, 0, 0] = np.arange(count) % 256
    y = rng.integers(0, classes + 1, count) % classes
    return x, y


@pytest.fixture
def data():
    x, y = pictures(60)
    return Dataset(
        *(x[:40], np.resize(y, 40), x[40:48], y[40:48], x[48:], y[48:]),
        class_names=("a", "b", "c"),
        name="pictures",
        augmentation="crop_and_flip",
    )


def collected(batches):
    xs, ys = zip(*[(np.asarray(x), np.asarray(y)) for x, y in batches], strict=True)
    return np.concatenate(xs), np.concatenate(ys)


def identities(x):
    """Which image each is, of those whose first pixel says so."""
    return np.rint(x[:, 0, 0, 0] * 255).astype(int)


# Augmentation


def looped(images, plans, padding):
    """The same by a loop over pixels: shifted out of the black, then mirrored."""
    height, width = images.shape[1:3]
    result = np.zeros_like(images)
    for n, (top, left, flip) in enumerate(plans):
        for i in range(height):
            for j in range(width):
                row, column = i + top - padding[0], j + left - padding[1]
                if 0 <= row < height and 0 <= column < width:
                    result[n, i, width - 1 - j if flip else j] = images[n, row, column]
    return result


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shape", [(8, 8, 3), (5, 9, 1)])
def test_crops_and_flips_are_those_of_a_loop(shape, dtype, rng):
    images = rng.integers(1, 256, (30, *shape)).astype(dtype)
    padding = (2, 3)
    plans = np.stack(
        [rng.integers(0, 5, 30), rng.integers(0, 7, 30), rng.integers(0, 2, 30)], axis=1
    ).astype("int32")
    found = augmentation.augmented(tf.constant(images), tf.constant(plans), padding)
    np.testing.assert_array_equal(found, looped(images, plans, padding))
    assert found.dtype == dtype


@pytest.mark.parametrize(
    ("augment", "offsets", "flips"),
    [("crop", (2, 3), 0), ("flip", (0, 0), 1), ("crop_and_flip", (2, 3), 1), ("none", (0, 0), 0)],
)
def test_plans_are_uniform_over_all_that_may_happen(augment, offsets, flips):
    padding = augmentation.padding(augment, (16, 24, 3))
    assert padding == offsets
    draws = tf.random.stateless_uniform((3, 30_000), (1, 2), None, None, tf.int64)
    plans = augmentation.plans(draws, padding, augment).numpy()
    for column, choices in zip(plans.T, (2 * offsets[0], 2 * offsets[1], flips), strict=True):
        frequencies = np.bincount(column) / len(column)
        assert len(frequencies) == choices + 1
        # Five standard deviations of a fair draw.
        fair = 1 / (choices + 1)
        np.testing.assert_allclose(frequencies, fair, atol=5 * np.sqrt(fair / 30_000))


@pytest.mark.parametrize(("side", "pixels"), [(32, 4), (64, 8), (28, 4), (16, 2), (8, 1), (4, 1)])
def test_a_crop_moves_in_proportion_to_the_image(side, pixels):
    assert augmentation.padding("crop", (side, side, 1)) == (pixels, pixels)
    assert augmentation.padding("flip", (side, side, 1)) == (0, 0)


@pytest.mark.parametrize("augment", ["crop", "flip", "crop_and_flip"])
def test_training_images_are_crops_and_flips_of_their_own_image(augment, data):
    marked = dataclasses.replace(data, y_train=np.arange(40))
    x, which = collected(marked.training(8, augment=augment, epochs=4))
    pad = 1 if "crop" in augment else 0
    shifts = range(2 * pad + 1)
    flips = (0, 1) if "flip" in augment else (0,)
    plans = [(top, left, flip) for top in shifts for left in shifts for flip in flips]
    seen = set()
    for image, index in zip(np.rint(x * 255), which, strict=True):
        source = np.repeat(data.x_train[index : index + 1], len(plans), 0)
        hits = (looped(source, plans, (pad, pad)) == image).all(axis=(1, 2, 3))
        assert hits.sum() == 1
        seen.add(plans[int(np.argmax(hits))])
    assert seen == set(plans)


# Epochs


def test_every_epoch_is_an_order_of_all_examples_and_no_two_are_alike(data):
    x, y = collected(data.training(8, augment="none", epochs=3))
    epochs = identities(x).reshape(3, 40)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(40))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    np.testing.assert_array_equal(y, data.y_train[identities(x)])
    np.testing.assert_array_equal(x, data.x_train[identities(x)] / np.float32(255))


def test_the_order_is_that_of_the_first_row_of_draws_whatever_the_augmentation(data):
    draws = tf.random.stateless_uniform(
        (4, 40), [3, 1], minval=None, maxval=None, dtype=tf.int64, alg="philox"
    )
    marked = dataclasses.replace(data, y_train=np.arange(40))
    for augment in ("none", "crop", "flip"):
        _, which = collected(marked.training(8, seed=3, augment=augment, first_epoch=1, epochs=1))
        np.testing.assert_array_equal(which, np.argsort(draws[0], kind="stable"))


def test_every_order_is_equally_likely():
    x, y = pictures(3, classes=3)
    tiny = Dataset(x, np.arange(3), x, y, x, y, ("a", "b", "c"), "tiny", "none")
    ids, _ = collected(tiny.training(3, epochs=1200))
    _, counts = np.unique(identities(ids).reshape(-1, 3), axis=0, return_counts=True)
    assert len(counts) == 6
    np.testing.assert_allclose(counts, 200, atol=5 * np.sqrt(200))


def test_a_stopped_run_goes_on_with_the_very_batches(data):
    whole = list(data.training(8, seed=3, epochs=5))
    for stop in (1, 3):
        rest = list(data.training(8, seed=3, first_epoch=stop, epochs=5 - stop))
        assert len(rest) == 5 * (5 - stop)
        for (x, y), (x_rest, y_rest) in zip(whole[5 * stop :], rest, strict=True):
            np.testing.assert_array_equal(x, x_rest)
            np.testing.assert_array_equal(y, y_rest)
    endless = data.training(8, seed=3, first_epoch=2).take(15)
    for (x, _), (x_rest, _) in zip(whole[10:], endless, strict=True):
        np.testing.assert_array_equal(x, x_rest)


def test_what_is_at_a_place_does_not_depend_on_threads_or_on_the_batch_size(data):
    expected, _ = collected(data.training(8, seed=1, epochs=2))
    for threads in (1, 4):
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        options.threading.max_intra_op_parallelism = threads
        options.autotune.enabled = threads > 1
        found, _ = collected(data.training(8, seed=1, epochs=2).with_options(options))
        np.testing.assert_array_equal(found, expected)
    found, _ = collected(data.training(20, seed=1, epochs=2))
    np.testing.assert_array_equal(found, expected)


def test_the_seed_decides_and_tensorflows_own_does_not(data):
    tf.random.set_seed(1)
    first, _ = collected(data.training(8, seed=1, epochs=1))
    tf.random.set_seed(2)
    again, _ = collected(data.training(8, seed=1, epochs=1))
    other, _ = collected(data.training(8, seed=2, epochs=1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    huge, _ = collected(data.training(8, seed=2**63 - 1, epochs=1))
    assert not np.array_equal(first, huge)


def test_batches_have_a_fixed_shape_and_what_is_left_over_changes(data):
    batches = data.training(12, augment="none", epochs=20)
    x, y = batches.element_spec
    assert (x.shape, x.dtype) == ((12, 8, 8, 3), tf.float32)
    assert (y.shape, y.dtype) == ((12,), tf.int64)
    assert data.steps_per_epoch(12) == 3
    assert int(batches.cardinality()) == 60
    assert int(data.training(12).cardinality()) == tf.data.INFINITE_CARDINALITY
    ids = identities(collected(batches)[0]).reshape(20, 36)
    left_over = {number for epoch in ids for number in set(range(40)) - set(epoch.tolist())}
    assert len(left_over) > 20


def test_evaluation_keeps_the_order_and_the_last_batch(data):
    sizes = [len(y) for _, y in data.evaluation("test", 5)]
    assert sizes == [5, 5, 2]
    for split, x, y in (
        ("train", data.x_train, data.y_train),
        ("validation", data.x_validation, data.y_validation),
        ("test", data.x_test, data.y_test),
    ):
        pixels, labels = collected(data.evaluation(split, 7))
        x_array, y_array = data.arrays(split)
        np.testing.assert_array_equal(pixels, x_array)
        np.testing.assert_array_equal(x_array, x.astype("float32") / np.float32(255))
        assert pixels.dtype == x_array.dtype == np.float32
        np.testing.assert_array_equal(labels, y)
        np.testing.assert_array_equal(y_array, y)


def test_floats_are_passed_on_as_they_are(data):
    x = (data.x_train / 255).astype("float32") ** 2
    floats = dataclasses.replace(data, x_train=x)
    found, _ = collected(floats.training(8, augment="none", epochs=1))
    which = [int(np.argmax((x == image).all(axis=(1, 2, 3)))) for image in found]
    assert sorted(which) == list(range(40))
    np.testing.assert_array_equal(floats.arrays("train")[0], x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: d.training(41), ValueError, "batch_size must be <= 40, the number of train"),
        (lambda d: d.training(0), ValueError, "batch_size must be >= 1, got 0"),
        (lambda d: d.training(8.0), TypeError, "batch_size must be an integer"),
        (lambda d: d.training(8, seed=-1), ValueError, "seed must be >= 0"),
        (lambda d: d.training(8, seed=2**63), ValueError, "seed must be <= 9223372036854775807"),
        (lambda d: d.training(8, epochs=0), ValueError, "epochs must be >= 1"),
        (lambda d: d.training(8, first_epoch=-1), ValueError, "first_epoch must be >= 0"),
        (lambda d: d.training(8, augment="turn"), ValueError, "augment must be one of 'none', 'cr"),
        (lambda d: d.steps_per_epoch(50), ValueError, "batch_size must be <= 40"),
        (lambda d: d.evaluation("dev"), ValueError, "split must be one of 'train', 'validation',"),
        (lambda d: d.arrays("training"), ValueError, "split must be one of"),
        (lambda d: d.evaluation(batch_size=0), ValueError, "batch_size must be >= 1"),
        (lambda d: d.evaluation(batch_size=2**70), ValueError, "batch_size must be <= 2147483647"),
        (lambda d: d.subset(2), ValueError, "n_train must be from 3 to 40, got 2"),
        (lambda d: d.subset(n_test=13), ValueError, "n_test must be from 0 to 12, got 13"),
        (lambda d: d.subset(0.5), TypeError, "n_train must be an integer"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(call, error, message, data):
    with pytest.raises(error, match=message):
        call(data)


def test_an_empty_part_says_how_to_get_one(data):
    data = data.subset(n_validation=0)
    assert data.x_validation.shape == (0, 8, 8, 3)
    for call in (data.arrays, data.evaluation):
        with pytest.raises(ValueError, match="the validation part of pictures is empty: load the"):
            call("validation")
    assert len(data.subset(5).y_validation) == 0
    assert len(data.subset(n_validation=0).y_validation) == 0


# Both Kerases


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_models_are_trained_on_it_in_both_kerases(flavour, data):
    library = FLAVOURS[flavour]
    layers = library.layers
    inputs = library.Input(data.image_shape)
    model = library.Model(inputs, layers.Dense(3)(layers.Flatten()(inputs)))
    model.compile("sgd", library.losses.SparseCategoricalCrossentropy(from_logits=True))
    steps = data.steps_per_epoch(8)
    validation = data.evaluation("validation", 3)
    history = model.fit(
        data.training(8),
        epochs=2,
        steps_per_epoch=steps,
        validation_data=validation,
        shuffle=False,
        verbose=0,
    )
    assert len(history.history["val_loss"]) == 2
    whole = data.training(8, epochs=3)
    model.fit(whole, epochs=3, steps_per_epoch=steps, shuffle=False, verbose=0)
    model.fit(data.training(8, epochs=1), epochs=2, shuffle=False, verbose=0)

    trainer = tscnc_tf.AdversarialTraining(
        model, attack=attacks.FGSM(epsilon=0.1), loss=losses.Madry()
    )
    trainer.compile("sgd")
    trainer.fit(
        data.training(8),
        epochs=2,
        steps_per_epoch=steps,
        validation_data=validation,
        shuffle=False,
        verbose=0,
    )
    assert int(trainer.optimizer.iterations) == 2 * steps
    report = tscnc_tf.evaluate_robustness(
        model, *data.arrays("test"), attacks=attacks.FGSM(epsilon=0.1), progress=False
    )
    assert report.examples == 12


def test_a_stopped_training_ends_with_the_same_weights(data):
    import keras

    def trained(*parts):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input(data.image_shape), keras.layers.Flatten(), keras.layers.Dense(3)]
        )
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        for first, last in parts:
            batches = data.training(8, first_epoch=first, epochs=last - first)
            epochs = {"initial_epoch": first, "epochs": last, "steps_per_epoch": 5}
            model.fit(batches, **epochs, shuffle=False, verbose=0)
        return model.get_weights()

    for one, other in zip(trained((0, 4)), trained((0, 1), (1, 4)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_replicas_share_each_batch(data):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    alone = list(data.training(8, epochs=2))
    shared = strategy.experimental_distribute_dataset(data.training(8, epochs=2))
    seen = 0
    for (x, y), batch in zip(alone, shared, strict=True):
        xs, ys = (strategy.experimental_local_results(part) for part in batch)
        assert [len(part) for part in xs] == [4, 4]
        np.testing.assert_array_equal(np.concatenate(xs), x)
        np.testing.assert_array_equal(np.concatenate(ys), y)
        seen += 1
    assert seen == 10


# What is known about it


def test_channel_statistics_are_those_of_the_training_part(data):
    for part in (data, dataclasses.replace(data, x_train=data.arrays("train")[0])):
        mean, deviation = part.channel_statistics()
        pixels = data.x_train.astype("float64") / 255
        tolerance = 1e-14 if part is data else 1e-7
        np.testing.assert_allclose(mean, pixels.mean(axis=(0, 1, 2)), rtol=tolerance)
        np.testing.assert_allclose(deviation, pixels.std(axis=(0, 1, 2)), rtol=tolerance)
        assert all(type(value) is float for value in mean + deviation)


def test_statistics_do_not_depend_on_the_size_of_the_chunks(data, monkeypatch):
    from tscnc_tf.datasets import pixels

    expected = data.channel_statistics()
    monkeypatch.setattr(pixels, "CHUNK", 7)
    assert data.channel_statistics() == expected


def test_the_fingerprint_is_that_of_all_arrays(data):
    found = hashlib.sha256()
    for split in ("train", "validation", "test"):
        for kind, dtype in (("x", "|u1"), ("y", "<i8")):
            array = getattr(data, f"{kind}_{split}")
            found.update(f"{kind}_{split} {dtype} {array.shape}\n".encode())
            found.update(array.astype(dtype).tobytes())
    assert data.fingerprint == found.hexdigest()
    same = dataclasses.replace(data, name="another", x_test=data.x_test.copy())
    assert same.fingerprint == data.fingerprint


@pytest.mark.parametrize("field", ["x_train", "y_train", "x_validation", "y_test"])
def test_the_fingerprint_changes_with_a_single_value(field, data):
    array = getattr(data, field).copy()
    array.flat[-1] += 1
    assert dataclasses.replace(data, **{field: array}).fingerprint != data.fingerprint


def test_the_fingerprint_is_invariant_to_byte_order(data):
    swapped = dataclasses.replace(data, y_test=data.y_test.astype(">i8"))
    assert swapped.fingerprint == data.fingerprint


def test_nothing_can_be_changed_under_the_fingerprint(data):
    with pytest.raises(ValueError, match="read-only"):
        data.x_train[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.x_train = data.x_test


def test_what_it_says_about_itself(data):
    assert repr(data) == (
        "Dataset(pictures: 40 training, 8 validation and 12 test images, 8x8x3 as uint8, "
        "3 classes, augmentation 'crop_and_flip')"
    )
    small = data.subset(10, seed=4)
    assert json.loads(json.dumps(small.metadata)) == {
        "name": "pictures",
        "fingerprint": small.fingerprint,
        "image_shape": [8, 8, 3],
        "classes": 3,
        "images": {"train": 10, "validation": 8, "test": 12},
        "augmentation": "crop_and_flip",
        "provenance": ["train: 10 of 40 images kept, seed 4"],
    }


# Splits


def test_a_subset_keeps_the_share_of_every_class(rng):
    x, _ = pictures(200)
    y = np.repeat([0, 1, 2], [120, 70, 10])
    whole = Dataset(x, y, x[:0], y[:0], x[::2], y[::2], ("a", "b", "c"), "pictures", "none")
    small = whole.subset(20, 10, seed=1)
    np.testing.assert_array_equal(np.bincount(small.y_train), [12, 7, 1])
    np.testing.assert_array_equal(np.bincount(small.y_test, minlength=3), [6, 4, 0])
    np.testing.assert_array_equal(small.y_train, y[small.x_train[:, 0, 0, 0]])
    assert len(set(small.x_train[:, 0, 0, 0])) == 20
    assert small.fingerprint == whole.subset(20, 10, seed=1).fingerprint
    assert small.fingerprint != whole.subset(20, 10, seed=2).fingerprint
    np.testing.assert_array_equal(np.bincount(whole.subset(3).y_train), [1, 1, 1])


@settings(max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.data())
def test_a_cut_is_disjoint_complete_and_stratified(counts, drawn):
    counts = np.array(counts)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    size = drawn.draw(st.integers(0, int((counts - 1).sum())))
    stays, taken = splits.cut("validation", labels, size, 5, splits.VALIDATION)
    assert len(taken) == size
    np.testing.assert_array_equal(np.sort(np.concatenate([stays, taken])), np.arange(len(labels)))
    cut = np.bincount(labels[taken], minlength=len(counts))
    assert np.all(cut < counts)
    # Within one of the exact share, but where the last example of a class has to stay.
    exact = size * counts / counts.sum()
    if np.all(np.ceil(exact) <= counts - 1):
        assert np.all(np.abs(cut - exact) < 1)


def test_rounding_gives_to_the_largest_remainders():
    labels = np.repeat([0, 1, 2], [50, 30, 21])
    # 10 * (50, 30, 21) / 101 = (4.95, 2.97, 2.08)
    _, taken = splits.cut("test", labels, 10, 0, splits.TEST)
    np.testing.assert_array_equal(np.bincount(labels[taken]), [5, 3, 2])


def test_choices_are_the_same_on_every_machine():
    labels = np.arange(40) % 2
    _, taken = splits.cut("test", labels, 6, 7, splits.TEST)
    # Philox of Random123 with key (7, 0), by hand: the smallest keys of each class.
    keys = np.random.Generator(np.random.Philox(key=7)).bit_generator.random_raw(40)
    expected = [i for c in (0, 1) for i in sorted(range(c, 40, 2), key=lambda i: keys[i])[:3]]
    np.testing.assert_array_equal(taken, sorted(expected))
    _, other = splits.cut("test", labels, 6, 7, splits.VALIDATION)
    assert not np.array_equal(taken, other)


def test_digits_are_split_and_scaled():
    from sklearn.datasets import load_digits

    known = load_digits()
    data = load("digits", validation=0.1, test=0.2, seed=3)
    assert [len(y) for y in (data.y_train, data.y_validation, data.y_test)] == [1294, 144, 359]
    assert data.class_names == tuple("0123456789")
    assert data.augmentation == "crop"
    pixels = np.concatenate([data.x_train, data.x_validation, data.x_test])
    labels = np.concatenate([data.y_train, data.y_validation, data.y_test])
    found = {image.tobytes() + bytes([label]) for image, label in zip(pixels, labels, strict=True)}
    images = (known.images / 16).astype("float32")
    there = zip(images, known.target, strict=True)
    assert found == {image.tobytes() + bytes([label]) for image, label in there}
    assert len(found) == 1797
    for y in (data.y_train, data.y_validation, data.y_test):
        share = np.bincount(known.target) * len(y) / 1797
        assert np.all(np.abs(np.bincount(y) - share) < 2)
    assert load("digits", seed=3).fingerprint == data.fingerprint
    other = load("digits", seed=4)
    assert other.fingerprint != data.fingerprint
    np.testing.assert_array_equal(other.x_test, data.x_test)  # nobody's seed chooses what judges
    assert not np.array_equal(other.x_validation, data.x_validation)


def test_the_fingerprint_of_the_digits_is_this_one():
    # Everywhere and always: a change of this digest is a change of everybody's data.
    expected = "87b7d05ae41d78257e91e777552f6a154f85b03886fdfcae8524fcfb3282848e"
    assert load("digits").fingerprint == expected


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_no_tuner_keeps_whoever_lets_go_of_an_iterator_waiting(kind, data):
    batches = data.training(4) if kind == "training" else data.evaluation("test", 4)
    assert batches.options().autotune.enabled is False
