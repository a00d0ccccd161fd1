"""Train small models under a strategy; as a program, be one of two workers.

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
from tscnc_tf._keras import flavours, masks

BACKED_UP = "scores"  # the case that a worker is lost in
EPOCHS, BATCHES = 4, 3
LOST_IN = 2  # epoch
EXIT_CODE = 17  # of the worker that is lost


CASES = ("regrowth", "scores", "gates")
ONE_PROCESS = (*CASES, "learned")


def network(case: str, library=tf_keras):
    """Return a small network that is pruned or has gates."""
    layers = library.layers
    model = library.Sequential(
        [
            library.Input((6, 6, 1)),
            layers.Conv2D(4, 3, padding="same", name="conv"),
            layers.BatchNormalization(synchronized=True),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(3, name="logits"),
        ]
    )
    if case in ("scores", "learned"):
        scope = "layer" if case == "scores" else "learned"
        return tscnc.prune(model, method="scores", sparsity=0.75, scope=scope)
    if case == "gates":
        constraints = tscnc.regularizers.TSCNC(sparsity_factor=1e-4, condition_factor=1e-2)
        model = tscnc.pruning.add_regularizers(model, constraints)
        return tscnc.gates.add_gates(model, sparsity_factor=1.0)
    schedule = tscnc.schedules.CosineSparsity(0.0, 0.75, 1, 6, 1)
    regrowth = tscnc.pruning.Regrowth(fraction=0.3, frequency=1)
    return tscnc.prune(model, schedule, engine="masks", scope="global", regrowth=regrowth)


def images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images, labels and sample weights of 26 examples."""
    rng = np.random.default_rng(0)
    x = rng.random((26, 6, 6, 1), dtype=np.float32)
    return x, rng.integers(0, 3, 26), rng.uniform(0.5, 1.5, 26).astype(np.float32)


def stored(position: tscnc.callbacks.DataPosition) -> tf.data.Dataset:
    """Return batches of 8 of a `Dataset`, shuffled and augmented in each epoch."""
    x, y, _ = images()
    whole = tscnc.datasets.Dataset(x, y, x, y, x, y, tuple("abc"), "small", "crop_and_flip")
    assert whole.steps_per_epoch(8) == BATCHES
    return whole.training(8, seed=1, position=position)


def own(position: tscnc.callbacks.DataPosition) -> tf.data.Dataset:
    """Return batches of 8, 8 and 5 examples with sample weights, shuffled in each epoch."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(tf.range(21), [1, number])
        examples = tuple(tf.gather(each, order) for each in images())
        return tf.data.Dataset.from_tensor_slices(examples).batch(8)

    return position.batches(epoch, BATCHES).with_options(options)


def train(
    case: str, strategy: tf.distribute.Strategy, callbacks=(), library=tf_keras
) -> list[np.ndarray]:
    """Return all weights, masks, scores and counts of steps after adversarial training."""
    library.backend.clear_session()
    library.utils.set_random_seed(0)
    with strategy.scope():
        attack = tscnc.attacks.PGD(epsilon=0.1, steps=2)
        loss = tscnc.losses.TRADES(beta=3.0)
        trainer = tscnc.AdversarialTraining(network(case, library), attack=attack, loss=loss)
        optimizer = library.optimizers.SGD(0.05, momentum=0.9)
        trainer.compile(optimizer, steps_per_execution=2 if case == "regrowth" else 1)
    position = tscnc.callbacks.DataPosition()
    data = stored if case == BACKED_UP else own
    trainer.fit(
        data(position),
        epochs=EPOCHS,
        steps_per_epoch=BATCHES,
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks, position],
    )
    pruning = [each for pruner in masks.pruners(trainer.model) for each in pruner.state.weights]
    assert bool(pruning) == (case != "gates")
    return [*trainer.get_weights(), *(each.numpy().astype("float32") for each in pruning)]


class Record(flavours.Callback):
    """Write down which epochs begin."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_begin(self, epoch, logs=None):
        with self.path.open("a") as file:
            file.write(f"{epoch}\n")


class Lost(flavours.Callback):
    """End this process at the beginning of an epoch, as if its machine had failed."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == LOST_IN:
            os._exit(EXIT_CODE)


def withstood(strategy: tf.distribute.Strategy, part: slice = slice(None)) -> np.ndarray:
    """Return which examples of a part keep, under attack, the label that a network gives them."""
    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)
    with strategy.scope():
        model = network("regrowth")
    x, _, _ = images()
    labels = np.argmax(model(x), axis=1)
    attack = tscnc.attacks.PGD(epsilon=0.02, steps=2, start="none")
    report = tscnc.evaluate_robustness(
        model, x[part], labels[part], {"PGD": attack}, batch_size=5, progress=False
    )
    return report.attacks["PGD"].correct


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
        part = slice(index, None, len(workers))
        np.savez(folder / f"withstood-{index}.npz", withstood(strategy, part))
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
