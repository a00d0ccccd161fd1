"""A small arm of three stages: exported for the runner, and trained by TensorFlow itself."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import tensorflow as tf

import tscnc_tf as tscnc

ROOT = pathlib.Path(__file__).resolve().parents[1]
RUNNER = ROOT / "benchmarks/accelerator/runner"
sys.path[:0] = [str(ROOT), str(RUNNER)]

from batches import Epoch
from prepare import prepare

from benchmarks import accelerator

# Compiling takes most of the runner's time here: little is optimized, and nothing compiled twice.
HASTY = {
    **os.environ,
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}

BATCH, STEPS, EVALUATION = 8, 2, 6
COUNTS = {"train": 21, "validation": 10, "test": 15}  # the last batches have room left
# By the gradient's length: a sign may tip over where rounding differs, and what follows with it.
TRAINING = tscnc.attacks.PGD(epsilon=0.5, norm="l2", steps=2, start="uniform")
VALIDATION = tscnc.attacks.PGD(epsilon="8/255", step_size="8/255", steps=1)
TEST = tscnc.attacks.PGD(epsilon="16/255", step_size="16/255", steps=1, restarts=2)
STAGES = {
    # The last one of each is handed on, as TensorFlow goes on with it.
    "dense": {
        "epochs": 2,
        "augmentation": accelerator.Augmentation(pad=2),
        "seed": 5,
        "select_from": 2,
    },
    "prune": {"epochs": 2, "select_from": 2},
    "tune": {"epochs": 2, "test_attack": TEST, "evaluation_seed": 3, "select": "last"},
}


def write_data(folder):
    """Write images whose brightest columns tell the class, prepared for the runner."""
    rng = np.random.default_rng(0)
    count = sum(COUNTS.values())
    y = rng.integers(0, 4, count)
    x = rng.integers(0, 156, (count, 8, 8, 3))
    for index, label in enumerate(y):
        x[index, :, 2 * label : 2 * label + 2] += 100
    x, last = x.astype(np.uint8), COUNTS["test"]
    source = folder / "images.npz"
    np.savez(source, x_train=x[last:], y_train=y[last:, None], x_test=x[:last], y_test=y[:last])
    prepare(source, folder / "data", COUNTS["validation"], seed=1)
    return folder / "data"


def network(library, policy=None):
    """A convolutional network with BatchNorm for four classes, regularized by TSCNC."""
    layers = library.layers
    penalty = tscnc.regularizers.TSCNC(sparsity_factor=1e-4, condition_factor=1e-2)
    inputs = library.Input((8, 8, 3))
    options = {"kernel_regularizer": penalty, "use_bias": False, "dtype": policy}
    x = layers.Conv2D(6, 3, padding="same", name="conv", **options)(inputs)
    x = layers.BatchNormalization(name="norm", momentum=0.5, dtype=policy)(x)
    x = layers.LeakyReLU(dtype=policy)(x)
    x = layers.Flatten()(x)
    return library.Model(inputs, layers.Dense(4, name="logits", dtype="float32")(x))


def trainer(model, loss, optimizer):
    made = tscnc.AdversarialTraining(model, attack=TRAINING, loss=loss, seed=7)
    made.compile(optimizer=optimizer, metrics=["accuracy"])
    made.optimizer.build(model.trainable_variables)
    return made


def export(made, folder, name, **settings):
    return accelerator.export_stage(
        made,
        folder,
        name=name,
        steps_per_epoch=STEPS,
        batch_size=BATCH,
        evaluation_batch_size=EVALUATION,
        attack=VALIDATION,
        **settings,
    )


def run(*arguments):
    """Run the runner in a process that has neither TensorFlow nor tscnc_tf, and return it."""
    return subprocess.run(
        command(*arguments), env=HASTY, capture_output=True, text=True, check=False
    )


def command(*arguments):
    code = (
        "import runpy, sys; sys.modules.update(tensorflow=None, keras=None, tscnc_tf=None); "
        f"sys.path[0] = {str(RUNNER)!r}; "
        "runpy.run_path(sys.path[0] + '/run.py', run_name='__main__')"
    )
    return [sys.executable, "-c", code, *map(str, arguments)]


class Arm:
    """Exports the arm, and trains it in TensorFlow on the way.

    Attributes:
        folder: of the exported arm.
        model: as the last stage leaves it.
        networks: of each stage, what each epoch ends with: values by name.
        logs: of each stage, those of each epoch.
    """

    def __init__(self, library, folder, data):
        self.folder, self._data = folder, data
        self.networks, self.logs = {}, {}
        library.utils.set_random_seed(0)
        optimizers = library.optimizers
        self.model = network(library)
        decay = optimizers.schedules.PiecewiseConstantDecay([1, 3], [0.04, 0.02, 0.01])
        average = {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": None}
        sgd = optimizers.SGD(decay, momentum=0.9, nesterov=True, name="sgd", **average)
        self._stage("dense", trainer(self.model, tscnc.losses.TRADES(6.0), sgd))
        schedule = tscnc.schedules.CosineSparsity(0.2, 0.7, 1, 3, frequency=2)
        # Weights come back in the very last step, too, and are zero where it ends.
        regrowth = tscnc.pruning.Regrowth(frequency=2, until=1.0, steps=6)
        tscnc.prune(self.model, schedule, engine="masks", regrowth=regrowth)
        adam = optimizers.Adam(1e-3, epsilon=1e-3, **average)
        made = trainer(self.model, tscnc.losses.Madry(), adam)
        self._stage("prune", made, finish=self.model.pruner.finalize)
        kept = [mask.numpy() for _, mask in self.model.pruner.masked_variables()]
        tscnc.pruning.freeze_mask(tscnc.strip(self.model))
        for (_, mask), value in zip(self.model.pruner.masked_variables(), kept, strict=True):
            mask.assign(value)
        made = trainer(self.model, tscnc.losses.TRADES(2.0), optimizers.SGD(0.02))
        self._stage("tune", made, inherits=("model", "pruner/mask"))

    def _stage(self, name, made, finish=None, inherits=("model",)):
        with scrambled(made, inherits) if self.networks else contextlib.nullcontext():
            export(made, self.folder, name, finish=finish, inherits=inherits, **STAGES[name])
        step = tf.function(lambda x, y: made.train_step((x, y)), jit_compile=True, autograph=False)
        number, self.networks[name], self.logs[name] = len(self.networks), [], []
        for epoch in range(STAGES[name]["epochs"]):
            made.reset_metrics()
            for x, y in self._batches(name, number, epoch):
                logs = step(tf.constant(x), tf.constant(y))
            variables = accelerator.trainer_variables(made)
            before = {key: variable.numpy() for key, variable in variables.items()}
            made.optimizer.finalize_variable_values(self.model.trainable_variables)
            if finish is not None:
                finish()
            self.networks[name].append(
                {key: v.numpy() for key, v in variables.items() if key.startswith(("mod", "prun"))}
            )
            self.logs[name].append({key: float(value) for key, value in logs.items()})
            if epoch + 1 < STAGES[name]["epochs"]:
                assign(variables, before)

    def _batches(self, name, number, epoch):
        """Yield the batches of an epoch, cut out by NumPy, one image after the other."""
        x, y = (np.load(self._data / f"{letter}_train.npy") for letter in "xy")
        augmentation = STAGES[name].get("augmentation")
        pad = augmentation.pad if augmentation else 0
        seed = (STAGES[name].get("seed", 0), number, epoch)
        drawn = Epoch.drawn(len(x), seed, pad, flip=augmentation is not None)
        for start in range(0, STEPS * BATCH, BATCH):
            chosen = range(start, start + BATCH)
            images = [
                cut_out(x[drawn.order[i]], pad, drawn.shifts[i], drawn.flips[i]) for i in chosen
            ]
            labels = y[drawn.order[start : start + BATCH]].astype(np.int32)
            yield np.float32(images) / np.float32(255), labels

    def evaluate(self, attack, part, seed):
        """Count by `evaluate_robustness`, which draws for each batch as the programs do."""
        x, y = (np.load(self._data / f"{letter}_{part}.npy") for letter in "xy")
        report = tscnc.evaluate_robustness(
            self.model,
            x.astype(np.float32) / np.float32(255),
            y,
            attack,
            batch_size=EVALUATION,
            seed=seed,
            progress=False,
        )
        counts = {"clean": report.clean_correct, "attacked": report.robust_correct}
        return {key: int(np.sum(value)) for key, value in counts.items()} | {"examples": len(x)}


def cut_out(image, pad, shift, flip):
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    part = padded[shift[0] : shift[0] + 8, shift[1] : shift[1] + 8]
    return part[:, ::-1] if flip else part


@contextlib.contextmanager
def scrambled(made, inherits):
    """Have other values inside the block: those of TensorFlow must not get into an export."""
    variables, start = accelerator.trainer_variables(made), tuple(f"{role}/" for role in inherits)
    held = {name: v.numpy() for name, v in variables.items() if name.startswith(start)}
    assign(variables, {name: np.full_like(value, 0.5) for name, value in held.items()})
    yield
    assign(variables, held)


def assign(variables, values):
    for name, value in values.items():
        variables[name].assign(value)
