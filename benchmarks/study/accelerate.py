"""Export of a study's runs for an accelerator that has JAX only, and collection of the results.

Each dense network is trained once, by an arm of one stage. Each run is an arm of two stages, which
begins with that network.
"""

from __future__ import annotations

import filecmp
import json
import math
import operator
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks import accelerator
from benchmarks.accelerator.runner import prepare
from benchmarks.study import work
from benchmarks.study.plan import PLACE, Plan, Run
from benchmarks.study.table import Store
from tscnc_tf import _files, datasets, inspection
from tscnc_tf._keras import flavours, gated
from tscnc_tf._keras.models import selector
from tscnc_tf._reports import jsonable, versions
from tscnc_tf.datasets import augmentation
from tscnc_tf.experiments import Recipe, folders, stages
from tscnc_tf.experiments.recipe import differences

RUNNER = pathlib.Path(accelerator.__file__).parent / "runner"
_NO_CACHES = shutil.ignore_patterns("__pycache__")

# What can't be exported: the name in a recipe, which values, why, and an alternative.
_LATER = "it needs the dense network, which is not there yet"
_ALIKE = "one program takes the steps of all epochs of a stage"
_UNFIT: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    ("prune.scope", lambda scope: scope == "condition", _LATER, "'learned'"),
    ("finetune.loss", lambda loss: loss == "rslad", _LATER, "'trades'"),
    ("finetune.recalibrate", bool, _LATER, "False"),
    ("evaluate.attack", lambda kind: kind != "pgd", "its steps differ in shape", "'pgd'"),
    *(
        (f"{stage}.{name}", bool, _ALIKE, "0")
        for stage in stages.STAGES
        for name in ("average_from", "awp_from")
    ),
)


def export(plan: Plan, folder: pathlib.Path) -> None:
    """Write what the accelerator needs into a folder; parts that exist are kept.

    * `runner/`: the code that runs there, with Python, NumPy and JAX.
    * `SETTING/data-seedSEED/`: the images, in the splits of the study.
    * `SETTING/dense-.../`: arms of one stage.
    * `SETTING/ARM-.../`: arms of two stages; needs.json names the dense arm that they begin with.

    Each arm has its recipe in a file. The arms are run `in_order`.

    Raises:
        ValueError: an arm can't be exported, for example because it depends on the trained dense
            network; or the folder has parts of another recipe, data or runner.
    """
    _require_exportable(plan)
    if not (folder / "runner").exists():
        with _files.new_directory("folder", folder / "runner") as draft:
            shutil.copytree(RUNNER, draft, ignore=_NO_CACHES, dirs_exist_ok=True)
    _require_runner(folder / "runner")
    loaded: dict[Any, datasets.Dataset] = {}
    for turn, run in enumerate(in_order(plan)):
        key = (run.setting, run.seed)
        if key not in loaded:
            loaded = {key: stages.dataset(run.recipe)}
        data, place = loaded[key], folder / run.setting
        images = place / f"data-seed{run.seed}"
        if not images.exists():
            with _files.new_directory("folder", images) as draft:
                prepare.write(_parts(data), draft, {"source": data.name, **data.metadata})
        _require_data(images, data)
        dense = place / f"dense-{run.dense}"
        if not dense.exists():
            with _files.new_directory("folder", dense) as draft:
                _export_stage(run.recipe, "train", data, draft)
                _files.write_text(draft / "needs.json", _needs((turn, 0), images.name))
                folders.write_json(draft / folders.RECIPE, run.recipe.first_stage().to_dict())
        _require_recipe(dense, run.recipe.first_stage().to_dict())
        if not (place / run.name).exists():
            with _files.new_directory("folder", place / run.name) as draft:
                for stage in ("prune", "finetune"):
                    _export_stage(run.recipe, stage, data, draft)
                form = "plain" if run.recipe.gates.sparsity_factor else "best"
                needs = _needs((turn, 1), images.name, dense.name, f"train-{form}.npz")
                _files.write_text(draft / "needs.json", needs)
                folders.write_json(draft / folders.RECIPE, work.portable(run, data.metadata))
        _require_recipe(place / run.name, work.portable(run, data.metadata))


def in_order(plan: Plan) -> list[Run]:
    """Return the runs in the order for the accelerator: by setting, sparsity (falling) and seed."""
    settings = list(plan.settings)
    return sorted(plan.runs({}), key=lambda run: (settings.index(run.setting), -run.sparsity))


def collect(plan: Plan, folder: pathlib.Path, store: Store) -> list[str]:
    """Add the results of finished runs to the study; return the names of the runs.

    The accuracies are those of the accelerator. The kernels are inspected here.

    Raises:
        ValueError: an arm has another recipe, or other data.
    """
    found = []
    for run in store.missing(plan.runs({})):
        done = folder / run.setting / run.name / "run" / "result.json"
        if done.is_file():
            data = stages.dataset(run.recipe)
            _require_data(folder / run.setting / f"data-seed{run.seed}", data)
            _require_recipe(folder / run.setting / run.name, work.portable(run, data.metadata))
            content = folders.read_json(done, "Copy it from the accelerator again.")
            store.add(run, _result(run, content, done.parent))
            found.append(run.name)
    store.enter()
    return found


def _require_exportable(plan: Plan) -> None:
    for run in plan.runs({}):
        for name, is_unfit, why, instead in _UNFIT:
            value = operator.attrgetter(name)(run.recipe)
            if is_unfit(value):
                raise ValueError(
                    f"arm {run.arm!r} of plan {plan.name!r} has {name}={value!r}, which can't be "
                    f"exported: {why}. Give it {name}={instead}, or run the plan where TensorFlow "
                    "is (`python -m benchmarks.study run`)."
                )


def _require_runner(folder: pathlib.Path) -> None:
    names = [path.name for path in RUNNER.glob("*.py")]
    _, other, lacking = filecmp.cmpfiles(RUNNER, folder, names, shallow=False)
    if other or lacking:
        raise ValueError(
            f"{folder} has another version of the runner, in {[*other, *lacking]}: choose another "
            "folder by --scratch, or remove this one."
        )


def _require_data(folder: pathlib.Path, data: datasets.Dataset) -> None:
    about = folders.read_json(folder / "data.json", f"Remove {folder}, and export again.")
    folders.require_same_data(folder, about, data)


def _require_recipe(folder: pathlib.Path, recipe: Mapping[str, Any]) -> None:
    theirs = folders.read_json(folder / folders.RECIPE, f"Remove {folder}, and export again.")
    # `_require_data` compares the data; their path does not matter.
    mine = {**recipe, "data": theirs["data"]}
    if changed := differences(theirs, jsonable(mine)):
        raise ValueError(
            f"{folder} was made by another recipe: {'; '.join(changed)}. Choose another folder by "
            "--scratch, or remove this one."
        )


def _export_stage(recipe: Recipe, stage: str, data: datasets.Dataset, folder: pathlib.Path) -> None:
    settings = getattr(recipe, stage)
    stages.library(recipe).backend.clear_session()  # restarts the numbering of layers
    previous = None if stage == "train" else stages.network(recipe, data)
    trainer = stages.trainer(recipe, stage, data, previous=previous)
    model = trainer.model
    begin = model.pruner.begin if stage == "prune" else None
    if stage == "prune":
        # `begin` overwrites them, and zeros are small in a file.
        for variable in (*model.pruner.state.dense, *model.pruner.state.scores):
            variable.assign(tf.zeros_like(variable))
    per_epoch = data.steps_per_epoch(settings.batch_size)
    select_from = 1
    if stage == "prune" and settings.method == "magnitude":
        select_from = max(1, math.ceil(settings.ramp * settings.epochs))
    accelerator.export_stage(
        trainer,
        folder,
        name=stage,
        epochs=settings.epochs,
        steps_per_epoch=per_epoch,
        batch_size=settings.batch_size,
        attack=stages.validator(recipe, model).attack,
        test_attack=stages.test_attacks(recipe)[0] if stage == "finetune" else None,
        evaluation_batch_size=recipe.evaluate.batch_size,
        evaluation_seed=recipe.seed,
        augmentation=_augmentation(recipe, data),
        seed=recipe.seed,
        begin=begin,
        plain=_plain(recipe, data, model) if stage == "train" else None,
        inherits=("model", "pruner/mask") if stage == "finetune" else ("model",),
        select_from=select_from,
    )


def _plain(
    recipe: Recipe, data: datasets.Dataset, model: Any
) -> Callable[[], Mapping[str, tf.Tensor]] | None:
    """Return a function that computes the folded weights by their names in a network without gates.

    That is `stages.plain` in TensorFlow operations. Return None if the model has no gates.
    """
    if not gated.gated_layers(model):
        return None
    stages.library(recipe).backend.clear_session()
    network = stages.network(recipe, data)
    named = {id(v.handle): name for name, v in accelerator.model_variables(network).items()}
    pairs = [
        (named[id(flavours.tensor_variable(variable).handle)], source)
        for layer, other in zip(network.layers, model.layers, strict=True)
        for variable, source in zip(
            layer.variables,
            (other.layer if gated.is_gated(other) else other).variables,
            strict=True,
        )
    ]

    def plain() -> dict[str, tf.Tensor]:
        factors = gated.factors(model)
        values = {}
        for name, source in pairs:
            value = tf.convert_to_tensor(flavours.tensor_variable(source))
            gates = factors.get(id(source))
            values[name] = value if gates is None else gated.times(value, gates)
        return values

    return plain


def _augmentation(recipe: Recipe, data: datasets.Dataset) -> accelerator.Augmentation | None:
    kind = recipe.data.augment or data.augmentation
    down, across = augmentation.padding(kind, data.image_shape)
    if down != across:
        raise ValueError(f"images must be square for the accelerator, got {data.image_shape}.")
    if kind == "none":
        return None
    return accelerator.Augmentation(pad=down, flip=augmentation.AUGMENTATIONS[kind][1])


def _parts(data: datasets.Dataset) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        split: (getattr(data, f"x_{split}"), getattr(data, f"y_{split}"))
        for split in ("train", "validation", "test")
    }


def _needs(
    order: tuple[int, int], images: str, dense: str | None = None, file: str | None = None
) -> str:
    """Return the content of `needs.json`: the order of an arm, and what it needs beside it."""
    return json.dumps({"order": order, "data": images, "from": dense, "file": file}) + "\n"


def network_of(run: Run, folder: pathlib.Path) -> Any:
    """Return the final network of a run, plain, with pruned weights set to zero.

    Args:
        run: a run of the study.
        folder: the folder of the runner's results.
    """
    data = stages.dataset(run.recipe)
    previous = stages.network(run.recipe, data)
    trainer = stages.trainer(run.recipe, "finetune", data, previous=previous)
    accelerator.restore(trainer, folder / "finetune-best.npz", roles=("model", "pruner"))
    return stages.plain(run.recipe, data, trainer.model)


def _result(run: Run, content: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    data, model = stages.dataset(run.recipe), network_of(run, folder)
    chosen = selector("layers", stages.pruned_layers(run.recipe.prune), model, model.layers)
    pruned = {layer.name for layer in model.layers if chosen(layer)}
    x = data.arrays("test")[0][:1000]
    lipschitz = inspection.local_lipschitz(model, x, stages.epsilon(run.recipe), seed=run.seed)
    test = content["test"]
    zeros = inspection.sparsity(model)
    return {
        **dict(zip(PLACE, run.place, strict=True)),
        "clean": test["clean_accuracy"],
        "robust": test["attacked_accuracy"],
        "examples": test["examples"],
        "epsilon": test["attack"]["epsilon"],
        "attacks": {test["attack"]["name"]: test["attacked_accuracy"]},
        "lipschitz": lipschitz.mean,
        "zeros": zeros.sparsity,
        "effective_zeros": zeros.effective_sparsity,
        "kernels": work.kernels(inspection.condition_numbers(model).to_dict(), pruned),
        "validation": {line["stage"]: line["validation"] for line in content["chosen"]},
        "recipe": work.portable(run, data.metadata),
        "data": data.metadata,
        "versions": {**versions(), **content["versions"]},
        "device": content["device"],
        "seconds": content["seconds"],
    }
