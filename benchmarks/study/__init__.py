"""Does TSCNC help, where, and by how much? Arms that differ in one thing, on the same seeds.

Run it by `python -m benchmarks.study`:

* `run --quick`: the mechanism, in about 10 minutes of two cores.
* `run`: all of it, about 3½ hours; stopped, it goes on when it is called again.
* `report`: tables of whatever there is so far; with `--write` into `docs/study.md`, with a plot.
* `choose`: how the factors in the plan were chosen.
* `export --plan benchmarks/study/accelerator.yaml`: the runs as programs for an accelerator that
  has JAX and no TensorFlow; `collect` brings their results back.
"""
