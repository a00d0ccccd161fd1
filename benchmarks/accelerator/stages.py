"""Export of a stage of training: from a compiled trainer to a folder for the runner."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from benchmarks.accelerator import names, programs
from tscnc_tf import _checks, _files, _keras, attacks
from tscnc_tf._keras import masks, optimizers

SELECTIONS = ("best", "last")
INHERITABLE = ("model", "pruner", "pruner/mask", "optimizer")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random augmentation of training images.

    Attributes:
        pad: the number of zero pixels on each side, before an image of the same size is cropped.
        flip: whether an image is mirrored, left to right, with probability 1/2.
    """

    pad: int = 4
    flip: bool = True


def export_stage(
    trainer: Any,
    folder: str | os.PathLike[str],
    *,
    name: str,
    epochs: int,
    steps_per_epoch: int,
    batch_size: int,
    attack: attacks.Attack,
    test_attack: attacks.Attack | None = None,
    evaluation_batch_size: int | None = None,
    evaluation_seed: int = 0,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    begin: Callable[[], Any] | None = None,
    finish: Callable[[], Any] | None = None,
    plain: Callable[[], Mapping[str, tf.Tensor]] | None = None,
    inherits: Sequence[str] = ("model",),
    select: str = "best",
    select_from: int = 1,
) -> pathlib.Path:
    """Add a stage to an arm, a sequence of stages that pass on their networks.

    A stage consists of programs over one state, all variables of the trainer:

    * "begin", once: computes what depends on the network of the previous stage, such as the
      optimizer's moving averages of the weights, which begin with the weights.
    * "step": one optimizer step, `trainer.train_step`. It includes the schedules of the learning
      rate and of the pruning, by the optimizer's own count, and the seeds of the attacks.
    * "finish", at the end of each epoch on a copy of the state: what `fit` does in the end. So each
      epoch is evaluated, and kept, as the network that would result if it were the last one.
    * "evaluate", and "test" with `test_attack`: count the examples of a batch that are correct
      ("clean"), and those that stay correct under attack ("attacked"), as `evaluate_robustness`.

    Args:
        trainer: a compiled `AdversarialTraining`, its model pruned or not.
        folder: the folder of the arm; stages are run in the order in which they are exported.
        name: the name of the stage, and of its folder in the arm's.
        epochs: the number of epochs.
        steps_per_epoch: the number of batches per epoch.
        batch_size: examples per step.
        attack: the attack of the validation after each epoch.
        test_attack: the attack on the test set, if this is the last stage; None for `attack`.
        evaluation_batch_size: examples per batch of an evaluation; None for `batch_size`.
        evaluation_seed: batch i of an evaluation has the seed (evaluation_seed, i).
        augmentation: the augmentation of the training images; None for none.
        seed: the seed of the order of the examples and of the augmentation.
        begin: a function without arguments that assigns, by TensorFlow operations, what else
            depends on the inherited variables; for example `model.pruner.begin`.
        finish: such a function for the end of training; for example `model.pruner.finalize`.
        plain: returns the network in another form, such as without gates: values by the names of
            variables (`model_variables`), computed by TensorFlow operations. The runner writes them
            to `STAGE-plain.npz`, for another arm to begin with.
        inherits: the roles, of `INHERITABLE`, whose variables are taken from the previous stage.
            "pruner/mask" are the masks only, for a stage that only trains the kept weights. Other
            variables begin with their current values.
        select: which network is passed on, and tested: that of the "best" epoch by the accuracy
            under attack on the validation set (if equal, the first), or of the "last".
        select_from: the first epoch, counted from 1, that may be the best.

    Returns:
        The stage's folder.

    Raises:
        ValueError: an argument is out of range, the trainer is not compiled or can't be exported
            (see `export`), or it has variables to inherit that the stage before lacks.
        FileExistsError: the arm has a stage of that name.
    """
    _require_compiled(trainer)
    _require_folder_name(name)
    _checks.one_of("select", select, SELECTIONS)
    for role in inherits:
        _checks.one_of("inherits", role, INHERITABLE)
    if evaluation_batch_size is None:
        evaluation_batch_size = batch_size
    numbers = {
        "epochs": epochs,
        "steps_per_epoch": steps_per_epoch,
        "batch_size": batch_size,
        "evaluation_batch_size": evaluation_batch_size,
        "select_from": select_from,
    }
    numbers = {key: _checks.integer(key, value, minimum=1) for key, value in numbers.items()}
    if select_from > epochs:
        raise ValueError(f"select_from must be at most epochs, {epochs}, got {select_from}.")
    _build(trainer)
    plans = {
        "step": programs.Program(
            lambda x, y: trainer.train_step((x, y)), _batch(trainer, numbers["batch_size"])
        ),
        "finish": programs.Program(lambda: _finish(trainer, finish)),
        "evaluate": _evaluation(trainer, attack, numbers["evaluation_batch_size"]),
    }
    averages = _averages(trainer)
    if begin is not None or averages:
        plans["begin"] = programs.Program(lambda: _begin(averages, begin))
    if plain is not None:
        plans["plain"] = programs.Program(plain)
    if test_attack is not None:
        plans["test"] = _evaluation(trainer, test_attack, numbers["evaluation_batch_size"])
    arm = pathlib.Path(folder)
    stages = _stages(arm)
    with _files.new_directory("folder", arm / name) as draft:
        plan = programs.export(
            plans,
            draft,
            lambda: names.trainer_variables(trainer),
            omitted=inherits if stages else (),
        )
        _require_sources(arm, stages, plan, inherits)
        settings = {
            "name": name,
            **numbers,
            "attack": attack.describe(),
            "test_attack": None if test_attack is None else test_attack.describe(),
            "evaluation_seed": _checks.integer("evaluation_seed", evaluation_seed, minimum=0),
            "augmentation": None if augmentation is None else dataclasses.asdict(augmentation),
            "seed": _checks.integer("seed", seed, minimum=0),
            "trainer_seed": trainer.seed,
            "inherits": list(inherits),
            "select": select,
            "programs_sha256": _digest(draft / "programs.json"),
            "state_sha256": _digest(draft / "state.npz"),
        }
        _files.write_text(draft / "stage.json", json.dumps(settings, indent=1) + "\n")
    _files.write_text(arm / "arm.json", json.dumps({"stages": [*stages, name]}, indent=1) + "\n")
    return arm / name


def _require_compiled(trainer: Any) -> None:
    optimizer = getattr(trainer, "optimizer", None)
    if optimizer is None:
        raise ValueError(f"trainer {trainer.name!r} must be compiled before it is exported.")
    if isinstance(optimizer, _keras.tf_keras.optimizers.legacy.Optimizer):
        raise ValueError(
            f"trainer {trainer.name!r} is compiled with {optimizer!r}, a legacy optimizer, whose "
            "variables have no order: use the one of the same name in tf_keras.optimizers."
        )


def _require_folder_name(name: str) -> None:
    if _checks.file_name("name", name) == "run":
        raise ValueError("name must not be 'run', the folder of the results.")


def _build(trainer: Any) -> None:
    """Make the optimizer's variables, which a compiled function can't do, and reset metrics."""
    if not getattr(trainer.optimizer, "built", False):
        trainer.optimizer.build(trainer.model.trainable_variables)
    for metric in trainer.metrics:
        metric.reset_state()


def _batch(trainer: Any, size: int) -> dict[str, tf.TensorSpec]:
    shape = (size, *trainer.model.input_shape[1:])
    return {"x": tf.TensorSpec(shape, tf.float32), "y": tf.TensorSpec((size,), tf.int32)}


def _finish(trainer: Any, finish: Callable[[], Any] | None) -> None:
    """Do what `fit` does in the end, then call `finish`."""
    with masks.training(trainer.model, trainer.optimizer):
        trainer.optimizer.finalize_variable_values(trainer.model.trainable_variables)
    masks.apply(trainer.model, trainer.optimizer)
    if finish is not None:
        finish()


def _evaluation(trainer: Any, attack: attacks.Attack, size: int) -> programs.Program:
    network = _keras.inference(trainer.model)

    def evaluate(x: Any, y: Any, counts: Any, seed: Any) -> dict[str, tf.Tensor]:
        labels = tf.cast(y, tf.int64)
        adversarial = attack(trainer.model, x, y, seed=seed)
        clean = counts & (tf.argmax(network(x), axis=-1) == labels)
        attacked = clean & (tf.argmax(network(adversarial), axis=-1) == labels)
        return {
            "clean": tf.reduce_sum(tf.cast(clean, tf.int32)),
            "attacked": tf.reduce_sum(tf.cast(attacked, tf.int32)),
        }

    others = {"counts": tf.TensorSpec((size,), tf.bool), "seed": tf.TensorSpec((2,), tf.int32)}
    return programs.Program(evaluate, {**_batch(trainer, size), **others})


def _averages(trainer: Any) -> list[tuple[Any, Any]]:
    """Return pairs of the weights that the optimizer averages over time, and their averages."""
    optimizer = optimizers.innermost(trainer.optimizer)
    if not optimizer.use_ema:
        return []
    averages = optimizer._model_variables_moving_average  # Keras has no public access to them
    pairs = zip(trainer.model.trainable_variables, averages, strict=True)
    return [(weight, average) for weight, average in pairs if average is not None]


def _begin(averages: list[tuple[Any, Any]], begin: Callable[[], Any] | None) -> None:
    if begin is not None:
        begin()  # may prune the weights that the averages begin with
    for weight, average in averages:
        average.assign(weight)


def _stages(arm: pathlib.Path) -> list[str]:
    path = arm / "arm.json"
    return json.loads(path.read_text())["stages"] if path.exists() else []


def _require_sources(
    arm: pathlib.Path, stages: list[str], plan: dict[str, Any], inherits: Sequence[str]
) -> None:
    """Raise unless the previous stage has all inherited variables in the same shapes."""
    if not stages:
        return
    held = json.loads((arm / stages[-1] / "programs.json").read_text())["variables"]
    start = tuple(f"{role}/" for role in inherits)
    lacking = [
        name
        for name, variable in plan["variables"].items()
        if name.startswith(start) and held.get(name) != variable
    ]
    if lacking:
        raise ValueError(
            f"inherits={list(inherits)} asks for what stage {stages[-1]!r} does not have, or not "
            f"in this shape: {lacking}. Build both models alike, with the same names of layers."
        )


def _digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
