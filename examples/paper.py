"""The method's three stages on a dataset, in Python; `tscnc run` does the same from a shell.

It runs adversarial training with the constraints, pruning, fine-tuning, evaluation and export. If
it is stopped and started again, it continues where it was.
"""

import sys

import tscnc_tf as tscnc

if "--smoke" in sys.argv:  # seconds
    recipe = tscnc.experiments.Recipe.from_yaml("smoke")
else:
    recipe = tscnc.experiments.Recipe.from_yaml("paper").override(
        {"data.dataset": "cifar10", "network.architecture": "resnet-18", "sparsity": 0.99}
    )

folder = tscnc.experiments.run(recipe, f"outputs/paper/{recipe.name}")

for stage in ("1-train", "2-prune", "3-finetune"):
    print(tscnc.experiments.open_stage(folder / stage))
print((folder / "4-evaluate" / "report.txt").read_text(encoding="utf-8"))
