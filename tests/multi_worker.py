"""Train small tf_keras models under a strategy; as a program, be one of two workers.

`python multi_worker.py INDEX PORT FOLDER STAGE`; `test_multi_worker.py` runs it.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf
import tf_keras

import tscnc_tf as tscnc

BACKED_UP = "scores"  # the case that a worker is lost in
EPOCHS, BATCHES = 4, 3
LOST_IN = 2  # epoch
EXIT_CODE = 17  # of the worker that is lost


def network(case: str):
    """Return a small network that is pruned or has gates."""
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [
            layers.Conv2D(4, 3, padding="same", name="conv", input_shape=(6, 6, 1)),
            layers.BatchNormalization(synchronized=True),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(3, name="logits"),
        ]
    )
    if case == "scores":
        return tscnc.prune(model, method="scores", sparsity=0.75)
    if case == "gates":
        constraints = tscnc.regularizers.TSCNC(sparsity_factor=1e-4, condition_factor=1e-2)
        model = tscnc.pruning.add_regularizers(model, constraints)
        return tscnc.gates.add_gates(model, sparsity_factor=1.0)
    schedule = tscnc.schedules.CosineSparsity(0.0, 0.75, 1, 6, 1)
    regrowth = tscnc.pruning.Regrowth(fraction=0.3, frequency=1)
    return tscnc.prune(model, schedule, engine="masks", scope="global", regrowth=regrowth)


CASES = ("regrowth", "scores", "gates")


def data(position: tscnc.callbacks.DataPosition) -> tf.data.Dataset:
    """Return batches of 8, 8 and 5 examples with sample weights, shuffled in each epoch."""
    rng = np.random.default_rng(0)
    x = rng.random((21, 6, 6, 1), dtype=np.float32)
    y = rng.integers(0, 3, 21)
    weights = rng.uniform(0.5, 1.5, 21).astype(np.float32)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(tf.range(21), [1, number])
        examples = tuple(tf.gather(each, order) for each in (x, y, weights))
        return tf.data.Dataset.from_tensor_slices(examples).batch(8)

    return position.batches(epoch, BATCHES).with_options(options)


def train(case: str, strategy: tf.distribute.Strategy, callbacks=()) -> list[np.ndarray]:
    """Return all weights, masks and scores after adversarial training from random starts."""
    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)
    with strategy.scope():
        attack = tscnc.attacks.PGD(epsilon=0.1, steps=2)
        loss = tscnc.losses.TRADES(beta=3.0)
        trainer = tscnc.AdversarialTraining(network(case), attack=attack, loss=loss)
        optimizer = tf_keras.optimizers.SGD(0.05, momentum=0.9)
        trainer.compile(optimizer, steps_per_execution=2 if case == "regrowth" else 1)
    position = tscnc.callbacks.DataPosition()
    trainer.fit(
        data(position),
        epochs=EPOCHS,
        steps_per_epoch=BATCHES,
        verbose=0,
        callbacks=[*callbacks, position],
    )
    return [np.asarray(each) for each in trainer.get_weights()]


class Record(tf_keras.callbacks.Callback):
    """Write down which epochs begin."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_begin(self, epoch, logs=None):
        with self.path.open("a") as file:
            file.write(f"{epoch}\n")


class Lost(tf_keras.callbacks.Callback):
    """End this process at the beginning of an epoch, as if its machine had failed."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == LOST_IN:
            os._exit(EXIT_CODE)


def refused(strategy: tf.distribute.Strategy) -> list[str]:
    """Return what is said where two workers are to prune or train a model of Keras 3."""
    said = []
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)], name="small")
        for use in (
            lambda: tscnc.prune(model, tscnc.schedules.OneShot(0.5)),
            lambda: tscnc.AdversarialTraining(
                model, attack=tscnc.attacks.FGSM(epsilon=0.1), loss=tscnc.losses.Madry()
            ),
        ):
            try:
                use()
            except NotImplementedError as error:
                said.append(str(error))
    return said


def main(index: int, port: int, folder: pathlib.Path, stage: str) -> None:
    """Train as one of two workers: all cases; until the second worker is lost; or from a backup."""
    workers = [f"localhost:{port}", f"localhost:{port + 1}"]
    task = {"type": "worker", "index": index}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    if stage == "first":
        for case in CASES:
            np.savez(folder / f"{case}-{index}.npz", *train(case, strategy))
        (folder / f"refused-{index}.json").write_text(json.dumps(refused(strategy)))
    callbacks = [
        tf_keras.callbacks.BackupAndRestore(str(folder / "backup")),
        Record(folder / f"epochs-{stage}-{index}.txt"),
    ]
    if stage == "first" and index == 1:
        callbacks.append(Lost())
    np.savez(folder / f"restored-{index}.npz", *train(BACKED_UP, strategy, callbacks))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4])
