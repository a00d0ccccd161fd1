"""Does TSCNC help, where, and by how much? Arms that differ in one thing, on the same seeds.

The commands of `python -m benchmarks.study`:

* `run`: runs a plan, by default `cpu.yaml`; with `--quick` a plan of about 10 minutes on two cores.
  If it is stopped, the same command continues it.
* `report`: prints tables of the results so far; with `--write`, writes them into `docs/study.md`,
  with a plot.
* `export --plan benchmarks/study/accelerator.yaml`: exports the runs as programs for an accelerator
  that has JAX and no TensorFlow; `collect` reads their results.
"""
