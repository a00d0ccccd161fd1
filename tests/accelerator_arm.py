"""A small arm of three stages, as the runner gets it and as TensorFlow itself trains it."""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys

import numpy as np
import tensorflow as tf
from helpers import FLAVOURS

import tscnc_tf as tscnc

ROOT = pathlib.Path(__file__).resolve().parents[1]
RUNNER = ROOT / "benchmarks/accelerator/runner"
sys.path[:0] = [str(ROOT), str(RUNNER)]

from batches import Epoch
from prepare import prepare

from benchmarks import accelerator

BATCH, STEPS, EVALUATION = 8, 3, 6
COUNTS = {"train": 26, "validation": 10, "test": 15}  # none of them a multiple of the batch size
ATTACK = tscnc.attacks.PGD(epsilon="16/255", steps=2)
TEST_ATTACK = tscnc.attacks.PGD(epsilon="8/255", steps=3, restarts=2)
STAGES = {
    "dense": {"epochs": 2, "augmentation": accelerator.Augmentation(pad=2), "seed": 5},
    "prune": {"epochs": 2, "select_from": 2, "seed": 6},
    "tune": {"epochs": 2, "test_attack": TEST_ATTACK, "select": "last", "evaluation_seed": 3},
}


def write_data(folder):
    """Images with a bright bar whose place is the class, prepared for the runner."""
    rng = np.random.default_rng(0)
    count = sum(COUNTS.values())
    y = rng.integers(0, 4, count)
    x = rng.integers(0, 100, (count, 8, 8, 3))
    for index, label in enumerate(y):
        x[index, :, 2 * label : 2 * label + 2] += 60
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
    options = {"kernel_regularizer": penalty, "dtype": policy}
    x = layers.Conv2D(6, 3, padding="same", name="conv", **options)(inputs)
    x = layers.BatchNormalization(name="norm", momentum=0.5, dtype=policy)(x)
    x = layers.ReLU(dtype=policy)(x)
    x = layers.Flatten()(x)
    return library.Model(inputs, layers.Dense(4, name="logits", dtype="float32")(x))


def trainer(library, model, loss, optimizer):
    made = tscnc.AdversarialTraining(model, attack=ATTACK, loss=loss, seed=7)
    made.compile(optimizer=optimizer, metrics=["accuracy"])
    return made


class Arm:
    """Exports the arm, and trains it in TensorFlow on the way.

    Attributes:
        folder: of the exported arm.
        networks: what each stage ends with, "best" and "last": values by name.
        lines: clean and attacked counts and logs of each epoch.
        test: counts on the test set.
    """

    def __init__(self, library, folder, data):
        self.folder, self._data = folder, data
        self.networks, self.lines, self.test = {}, [], {}
        library.utils.set_random_seed(0)
        optimizers = library.optimizers
        model = network(library)
        decay = optimizers.schedules.PiecewiseConstantDecay([2, 4], [0.04, 0.02, 0.01])
        average = {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": None}
        sgd = optimizers.SGD(decay, momentum=0.9, nesterov=True, **average)
        self._stage(trainer(library, model, tscnc.losses.TRADES(6.0), sgd), "dense")
        schedule = tscnc.schedules.CosineSparsity(0.2, 0.7, 1, 5, frequency=2)
        tscnc.prune(model, schedule, engine="masks")
        made = trainer(library, model, tscnc.losses.Madry(), optimizers.Adam(1e-3))
        self._stage(made, "prune", finish=model.pruner.finalize)
        tscnc.pruning.freeze_mask(tscnc.strip(model))
        begin = accelerator.masks_from_zeros(model)
        made = trainer(library, model, tscnc.losses.TRADES(2.0), optimizers.SGD(0.02))
        self._stage(made, "tune", begin=begin)

    def _stage(self, trainer, name, begin=None, finish=None):
        settings = {"evaluation_seed": 0, "select": "best", "select_from": 1, "seed": 0}
        settings |= {"test_attack": None, "augmentation": None} | STAGES[name]
        with scrambled(trainer):
            accelerator.export_stage(
                trainer,
                self.folder,
                name=name,
                steps_per_epoch=STEPS,
                batch_size=BATCH,
                evaluation_batch_size=EVALUATION,
                attack=ATTACK,
                begin=begin,
                finish=finish,
                **settings,
            )
        if begin is not None:
            begin()
        step = tf.function(
            lambda x, y: trainer.train_step((x, y)), jit_compile=True, autograph=False
        )
        variables = accelerator.trainer_variables(trainer)
        best, networks = -1, {}
        for epoch in range(settings["epochs"]):
            trainer.reset_metrics()
            for x, y in self._batches(len(self.networks), epoch, settings):
                logs = step(tf.constant(x), tf.constant(y))
            before = {name: variable.numpy() for name, variable in variables.items()}
            trainer.optimizer.finalize_variable_values(trainer.model.trainable_variables)
            for part in (trainer.model,) if name != "dense" else ():
                part.pruner.apply()
            if finish is not None:
                finish()
            counts = self.evaluate(trainer.model, ATTACK, "validation", settings)
            line = {"stage": name, "epoch": epoch + 1, "validation": counts}
            self.lines.append(line | {"logs": {key: float(logs[key]) for key in logs}})
            networks["last"] = {
                name: variable.numpy()
                for name, variable in variables.items()
                if name.startswith(("model/", "pruner/"))
            }
            if epoch + 1 >= settings["select_from"] and counts["attacked"] >= best:
                best, networks["best"] = counts["attacked"], networks["last"]
            assign(variables, before)
        self.networks[name] = networks
        assign(variables, networks[settings["select"]])
        self.test = self.evaluate(trainer.model, TEST_ATTACK, "test", settings)

    def _batches(self, stage, epoch, settings):
        """Yield the batches of an epoch, cut out by NumPy, one image after the other."""
        x, y = (np.load(self._data / f"{name}_train.npy") for name in "xy")
        augmentation = settings["augmentation"]
        pad, flip = (augmentation.pad, True) if augmentation else (0, False)
        drawn = Epoch.drawn(len(x), (settings["seed"], stage, epoch), pad, flip)
        assert sorted(drawn.order) == list(range(len(x)))
        images = []
        for index, (row, column), flipped in zip(
            drawn.order, drawn.shifts, drawn.flips, strict=True
        ):
            padded = np.pad(x[index], ((pad, pad), (pad, pad), (0, 0)))
            image = padded[row : row + 8, column : column + 8]
            images.append(image[:, ::-1] if flipped else image)
        images, labels = np.float32(images) / np.float32(255), y[drawn.order].astype(np.int32)
        for start in range(0, STEPS * BATCH, BATCH):
            yield images[start : start + BATCH], labels[start : start + BATCH]

    def evaluate(self, model, attack, part, settings):
        """Count by `evaluate_robustness`; it draws for each batch as the programs do."""
        x, y = (np.load(self._data / f"{name}_{part}.npy") for name in "xy")
        report = tscnc.evaluate_robustness(
            model,
            x.astype(np.float32) / np.float32(255),
            y,
            attack,
            batch_size=EVALUATION,
            seed=settings["evaluation_seed"],
            progress=False,
        )
        counts = {"clean": report.clean_correct, "attacked": report.robust_correct}
        return {key: int(np.sum(value)) for key, value in counts.items()} | {"examples": len(x)}


@contextlib.contextmanager
def scrambled(trainer):
    """Have other weights inside the block, so that nothing can be taken over from TensorFlow.

    Not in the first stage, whose weights go into the export.
    """
    variables = accelerator.trainer_variables(trainer)
    held = {name: v.numpy() for name, v in variables.items() if name.startswith("model/")}
    if hasattr(trainer.model, "pruner"):
        assign(variables, {name: np.full_like(value, 0.5) for name, value in held.items()})
    yield
    assign(variables, held)


def assign(variables, values):
    for name, value in values.items():
        variables[name].assign(value)


def settings_of(folder, stage):
    return json.loads((folder / stage / "stage.json").read_text())
