"""AdversarialTraining: what a step computes, and that it behaves as any Keras model does."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import blobs, conv_model, dense_model, fresh_process, images

from tscnc_tf import _keras, attacks, callbacks, losses, pruning, regularizers, schedules
from tscnc_tf._keras import wrappers
from tscnc_tf.training import LOGS, AdversarialTraining

PGD = attacks.PGD(epsilon=0.1, step_size=0.04, steps=2)
LOSSES = {"TRADES": losses.TRADES(6.0), "Madry": losses.Madry(), "MART": losses.MART(5.0)}


def trainer_for(model, loss="TRADES", optimizer=None, seed=0, **options):
    trainer = AdversarialTraining(model, attack=PGD, loss=LOSSES[loss], seed=seed)
    trainer.compile(optimizer=optimizer or tf_keras.optimizers.SGD(0.1, momentum=0.9), **options)
    return trainer


def pruned_conv_model(end_step=6):
    model = pruning.add_regularizers(conv_model(), regularizers.TSCNC(1e-4, 1e-2))
    return pruning.prune(model, schedules.CosineSparsity(0.0, 0.75, 1, end_step, frequency=2))


def fit(trainer, data, epochs=2, batch_size=16, **options):
    return trainer.fit(
        *data,
        batch_size=batch_size,
        epochs=epochs,
        verbose=0,
        shuffle=False,
        callbacks=callbacks.pruning_callbacks(),
        **options,
    )


def sparsities(model):
    return [1 - float(tf.reduce_mean(mask)) for _, mask in wrappers.pruned_variables(model)]


def assert_zeros_equal_masks(model):
    for weight, mask in wrappers.pruned_variables(model):
        np.testing.assert_array_equal(np.asarray(weight) == 0, np.asarray(mask) == 0)


def cross_entropy(logits, y):
    logits = np.asarray(logits, np.float64)
    logs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    return -logs[np.arange(len(y)), y], logs


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_descends_the_loss_of_its_paper(loss):
    """One SGD step against gradients of the loss written out here, on the same adversary."""
    x, y = blobs(32)
    model = pruning.add_regularizers(dense_model(), regularizers.TSCNC(1e-3, 1e-2))
    before = model.get_weights()
    trainer = trainer_for(model, loss, tf_keras.optimizers.SGD(0.1))
    adversary = trainer._adversary
    x_adversarial = adversary.perturb(model, tf.constant(x), tf.constant(y), tf.constant([0, 1]))
    with tf.GradientTape() as tape:
        clean = tf.nn.log_softmax(model(x))
        adversarial = tf.nn.log_softmax(model(x_adversarial))
        hot = tf.one_hot(y, 3)
        ce_clean = -tf.reduce_sum(hot * clean, 1)
        ce_adversarial = -tf.reduce_sum(hot * adversarial, 1)
        kl = tf.reduce_sum(tf.exp(clean) * (clean - adversarial), 1)
        if loss == "TRADES":
            value = ce_clean + 6.0 * kl
        elif loss == "Madry":
            value = ce_adversarial
        else:
            other = tf.reduce_max(tf.exp(adversarial) - 2 * hot, 1)
            boosted = ce_adversarial - tf.math.log(1.0001 - other + 1e-12)
            value = boosted + 5.0 * kl * (1.0 - tf.reduce_sum(hot * tf.exp(clean), 1))
        total = tf.reduce_mean(value) + tf.add_n(model.losses)
    gradients = tape.gradient(total, model.trainable_variables)
    logs = trainer.train_step((tf.constant(x), tf.constant(y)))
    assert float(logs["loss"]) == pytest.approx(float(total), rel=1e-4)
    for was, slope, now in zip(before, gradients, model.get_weights(), strict=True):
        np.testing.assert_allclose(now, was - 0.1 * slope, atol=2e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_logs_add_up(loss):
    x, y = blobs(32)
    model = pruning.add_regularizers(dense_model(), regularizers.TSCNC(1e-3, 1e-2))
    penalty = float(tf.add_n(model.losses))
    expected, _ = cross_entropy(model(x), y)
    trainer = trainer_for(model, loss, tf_keras.optimizers.SGD(0.0), metrics=["accuracy"])
    history = fit(trainer, (x, y), epochs=1, batch_size=32, validation_data=(x, y)).history
    assert set(history) == {p + k for k in (*LOGS, "accuracy") for p in ("", "val_")}
    logs = {name: values[0] for name, values in history.items()}
    assert logs["penalty"] == pytest.approx(penalty, rel=1e-5), "added once"
    assert logs["clean_loss"] == pytest.approx(np.mean(expected), rel=1e-4)
    parts = logs["robust_loss"] + logs["penalty"]
    parts += logs["clean_loss"] if loss == "TRADES" else 0.0
    assert logs["loss"] == pytest.approx(parts, rel=1e-5)
    hits = np.argmax(model(x), 1) == y
    assert logs["clean_accuracy"] == pytest.approx(hits.mean())
    assert logs["accuracy"] == pytest.approx(hits.mean())
    assert logs["adversarial_accuracy"] <= logs["clean_accuracy"]
    assert logs["val_clean_accuracy"] == pytest.approx(hits.mean())


class Counting(tf_keras.layers.Layer):
    """Counts its calls in training and in inference mode, as they run."""

    def build(self, _):
        self.calls = [tf.Variable(0, trainable=False, dtype=tf.int64) for _ in range(2)]

    def call(self, inputs, training=False):
        self.calls[bool(training)].assign_add(1)
        return tf.identity(inputs)


@pytest.mark.parametrize(("loss", "inference"), [("TRADES", 3), ("Madry", 3), ("MART", 2)])
def test_a_step_takes_one_forward_pass_in_training_mode(loss, inference):
    x, y = blobs(48)
    inputs = tf_keras.Input((6,))
    counter = Counting()
    outputs = tf_keras.layers.Dense(3)(counter(inputs))
    model = pruning.prune(tf_keras.Model(inputs, outputs), schedules.OneShot(0.5))
    wrapper = wrappers.wrapped_layers(model)[0]
    fit(trainer_for(model, loss), (x, y), epochs=2)
    assert [int(calls) for calls in counter.calls] == [6 * inference, 6]
    assert int(wrapper.pruning_step) == 6


def test_the_adversary_leaves_batch_norm_and_wrappers_alone():
    x, y = images(16)
    model = pruned_conv_model()
    twin = tf_keras.models.clone_model(conv_model())
    twin.set_weights(wrappers.bare(model).get_weights())
    trainer = trainer_for(model, optimizer=tf_keras.optimizers.SGD(0.0))
    adversary = trainer._adversary.perturb(
        trainer._inference, tf.constant(x), tf.constant(y), tf.constant([0, 1])
    )
    twin(tf.concat([x, adversary], 0), training=True)  # the one pass that may move the averages
    fit(trainer, (x, y), epochs=1)
    for name in ("moving_mean", "moving_variance"):
        expected = getattr(twin.get_layer("norm"), name)
        np.testing.assert_allclose(getattr(model.get_layer("norm"), name), expected, atol=1e-5)


def test_training_makes_the_network_robust():
    x, y = blobs(192)
    trainer = trainer_for(dense_model(), optimizer=tf_keras.optimizers.SGD(0.05, momentum=0.9))
    before = trainer.evaluate(x, y, verbose=0, return_dict=True)
    fit(trainer, (x, y), epochs=25)
    after = trainer.evaluate(x, y, verbose=0, return_dict=True)
    assert after["clean_accuracy"] > 0.85
    assert after["adversarial_accuracy"] > before["adversarial_accuracy"] + 0.3


def test_predict_and_call_are_those_of_the_model():
    x, _ = blobs(20)
    model = dense_model()
    trainer = trainer_for(model)
    assert trainer.model is model
    np.testing.assert_allclose(trainer.predict(x, verbose=0), model(x), rtol=1e-6)
    np.testing.assert_array_equal(trainer(x), model(x))


def trained(make, data, **options):
    tf_keras.utils.set_random_seed(3)
    trainer = make()
    fit(trainer, data, **options)
    return trainer.model


def weights_after(make, data, **options):
    return trained(make, data, **options).get_weights()


def assert_same(left, right, **tolerance):
    for one, other in zip(left, right, strict=True):
        if tolerance:
            np.testing.assert_allclose(one, other, **tolerance)
        else:
            np.testing.assert_array_equal(one, other)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    data = images(48)
    first = weights_after(lambda: trainer_for(pruned_conv_model(), "Madry"), data)
    again = weights_after(lambda: trainer_for(pruned_conv_model(), "Madry"), data)
    other = weights_after(lambda: trainer_for(pruned_conv_model(), "Madry", seed=1), data)
    assert_same(first, again)
    assert any(np.any(a != b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "options", [{"steps_per_execution": 3}, {"run_eagerly": True}, {"jit_compile": True}], ids=str
)
def test_ways_to_run_agree(options):
    data = images(48)

    def make(**compile_options):
        trainer = AdversarialTraining(pruned_conv_model(), attack=PGD, loss=losses.Madry())
        trainer.compile(tf_keras.optimizers.SGD(0.1, momentum=0.9), **compile_options)
        return trainer

    plain = trained(make, data, epochs=1)
    other = trained(lambda: make(**options), data, epochs=1)
    assert_same(plain.get_weights(), other.get_weights(), atol=1e-3)
    assert sparsities(other) == sparsities(plain)
    assert [int(w.pruning_step) for w in wrappers.wrapped_layers(other)] == [3, 3]


def test_sample_weights_and_class_weights_weigh_examples():
    x, y = blobs(32)

    def after(data=(x, y), **options):
        return weights_after(lambda: trainer_for(dense_model()), data, epochs=1, **options)

    plain = after()
    weights = np.where(y == 1, 3.0, 0.5).astype("float32")
    by_sample = after(sample_weight=weights)
    assert any(np.any(np.abs(a - b) > 1e-3) for a, b in zip(by_sample, plain, strict=True))
    assert_same(by_sample, after(class_weight={0: 0.5, 1: 3.0, 2: 0.5}), atol=1e-6)
    assert_same(after(sample_weight=np.ones(32)), plain, atol=1e-6)
    assert_same(after((x, np.eye(3, dtype="float32")[y])), plain, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains(policy):
    tf_keras.mixed_precision.set_global_policy(policy)
    try:
        model = pruned_conv_model()
        trainer = trainer_for(model)
        if policy == "mixed_float16":
            assert isinstance(trainer.optimizer, tf_keras.mixed_precision.LossScaleOptimizer)
        history = fit(trainer, images(96), epochs=1).history
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    assert np.isfinite(history["loss"]).all()
    moved = np.abs(model.layers[-1].layer.bias.numpy())
    assert moved.max() > 1e-3
    assert sparsities(model) == [pytest.approx(0.75, abs=0.03)] * 2
    assert_zeros_equal_masks(model)


def test_replicas_train_to_the_same_masks():
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    strategy = tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    assert strategy.num_replicas_in_sync == 2
    tf_keras.utils.set_random_seed(3)
    with strategy.scope():
        model = pruned_conv_model()
        trainer = trainer_for(model)
    fit(trainer, images(48))
    assert [int(w.pruning_step.numpy()) for w in wrappers.wrapped_layers(model)] == [6, 6]
    assert sparsities(model) == [pytest.approx(0.75, abs=0.03)] * 2
    for weight, mask in wrappers.pruned_variables(model):
        values = [value.numpy() for value in strategy.experimental_local_results(weight)]
        masks = [value.numpy() for value in strategy.experimental_local_results(mask)]
        assert len(values) == len(masks) == 2
        np.testing.assert_array_equal(masks[0], masks[1])
        np.testing.assert_array_equal(values[0], values[1])
        np.testing.assert_array_equal(values[0] == 0, masks[0] == 0)


def test_two_replicas_take_the_step_of_one_device():
    """TRADES on a linear start: the gradient of the batch is the mean over both halves."""
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    x, y = blobs(32)

    def after(scope):
        tf_keras.utils.set_random_seed(3)
        with scope:
            model = pruning.add_regularizers(dense_model(), regularizers.TSCNC(1e-3, 1e-2))
            attack = attacks.PGD(epsilon=0.1, steps=2, objective="cross_entropy", start="none")
            trainer = AdversarialTraining(model, attack=attack, loss=losses.Madry())
            trainer.compile(tf_keras.optimizers.SGD(0.1))
        trainer.fit(x, y, batch_size=32, verbose=0)
        return model.get_weights()

    strategy = tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    one = after(tf.distribute.get_strategy().scope())
    assert_same(one, after(strategy.scope()), atol=1e-5)


def test_a_checkpoint_written_at_any_moment_holds_the_zeros_of_its_masks(tmp_path):
    model = pruned_conv_model()
    trainer = trainer_for(model)
    checkpoint = tf_keras.callbacks.ModelCheckpoint(
        str(tmp_path / "{batch:02d}.weights.h5"), save_freq=1, save_weights_only=True
    )
    trainer.fit(
        *images(96),
        batch_size=16,
        verbose=0,
        callbacks=[checkpoint, *callbacks.pruning_callbacks()],
    )
    files = sorted(tmp_path.iterdir())
    assert len(files) == 6
    twin = trainer_for(pruned_conv_model())
    seen = []
    for file in files:
        twin.load_weights(file)
        assert_zeros_equal_masks(twin.model)
        seen.append(sparsities(twin.model)[0])
    assert seen[0] < seen[-1] == pytest.approx(0.75, abs=0.03)


def test_plain_fit_is_masked_by_the_callback(tmp_path):
    model = pruned_conv_model()
    model.compile("sgd", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    checkpoint = tf_keras.callbacks.ModelCheckpoint(
        str(tmp_path / "{batch:02d}.weights.h5"), save_freq=1, save_weights_only=True
    )
    model.fit(
        *images(96),
        batch_size=16,
        verbose=0,
        callbacks=[*callbacks.pruning_callbacks(), checkpoint],
    )
    twin = pruned_conv_model()
    for file in sorted(tmp_path.iterdir()):
        twin.load_weights(file)
        assert_zeros_equal_masks(twin)


def test_averaged_weights_are_masked_when_training_ends():
    model = pruned_conv_model()
    trainer = trainer_for(model, optimizer=tf_keras.optimizers.SGD(0.1, use_ema=True))
    fit(trainer, images(96))
    assert sparsities(model) == [pytest.approx(0.75, abs=0.03)] * 2
    assert_zeros_equal_masks(model)


CONTINUE = """
import sys
import numpy as np, tf_keras
import tscnc_tf as tscnc
x, y = np.load(sys.argv[1]).values()
with tscnc.pruning.prune_scope():
    trainer = tf_keras.models.load_model(sys.argv[2])
trainer.fit(x, y, batch_size=16, verbose=0, shuffle=False,
            callbacks=tscnc.callbacks.pruning_callbacks())
np.savez(sys.argv[3], *trainer.model.get_weights())
print(repr(trainer.attack), repr(trainer.robust_loss), trainer.seed)
"""


def test_training_goes_on_in_a_fresh_process_bit_for_bit(tmp_path):
    x, y = images(48)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    trainer = trainer_for(pruned_conv_model(end_step=5), seed=7)
    fit(trainer, (x, y), epochs=1)
    trainer.save(tmp_path / "half.keras")
    fit(trainer, (x, y), epochs=1)
    printed = fresh_process(
        CONTINUE, tmp_path / "data.npz", tmp_path / "half.keras", tmp_path / "end.npz"
    )
    assert printed.strip() == f"{PGD!r} {LOSSES['TRADES']!r} 7"
    with np.load(tmp_path / "end.npz") as end:
        assert_same(trainer.model.get_weights(), list(end.values()))


class Recording(schedules.ConditionGated):
    """A gate that notes when it is told something."""

    def update(self, condition_number, step):
        super().update(condition_number, step)
        seen_steps.append(step)


seen_steps = []


@pytest.mark.parametrize(("per_execution", "expected"), [(1, [0, 4, 8, 12]), (3, [0, 6, 12])])
def test_the_condition_gate_is_fed_by_steps_across_short_epochs(per_execution, expected):
    seen_steps.clear()
    gate = Recording(schedules.CosineSparsity(0.0, 0.75, 1, 6, 1), 1e9)
    model = pruning.prune(dense_model(), gate)
    trainer = trainer_for(model, steps_per_execution=per_execution)
    feed = callbacks.pruning_callbacks(condition_frequency=4)
    trainer.fit(*blobs(48), batch_size=16, epochs=4, verbose=0, callbacks=feed)
    assert seen_steps == expected


def test_a_gate_that_came_back_as_one_per_layer_is_still_one():
    def gate():
        return schedules.ConditionGated(schedules.CosineSparsity(0.0, 0.75, 1, 50, 1), 20.0)

    model = pruning.prune(dense_model(), gate())
    for wrapper in wrappers.wrapped_layers(model):
        wrapper.pruning_schedule = wrapper.pruning_obj._pruning_schedule = gate()
    hidden = wrappers.wrapped_layers(model)[0].layer
    hidden.kernel.assign(hidden.kernel * np.logspace(0, -3, 8)[np.newaxis])
    fit(trainer_for(model, optimizer=tf_keras.optimizers.SGD(0.0)), blobs(48), epochs=1)
    gates = [wrapper.pruning_schedule for wrapper in wrappers.wrapped_layers(model)]
    assert [g.is_open for g in gates] == [False, False]
    assert sparsities(model) == [0.0, 0.0]


def test_a_layer_called_twice_still_counts_optimizer_steps():
    inputs = tf_keras.Input((6,))
    twice = tf_keras.layers.Dense(6, name="twice")
    outputs = tf_keras.layers.Dense(3, name="once")(twice(tf_keras.layers.ReLU()(twice(inputs))))
    model = pruning.prune(tf_keras.Model(inputs, outputs), schedules.OneShot(0.5, 3))
    fit(trainer_for(model), blobs(48), epochs=2)
    assert [int(wrapper.pruning_step) for wrapper in wrappers.wrapped_layers(model)] == [6, 6]


def test_the_adversary_meets_masked_weights_only():
    x, _ = blobs(8)
    model = pruning.prune(dense_model(), schedules.OneShot(0.5))
    for weight, mask in wrappers.pruned_variables(model):
        mask.assign(np.resize([0.0, 1.0], mask.shape))
        weight.assign(tf.ones_like(weight))
    logits = _keras.inference(model)(x)
    np.testing.assert_array_equal(logits, model(x, training=False))
    assert_zeros_equal_masks(model)


def test_the_condition_gate_is_fed_and_holds():
    gate = schedules.ConditionGated(schedules.CosineSparsity(0.0, 0.75, 1, 6, 1), 1.0)
    model = pruning.prune(conv_model(), gate)
    seen = []

    class Watch(tf_keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(sparsities(self.model)[1])

    trainer_for(model).fit(
        *images(96), batch_size=16, verbose=0, callbacks=[*callbacks.pruning_callbacks(), Watch()]
    )
    assert not gate.is_open
    assert seen[:5] == [0.0] * 5, "no network is better conditioned than 1"
    assert seen[5] == pytest.approx(0.75, abs=0.03), "the end is the end"


def test_the_logger_writes_what_numpy_measures():
    model = pruned_conv_model()
    history = (
        trainer_for(model)
        .fit(
            *images(96),
            batch_size=16,
            verbose=0,
            callbacks=callbacks.pruning_callbacks(log_kernels=True),
        )
        .history
    )
    kernel = model.layers[-1].layer.kernel.numpy()
    assert history["sparsity/logits"][-1] == pytest.approx(np.mean(kernel == 0))
    values = np.linalg.svd(kernel.astype("float64"), compute_uv=False)
    expected = values[0] / values[-1] if values[-1] > 1e-6 * values[0] else np.inf
    assert history["condition_number/logits"][-1] == pytest.approx(expected)
    assert history["condition_number"][-1] >= expected


def test_the_step_compiles_to_stablehlo_without_state_of_its_own():
    x, y = images(8)
    trainer = trainer_for(pruned_conv_model())
    for wrapper in wrappers.wrapped_layers(trainer.model):
        wrapper.pruning_step.assign(0)
    trainer.optimizer.build(trainer.model.trainable_variables)
    step = tf.function(lambda x, y: trainer.train_step((x, y)), jit_compile=True)
    example = (tf.constant(x), tf.constant(y))
    text = step.experimental_get_compiler_ir(*example)(stage="stablehlo")
    assert "stablehlo" in text
    assert "stablehlo.rng " not in text, "all randomness comes from the seed"
    before = trainer.model.get_weights()
    step(*example)
    assert any(np.any(a != b) for a, b in zip(before, trainer.model.get_weights(), strict=True))


def test_bad_input_is_named():
    x, y = blobs(16)
    build = AdversarialTraining
    loss = losses.TRADES()
    soft = tf_keras.Sequential([tf_keras.layers.Dense(3, activation="softmax", input_shape=(6,))])
    single = tf_keras.Sequential([tf_keras.layers.Dense(1, input_shape=(6,))])
    inputs = tf_keras.Input((6,))
    functional = tf_keras.Model(inputs, tf.nn.softmax(tf_keras.layers.Dense(3)(inputs)))
    custom = attacks.Custom(function=lambda m, x, y: x, epsilon=0.1)

    def trainer():
        return trainer_for(dense_model())

    cases = [
        (lambda: build(dense_model(keras), attack=PGD, loss=loss), TypeError, "Keras 3 model"),
        (lambda: build("model", attack=PGD, loss=loss), TypeError, "tf_keras model, got str"),
        (lambda: build(dense_model(), attack="pgd", loss=loss), TypeError, "attack must be one of"),
        (lambda: build(dense_model(), attack=custom, loss=loss), TypeError, "follow the gradient"),
        (
            lambda: build(dense_model(), attack=attacks.PGD(epsilon=0.1, targeted=True), loss=loss),
            ValueError,
            "attack must be untargeted",
        ),
        (lambda: trainer().save("folder"), ValueError, "must end in .keras"),
        (lambda: build(functional, attack=PGD, loss=loss), ValueError, "ends in a softmax"),
        (lambda: build(dense_model(), attack=PGD, loss="trades"), TypeError, "loss must be one of"),
        (lambda: build(soft, attack=PGD, loss=loss), ValueError, "ends in a softmax"),
        (lambda: build(single, attack=PGD, loss=loss), ValueError, "2 classes or more"),
        (
            lambda: build(dense_model(), attack=PGD, loss=loss, seed=-1),
            ValueError,
            "seed must be >= 0",
        ),
        (lambda: trainer().compile("sgd", "mse"), ValueError, "loss must be given to Adv"),
        (lambda: trainer().fit(x[:0], y[:0]), ValueError, "at least one example"),
        (lambda: trainer().fit(x * 255, y), ValueError, "inside the attack's bounds"),
        (lambda: trainer().fit(x * np.nan, y), ValueError, "inside the attack's bounds"),
        (lambda: trainer().fit(x, y + 1), ValueError, "labels from 0 to 2.*from 1 to 3"),
        (lambda: trainer().fit(x, verbose=0), ValueError, "y must be given"),
        (lambda: trainer().fit((x * 1).astype("uint8"), y, verbose=0), TypeError, "float tensor"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


def test_bad_batches_of_a_pipeline_are_refused_in_the_graph():
    x, y = blobs(16)
    for bad in ((x * 255, y), (x, y + 1)):
        data = tf.data.Dataset.from_tensor_slices(bad).batch(8)
        with pytest.raises(tf.errors.InvalidArgumentError, match="must"):
            trainer_for(dense_model()).fit(data, verbose=0)
