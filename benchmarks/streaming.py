"""Peak memory and speed of data that stay in their files, by the number of examples."""

from __future__ import annotations

import io
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import record

COUNTS, FEW = (10_000, 100_000, 1_000_000), (500, 1_000)
SIDE, CLASSES, SHARDS = 28, 10, 10
BATCH = 256
SAMPLE = 1_000  # test images that are evaluated on
MOST = 200  # bytes of memory for each further example
ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(options: record.Options) -> None:
    """Stream sets of several sizes, each in a process of its own, and write what they needed."""
    counts = FEW if options.smoke else COUNTS
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in counts:
            folder = pathlib.Path(scratch, str(count))
            write(folder, count)
            command = [sys.executable, "-m", "benchmarks.streaming", str(folder)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
            found.append({"examples": count, **json.loads(done.stdout.splitlines()[-1])})
    first, last = found[0], found[-1]
    further = last["examples"] - first["examples"]
    slope = (last["peak_mib"] - first["peak_mib"]) * 2**20 / further
    path = record.write(options, "streaming", {"sizes": found, "bytes_per_further_example": slope})
    record.show(
        f"TFRecord files of {SIDE}x{SIDE} PNG images, streamed",
        ("examples", "peak memory", "loading", "statistics", "an epoch without a model"),
        [
            [
                f"{row['examples']:,}",
                f"{row['peak_mib']:,.0f} MiB",
                *(f"{row[f'{what}_seconds']:,.1f} s" for what in ("load", "statistics", "epoch")),
            ]
            for row in found
        ],
        [f"Bytes of memory for each further example: {record.against(slope, MOST, 1)}"],
        path,
    )


def write(folder: pathlib.Path, count: int) -> None:
    """Write a training part of `count` images, and a test part of a tenth of them."""
    import tensorflow as tf

    folder.mkdir()
    rng = np.random.default_rng(0)
    contents = []
    for label in range(CLASSES * 100):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), np.uint8)).save(stream, "PNG")
        features = {
            "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[stream.getvalue()])),
            "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label % CLASSES])),
        }
        example = tf.train.Example(features=tf.train.Features(feature=features))
        contents.append(example.SerializeToString())
    for part, size in (("train", count), ("test", count // 10)):
        for shard, span in enumerate(np.array_split(np.arange(size), SHARDS)):
            path = folder / f"synthetic-{part}.tfrecord-{shard:05d}-of-{SHARDS:05d}"
            with tf.io.TFRecordWriter(str(path)) as writer:
                for index in span.tolist():
                    writer.write(contents[index % len(contents)])


def measured(folder: pathlib.Path) -> dict[str, Any]:
    """Load a set, take all that training and evaluation take; return seconds and peak memory."""
    import resource

    import tscnc_tf as tscnc

    seconds = {}

    def timed(name: str, begin: float) -> None:
        seconds[f"{name}_seconds"] = time.perf_counter() - begin

    begin = time.perf_counter()
    data = tscnc.datasets.load(folder, validation=0.01, stream=True)
    timed("load", begin)
    begin = time.perf_counter()
    mean, std = data.channel_statistics()
    timed("statistics", begin)
    begin = time.perf_counter()
    for _ in data.training(BATCH, epochs=1):
        pass
    timed("epoch", begin)
    model = tscnc.AdversarialTraining(
        tscnc.applications.SmallCNN(
            input_shape=data.image_shape, classes=data.classes, width=4, mean=mean, std=std
        ),
        attack=tscnc.attacks.PGD(epsilon=0.1, steps=1),
        loss=tscnc.losses.Madry(),
    )
    model.compile(optimizer="sgd")
    model.fit(data.training(BATCH), steps_per_epoch=20, shuffle=False, verbose=0)
    x, y = data.subset(n_test=min(SAMPLE, len(data.y_test))).arrays("test")
    attack = tscnc.attacks.FGSM(epsilon=0.1)
    tscnc.evaluate_robustness(model.model, x, y, attack, diagnose=False, progress=False)
    found = {**seconds, "fingerprint": data.fingerprint}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {**found, "peak_mib": peak}


if __name__ == "__main__":
    print(json.dumps(measured(pathlib.Path(sys.argv[1]))))
