"""A study's runs as programs for an accelerator that has JAX only; and their results, back again.

A dense network is trained once for all that prune it: each is an arm of one stage, and what prunes
it is an arm of two, which begins with the network that the first has left.
"""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import accelerator
from benchmarks.accelerator.runner import prepare
from benchmarks.study import work
from benchmarks.study.plan import Plan, Run
from tscnc_tf import _files, datasets, inspection
from tscnc_tf._keras.selection import selector
from tscnc_tf.datasets import augmentation
from tscnc_tf.evaluation.report import versions
from tscnc_tf.experiments import Recipe, stages

RUNNER = pathlib.Path(accelerator.__file__).parent / "runner"


def export(plan: Plan, folder: pathlib.Path) -> None:
    """Write everything that the accelerator needs into a folder; what is there is left alone.

    * `runner/`: to be run there, by Python, NumPy and JAX.
    * `SETTING/data-SEED/`: the images, with the study's own splits.
    * `SETTING/dense-ARM-SEED/`: arms of one stage.
    * `SETTING/ARM-.../`: arms of two stages; needs.json says with which dense one they begin.

    Raises:
        ValueError: an arm's budgets depend on the dense network, which is not there yet.
    """
    if any(run.recipe.prune.scope == "condition" for run in plan.runs()):
        raise ValueError(
            f"plan {plan.name!r} has an arm with prune.scope='condition', which is measured on "
            "the dense network: give it a scope that is known beforehand."
        )
    if not (folder / "runner").exists():
        with _files.new_directory("folder", folder / "runner") as draft:
            shutil.copytree(RUNNER, draft, dirs_exist_ok=True)
    loaded: dict[Any, datasets.Dataset] = {}
    for run in plan.runs():
        key = (run.setting, run.seed)
        if key not in loaded:
            loaded = {key: stages.dataset(run.recipe)}
        data, place = loaded[key], folder / run.setting
        images = place / f"data-seed{run.seed}"
        if not images.exists():
            with _files.new_directory("folder", images) as draft:
                prepare.write(_parts(data), draft, {"source": data.name, **data.metadata})
        dense = place / f"dense-{run.dense}-seed{run.seed}"
        if not dense.exists():
            with _files.new_directory("folder", dense) as draft:
                _export_stage(run.recipe, "train", data, draft)
                _files.write_text(draft / "needs.json", _needs(run.seed, 0, images.name))
        if not (place / run.name).exists():
            with _files.new_directory("folder", place / run.name) as draft:
                for stage in ("prune", "finetune"):
                    _export_stage(run.recipe, stage, data, draft)
                needs = _needs(run.seed, 1, images.name, dense.name)
                _files.write_text(draft / "needs.json", needs)


def collect(plan: Plan, folder: pathlib.Path, results: pathlib.Path) -> list[str]:
    """Write the results of the runs that are finished as the study keeps them; return their names.

    Accuracies are those that the accelerator found; the kernels are looked at here.
    """
    found = []
    for run in plan.runs():
        done = folder / run.setting / run.name / "run" / "result.json"
        if done.is_file() and not work.result_path(results, run).is_file():
            content = json.loads(done.read_text(encoding="utf-8"))
            text = json.dumps(_result(run, content, done.parent), indent=1, ensure_ascii=False)
            _files.write_text(work.result_path(results, run), f"{text}\n")
            found.append(run.name)
    return found


def _export_stage(recipe: Recipe, stage: str, data: datasets.Dataset, folder: pathlib.Path) -> None:
    settings = getattr(recipe, stage)
    stages.library(recipe).backend.clear_session()  # layers without a name are counted anew
    previous = None if stage == "train" else stages.network(recipe, data)
    trainer = stages.trainer(recipe, stage, data, previous=previous)
    model = trainer.model
    begin = None
    if stage == "prune" and settings.method == "scores":
        begin = model.pruner.begin
    elif stage == "finetune":
        begin = accelerator.masks_from_zeros(model)
    per_epoch = data.steps_per_epoch(settings.batch_size)
    select_from = 1
    if stage == "prune" and settings.method == "magnitude":
        select_from = math.ceil(settings.ramp * settings.epochs)
    accelerator.export_stage(
        trainer,
        folder,
        name=stage,
        epochs=settings.epochs,
        steps_per_epoch=per_epoch,
        batch_size=settings.batch_size,
        attack=stages.validator(recipe, model).attack,
        test_attack=stages.judges(recipe)[0] if stage == "finetune" else None,
        evaluation_batch_size=recipe.evaluate.batch_size,
        evaluation_seed=recipe.seed,
        augmentation=_augmentation(recipe, data),
        seed=recipe.seed,
        begin=begin,
        select_from=select_from,
    )


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


def _needs(seed: int, rank: int, images: str, dense: str | None = None) -> str:
    """Return what `run_all.py` wants to know of an arm: its turn, and the folders beside it."""
    file = None if dense is None else "train-best.npz"
    return json.dumps({"order": [seed, rank], "data": images, "from": dense, "file": file}) + "\n"


def network_of(run: Run, folder: pathlib.Path) -> Any:
    """Return the network that a run has ended with, plain, pruned weights being zero.

    Args:
        run: of the study.
        folder: where the runner has put its results.
    """
    data = stages.dataset(run.recipe)
    previous = stages.network(run.recipe, data)
    trainer = stages.trainer(run.recipe, "finetune", data, previous=previous)
    accelerator.restore(trainer, folder / "finetune-best.npz", roles=("model", "pruner"))
    return stages.plain(run.recipe, data, trainer.model)


def _result(run: Run, content: Mapping[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    data, model = stages.dataset(run.recipe), network_of(run, folder)
    chosen = selector("layers", stages.pruned_layers(run.recipe.prune))
    pruned = {layer.name for layer in model.layers if chosen(layer)}
    x = data.arrays("test")[0][:1000]
    lipschitz = inspection.local_lipschitz(model, x, stages.epsilon(run.recipe), seed=run.seed)
    test = content["test"]
    return {
        **work.place(run),
        "clean": test["clean_accuracy"],
        "robust": test["attacked_accuracy"],
        "examples": test["examples"],
        "epsilon": test["attack"]["epsilon"],
        "attacks": {test["attack"]["name"]: test["attacked_accuracy"]},
        "lipschitz": lipschitz.mean,
        "zeros": inspection.sparsity(model).sparsity,
        "kernels": work.kernel_rows(inspection.condition_numbers(model).to_dict(), pruned),
        "validation": {line["stage"]: line["validation"] for line in content["chosen"]},
        "recipe": work.portable(run, data.metadata),
        "data": data.metadata,
        "versions": {**versions(), **content["versions"]},
        "device": content["device"],
        "seconds": content["seconds"],
    }
