"""AdversarialTraining: what a step computes, and that it behaves as any Keras model does."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, blobs, conv_model, dense_model, fresh_process, images

from tscnc_tf import _keras, attacks, callbacks, losses, pruning, regularizers, schedules
from tscnc_tf._keras import cloning, flavours, masks, wrappers
from tscnc_tf.training import AdversarialTraining
from tscnc_tf.training.trainer import LOGS

PGD = attacks.PGD(epsilon=0.1, step_size=0.04, steps=2)


def teacher(x):
    """A network that is sure of the class whose pair of inputs is the largest."""
    return 4.0 * (x[:, :3] + x[:, 3:])


LOSSES = {
    "TRADES": losses.TRADES(6.0),
    "Madry": losses.Madry(),
    "MART": losses.MART(5.0),
    "RSLAD": losses.RSLAD(teacher),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A Keras and an engine that prunes its models."""

    flavour: str
    engine: str

    @property
    def library(self):
        return FLAVOURS[self.flavour]

    def sgd(self, rate=0.1, momentum=0.9, **options):
        return self.library.optimizers.SGD(rate, momentum=momentum, **options)

    def dense(self):
        return dense_model(self.library)

    def prune(self, model, schedule):
        return pruning.prune(model, schedule, engine=self.engine)

    def pruned_conv(self, end_step=6):
        model = pruning.add_regularizers(conv_model(self.library), regularizers.TSCNC(1e-4, 1e-2))
        return self.prune(model, schedules.CosineSparsity(0.0, 0.75, 1, end_step, frequency=2))


# Some tests stop before the schedule does, and are warned of it.
SHORT = pytest.mark.filterwarnings("ignore:.*does not reach its sparsity")
KINDS = [Kind("tf_keras", "tfmot"), Kind("tf_keras", "masks"), Kind("keras", "masks")]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind.flavour}-{kind.engine}")
def kind(request):
    return request.param


def trainer_for(model, loss="TRADES", optimizer=None, seed=0, **options):
    trainer = AdversarialTraining(model, attack=PGD, loss=LOSSES[loss], seed=seed)
    library = FLAVOURS[_keras.flavour(model)]
    optimizer = optimizer or library.optimizers.SGD(0.1, momentum=0.9)
    trainer.compile(optimizer=optimizer, **options)
    return trainer


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
    found = masks.masked_variables(model)
    return [1 - float(tf.reduce_mean(tf.cast(mask, tf.float64))) for _, mask in found]


def pruning_steps(model):
    """The steps that the wrappers, or the pruner, have counted."""
    pruners = [pruner.steps for pruner in masks.pruners(model)]
    return pruners or [int(w.pruning_step.numpy()) for w in wrappers.wrapped_layers(model)]


def assert_zeros_equal_masks(model):
    for weight, mask in masks.masked_variables(model):
        np.testing.assert_array_equal(np.asarray(weight) == 0, np.asarray(mask) == 0)


def cross_entropy(logits, y):
    logits = np.asarray(logits, np.float64)
    logs = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    return -logs[np.arange(len(y)), y], logs


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_descends_the_loss_of_its_paper(loss, flavour):
    """One SGD step against gradients of the loss written out here, on the same adversary."""
    x, y = blobs(32)
    library = FLAVOURS[flavour]
    model = pruning.add_regularizers(dense_model(library), regularizers.TSCNC(1e-3, 1e-2))
    before = model.get_weights()
    trainer = trainer_for(model, loss, library.optimizers.SGD(0.1))
    adversary = trainer._adversary
    target = teacher(x) if loss == "RSLAD" else None
    x_adversarial = adversary.perturb(
        model, tf.constant(x), tf.constant(y), tf.constant([0, 1]), clean_logits=target
    )
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
        elif loss == "RSLAD":
            soft = tf.nn.softmax(target)
            to_clean = tf.reduce_sum(soft * (tf.math.log(soft) - clean), 1)
            to_adversarial = tf.reduce_sum(soft * (tf.math.log(soft) - adversarial), 1)
            value = to_clean / 6.0 + 5.0 * to_adversarial / 6.0
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


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_logs_add_up(loss, flavour):
    x, y = blobs(32)
    library = FLAVOURS[flavour]
    model = pruning.add_regularizers(dense_model(library), regularizers.TSCNC(1e-3, 1e-2))
    penalty = float(tf.add_n(model.losses))
    expected, _ = cross_entropy(model(x), y)
    trainer = trainer_for(model, loss, library.optimizers.SGD(0.0), metrics=["accuracy"])
    history = fit(trainer, (x, y), epochs=1, batch_size=32, validation_data=(x, y)).history
    evaluated = trainer.evaluate(x, y, verbose=0)
    assert len(evaluated) == len(LOGS) + 1
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


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_logs_add_up_also_with_a_smaller_last_batch(flavour):
    x, y = blobs(17)
    model = dense_model(FLAVOURS[flavour], kernel_regularizer="l2")
    sgd = FLAVOURS[flavour].optimizers.SGD(1.0)  # the penalty changes fast
    logs = fit(trainer_for(model, "TRADES", sgd), (x, y), epochs=1, batch_size=8).history
    parts = sum(logs[name][0] for name in ("clean_loss", "robust_loss", "penalty"))
    assert logs["loss"][0] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_condition_penalty_in_every_second_step_is_twice_as_large_there(flavour):
    library, (x, y) = FLAVOURS[flavour], blobs(16)

    def trained(factor, every, rate, steps):
        library.utils.set_random_seed(0)
        penalty = regularizers.ConditionNumber(factor, every=every)
        model = pruning.add_regularizers(dense_model(library), penalty)
        trainer = trainer_for(model, optimizer=library.optimizers.SGD(rate))
        logs = []
        for _ in range(steps):
            trainer.reset_metrics()
            logs.append(trainer.train_on_batch(x, y, return_dict=True)["penalty"])
        return trainer, logs

    trainer, logs = trained(0.5, every=2, rate=0.0, steps=3)
    full = float(tf.add_n(trainer.model.losses))
    assert logs == pytest.approx([2 * full, 0.0, 2 * full], rel=1e-5)
    assert trainer.evaluate(x, y, verbose=0, return_dict=True)["penalty"] == pytest.approx(full)
    rarely, _ = trained(0.5, every=2, rate=0.1, steps=1)
    always, _ = trained(1.0, every=1, rate=0.1, steps=1)
    for mine, other in zip(rarely.get_weights(), always.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-7)


class Counter:
    """Counts its calls in training and in inference mode, as they run."""

    def build(self, _):
        self.calls = [tf.Variable(0, trainable=False, dtype=tf.int64) for _ in range(2)]

    def call(self, inputs, training=False):
        self.calls[bool(training)].assign_add(1)
        return tf.identity(inputs)


@pytest.mark.parametrize(
    ("loss", "inference"), [("TRADES", 3), ("Madry", 3), ("MART", 2), ("RSLAD", 2)]
)
def test_a_step_takes_one_forward_pass_in_training_mode(loss, inference, kind):
    x, y = blobs(48)
    layers = kind.library.layers
    inputs = kind.library.Input((6,))
    counter = type("Counting", (Counter, layers.Layer), {})()
    outputs = layers.Dense(3)(counter(inputs))
    model = kind.prune(kind.library.Model(inputs, outputs), schedules.OneShot(0.5))
    trainer = trainer_for(model, loss)
    for calls in counter.calls:  # Keras 3 counts one for the shapes, and the trainer has looked
        calls.assign(0)
    fit(trainer, (x, y), epochs=2)
    # And one in the first batch of all, to see whether the network returns logits.
    assert [int(calls) for calls in counter.calls] == [6 * inference + 1, 6]
    assert pruning_steps(model) == [6]


@SHORT
def test_the_adversary_leaves_batch_norm_and_wrappers_alone(kind):
    x, y = images(16)
    model = kind.pruned_conv(end_step=2)
    twin = conv_model(kind.library)
    twin.set_weights(cloning.bare(model).get_weights())
    trainer = trainer_for(model, optimizer=kind.sgd(0.0))
    adversary = trainer._adversary.perturb(
        trainer._inference, tf.constant(x), tf.constant(y), tf.constant([0, 1])
    )
    twin(tf.concat([x, adversary], 0), training=True)  # the one pass that may move the averages
    fit(trainer, (x, y), epochs=1)
    for name in ("moving_mean", "moving_variance"):
        expected = getattr(twin.get_layer("norm"), name)
        np.testing.assert_allclose(getattr(model.get_layer("norm"), name), expected, atol=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_training_makes_the_network_robust(flavour):
    x, y = blobs(192)
    library = FLAVOURS[flavour]
    optimizer = library.optimizers.SGD(0.05, momentum=0.9)
    trainer = trainer_for(dense_model(library), optimizer=optimizer)
    before = trainer.evaluate(x, y, verbose=0, return_dict=True)
    fit(trainer, (x, y), epochs=25)
    after = trainer.evaluate(x, y, verbose=0, return_dict=True)
    assert after["clean_accuracy"] > 0.85
    assert after["adversarial_accuracy"] > before["adversarial_accuracy"] + 0.3


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_predict_and_call_are_those_of_the_model(flavour):
    x, _ = blobs(20)
    model = dense_model(FLAVOURS[flavour])
    trainer = trainer_for(model)
    assert isinstance(trainer, AdversarialTraining)
    assert isinstance(trainer, FLAVOURS[flavour].Model)
    assert trainer.model is model
    np.testing.assert_allclose(trainer.predict(x, verbose=0), model(x), rtol=1e-6)
    np.testing.assert_array_equal(trainer(x), model(x))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_trainers_are_pickled_and_may_have_subclasses(flavour):
    x, y = blobs(20)
    trainer = trainer_for(dense_model(FLAVOURS[flavour]))
    trainer.fit(x, y, verbose=0)
    copy = pickle.loads(pickle.dumps(trainer))
    assert type(copy) is type(trainer) and isinstance(copy, AdversarialTraining)
    np.testing.assert_array_equal(copy(x), trainer(x))
    arguments = {"attack": trainer.attack, "loss": trainer.robust_loss}
    made = type("Mine", (type(trainer),), {})(trainer.model, **arguments)
    assert type(made).__name__ == "Mine" and isinstance(made, FLAVOURS[flavour].Model)
    with pytest.raises(TypeError, match=r"Other derives from Adv.*derive it from tscnc_tf\..*Trai"):
        type("Other", (AdversarialTraining,), {})(trainer.model, **arguments)


def trained(make, data, **options):
    tf_keras.utils.set_random_seed(3)  # of Python, NumPy and TensorFlow, so of both Kerases
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


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(kind):
    data = images(48)
    first = weights_after(lambda: trainer_for(kind.pruned_conv(), "Madry"), data)
    again = weights_after(lambda: trainer_for(kind.pruned_conv(), "Madry"), data)
    other = weights_after(lambda: trainer_for(kind.pruned_conv(), "Madry", seed=1), data)
    assert_same(first, again)
    assert any(np.any(a != b) for a, b in zip(first, other, strict=True))


@SHORT
def test_ways_to_run_agree(kind):
    def after(**options):
        def make():
            attack = attacks.PGD(epsilon=0.1, steps=1)
            trainer = AdversarialTraining(kind.pruned_conv(), attack=attack, loss=losses.Madry())
            trainer.compile(kind.sgd(), **options)
            return trainer

        return trained(make, images(48), epochs=1)

    plain = after()
    for options in ({"steps_per_execution": 3}, {"run_eagerly": True}, {"jit_compile": True}):
        other = after(**options)
        assert_same(plain.get_weights(), other.get_weights(), atol=1e-3)
        assert sparsities(other) == sparsities(plain)
        assert set(pruning_steps(other)) == {3}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_sample_weights_and_class_weights_weigh_examples(flavour):
    (x, y), library = blobs(32), FLAVOURS[flavour]
    trainer = trainer_for(dense_model(library), optimizer=library.optimizers.SGD(0.1))
    start = trainer.model.get_weights()

    def after(data=(x, y), **options):
        trainer.model.set_weights(start)
        trainer.optimizer.iterations.assign(0)  # of which the adversary's seeds are made
        fit(trainer, data, epochs=1, **options)
        return trainer.model.get_weights()

    plain = after()
    weights = np.where(y == 1, 3.0, 0.5).astype("float32")
    by_sample = after(sample_weight=weights)
    assert any(np.any(np.abs(a - b) > 1e-3) for a, b in zip(by_sample, plain, strict=True))
    assert_same(by_sample, after(class_weight={0: 0.5, 1: 3.0, 2: 0.5}), atol=1e-6)
    assert_same(after(sample_weight=np.ones(32)), plain, atol=1e-6)
    assert_same(after((x, np.eye(3, dtype="float32")[y])), plain, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains(policy, kind):
    # The two Kerases keep a policy each, and not in the same place.
    mixed_precision = kind.library.mixed_precision
    set_policy = (
        getattr(mixed_precision, "set_global_policy", None) or kind.library.config.set_dtype_policy
    )
    set_policy(policy)
    try:
        model = kind.pruned_conv()
        trainer = trainer_for(model)
        if policy == "mixed_float16":
            assert type(trainer.optimizer).__name__.startswith("LossScaleOptimizer")
        history = fit(trainer, images(96), epochs=1).history
    finally:
        set_policy("float32")
    assert np.isfinite(history["loss"]).all()
    last = model.layers[-1]
    moved = np.abs(np.asarray(getattr(last, "layer", last).bias))
    assert moved.max() > 1e-3
    assert sparsities(model) == [pytest.approx(0.75, abs=0.03)] * 2
    assert_zeros_equal_masks(model)


def two_devices():
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    strategy = tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    assert strategy.num_replicas_in_sync == 2
    return strategy


def test_replicas_train_to_the_same_masks(kind):
    strategy = two_devices()
    tf_keras.utils.set_random_seed(3)
    with strategy.scope():
        model = kind.pruned_conv()
        trainer = trainer_for(model)
    fit(trainer, images(48))
    assert set(pruning_steps(model)) == {6}
    assert sparsities(model) == [pytest.approx(0.75, abs=0.03)] * 2
    for weight, mask in masks.masked_variables(model):
        copies = strategy.experimental_local_results(flavours.tensor_variable(weight))
        values = [value.numpy() for value in copies]
        masked_out = [value.numpy() == 0 for value in strategy.experimental_local_results(mask)]
        assert len(values) == len(masked_out) == 2
        np.testing.assert_array_equal(masked_out[0], masked_out[1])
        np.testing.assert_array_equal(values[0], values[1])
        np.testing.assert_array_equal(values[0] == 0, masked_out[0])


def test_two_replicas_take_the_steps_of_one_device(kind):
    """On a linear start: the gradient of the batch is the mean over both halves."""
    x, y = blobs(32)

    def after(scope):
        tf_keras.utils.set_random_seed(3)
        with scope:
            model = pruning.add_regularizers(kind.dense(), regularizers.TSCNC(1e-3, 1e-2))
            model = kind.prune(model, schedules.CosineSparsity(0.0, 0.75, 1, 3, 1))
            attack = attacks.PGD(epsilon=0.1, steps=2, objective="cross_entropy", start="none")
            trainer = AdversarialTraining(model, attack=attack, loss=losses.Madry())
            trainer.compile(kind.sgd())
        fit(trainer, (x, y), epochs=3, batch_size=32)
        found = [np.asarray(tf.cast(mask, tf.bool)) for _, mask in masks.masked_variables(model)]
        return cloning.bare(model).get_weights(), found

    one, masks_of_one = after(tf.distribute.get_strategy().scope())
    two, masks_of_two = after(two_devices().scope())
    assert_same(one, two, atol=1e-5)
    assert_same(masks_of_one, masks_of_two)


def test_xla_under_a_strategy_of_one_device(kind):
    def after(scope):
        tf_keras.utils.set_random_seed(3)
        with scope:
            model = kind.prune(kind.dense(), schedules.CosineSparsity(0.0, 0.75, 1, 3, 1))
            attack = attacks.PGD(epsilon=0.1, steps=1)
            trainer = AdversarialTraining(model, attack=attack, loss=losses.Madry())
            trainer.compile(kind.sgd(), jit_compile=True)
        fit(trainer, blobs(32), epochs=2, batch_size=16)
        return cloning.bare(model).get_weights()

    plain = after(contextlib.nullcontext())
    assert np.mean(plain[0] == 0) > 0.5
    for strategy in (
        tf.distribute.OneDeviceStrategy("CPU:0"),
        tf.distribute.MirroredStrategy(["CPU:0"]),
    ):
        assert_same(plain, after(strategy.scope()), atol=1e-6)


@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_xla_on_several_cpu_devices_is_refused(library):
    with two_devices().scope():
        model = dense_model(library)
        trainer = trainer_for(model, jit_compile=True)
        model.compile("sgd", "mse", jit_compile=True)
    before = model.get_weights()
    for use in (trainer.fit, trainer.evaluate):
        with pytest.raises(ValueError, match=r"jit_compile must be False on several CPU .* with 2"):
            use(*blobs(32), verbose=0)
    assert_same(before, model.get_weights())
    trainer.jit_compile = False
    trainer.fit(*blobs(32), verbose=0)
    # Of any Keras model: once this is trained, the refusal may go.
    x, _ = blobs(32)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"resource .* located in device"):
        model.fit(x, np.zeros((32, 3), np.float32), verbose=0)


def test_a_checkpoint_written_at_any_moment_holds_the_zeros_of_its_masks(tmp_path, kind):
    model = kind.pruned_conv()
    trainer = trainer_for(model)
    checkpoint = kind.library.callbacks.ModelCheckpoint(
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
    twin = trainer_for(kind.pruned_conv())
    twin.optimizer.build(twin.model.trainable_variables)  # Keras 3 loads into what exists
    seen = []
    for file in files:
        twin.load_weights(file)
        assert_zeros_equal_masks(twin.model)
        seen.append(sparsities(twin.model)[0])
    assert seen[0] < seen[-1] == pytest.approx(0.75, abs=0.03)


def test_plain_fit_is_masked_after_every_batch(tmp_path, kind):
    model = kind.pruned_conv()
    loss = kind.library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, jit_compile=False)
    checkpoint = kind.library.callbacks.ModelCheckpoint(
        str(tmp_path / "{batch:02d}.weights.h5"), save_freq=1, save_weights_only=True
    )
    model.fit(
        *images(96),
        batch_size=16,
        verbose=0,
        callbacks=[*callbacks.pruning_callbacks(), checkpoint],
    )
    twin = kind.pruned_conv()
    for file in sorted(tmp_path.iterdir()):
        twin.load_weights(file)
        assert_zeros_equal_masks(twin)


def test_averaged_weights_are_masked_when_training_ends(kind):
    model = kind.pruned_conv()
    trainer = trainer_for(model, optimizer=kind.sgd(0.1, 0.0, use_ema=True))
    fit(trainer, images(96))
    assert sparsities(model) == [pytest.approx(0.75, abs=0.03)] * 2
    assert_zeros_equal_masks(model)


CONTINUE = """
import importlib, pathlib, sys
import numpy as np
import tscnc_tf as tscnc
folder = pathlib.Path(sys.argv[1])
x, y = np.load(folder / "data.npz").values()
for name in sys.argv[2:]:
    library = importlib.import_module(name.partition("-")[0])
    with tscnc.pruning.prune_scope():
        trainer = library.models.load_model(folder / f"{name}.keras")
    trainer.fit(x, y, batch_size=16, verbose=0, shuffle=False,
                callbacks=tscnc.callbacks.pruning_callbacks())
    np.savez(folder / f"{name}.npz", *trainer.model.get_weights())
    print(repr(trainer.attack), repr(trainer.robust_loss), trainer.seed)
"""


@SHORT
def test_training_goes_on_in_a_fresh_process_bit_for_bit(tmp_path):
    x, y = images(48)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    trainers = {}
    for kind in KINDS:
        name = f"{kind.flavour}-{kind.engine}"
        trainers[name] = trainer = trainer_for(kind.pruned_conv(end_step=5), seed=7)
        fit(trainer, (x, y), epochs=1)
        trainer.save(tmp_path / f"{name}.keras")
        fit(trainer, (x, y), epochs=1)
    printed = fresh_process(CONTINUE, tmp_path, *trainers)
    assert printed.splitlines() == [f"{PGD!r} {LOSSES['TRADES']!r} 7"] * 3
    for name, trainer in trainers.items():
        with np.load(tmp_path / f"{name}.npz") as end:
            assert_same(trainer.model.get_weights(), list(end.values()))


class Recording(schedules.ConditionGated):
    """A gate that notes when it is told something."""

    def update(self, condition_number, step):
        super().update(condition_number, step)
        seen_steps.append(step)


seen_steps = []


@pytest.mark.parametrize(("per_execution", "expected"), [(1, [0, 4, 8, 12]), (3, [0, 6, 12])])
def test_the_condition_gate_is_fed_by_steps_across_short_epochs(per_execution, expected, kind):
    seen_steps.clear()
    gate = Recording(schedules.CosineSparsity(0.0, 0.75, 1, 6, 1), 1e9)
    model = kind.prune(kind.dense(), gate)
    trainer = trainer_for(model, steps_per_execution=per_execution)
    feed = callbacks.pruning_callbacks(condition_frequency=4)
    trainer.fit(*blobs(48), batch_size=16, epochs=4, verbose=0, callbacks=feed)
    assert seen_steps == expected


@SHORT
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


def test_a_layer_called_twice_still_counts_optimizer_steps(kind):
    layers = kind.library.layers
    inputs = kind.library.Input((6,))
    twice = layers.Dense(6, name="twice")
    outputs = layers.Dense(3, name="once")(twice(layers.ReLU()(twice(inputs))))
    model = kind.prune(kind.library.Model(inputs, outputs), schedules.OneShot(0.5, 3))
    fit(trainer_for(model), blobs(48), epochs=2)
    assert set(pruning_steps(model)) == {6}


def test_the_adversary_meets_masked_weights_only():
    """Of tfmot's wrappers, which mask in the forward pass that the adversary goes around."""
    x, _ = blobs(8)
    model = pruning.prune(dense_model(), schedules.OneShot(0.5))
    for weight, mask in masks.masked_variables(model):
        mask.assign(tf.cast(np.resize([0.0, 1.0], mask.shape), mask.dtype))
        weight.assign(tf.ones_like(weight))
    logits = _keras.inference(model)(x)
    np.testing.assert_array_equal(logits, model(x, training=False))
    assert_zeros_equal_masks(model)


def test_the_condition_gate_is_fed_and_holds(kind):
    gate = schedules.ConditionGated(schedules.CosineSparsity(0.0, 0.75, 1, 6, 1), 1.0)
    model = kind.prune(conv_model(kind.library), gate)
    seen = []

    class Watch(kind.library.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(sparsities(self.model)[1])

    trainer_for(model).fit(
        *images(96), batch_size=16, verbose=0, callbacks=[*callbacks.pruning_callbacks(), Watch()]
    )
    assert not gate.is_open
    assert seen[:5] == [0.0] * 5, "no network is better conditioned than 1"
    assert seen[5] == pytest.approx(0.75, abs=0.03), "the end is the end"


def test_the_logger_writes_what_numpy_measures(kind):
    model = kind.pruned_conv()
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
    kernel = np.asarray(cloning.bare(model).layers[-1].kernel)
    assert history["sparsity/logits"][-1] == pytest.approx(np.mean(kernel == 0))
    values = np.linalg.svd(kernel.astype("float64"), compute_uv=False)
    expected = values[0] / values[-1] if values[-1] > 1e-6 * values[0] else np.inf
    assert history["condition_number/logits"][-1] == pytest.approx(expected)
    assert history["condition_number"][-1] >= expected


def test_the_step_compiles_to_stablehlo_without_state_of_its_own(kind):
    x, y = images(8)
    trainer = trainer_for(kind.pruned_conv())
    trainer.attack = attacks.PGD(epsilon=0.1, steps=1)
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


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_bad_input_is_named(flavour):
    x, y = blobs(16)
    build = AdversarialTraining
    loss = losses.TRADES()
    library = FLAVOURS[flavour]
    inputs = library.Input((6,))

    def model(*parts):
        outputs = inputs
        for part in parts:
            outputs = part(outputs)
        return library.Model(inputs, outputs)

    soft = model(library.layers.Dense(3, activation="softmax"))
    single = model(library.layers.Dense(1))
    softmax = keras.ops.softmax if library is keras else tf.nn.softmax
    functional = model(library.layers.Dense(3), softmax)
    custom = attacks.Custom(function=lambda m, x, y: x, epsilon=0.1)

    def trainer():
        return trainer_for(dense_model(library))

    cases = [
        (lambda: build("model", attack=PGD, loss=loss), TypeError, "tf_keras model, got str"),
        (
            lambda: build(dense_model(library), attack="pgd", loss=loss),
            TypeError,
            "attack must be one of",
        ),
        (
            lambda: build(dense_model(library), attack=custom, loss=loss),
            TypeError,
            "follow the gradient",
        ),
        (
            lambda: build(
                dense_model(library), attack=attacks.PGD(epsilon=0.1, targeted=True), loss=loss
            ),
            ValueError,
            "attack must be untargeted",
        ),
        (lambda: trainer().save("folder"), ValueError, "must end in .keras"),
        (lambda: build(functional, attack=PGD, loss=loss), ValueError, "ends in a softmax"),
        (
            lambda: build(dense_model(library), attack=PGD, loss="trades"),
            TypeError,
            "loss must be one of",
        ),
        (lambda: build(soft, attack=PGD, loss=loss), ValueError, "ends in a softmax"),
        (lambda: build(single, attack=PGD, loss=loss), ValueError, "2 classes or more"),
        (
            lambda: build(dense_model(), attack=PGD, loss=loss, seed=-1),
            ValueError,
            "seed must be >= 0",
        ),
        (lambda: trainer().compile("sgd", "mse"), ValueError, "loss must be given to Adv"),
        (lambda: trainer().fit(x[:0], y[:0]), ValueError, "at least one example"),
        (lambda: trainer().fit(np.array("x"), y), ValueError, r"x must .* got shape \(\)"),
        (lambda: trainer().fit(x, np.array(1)), ValueError, r"y must .* got shape \(\)"),
        (lambda: trainer().fit(x, list(y)), TypeError, "y must be an array or tensor of labels"),
        (lambda: trainer().fit(x * 255, y), ValueError, "x must lie within bounds"),
        (lambda: trainer().fit(x * np.nan, y), ValueError, "x must lie within bounds"),
        (lambda: trainer().fit(x, y + 1), ValueError, "y must be in 0 ... 2.*from 1 to 3"),
        (lambda: trainer().fit(x, verbose=0), ValueError, "y must be given"),
        (lambda: trainer().fit((x * 1).astype("uint8"), y, verbose=0), TypeError, "x / 255"),
        (
            lambda: trainer().fit({"x": x}, y, verbose=0),
            TypeError,
            "x must be one tensor per batch, got a dict.*Wrap the model",
        ),
        (
            lambda: build(dense_model(library), attack=PGD, loss=loss).fit(x, y),
            ValueError,
            "is not compiled: call trainer.compile",
        ),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


def test_batches_whose_gradients_are_summed_up_are_attacked_by_seeds_of_their_own():
    x, y = blobs(32)
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    trainer = trainer_for(dense_model(keras), "Madry", optimizer, run_eagerly=True)
    seen = []
    perturb = trainer._perturb

    def noted(x, y, seed, *rest):
        seen.append(tuple(seed.numpy()))
        return perturb(x, y, seed, *rest)

    trainer._perturb = noted
    trainer.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert len(set(seen)) == len(seen) == 8
    assert int(optimizer.iterations) == 4


def own_model(library, classes=3, **options):
    """A subclassed network, of which no graph is known."""

    class Own(library.Model):
        def __init__(self):
            super().__init__()
            self.dense = library.layers.Dense(classes, **options)

        def call(self, x, training=None):
            return self.dense(x)

    model = Own()
    model(np.zeros((1, 6), "float32"))
    return model


def data_of(form, x, y, batch_size=8):
    """A batched dataset of tensors, or of a Python generator, which can be iterated once."""
    if form == "dataset":
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size)
    starts = range(0, len(x), batch_size)
    return ((x[i : i + batch_size], y[i : i + batch_size]) for i in starts)


def ways_in(x, y):
    """All ways to hand a batch to a trainer that ends in a step; each a function of the trainer."""
    return {
        "fit": lambda t: t.fit(x, y, verbose=0),
        "fit, dataset": lambda t: t.fit(data_of("dataset", x, y), verbose=0),
        "fit, generator": lambda t: t.fit(
            data_of("generator", x, y), steps_per_epoch=len(x) // 8, verbose=0
        ),
        "train_on_batch": lambda t: t.train_on_batch(x, y),
        "evaluate": lambda t: t.evaluate(x, y, verbose=0),
        "evaluate, dataset": lambda t: t.evaluate(data_of("dataset", x, y), verbose=0),
        "test_on_batch": lambda t: t.test_on_batch(x, y),
        "train_step": lambda t: t.train_step((tf.constant(x), tf.constant(y))),
        "test_step": lambda t: t.test_step((tf.constant(x), tf.constant(y))),
    }


RUN_AS = {"graph": {}, "XLA": {"jit_compile": True}, "eager": {"run_eagerly": True}}
run_as = pytest.mark.parametrize("how", RUN_AS)
every_flavour = pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
NOT_SHUFFLED = pytest.mark.filterwarnings("ignore:.shuffle=True. was passed")


def assert_refused(trainer, call, words):
    before = trainer.model.get_weights()
    with pytest.raises(ValueError, match=words):
        call(trainer)
    assert_same(before, trainer.model.get_weights())


WAYS = {
    "graph": list(ways_in(*blobs(8))),
    "XLA": ["fit, dataset", "test_on_batch"],
    "eager": ["fit, generator", "train_on_batch"],
}


@NOT_SHUFFLED
@run_as
@every_flavour
def test_bad_batches_are_refused_before_anything_is_changed(library, how):
    x, y = blobs(16)
    # One trainer for all ways, which share its compiled steps; a batch is its first until one is
    # taken, after all have been refused.
    trainer = trainer_for(own_model(library), **RUN_AS[how])
    for bad, words in [
        (
            (255 * x, y),
            r"x must lie within bounds=\(0.0, 1.0\), got values from .* to 2",
        ),
        ((np.where(x > 0.5, np.nan, x), y), "x must lie within .*, got values from nan to nan"),
        ((x, y + 1), "y must be in 0 ... 2, for the model has 3 outputs, got labels from 1 to 3"),
        ((x, y - 1), "y must be in 0 ... 2, .* got labels from -1 to 1"),
        ((x, 2 * np.eye(3, dtype="float32")[y]), "rows that are >= 0 and sum to 1.* from 2 to 2"),
    ]:
        for way in WAYS[how]:
            assert_refused(trainer, ways_in(*bad)[way], words)
    for way in WAYS[how]:
        ways_in(x, y)[way](trainer)


@NOT_SHUFFLED
@pytest.mark.parametrize(
    "options", [{}, {"steps_per_execution": 2}, {"jit_compile": True}], ids=str
)
@every_flavour
def test_bad_batches_are_refused_later_on_as_well(library, options):
    x, y = blobs(48)
    trainer = trainer_for(dense_model(library), **options)
    trainer.fit(data_of("dataset", x, y), verbose=0)
    steps = int(trainer.optimizer.iterations)
    bad = data_of("dataset", x, np.where(np.arange(48) < 40, y, 7))
    with pytest.raises(ValueError, match=r"got labels from .* to 7"):
        trainer.fit(bad, verbose=0)
    assert int(trainer.optimizer.iterations) == steps + 5


def probabilities(library, kind):
    layers = library.layers
    inputs = library.Input((6,))
    softmax = layers.Dense(3, activation="softmax")
    if kind == "nested":
        return library.Model(inputs, library.Sequential([library.Input((6,)), softmax])(inputs))
    if kind == "recast":
        return library.Model(inputs, layers.Activation("linear", dtype="float32")(softmax(inputs)))
    return own_model(library, activation="softmax")


@NOT_SHUFFLED
@pytest.mark.parametrize(
    ("how", "inside", "way"),
    [
        ("graph", "nested", "fit, generator"),
        ("graph", "recast", "train_on_batch"),
        ("graph", "subclassed", "test_on_batch"),
        ("XLA", "subclassed", "train_on_batch"),
        ("eager", "subclassed", "evaluate"),
        ("eager", "nested", "train_step"),
    ],
)
@every_flavour
def test_probabilities_are_refused_by_their_values(library, how, inside, way, monkeypatch):
    """In the first batch, where it is not known before what the model takes."""
    monkeypatch.setattr(losses, "require_no_probabilities", lambda *_: None)
    data = blobs(16)
    model = probabilities(library, inside)
    words = "model must return logits, but returns probabilities"
    assert_refused(trainer_for(model, **RUN_AS[how]), ways_in(*data)[way], words)
    student = trainer_for(own_model(library), **RUN_AS[how])
    student.robust_loss = losses.RSLAD(model)
    words = "teacher must return logits, but returns probabilities"
    assert_refused(student, ways_in(*data)[way], words)
    student.robust_loss = losses.RSLAD(teacher)
    ways_in(*data)[way](student)


@pytest.mark.parametrize("kind", ["nested", "recast", "subclassed"])
@every_flavour
def test_probabilities_are_refused_at_once_where_inputs_can_be_drawn(library, kind):
    model = probabilities(library, kind)
    with pytest.raises(ValueError, match="model must return logits, but returns probabilities"):
        trainer_for(model)
    with pytest.raises(ValueError, match="teacher must return logits, but returns probabilities"):
        losses.RSLAD(model)
    trainer_for(own_model(library))


@pytest.mark.parametrize("loss", LOSSES)
@run_as
@every_flavour
def test_a_single_logit_is_refused(library, how, loss):
    x, y = blobs(16)
    trainer = trainer_for(own_model(library, classes=1), loss, **RUN_AS[how])
    words = "model must return logits .* 2 classes or more, got shape .*1.* has the logits"
    for way in ("fit", "train_on_batch", "evaluate"):
        assert_refused(trainer, ways_in(x, y % 2)[way], words)


@every_flavour
def test_a_teacher_of_a_single_logit_is_refused(library):
    student = trainer_for(own_model(library, classes=3))
    student.robust_loss = losses.RSLAD(own_model(library, classes=1))
    words = "teacher must return logits .* 2 classes or more, got shape"
    assert_refused(student, ways_in(*blobs(16))["fit"], words)


@SHORT
def test_replicas_check_their_batches_in_the_graph(kind):
    with two_devices().scope():
        trainer = trainer_for(kind.dense())
    x, y = blobs(32)
    trainer.fit(x, y, batch_size=16, verbose=0)
    for bad in ((255 * x, y), (x, y + 1)):
        with pytest.raises(ValueError, match="must"):
            trainer.evaluate(*bad, batch_size=16, verbose=0)


@every_flavour
def test_labels_of_any_integer_dtype_count_alike(library):
    x, y = blobs(16)
    trainer = trainer_for(dense_model(library), "MART", metrics=["accuracy"])
    expected = trainer.evaluate(x, y, verbose=0, return_dict=True)
    for dtype in ("int16", "uint16", "uint32"):
        labels = y.astype(dtype)
        assert trainer.evaluate(x, labels, verbose=0, return_dict=True) == expected
    trainer.fit(x, labels[:, None], verbose=0)


@every_flavour
def test_the_last_of_256_classes_fits_into_a_byte(library):
    x, _ = blobs(16)
    y = np.arange(240, 256).astype("uint8")
    trainer = trainer_for(dense_model(library, classes=256))
    assert np.isfinite(trainer.fit(x, y, verbose=0).history["loss"][0])
    rows = np.eye(256, dtype="float32")[y]
    with_rows = trainer.evaluate(x, rows, verbose=0, return_dict=True)
    assert trainer.evaluate(x, y, verbose=0, return_dict=True) == pytest.approx(with_rows)


@pytest.mark.parametrize("loss", LOSSES)
@every_flavour
def test_smoothed_labels_meet_the_adversary_of_hard_ones(library, loss):
    x, y = blobs(64)
    trainer = trainer_for(dense_model(library), loss)
    hard = trainer.evaluate(x, y, verbose=0, return_dict=True)
    for amount in (0.01, 0.1):
        soft = ((1 - amount) * np.eye(3)[y] + amount / 3).astype("float32")
        found = trainer.evaluate(x, soft, verbose=0, return_dict=True)
        assert found["adversarial_accuracy"] == hard["adversarial_accuracy"]
        expected = trainer.model(x)
        logs = np.asarray(tf.nn.log_softmax(tf.cast(expected, tf.float64)))
        assert found["clean_loss"] == pytest.approx(-np.mean(np.sum(soft * logs, axis=1)), rel=1e-5)


@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_an_attack_that_is_set_later_is_the_one_that_trains(library):
    """From the moment on, and not from the next saving and loading on."""
    x, y = blobs()
    x = (x - x.min()) / (x.max() - x.min())
    trainer = AdversarialTraining(
        dense_model(library),
        attack=attacks.PGD(epsilon=0.01, steps=2),
        loss=losses.TRADES(beta=1.0),
    )
    trainer.compile("sgd")
    weak = trainer.evaluate(x, y, verbose=0, return_dict=True)["robust_loss"]
    trainer.attack = attacks.PGD(epsilon=0.5, steps=2)
    strong = trainer.evaluate(x, y, verbose=0, return_dict=True)["robust_loss"]
    assert strong > 5 * weak
    with pytest.raises(TypeError, match="attack must be"):
        trainer.attack = "PGD"


class Scaled:
    """A model that trains with a factor, which is a constant of the compiled steps."""

    factor = 1.0
    traces = 0

    def scaled(self, data, sign):
        type(self).traces += 1
        x, _ = data
        self.seen.assign_add(sign * self.factor * tf.cast(tf.shape(x)[0], tf.float32))
        return {"loss": tf.reduce_sum(x)}

    def train_step(self, data):
        return self.scaled(data, 1.0)

    def test_step(self, data):
        return self.scaled(data, -1.0)


HOOKS = ("epoch_begin", "epoch_end", "train_batch_begin", "train_batch_end", "test_begin")


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_functions_are_compiled_anew_in_the_middle_of_fit(library, hook, run_eagerly):
    x, y = blobs(8)
    calls = {"epoch_begin": 2, "epoch_end": 2, "test_begin": 2}.get(hook, 4)
    cls = type("Net", (Scaled, library.Model), {})
    inputs = library.Input((6,))
    model = cls(inputs, library.layers.Dense(3)(inputs))
    model.seen = tf.Variable(0.0, trainable=False)
    model.compile("sgd", run_eagerly=run_eagerly)
    now, expected = [1.0], []

    class Change(library.callbacks.Callback):
        pass

    def change(self, *_, logs=None):
        now[0] = self.model.factor = 2 * self.model.factor
        flavours.reset_functions(self.model)

    setattr(Change, f"on_{hook}", change)

    class Watch(library.callbacks.Callback):  # told after Change
        def on_train_batch_begin(self, batch, logs=None):
            expected.append(4 * now[0])

        def on_test_batch_begin(self, batch, logs=None):
            expected.append(-4 * now[0])

    data = {"validation_data": (x, y), "batch_size": 4, "epochs": 2, "verbose": 0}
    model.fit(x, y, callbacks=[Change(), Watch()], **data)
    assert len(expected) == 8
    assert float(model.seen) == sum(expected)
    if not run_eagerly and hook != "test_begin":
        # Of the training step one for each change and one for the start; of the test step no more.
        assert cls.traces <= 2 * (calls + 1)
    cls.traces = 0
    model.fit(x, y, **data)
    if not run_eagerly:
        assert cls.traces <= 2, "what was compiled last is kept"


@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_a_model_that_has_compiled_nothing_is_left_alone(library):
    model = dense_model(library)
    model.compile("sgd", "mse")
    flavours.reset_functions(model)
    assert model.train_function is None
    assert model.test_function is None


RAMPS = {
    "attack": [attacks.PGD(epsilon=0.02, steps=1), attacks.FGSM(epsilon=0.1)],
    "robust_loss": [losses.TRADES(1.0), losses.Madry()],
}


@pytest.mark.parametrize(
    ("name", "options"),
    [("attack", {}), ("robust_loss", {}), ("attack", {"jit_compile": True})],
    ids=str,
)
@every_flavour
def test_what_a_callback_changes_acts_from_the_next_step_on(library, name, options):
    """As if training had been stopped for each change."""
    (x, y), values = blobs(32), RAMPS[name]

    class Change(library.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            setattr(self.model, name, values[epoch])

    def after(at_once):
        tf_keras.utils.set_random_seed(3)
        loss = "Madry" if options else "TRADES"  # the smaller one, where XLA compiles it
        trainer = trainer_for(dense_model(library), loss, **options)
        how = {"batch_size": 16, "verbose": 0, "shuffle": False, "validation_data": (x, y)}
        if at_once:
            history = trainer.fit(x, y, epochs=2, callbacks=[Change()], **how).history
            return trainer.model.get_weights(), history
        history = {}
        for value in values:
            setattr(trainer, name, value)
            for key, found in trainer.fit(x, y, epochs=1, **how).history.items():
                history.setdefault(key, []).extend(found)
        return trainer.model.get_weights(), history

    (weights, history), (expected, by_parts) = after(True), after(False)
    assert_same(weights, expected)
    assert history == by_parts


GROWING = [attacks.PGD(epsilon=epsilon, steps=1) for epsilon in (0.02, 0.05, 0.2)]


def attacked_by_the_first(library):
    tf_keras.utils.set_random_seed(3)
    trainer = trainer_for(dense_model(library))
    trainer.attack = GROWING[0]
    return trainer


@functools.cache
def weights_after_each_attack(library):
    """The weights after one step with each attack, without `fit`."""
    x, y = blobs(24)
    trainer = attacked_by_the_first(library)
    for start, attack in zip(range(0, 24, 8), GROWING, strict=True):
        trainer.attack = attack
        trainer.train_on_batch(x[start : start + 8], y[start : start + 8])
    return trainer.model.get_weights()


@pytest.mark.parametrize("hook", ["train_batch_begin", "train_batch_end"])
@every_flavour
def test_an_attack_may_change_with_every_step(library, hook):
    def change(self, batch, logs=None):
        taken = int(self.model.optimizer.iterations)
        self.model.attack = GROWING[min(taken, 2)]

    callback = type("Change", (library.callbacks.Callback,), {f"on_{hook}": change})()
    trainer = attacked_by_the_first(library)
    trainer.fit(*blobs(24), batch_size=8, verbose=0, shuffle=False, callbacks=[callback])
    assert_same(trainer.model.get_weights(), weights_after_each_attack(library), atol=1e-6)


@every_flavour
def test_an_equal_attack_or_loss_compiles_nothing_anew(library):
    trainer = trainer_for(dense_model(library))
    trainer.fit(*blobs(16), verbose=0)
    step = trainer.train_function
    trainer.attack = dataclasses.replace(PGD)
    trainer.robust_loss = losses.TRADES(6.0)
    assert trainer.train_function is step
    trainer.attack = attacks.PGD(epsilon=0.1, steps=3)
    assert trainer.train_function is not step


@pytest.mark.filterwarnings("ignore:.*HDF5")
@every_flavour
def test_the_best_epoch_by_adversarial_accuracy(library, tmp_path):
    """The recipe of the documentation."""
    x, y = blobs(48)
    rates = iter([0.0, 0.1, -3.0, -3.0, -3.0, -3.0, 0.1])
    trainer = trainer_for(dense_model(library), optimizer=library.optimizers.SGD(0.1))

    class Rate(library.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.optimizer.learning_rate = next(rates)  # uphill from the third epoch on

    best = {"monitor": "val_adversarial_accuracy", "mode": "max"}
    kept = [
        library.callbacks.EarlyStopping(**best, patience=2, restore_best_weights=True),
        library.callbacks.ModelCheckpoint(
            str(tmp_path / "best.weights.h5"), **best, save_best_only=True, save_weights_only=True
        ),
    ]
    how = {"batch_size": 8, "epochs": 6, "verbose": 0, "validation_data": (x, y)}
    history = trainer.fit(x, y, callbacks=[Rate(), *kept], **how).history
    found = history["val_adversarial_accuracy"]
    assert len(found) == int(np.argmax(found)) + 3 <= 6, "two epochs after the best one"
    assert min(found) < max(found)

    def accuracy():
        logs = trainer.evaluate(x, y, batch_size=8, verbose=0, return_dict=True)
        return logs["adversarial_accuracy"]

    assert accuracy() == pytest.approx(max(found))
    if library is keras:
        undirected = library.callbacks.EarlyStopping("val_adversarial_accuracy")
        with pytest.raises(ValueError, match=r"Pass .mode='max'"):
            trainer.fit(x, y, callbacks=[undirected], **{**how, "epochs": 1})
    trainer.load_weights(str(tmp_path / "best.weights.h5"))
    assert accuracy() == pytest.approx(max(found))


@pytest.mark.parametrize("how", ["train_on_batch", "fit", "loop"])
def test_wrappers_of_tfmot_train_without_its_callback(how):
    x, y = blobs(32)

    def after(way):
        tf_keras.utils.set_random_seed(3)
        model = pruning.prune(
            dense_model(), schedules.CosineSparsity(0.2, 0.75, 1, 4, 1), engine="tfmot"
        )
        trainer = trainer_for(model)
        if way == "callback":
            fit(trainer, (x, y), batch_size=8, epochs=1)
        elif way == "fit":
            trainer.fit(x, y, batch_size=8, epochs=1, verbose=0, shuffle=False)
        else:
            step = tf.function(trainer.train_step) if way == "loop" else None
            for start in range(0, 32, 8):
                batch = (tf.constant(x[start : start + 8]), tf.constant(y[start : start + 8]))
                step(batch) if step else trainer.train_on_batch(*batch)
        assert pruning_steps(model) == [4, 4]
        assert_zeros_equal_masks(model)
        return model.get_weights()

    assert_same(after(how), after("callback"), atol=1e-6)


@every_flavour
def test_the_model_of_a_trainer_is_not_exchanged(library):
    trainer = trainer_for(dense_model(library))
    trainer.model = trainer.model
    with pytest.raises(AttributeError, match=r"model of trainer .* can't be exchanged"):
        trainer.model = dense_model(library)
    assert np.isfinite(trainer.evaluate(*blobs(8), verbose=0)[0])
