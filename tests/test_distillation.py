"""RSLAD: its value, and that the teacher is asked once a step and otherwise left alone."""

from __future__ import annotations

import contextlib
import json
import zipfile

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import FLAVOURS, conv_model, dense_model, fresh_process, images
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

import tscnc_tf as tscnc
from tscnc_tf import attacks, losses, schedules
from tscnc_tf._keras import flavours, wrappers
from tscnc_tf.functional import balls
from tscnc_tf.losses import RSLAD
from tscnc_tf.training import AdversarialTraining

PGD = attacks.PGD(epsilon=0.1, step_size=0.04, steps=2)
PAIRS = [(one, other) for one in FLAVOURS for other in FLAVOURS]
LABELS = [0, 1, 2, 0, 1]


@pytest.fixture(params=FLAVOURS)
def library(request):
    return FLAVOURS[request.param]


@pytest.fixture
def logits(rng):
    """Those of a teacher, and of a network on clean and on adversarial inputs."""
    return 3.0 * rng.standard_normal((3, 5, 3))


def np_kl(reference, z):
    def softmax(z):
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    p, q = softmax(np.asarray(reference, "float64")), softmax(np.asarray(z, "float64"))
    return np.sum(p * (np.log(p) - np.log(q)), axis=1)


def np_rslad(alpha, teacher, clean, adversarial):
    return (1 - alpha) * np_kl(teacher, clean) + alpha * np_kl(teacher, adversarial)


def trainer_for(student, teacher, *, attack=PGD, alpha=5 / 6, optimizer=None, seed=0, **options):
    trainer = AdversarialTraining(student, attack=attack, loss=RSLAD(teacher, alpha), seed=seed)
    library = FLAVOURS["tf_keras" if isinstance(student, tf_keras.Model) else "keras"]
    trainer.compile(optimizer or library.optimizers.SGD(0.05, momentum=0.9), **options)
    return trainer


def fit(trainer, data, **options):
    return trainer.fit(*data, batch_size=16, verbose=0, shuffle=False, **options).history


def conv_teacher(library, seed=5):
    """A network with BatchNorm whose averages are not those it began with, and sure of itself."""
    model = conv_model(library)
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(0.2, 1.0, w.shape) for w in model.get_weights()])
    kernel = model.get_layer("logits").kernel
    kernel.assign(8.0 * rng.standard_normal(kernel.shape).astype("float32"))
    return model


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 5 / 6, 1.0])
def test_the_value_is_numpys(alpha, logits):
    teacher, clean, adversarial = logits
    value = RSLAD(None, alpha).robust(LABELS, clean, adversarial, teacher)
    np.testing.assert_allclose(value, np_rslad(alpha, *logits), rtol=1e-9)
    other_labels = RSLAD(None, alpha).robust(LABELS[::-1], clean, adversarial, teacher)
    np.testing.assert_array_equal(value, other_labels)


def test_alpha_is_the_share_of_the_adversarial_half(logits):
    teacher, clean, adversarial = logits
    assert RSLAD(None).alpha == 5 / 6
    only_clean = RSLAD(None, 0.0).robust(LABELS, clean, adversarial, teacher)
    np.testing.assert_allclose(only_clean, np_kl(teacher, clean), rtol=1e-9)
    only_adversarial = RSLAD(None, 1).robust(LABELS, clean, adversarial, teacher)
    np.testing.assert_allclose(only_adversarial, np_kl(teacher, adversarial), rtol=1e-9)


@settings(max_examples=20)
@given(
    logits=st_numpy.arrays(float, (3, 4, 3), elements=st.floats(-30, 30)),
    alpha=st.floats(0, 1),
    shift=st.floats(-10, 10),
)
def test_it_is_zero_where_the_network_says_what_its_teacher_says(logits, alpha, shift):
    teacher, clean, adversarial = logits
    loss = RSLAD(None, alpha)
    same = loss.robust(None, teacher + shift, teacher - shift, teacher)
    np.testing.assert_allclose(same, np.zeros(4), atol=1e-9)
    assert np.all(loss.robust(None, clean, adversarial, teacher) > -1e-9)


@pytest.mark.parametrize("side", ["clean", "adversarial"])
def test_gradients_are_finite_differences(side, logits):
    teacher, clean, adversarial = logits

    def value(z):
        pair = (z, adversarial) if side == "clean" else (clean, z)
        return RSLAD(None).robust(None, *pair, teacher)

    z = tf.constant(clean if side == "clean" else adversarial)
    with tf.GradientTape() as tape:
        tape.watch(z)
        total = tf.reduce_sum(value(z))
    expected = np.zeros(z.shape)
    for index in np.ndindex(*z.shape):
        step = np.zeros(z.shape)
        step[index] = 1e-6
        expected[index] = np.sum(value(z + step) - value(z - step)) / 2e-6
    np.testing.assert_allclose(tape.gradient(total, z), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_half_precision_is_lifted_and_huge_logits_stay_finite(dtype, logits):
    teacher = tf.cast(logits[0], "float16")  # it need not be of the student's precision
    student = [tf.cast(z, dtype) for z in logits[1:]]
    value = RSLAD(None).robust(None, *student, teacher)
    assert value.dtype == ("float64" if dtype == "float64" else "float32")
    expected = np_rslad(5 / 6, teacher, *(tf.cast(z, "float64") for z in student))
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    huge = tf.constant([[3e4, -3e4, 0.0]], dtype="float32")
    assert np.all(np.isfinite(RSLAD(None).robust(None, huge[:, ::-1], -huge, huge)))


# --- the teacher ----------------------------------------------------------------------------------


def test_the_reference_is_the_teachers_output_in_inference_mode(library):
    x, _ = images(8)
    teacher = conv_teacher(library)
    x = tf.constant(x)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        reference = RSLAD(teacher).reference(x)
        own = teacher(x, training=False)
    np.testing.assert_allclose(reference, own, rtol=1e-6)
    sources = [x, *map(flavours.tensor_variable, teacher.trainable_variables)]
    assert all(gradient is not None for gradient in tape.gradient(own, sources))
    assert all(gradient is None for gradient in tape.gradient(reference, sources))
    assert np.max(np.abs(reference - teacher(x, training=True))) > 0.1


def test_a_teacher_in_pruning_wrappers_is_run_without_them():
    teacher = tscnc.prune(dense_model(), schedules.OneShot(0.5), engine="tfmot")
    x = np.random.default_rng(0).uniform(0, 1, (4, 6)).astype("float32")
    expected = teacher(x, training=False)
    steps = [int(step) for step in wrappers.pruning_steps(teacher)]
    compiled = tf.function(RSLAD(teacher).reference)
    np.testing.assert_allclose(RSLAD(teacher).reference(x), expected, rtol=1e-6)
    np.testing.assert_allclose(compiled(tf.constant(x)), expected, rtol=1e-6)
    assert [int(step) for step in wrappers.pruning_steps(teacher)] == steps
    operations = {op.type for op in compiled.get_concrete_function(x).graph.get_operations()}
    assert "AssignVariableOp" not in operations, "wrappers write their weights at each call"


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_training_leaves_the_teacher_alone_and_the_student_learns(student, teacher):
    data = images(96)
    teacher = conv_teacher(FLAVOURS[teacher])
    before = [w.copy() for w in teacher.get_weights()]
    model = conv_model(FLAVOURS[student])
    trainer = trainer_for(model, teacher, metrics=["accuracy"])
    history = fit(trainer, data, epochs=6, validation_data=data)
    assert history["robust_loss"][-1] < 0.6 * history["robust_loss"][0]
    for one, other in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    theirs = {id(variable) for variable in teacher.variables}
    assert not theirs & {id(variable) for variable in [*trainer.variables, *trainer.weights]}
    assert len(trainer.trainable_variables) == len(model.trainable_variables)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_is_logged_is_what_numpy_makes_of_both_networks(flavour):
    x, y = images(16)
    student, teacher = conv_model(FLAVOURS[flavour]), conv_teacher(FLAVOURS[flavour])
    trainer = trainer_for(student, teacher)
    logs = trainer.evaluate(x, y, batch_size=16, verbose=0, return_dict=True)
    target = teacher(x, training=False)
    x_adversarial = attacks.PGD(
        epsilon=0.1, step_size=0.04, steps=2, objective="kl", start="gaussian"
    ).perturb(
        lambda z: student(z, training=False),
        tf.constant(x),
        None,
        tf.constant([0, 0]),
        clean_logits=target,
    )
    expected = np_rslad(5 / 6, target, student(x), student(x_adversarial))
    assert logs["robust_loss"] == pytest.approx(np.mean(expected), rel=1e-3)
    assert logs["loss"] == pytest.approx(logs["robust_loss"])


class Counter:
    """Counts its calls in inference and in training mode, as they run."""

    def build(self, _):
        self.calls = [tf.Variable(0, trainable=False, dtype=tf.int64) for _ in range(2)]

    def call(self, inputs, training=False):
        self.calls[bool(training)].assign_add(1)
        return tf.identity(inputs)


def counted(library):
    counter = type("Counting", (Counter, library.layers.Layer), {})()
    inputs = library.Input((8, 8, 1))
    x = library.layers.Flatten()(counter(inputs))
    model = library.Model(inputs, library.layers.Dense(3)(x))
    for calls in counter.calls:  # Keras 3 counts one for the shapes
        calls.assign(0)
    return model, counter.calls


@pytest.mark.parametrize("objective", [None, "cross_entropy"])
@pytest.mark.parametrize("steps", [1, 12], ids=["unrolled", "looped"])
def test_a_step_asks_the_teacher_once(steps, objective, library):
    teacher, asked = counted(library)
    student, taken = counted(library)
    attack = attacks.PGD(epsilon=0.1, steps=steps, objective=objective)
    trainer = trainer_for(student, teacher, attack=attack)
    for calls in (*asked, *taken):  # whose making has looked at both networks
        calls.assign(0)
    fit(trainer, images(48), epochs=2)
    # And once in the first batch of all, to see whether the networks return logits.
    assert [int(calls) for calls in asked] == [6 + 1, 0]
    assert [int(calls) for calls in taken] == [6 * steps + 1, 6]
    trainer.evaluate(*images(48), batch_size=16, verbose=0)
    assert [int(calls) for calls in asked] == [9 + 1, 0]


def test_steps_are_traced_once(library):
    traces = []

    def teacher(x):
        traces.append(x.shape)
        return tf.reduce_sum(x, axis=[1, 3])[:, :3]

    trainer = trainer_for(conv_model(library), teacher)
    fit(trainer, images(48), epochs=1)
    once = len(traces)
    fit(trainer, images(48), epochs=3)
    # tf.function may trace twice where it creates variables; each time for the step itself, and
    # for the look at the first batch.
    assert len(traces) == once <= 4


def test_the_adversary_leads_away_from_the_teacher(library):
    x, y = images(32)
    teacher, student = conv_teacher(library, seed=5), conv_teacher(library, seed=6)
    target = teacher(x, training=False)
    attack = attacks.PGD(epsilon=0.1, steps=10).with_defaults(
        objective=RSLAD.objective, start=RSLAD.start
    )
    assert (attack.objective, attack.start) == ("kl", "gaussian")
    logits_fn = tscnc._keras.inference(student)
    inputs = (tf.constant(x), tf.constant(y), tf.constant([0, 1]))
    found = attack.perturb(logits_fn, *inputs, clean_logits=target)
    reached = np_kl(target, logits_fn(found))
    for seed in range(5):
        noise = balls.random_start(x.shape, 0.1, "linf", tf.constant([seed, 0]), tf.float32)
        random = np_kl(target, logits_fn(tf.clip_by_value(x + noise, 0.0, 1.0)))
        assert np.mean(reached >= random) > 0.95
        assert np.mean(reached) > 1.2 * np.mean(random)
    own = attack.perturb(logits_fn, *inputs)  # away from the student's own output, as TRADES
    assert np.mean(reached) > np.mean(np_kl(target, logits_fn(own)))


def test_ways_to_run_agree(library):
    data = images(48)
    start = conv_model(library).get_weights()

    def after(**options):
        model = conv_model(library)
        model.set_weights(start)
        attack = attacks.PGD(epsilon=0.1, steps=1)
        fit(trainer_for(model, conv_teacher(library), attack=attack, **options), data, epochs=1)
        return model.get_weights()

    plain = after()
    assert any(np.max(np.abs(a - b)) > 1e-3 for a, b in zip(plain, start, strict=True))
    for options in ({"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 3}):
        for one, other in zip(plain, after(**options), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-3)


@contextlib.contextmanager
def policy(library, name):
    set_policy = (
        getattr(library.mixed_precision, "set_global_policy", None)
        or library.config.set_dtype_policy
    )
    set_policy(name)
    try:
        yield
    finally:
        set_policy("float32")


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_either_network_may_be_of_mixed_precision(who, library):
    data = images(48)
    with policy(library, "mixed_float16" if who == "teacher" else "float32"):
        teacher = conv_model(library)
    with policy(library, "mixed_float16" if who == "student" else "float32"):
        student = conv_model(library)
        trainer = trainer_for(student, teacher)
        history = fit(trainer, data, epochs=3)
    assert np.isfinite(history["loss"]).all()
    assert history["robust_loss"][-1] < history["robust_loss"][0]


@pytest.mark.parametrize("made", ["inside", "outside"])
def test_two_replicas_take_the_steps_of_one_device(made, library):
    """On a linear start: the gradient of the batch is the mean over both halves."""
    x = np.random.default_rng(0).uniform(0, 1, (32, 6)).astype("float32")
    y = np.arange(32) % 3
    weights = [dense_model(library).get_weights() for _ in range(2)]
    attack = attacks.PGD(epsilon=0.1, steps=2, objective="cross_entropy", start="none")

    def networks():
        pair = dense_model(library), dense_model(library)
        for model, values in zip(pair, weights, strict=True):
            model.set_weights(values)
        return pair

    def after(strategy):
        _, teacher = networks()
        with strategy.scope():
            student, inside = networks()
            teacher = inside if made == "inside" else teacher
            trainer = trainer_for(student, teacher, attack=attack)
        trainer.fit(x, y, batch_size=32, epochs=3, verbose=0, shuffle=False)
        return student.get_weights()

    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    two = tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    assert two.num_replicas_in_sync == 2
    one = after(tf.distribute.get_strategy())
    assert any(np.max(np.abs(a - b)) > 1e-3 for a, b in zip(one, weights[0], strict=True))
    for a, b in zip(one, after(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# --- files ----------------------------------------------------------------------------------------

RESUME = """
import importlib, sys
import numpy as np
import tscnc_tf as tscnc
for name in sys.argv[2:]:
    library, folder = importlib.import_module(name), f"{sys.argv[1]}/{name}"
    x, y = np.load(folder + "/data.npz").values()
    trainer = library.models.load_model(folder + "/trainer.keras")
    assert trainer.robust_loss == tscnc.losses.RSLAD(None, alpha=0.75)
    try:
        trainer.fit(x, y, batch_size=16, verbose=0, shuffle=False)
    except ValueError as error:
        print(error)
    teacher = library.models.load_model(folder + "/teacher.keras")
    trainer.robust_loss = trainer.robust_loss.with_teacher(teacher)
    trainer.fit(x, y, batch_size=16, verbose=0, shuffle=False)
    np.savez(folder + "/end.npz", *trainer.model.get_weights())
"""


def test_training_goes_on_in_a_fresh_process_once_the_teacher_is_given(tmp_path):
    (x, y), students = images(48), {}
    for name, library in FLAVOURS.items():
        teacher, students[name] = conv_teacher(library), conv_model(library)
        trainer = trainer_for(students[name], teacher, alpha=0.75, seed=7)
        fit(trainer, (x, y), epochs=1)
        folder = tmp_path / name
        folder.mkdir()
        teacher.save(folder / "teacher.keras")
        trainer.save(folder / "trainer.keras")
        np.savez(folder / "data.npz", x=x, y=y)
        fit(trainer, (x, y), epochs=1)
    printed = fresh_process(RESUME, tmp_path, *students)
    assert printed.count("RSLAD has no teacher, which is not saved with a trainer") == 2
    assert printed.count("trainer.robust_loss.with_teacher(teacher)") == 2
    for name, student in students.items():
        with np.load(tmp_path / name / "end.npz") as end:
            for one, other in zip(student.get_weights(), end.values(), strict=True):
                np.testing.assert_array_equal(one, other)


def test_the_teachers_weights_are_not_in_the_file(library, tmp_path):
    inputs = library.Input((8, 8, 1))
    flat = library.layers.Flatten()(inputs)
    wide = library.layers.Dense(20_000, name="enormous")(flat)
    teacher = library.Model(inputs, library.layers.Dense(3)(wide))
    trainer = trainer_for(conv_model(library), teacher)
    trainer.save(tmp_path / "trainer.keras")
    assert (tmp_path / "trainer.keras").stat().st_size < 200_000 < 4 * teacher.count_params()
    with zipfile.ZipFile(tmp_path / "trainer.keras") as archive:
        config = archive.read("config.json").decode()
    assert "enormous" not in config
    assert json.loads(config)["config"]["loss"]["config"] == {"teacher": None, "alpha": 5 / 6}


def test_the_loss_of_a_trainer_can_be_exchanged(library):
    data = images(48)
    asked = []

    def teacher(x):
        asked.append(x)
        return tf.reduce_sum(x, axis=[1, 3])[:, :3]

    trainer = AdversarialTraining(conv_model(library), attack=PGD, loss=losses.Madry())
    trainer.compile("sgd")
    fit(trainer, data, epochs=1)
    trainer.evaluate(*data, verbose=0)
    assert not asked
    trainer.robust_loss = RSLAD(teacher)
    fit(trainer, data, epochs=1)
    in_training = len(asked)
    assert in_training > 0
    trainer.evaluate(*data, verbose=0)
    assert len(asked) > in_training
    with pytest.raises(TypeError, match=r"loss must be one of tscnc_tf\.losses.*got 'RSLAD'"):
        trainer.robust_loss = "RSLAD"


def test_errors_say_what_is_wrong(library):
    x, y = images(16)
    inputs = library.Input((8, 8, 1))
    flat = library.layers.Flatten()(inputs)
    soft = library.Model(inputs, library.layers.Dense(3, activation="softmax")(flat))
    four = library.Model(inputs, library.layers.Dense(4)(flat))
    unbuilt = library.Sequential([library.layers.Dense(3)])
    student = conv_model(library)
    cases = [
        (
            lambda: RSLAD("teacher"),
            TypeError,
            "teacher must be a Keras 3 or tf_keras model or.*'tea",
        ),
        (lambda: RSLAD(library.layers.Dense(3)), TypeError, "teacher must be .* got Dense"),
        (lambda: RSLAD(soft), ValueError, "teacher must return logits, but.*ends in a softmax"),
        (lambda: RSLAD(unbuilt), ValueError, "teacher 'sequential.*' has no weights yet"),
        (lambda: RSLAD(four, alpha=1.5), ValueError, "alpha must be <= 1, got 1.5"),
        (lambda: RSLAD(four, alpha="1"), TypeError, "alpha must be a number, got '1'"),
        (
            lambda: RSLAD(None).robust([0], [[1.0, 2.0]], [[1.0, 2.0]]),
            ValueError,
            "reference_logits must be given",
        ),
        (lambda: RSLAD(None).reference(x), ValueError, "RSLAD has no teacher"),
        (
            lambda: RSLAD(lambda x: x).reference(x),
            ValueError,
            r"teacher must return logits of shape .*, got shape \(16, 8, 8",
        ),
        (
            lambda: RSLAD(lambda x: {"logits": x}).reference(x),
            ValueError,
            r"teacher must return logits of shape .*, got a dict",
        ),
        (
            lambda: RSLAD(lambda x: x[:, :1, 0, 0]).reference(x),
            ValueError,
            r"teacher must .* with 2 classes or more, got shape \(16, 1\).* has the logits \(0, z",
        ),
        (
            lambda: fit(trainer_for(student, four), (x, y)),
            ValueError,
            "for the same classes as logits, got shapes .*4.*3.*teacher and student must have",
        ),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()
