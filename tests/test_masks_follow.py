"""Masks go where their weights go: other models, saved files, frozen layers, steps without data."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import warnings
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, blobs, dense_model, training_itself

import tscnc_tf as tscnc
from tscnc_tf import attacks, callbacks, inspection, losses, pruning, schedules
from tscnc_tf.training import AdversarialTraining

X, Y = blobs(64)


@pytest.fixture(params=FLAVOURS)
def library(request):
    return FLAVOURS[request.param]


def loss(library):
    return library.losses.SparseCategoricalCrossentropy(from_logits=True)


def fitted(model, library, optimizer="sgd", x=X, y=Y, **options):
    used = {name: options.pop(name) for name in ("jit_compile",) if name in options}
    model.compile(optimizer, loss(library), **{"jit_compile": False, **used})
    model.fit(x, y, **{"batch_size": 16, "verbose": 0, **options})
    return model


def zeros(layer):
    return float(np.mean(np.asarray(layer.kernel) == 0))


def three_layers(library, units=4):
    layers = library.layers
    first = [layers.InputLayer((6,)) if library is tf_keras else library.Input((6,))]
    return library.Sequential([*first, *(layers.Dense(units, name=name) for name in "abc")])


def statuses(model):
    return {row.name: (row.pruned, row.reason) for row in pruning.report(model).rows}


# Other models


def with_new_head(library, body, classes=3):
    feature = body.get_layer("hidden").output
    inputs = body.inputs[0] if library is keras else body.input
    return library.Model(inputs, library.layers.Dense(classes, name="head")(feature))


@pytest.mark.parametrize("used", [[], callbacks.pruning_callbacks()], ids=["alone", "callbacks"])
@pytest.mark.parametrize(
    "options", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=["", "jit", "eager"]
)
def test_a_new_head_on_a_pruned_body_trains_what_is_kept(used, options, library):
    body = pruning.prune_now(dense_model(library), 0.75)
    hidden = body.get_layer("hidden")
    before, pattern = np.asarray(hidden.kernel), np.asarray(hidden.kernel) == 0
    model = with_new_head(library, body)
    model.compile("adam", loss(library), **{"jit_compile": False, **options})
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=used)
    np.testing.assert_array_equal(np.asarray(hidden.kernel) == 0, pattern)
    assert np.any(np.asarray(hidden.kernel) != before)
    assert statuses(model) == {"hidden": (True, ""), "head": (False, "not chosen")}
    assert inspection.sparsity(model).sparsity == 0.75
    with pytest.raises(ValueError, match="pruned already"):
        pruning.prune_now(model, 0.9)


@pytest.mark.parametrize("how", ["averages", "accumulation", "float16", "trainer", "two steps"])
def test_masks_hold_in_another_model_in_every_way_to_train(how, library):
    if how == "accumulation" and library is tf_keras:
        pytest.skip("tf_keras accumulates no gradients")
    if how == "float16":
        library.mixed_precision.set_global_policy("mixed_float16")
    try:
        body = pruning.prune_now(dense_model(library), 0.75)
        model = with_new_head(library, body)
    finally:
        library.mixed_precision.set_global_policy("float32")
    pattern = np.asarray(body.get_layer("hidden").kernel) == 0
    more = {"accumulation": {"gradient_accumulation_steps": 2}}.get(how, {})
    if how == "averages":
        more = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
    optimizer = library.optimizers.Adam(0.01, **more)
    if how == "trainer":
        model = AdversarialTraining(
            model, attack=attacks.PGD(epsilon=0.1, steps=1), loss=losses.TRADES()
        )
        model.compile(optimizer)
    else:
        steps = 2 if how == "two steps" else 1
        model.compile(optimizer, loss(library), jit_compile=False, steps_per_execution=steps)
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=callbacks.pruning_callbacks())
    np.testing.assert_array_equal(np.asarray(body.get_layer("hidden").kernel) == 0, pattern)


def test_a_schedule_goes_on_in_another_model(library):
    schedule = schedules.CosineSparsity(0.0, 0.75, 0, 4, frequency=1)
    body = pruning.prune(dense_model(library), schedule, engine="masks")
    model = with_new_head(library, body)
    fitted(model, library, callbacks=callbacks.pruning_callbacks())
    assert body.pruner.steps == 4
    assert zeros(body.get_layer("hidden")) == 0.75
    assert tscnc.strip(model) is model
    assert not statuses(body)["hidden"][0]
    fitted(model, library)
    assert zeros(body.get_layer("hidden")) < 0.75, "but for dead units"


@pytest.mark.filterwarnings("ignore:.*does not reach its sparsity")
def test_trainings_in_turn_count_the_steps_that_each_takes(library):
    model = dense_model(library)
    pruner = pruning.Pruner(model, schedules.CosineSparsity(0.0, 0.5, 0, 1000, frequency=1))
    trainer = AdversarialTraining(
        model, attack=attacks.PGD(epsilon=0.01, steps=1), loss=losses.Madry()
    )
    outer = library.Sequential([library.layers.InputLayer((6,)), model])
    trainer.compile("sgd")
    for each in (model, outer):
        each.compile("sgd", loss(library), jit_compile=False)
    counts, steps = [], {"batch_size": 16, "verbose": 0}  # 4 steps an epoch
    for _ in range(3):
        model.fit(X, Y, epochs=2, **steps)
        trainer.fit(X, Y, epochs=1, **steps)
        outer.fit(X, Y, epochs=1, callbacks=callbacks.pruning_callbacks(), **steps)
        counts.append(pruner.steps)
    assert counts == [16, 32, 48]


@pytest.mark.parametrize("method", ["magnitude", "scores"])
def test_a_trainer_masks_weights_that_come_in(method, library, tmp_path):
    model = dense_model(library)
    dense = model.get_weights()
    pruner = (
        pruning.Pruner(model, schedules.OneShot(0.5))
        if method == "magnitude"
        else pruning.ScorePruner(model, sparsity=0.5)
    )
    trainer = AdversarialTraining(
        model, attack=attacks.PGD(epsilon=0.01, steps=1), loss=losses.Madry()
    )
    trainer.compile(library.optimizers.SGD(3.0))
    before = [weight.numpy() for weight in model.layers[-1].weights]
    trainer.save_weights(tmp_path / "a.weights.h5")
    trainer.fit(X, Y, batch_size=16, epochs=2, verbose=0)
    given = {id(weight): value for weight, value in zip(model.weights, dense, strict=True)}
    pairs = zip(trainer.weights, trainer.get_weights(), strict=True)
    trainer.set_weights([given.get(id(weight), value) for weight, value in pairs])
    assert pruner.is_attached
    kept = model.layers[-1].kernel.numpy()
    assert np.all((kept == 0) | (kept == dense[-2]))
    assert zeros(model.layers[-1]) == 0.5
    trainer.load_weights(tmp_path / "a.weights.h5")
    for found, wanted in zip(model.layers[-1].weights, before, strict=True):
        np.testing.assert_array_equal(found.numpy(), wanted)
    pruning.strip(model)
    if library is keras:
        with pytest.raises(ValueError, match=r"only one of them is pruned: trainer\.model"):
            trainer.load_weights(tmp_path / "a.weights.h5")


def test_stripped_weights_are_not_moved_by_what_trained_their_scores(library):
    model = dense_model(library)
    pruning.prune(model, method="scores", sparsity=0.5)
    optimizer = library.optimizers.SGD(0.0, momentum=0.9, use_ema=True, ema_momentum=0.9)
    model.compile(optimizer, loss(library), jit_compile=False)
    kernel = model.layers[0].kernel.numpy()

    class Strip(library.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                pruning.strip(model)

    model.fit(X, Y, batch_size=16, epochs=2, verbose=0, callbacks=[Strip()])
    np.testing.assert_allclose(model.layers[0].kernel.numpy(), kernel, atol=1e-7)


def test_refused_scores_leave_the_optimizer_as_it_was(library):
    model = fitted(dense_model(library), library, library.optimizers.SGD(0.1, momentum=0.9))
    before = values_of(model.optimizer)
    with pytest.raises(UserWarning, match="dead"):  # warnings are errors here
        pruning.ScorePruner(model, sparsity=0.95)
    for one, other in zip(values_of(model.optimizer), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert any(np.any(value) for value in before[2:])  # the momenta


def values_of(optimizer):
    variables = optimizer.variables
    found = variables() if callable(variables) else variables
    return [np.copy(tf.convert_to_tensor(each)) for each in found]


def test_scores_are_stripped_from_a_part_that_a_legacy_optimizer_does_not_train():
    library, legacy = tf_keras, tf_keras.optimizers.legacy
    model = dense_model(library)
    pruning.prune(model, method="scores", sparsity=0.5)
    fitted(model, library, legacy.SGD(0.1, momentum=0.9))
    model.other = legacy.SGD(0.1, momentum=0.9)
    variable = tf.Variable([1.0])
    model.other.apply_gradients([(tf.constant([1.0]), variable)])
    pruning.strip(model)
    assert not hasattr(model, "pruner")


def test_steps_of_an_optimizer_of_ones_own_are_counted_once(library):
    model = training_itself(library, library.layers.Dense(3))
    pruning.prune(model, schedules.OneShot(0.5, 3), engine="masks")
    model.compile(jit_compile=False)
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=callbacks.pruning_callbacks())
    assert model.pruner.steps == 4
    assert zeros(model.part) == 0.5


def test_a_constraint_of_the_layer_acts_as_well(library):
    model = dense_model(library, kernel_constraint=library.constraints.UnitNorm(axis=0))
    pruning.prune_now(model, 0.5)
    fitted(model, library)
    kernel = np.asarray(model.get_layer("hidden").kernel)
    assert np.mean(kernel == 0) == 0.5
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1.0, atol=1e-5)
    own = model.get_layer("hidden").kernel.constraint.own
    tscnc.strip(model)
    assert model.get_layer("hidden").kernel.constraint is own


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_masks_hold_on_every_replica(flavour):
    library = FLAVOURS[flavour]
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    strategy = tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    kinds = [library.optimizers.Adam]
    if library is tf_keras:
        kinds.append(tf_keras.optimizers.legacy.Adam)
    for kind in kinds:
        with strategy.scope():
            body = pruning.prune_now(dense_model(library), 0.75)
            model = with_new_head(library, body)
            model.compile(kind(0.01), loss(library), jit_compile=False)
        variable = body.get_layer("hidden").kernel
        pattern = np.asarray(variable) == 0
        model.fit(X, Y, batch_size=16, verbose=0)
        mirrored = variable.value if library is keras else variable
        for replica in mirrored.values:
            np.testing.assert_array_equal(replica.numpy() == 0, pattern)


def test_scores_are_not_passed_by_in_another_model(library):
    body = pruning.prune(dense_model(library), method="scores", sparsity=0.5)
    model = with_new_head(library, body)
    dense = [np.asarray(each) for each in body.pruner.state.dense]
    fitted(model, library, callbacks=callbacks.pruning_callbacks())
    assert body.pruner.steps == 4
    for was, now in zip(dense, body.pruner.state.dense, strict=True):
        np.testing.assert_array_equal(was, now)
    other = with_new_head(library, body, classes=3)
    with pytest.raises(RuntimeError, match="has changed the kernels of model"):
        fitted(other, library)


# Files


def saved(model, library, tmp_path):
    path = tmp_path / "model.keras"
    model.save(path)
    return library.models.load_model(path)


def assert_masks_where_zeros(model, expected):
    """The loaded model is pruned as it was, and stays so in training."""
    assert {name: pruned for name, (pruned, _) in statuses(model).items()} == expected
    for layer in model.layers:
        if layer.name in expected:
            assert (zeros(layer) == 0.5) == expected[layer.name], layer.name


@pytest.mark.parametrize("classes", [4, 5])
def test_a_head_that_is_exchanged_is_not_pruned_after_loading(classes, library, tmp_path):
    model = pruning.prune_now(dense_model(library, classes=4), 0.5)
    model.pop()
    model.add(library.layers.Dense(classes, name="new"))
    fitted(model, library)
    other = saved(model, library, tmp_path)
    fitted(other, library)
    for each in (model, other):
        assert (zeros(each.get_layer("hidden")), zeros(each.get_layer("new"))) == (0.5, 0.0)
        assert statuses(each) == {"hidden": (True, ""), "new": (False, "not chosen")}
    weights = tmp_path / "model.weights.h5"
    model.save_weights(weights)
    other.load_weights(weights)
    np.testing.assert_array_equal(other(X), model(X))


def test_a_model_that_lost_all_pruned_weights_comes_back_as_it_is(library, tmp_path):
    model = pruning.prune_now(dense_model(library), 0.5, layers="logits")
    model.pop()
    model.add(library.layers.Dense(2, name="new"))
    other = saved(model, library, tmp_path)
    np.testing.assert_array_equal(other(X), model(X))
    assert not any(pruned for pruned, _ in statuses(other).values())
    pruning.prune_now(other, 0.5)


def test_lora_on_an_earlier_layer_does_not_move_masks(tmp_path):
    model = pruning.prune_now(three_layers(keras), 0.5, layers=["b", "c"])
    model.get_layer("a").enable_lora(2)
    other = saved(model, keras, tmp_path)
    assert [t.name for t in other.pruner.targets] == ["b", "c"]
    fitted(other, keras, x=X, y=Y)
    assert [zeros(other.get_layer(name)) for name in "bc"] == [0.5, 0.5]


def test_lora_on_a_pruned_layer_keeps_what_the_model_predicts(tmp_path):
    model = pruning.prune_now(three_layers(keras), 0.5, layers=["b", "c"])
    model.get_layer("b").enable_lora(2)
    fitted(model, keras, optimizer=keras.optimizers.Adam(0.05), epochs=2)
    kernel = np.asarray(model.get_layer("b")._kernel)
    assert np.mean(kernel == 0) == 0.5, "frozen, with its zeros"
    before = np.asarray(model(X))
    pruned, reason = statuses(model)["b"]
    assert not pruned
    assert "LoRA" in reason
    other = saved(model, keras, tmp_path)  # Keras merges what it saves
    np.testing.assert_allclose(other(X), before, atol=1e-6)
    assert [t.name for t in other.pruner.targets] == ["c"]
    weights = tmp_path / "model.weights.h5"
    model.save_weights(weights)
    model.load_weights(weights)
    np.testing.assert_allclose(model(X), before, atol=1e-6)
    np.testing.assert_allclose(tscnc.strip(model)(X), before, atol=1e-6)
    assert zeros(model.get_layer("c")) == 0.5


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_model_is_saved_without_masks_for_what_is_quantized(mode, tmp_path):
    model = pruning.prune_now(three_layers(keras, units=8), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an InputLayer can't be quantized
        model.quantize(mode)
    before = np.asarray(model(X))
    other = saved(model, keras, tmp_path)
    np.testing.assert_allclose(other(X), before, atol=1e-6)


def test_files_that_name_weights_by_position_still_load(library, tmp_path):
    """As all files did before there were paths."""
    model = pruning.prune_now(three_layers(library), 0.5, layers=["b", "c"])
    model.save(tmp_path / "new.keras")
    with (
        zipfile.ZipFile(tmp_path / "new.keras") as new,
        zipfile.ZipFile(tmp_path / "old.keras", "w") as old,
    ):
        for name in new.namelist():
            content = new.read(name)
            if name == "config.json":
                config = json.loads(content)
                weights = config["config"]["pruner"]["weights"]
                for position, weight in enumerate(weights, start=1):
                    assert weight.pop("path") == f"{weight['name']}/_kernel".replace(
                        "_kernel", "kernel" if library is tf_keras else "_kernel"
                    )
                    weight["position"] = position
                content = json.dumps(config)
            old.writestr(name, content)
    other = library.models.load_model(tmp_path / "old.keras")
    assert_masks_where_zeros(other, {"a": False, "b": True, "c": True})
    fitted(other, library)
    assert_masks_where_zeros(other, {"a": False, "b": True, "c": True})


def test_a_weight_that_is_not_found_again_is_named_on_both_sides(library):
    from tscnc_tf.pruning.targets import found_again

    model = dense_model(library)
    wanted = [{"path": "hidden/kernel_of_another", "name": "hidden", "shape": [6, 8]}]
    with pytest.raises(ValueError, match=r"lacks \[\('hidden/kernel_of_another'.*it has \[\('hid"):
        found_again(model, wanted)
    attribute = "kernel" if library is tf_keras else "_kernel"
    wanted = [{"path": f"hidden/{attribute}", "name": "hidden", "shape": [6, 9]}]
    with pytest.raises(ValueError, match=r"lacks .*\(6, 9\).*it has .*\(6, 8\)"):
        found_again(model, wanted)


def test_paths_are_of_attributes_where_names_are_made_anew(library):
    from tscnc_tf._keras import layers

    class Block(library.layers.Layer):
        def __init__(self):
            super().__init__()
            self.parts = [library.layers.Dense(3), library.layers.Dense(3)]

        def build(self, shape):
            self.scale = self.add_weight(name="scale", shape=(3, 3))
            for part in self.parts:
                part.build(shape)
            self.built = True

        def call(self, inputs):
            return self.parts[1](self.parts[0](inputs)) @ self.scale

    class Net(library.Model):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def call(self, inputs):
            return self.block(inputs)

    attribute = "kernel" if library is tf_keras else "_kernel"
    for _ in range(2):
        model = Net()
        model(np.ones((1, 3), np.float32))
        assert set(layers.weight_paths(model).values()) == {
            "block/scale",
            *(f"block/parts[{i}]/{name}" for i in (0, 1) for name in (attribute, "bias")),
        }


def test_the_legacy_format_is_refused_by_whichever_function_saves(library, tmp_path):
    model = pruning.prune_now(dense_model(library), 0.5)
    inputs = library.Input((6,))
    outer = library.Model(inputs, model(inputs))
    saves = [library.models.save_model]
    saves += [keras.saving.save_model] if library is keras else [tf_keras.saving.save_model]
    for save in saves:
        for each in (model, outer):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # tf_keras: the format is legacy
                with pytest.raises(ValueError, match=r"legacy \.h5 format has no place for its"):
                    save(each, str(tmp_path / "model.h5"))


def test_dense_weights_that_come_in_are_masked_where_they_are_used_on(library, tmp_path):
    model, dense = pruning.prune_now(dense_model(library), 0.5), dense_model(library)
    pattern = np.asarray(model.get_layer("hidden").kernel) == 0
    if library is keras:
        dense.save_weights(tmp_path / "dense.weights.h5")
        keras.saving.load_weights(model, tmp_path / "dense.weights.h5")
        np.testing.assert_array_equal(np.asarray(model.get_layer("hidden").kernel) == 0, pattern)
    layer = model.get_layer("hidden")
    layer.set_weights(dense.get_layer("hidden").get_weights())
    other = saved(model, library, tmp_path)
    np.testing.assert_array_equal(np.asarray(other.get_layer("hidden").kernel) == 0, pattern)
    layer.set_weights(dense.get_layer("hidden").get_weights())
    fitted(model, library)
    np.testing.assert_array_equal(np.asarray(layer.kernel) == 0, pattern)


# What is frozen


def ramp():
    return schedules.CosineSparsity(0.0, 0.75, 0, 4, frequency=1)


@pytest.mark.parametrize("first", ["frozen", "pruned"])
@pytest.mark.parametrize("scope", ["layer", "global", {"hidden": 0.75, "log*": 0.75}], ids=str)
def test_what_is_frozen_when_a_step_is_taken_does_not_change(first, scope, library):
    model = dense_model(library, classes=8)
    hidden, logits = model.get_layer("hidden"), model.get_layer("logits")
    if first == "frozen":
        hidden.trainable = False
    pruning.prune(model, ramp(), engine="masks", scope=scope)
    hidden.trainable = False
    before = np.asarray(hidden.kernel)
    fitted(model, library)
    np.testing.assert_array_equal(hidden.kernel, before)
    assert zeros(logits) == 0.75
    assert statuses(model)["hidden"] == (False, "it is frozen (trainable=False)")
    hidden.trainable = True
    fitted(model, library)
    kept = 48 * (1 - zeros(hidden)) + 64 * (1 - zeros(logits))
    assert kept == 28
    assert zeros(hidden) > 0.3
    assert statuses(model) == {"hidden": (True, ""), "logits": (True, "")}
    # A mask that is there holds.
    hidden.trainable = False
    model.layers[-1].trainable = True
    before = np.asarray(hidden.kernel)
    fitted(model, library)
    np.testing.assert_array_equal(hidden.kernel, before)
    assert statuses(model)["hidden"] == (True, "")


def test_a_custom_loop_reads_what_is_frozen_at_each_step(library):
    model = dense_model(library)
    hidden = model.get_layer("hidden")
    pruner = pruning.Pruner(model, ramp())
    hidden.trainable = False
    for _ in range(5):
        pruner.step()
    assert zeros(hidden) == 0.0
    hidden.trainable = True
    pruner.step()
    assert zeros(hidden) == 0.75
    assert pruner.steps == 6


def test_that_a_weight_was_left_out_is_saved(library, tmp_path):
    model = dense_model(library)
    model.get_layer("hidden").trainable = False
    pruning.prune(model, ramp(), engine="masks")
    fitted(model, library)
    other = saved(model, library, tmp_path)
    assert zeros(other.get_layer("hidden")) == 0.0
    other.get_layer("hidden").trainable = True
    fitted(other, library)
    assert zeros(other.get_layer("hidden")) == 0.75


def test_scores_leave_alone_what_is_frozen(library):
    model = dense_model(library)
    hidden = model.get_layer("hidden")
    hidden.trainable = False
    pruning.prune(model, method="scores", sparsity=0.75)
    assert (zeros(hidden), zeros(model.get_layer("logits"))) == (0.0, 0.75)
    hidden.trainable = True
    fitted(model, library)
    assert (zeros(hidden), zeros(model.get_layer("logits"))) == (0.75, 0.75)


def test_a_weight_made_without_training_is_never_pruned(library):
    class Fixed(library.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(name="kernel", shape=(6, 3), trainable=False)

        def call(self, inputs):
            return inputs @ self.kernel

    model = library.Sequential([library.Input((6,)), Fixed(name="fixed"), library.layers.Dense(3)])
    model.build((None, 6))
    pruning.prune_now(model, 0.5)
    assert statuses(model)["fixed"] == (False, "it was made with trainable=False")


# Steps without data


def unknown(count=39):
    data = tf.data.Dataset.from_tensor_slices((X[:count], Y[:count]))
    return data.filter(lambda *_: True).batch(4)


@pytest.mark.parametrize(
    ("method", "outer", "jit"),
    [
        ("magnitude", False, False),
        ("magnitude", True, False),
        ("scores", False, False),
        ("scores", True, False),
        ("magnitude", False, True),
    ],
)
def test_a_dataset_of_unknown_length_is_pruned_as_any_other(method, outer, jit, library):
    options = {"schedule": schedules.CosineSparsity(0.0, 0.75, 4, 16, frequency=4)}
    if method == "scores":
        options = {"method": "scores", "sparsity": 0.75}
    pruned = pruning.prune(dense_model(library, classes=4), engine="masks", **options)
    model = pruned
    if outer:
        inputs = library.Input((6,))
        model = library.Model(inputs, library.layers.Dense(3)(pruned(inputs)))
    model.compile("sgd", loss(library), jit_compile=jit)
    used = callbacks.pruning_callbacks()
    # Keras 3 warns that it ran out of data.
    with pytest.warns() if library is keras else contextlib.nullcontext():
        model.fit(unknown(), epochs=3, verbose=0, callbacks=used)
    assert pruned.pruner.steps == 30
    assert zeros(pruned.get_layer("hidden")) == 0.75


@pytest.mark.parametrize("engine", ["masks", "tfmot"])
@pytest.mark.parametrize("jit", [False, True], ids=["plain", "jit"])
def test_a_trainer_does_with_unknown_length_what_it_does_with_known(engine, jit, library):
    if engine == "tfmot" and library is keras:
        pytest.skip("tfmot's wrappers are for tf_keras")

    def after(data):
        library.utils.set_random_seed(1)
        schedule = schedules.CosineSparsity(0.0, 0.75, 4, 16, frequency=4)
        model = tscnc.prune(dense_model(library), schedule, engine=engine)
        attack = attacks.PGD(epsilon=0.1, steps=1)
        trainer = AdversarialTraining(model, attack=attack, loss=losses.Madry())
        trainer.compile(library.optimizers.Adam(0.01), jit_compile=jit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Keras 3: it ran out of data
            trainer.fit(data, epochs=3, verbose=0, callbacks=callbacks.pruning_callbacks())
        assert int(trainer.optimizer.iterations) == 30
        return tscnc.strip(model).get_weights()

    count = 40 if jit else 39  # XLA would compile a last batch of another size once more
    known = tf.data.Dataset.from_tensor_slices((X[:count], Y[:count])).batch(4)
    for one, other in zip(after(unknown(count)), after(known), strict=True):
        np.testing.assert_array_equal(one, other)


# In callbacks


def change(name, library):
    def act(model):
        if name == "prune":
            pruning.prune(model, schedules.OneShot(0.75), engine="masks")
        elif name == "scores":
            pruning.prune(model, method="scores", sparsity=0.75)
        elif name == "prune_now":
            pruning.prune_now(model, 0.75)
        elif name == "strip":
            tscnc.strip(model)
        else:
            pruning.freeze_mask(model)

    class Change(library.callbacks.Callback):
        def __init__(self, hook):
            super().__init__()
            self.hook, self.seen = hook, []

        def on_epoch_begin(self, epoch, logs=None):
            if self.hook == "epoch" and epoch == 1:
                act(getattr(self.model, "model", self.model))

        def on_train_batch_end(self, batch, logs=None):
            model = getattr(self.model, "model", self.model)
            self.seen.append(zeros(model.get_layer("hidden")))
            if self.hook == "batch" and len(self.seen) == 4:
                act(model)

    return Change


CHANGES = ["prune", "prune_now", "scores", "strip", "freeze_mask"]


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("trainer", [False, True], ids=["fit", "trainer"])
def test_what_a_callback_changes_acts_from_the_next_step_on(name, trainer, library):
    # Each change in both hooks, and each hook in both Kerases, with and without a trainer.
    hook = ["epoch", "batch"][(CHANGES.index(name) + trainer + (library is keras)) % 2]
    model = trained = dense_model(library)
    if name == "strip":
        pruning.prune_now(model, 0.75)
    elif name == "freeze_mask":
        pruning.prune(model, method="scores", sparsity=0.75)
    if trainer:
        trained = AdversarialTraining(
            model, attack=attacks.PGD(epsilon=0.1, steps=1), loss=losses.Madry()
        )
        trained.compile(library.optimizers.SGD(0.1))
    else:
        trained.compile(library.optimizers.SGD(0.1), loss(library), jit_compile=False)
    callback = change(name, library)(hook)
    trained.fit(X, Y, batch_size=16, epochs=2, verbose=0, callbacks=[callback])
    before, after = callback.seen[:4], callback.seen[4:]
    if name == "strip":
        assert before == [0.75] * 4
        assert max(after) < 0.75
        assert not hasattr(model, "pruner")
    elif name == "freeze_mask":
        assert set(callback.seen) == {0.75}
        assert type(model.pruner) is pruning.Pruner
        assert model.pruner.frozen
        kernel = np.asarray(model.get_layer("hidden").kernel)
        np.testing.assert_array_equal(kernel == 0, ~np.asarray(model.pruner.state.masks[0]))
    else:
        assert before == [0.0] * 4
        assert after == [0.75] * 4
        assert model.pruner.steps == 4


LOOPS = """
import keras, tensorflow as tf, tscnc_tf as tscnc
for options in ({"schedule": tscnc.schedules.OneShot(0.5)}, {"method": "scores", "sparsity": 0.5}):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    pruner, optimizer = tscnc.prune(model, **options).pruner, keras.optimizers.Adam()

    def step():
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(model(tf.ones((2, 4))) ** 2)
        variables = model.trainable_variables
        pairs = list(zip(tape.gradient(value, variables), variables))
        if "method" in options:
            pruner.apply_gradients(optimizer, pairs)
        else:
            optimizer.apply_gradients(pairs)
        pruner.step(optimizer)

    step()
    tf.function(step)()
    print(pruner.steps)
"""


def test_custom_loops_do_not_warn_of_autograph(tmp_path):
    (tmp_path / "loops.py").write_text(LOOPS)  # whose source AutoGraph can read
    command = [sys.executable, str(tmp_path / "loops.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "2"]
    assert "AutoGraph" not in done.stdout + done.stderr


# What a second look found


@pytest.mark.parametrize("kind", ["sequential", "functional", "in a layer"])
def test_models_made_by_the_code_of_another_one_find_their_masks(kind, library, tmp_path):
    """Their layers are named anew each time, by the names that come next."""
    layers = library.layers

    def inner():
        if kind == "functional":
            inputs = library.Input((4,))
            return library.Model(inputs, layers.Dense(4)(layers.Dense(4)(inputs)))
        return library.Sequential([library.Input((4,)), layers.Dense(4), layers.Dense(4)])

    class Holder(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inside = inner()

        def call(self, inputs):
            return self.inside(inputs)

    @library.saving.register_keras_serializable("tests", f"Net {kind}")
    class Net(library.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.part = Holder() if kind == "in a layer" else inner()

        def call(self, inputs):
            return self.part(inputs)

        def get_config(self):
            return {"name": self.name}

    x = X[:, :4]
    layers.Dense(1)  # so that names are counted on from here
    model = Net()
    model(x)

    def dense(model):
        part = model.part.inside if kind == "in a layer" else model.part
        return part.layers[-2:]

    pruning.prune_now(model, 0.5, layers=[dense(model)[0]])
    other = saved(model, library, tmp_path)
    np.testing.assert_array_equal(other(x), model(x))
    other.compile("sgd", "mse", jit_compile=False)
    other.fit(x, np.zeros((64, 4)), verbose=0)
    assert [zeros(layer) for layer in dense(other)] == [0.5, 0.0]


def test_steps_compiled_before_see_what_is_stripped_or_pruned_anew(library):
    body = pruning.prune_now(dense_model(library), 0.75)
    hidden = body.get_layer("hidden")
    model = fitted(with_new_head(library, body), library)
    how = {"batch_size": 16, "verbose": 0}
    tscnc.strip(body)
    model.fit(X, Y, **how)
    assert zeros(hidden) < 0.5, "but for dead units"
    pruning.prune_now(body, 0.5)
    pattern = np.asarray(hidden.kernel) == 0
    seen = []

    class Watch(library.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(np.array_equal(np.asarray(hidden.kernel) == 0, pattern))

    model.fit(X, Y, callbacks=[*callbacks.pruning_callbacks(), Watch()], **how)
    assert seen == [True] * 4


def test_freezing_scores_in_another_models_fit_trains_the_weights_from_then_on(library):
    body = pruning.prune(dense_model(library), method="scores", sparsity=0.5)
    hidden, kernels = body.get_layer("hidden"), []
    model = with_new_head(library, body)

    class Freeze(library.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                pruning.freeze_mask(self.model)
            kernels.append(np.asarray(hidden.kernel))

    used = [*callbacks.pruning_callbacks(), Freeze()]
    fitted(model, library, epochs=3, callbacks=used)
    np.testing.assert_array_equal(kernels[2] == 0, kernels[1] == 0)
    assert np.any(kernels[2] != kernels[1])


def test_a_step_masks_what_was_changed_after_the_optimizer(library):
    model = pruning.prune_now(dense_model(library), 0.5)
    fitted(model, library)
    hidden = model.get_layer("hidden")
    for step in (model.pruner.step, lambda: model.pruner.step(model.optimizer)):
        hidden.kernel.assign(tf.ones((6, 8)))
        step()
        assert zeros(hidden) == 0.5

    class Noisy(library.Model):
        def train_step(self, data):
            logs = super().train_step(data)
            for weight in self.trainable_variables:
                weight.assign_add(tf.ones(weight.shape))
            return logs

    inputs = library.Input((6,))
    model = Noisy(inputs, library.layers.Dense(3, name="hidden")(inputs))
    fitted(pruning.prune_now(model, 0.5), library, batch_size=64)
    assert zeros(model.get_layer("hidden")) == 0.5


def test_sparsities_by_name_are_saved_for_what_is_left(library, tmp_path):
    model = dense_model(library)
    pruning.prune(model, ramp(), engine="masks", scope={"hidden": 0.75, "logits": 0.5})
    model.pop()
    model.add(library.layers.Dense(3, name="new"))
    other = saved(model, library, tmp_path)
    assert [t.name for t in other.pruner.targets] == ["hidden"]


def test_an_interrupt_leaves_no_scores_in_the_kernels(library):
    model = pruning.prune(dense_model(library), method="scores", sparsity=0.5)
    before = np.asarray(model.get_layer("hidden").kernel)

    class Interrupted(library.optimizers.SGD):
        def update_step(self, *args, **kwargs):
            raise KeyboardInterrupt

    pairs = [(tf.ones_like(variable), variable) for variable in model.trainable_variables]
    options = {} if library is keras else {"jit_compile": False}
    with pytest.raises(KeyboardInterrupt):
        model.pruner.apply_gradients(Interrupted(0.1, **options), pairs)
    np.testing.assert_array_equal(model.get_layer("hidden").kernel, before)


def test_legacy_optimizers_train_pruned_embeddings():
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [layers.Embedding(8, 4, input_length=2, name="hidden"), layers.Flatten(), layers.Dense(3)]
    )
    model.build((None, 2))
    pruning.prune_now(model, 0.5, layers="hidden")
    table = model.layers[0].embeddings
    before, pattern = table.numpy(), table.numpy() == 0
    model.compile(tf_keras.optimizers.legacy.Adam(0.1), loss(tf_keras))
    model.fit(np.arange(128).reshape(64, 2) % 8, Y, verbose=0)
    np.testing.assert_array_equal(table.numpy() == 0, pattern)
    assert np.any(table.numpy() != before)


def test_another_model_may_train_by_an_optimizer_of_its_own(library):
    for method in ("magnitude", "scores"):
        options = {"schedule": schedules.OneShot(0.5, 2)}
        if method == "scores":
            options = {"method": "scores", "sparsity": 0.5}
        body = pruning.prune(dense_model(library), engine="masks", **options)
        model = training_itself(library, body)
        model.compile(jit_compile=False)
        used = callbacks.pruning_callbacks()
        model.fit(X, Y, batch_size=16, verbose=0, callbacks=used)
        assert body.pruner.steps == 4
        assert zeros(body.get_layer("hidden")) == 0.5


def test_weight_files_tell_what_was_left_out(library, tmp_path):
    def frozen():
        model = dense_model(library)
        model.get_layer("hidden").trainable = False
        return pruning.prune(model, ramp(), engine="masks")

    model, other = frozen(), frozen()
    fitted(model, library)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    other.get_layer("hidden").trainable = True
    fitted(other, library)
    assert zeros(other.get_layer("hidden")) == 0.75


def test_optimizers_in_turn_compile_their_steps_once(library):
    model = dense_model(library)
    traces = []

    def schedule(step):
        traces.append(step)
        return step == 3, 0.5

    pruner = pruning.Pruner(model, schedule)
    one, two = library.optimizers.SGD(), library.optimizers.SGD()
    for _ in range(2):
        pruner.step(one), pruner.step(two)
    count = len(traces)
    for _ in range(4):
        pruner.step(one), pruner.step(two)
    assert len(traces) == count


def test_an_interception_lasts_as_long_as_one_of_its_users(library):
    from tscnc_tf._keras import optimizers

    optimizer, seen = library.optimizers.SGD(), []

    def on_step(optimizer, pairs, take):
        seen.append(len(pairs))
        return take(pairs)

    first = optimizers.intercept(optimizer, on_step, lambda finalize: finalize())
    second = optimizers.intercept(optimizer, on_step, lambda finalize: finalize())
    variable = dense_model(library).trainable_variables[0]
    first.__enter__()
    with second:
        first.__exit__(None, None, None)
        optimizer.apply_gradients([(tf.ones((6, 8)), variable)])
    optimizer.apply_gradients([(tf.ones((6, 8)), variable)])
    assert seen == [1]
