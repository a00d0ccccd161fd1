"""Peak memory and speed of streamed data, by the number of examples."""

from __future__ import annotations

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import measure, record

COUNTS, FEW = (10_000, 100_000, 1_000_000), (500, 1_000)
SIDE, CLASSES, SHARDS = 28, 10, 10
BATCH = 256
SAMPLE = 1_000  # test images that are evaluated on
MOST = 200  # bytes of memory for each further example
ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(options: record.Options) -> None:
    """Stream data sets of each kind and size, each in its own process; write `streaming.json`."""
    counts = FEW if options.smoke else COUNTS
    kinds: dict[str, Any] = {}
    for kind, write in KINDS.items():
        found = []
        for count in counts:
            with tempfile.TemporaryDirectory() as scratch:
                folder = pathlib.Path(scratch, "set")
                write(folder, count)
                command = [sys.executable, "-m", "benchmarks.streaming", str(folder)]
                done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
            found.append({"examples": count, **json.loads(done.stdout.splitlines()[-1])})
        further = found[-1]["examples"] - found[0]["examples"]
        slope = (found[-1]["peak_mib"] - found[0]["peak_mib"]) * 2**20 / further
        kinds[kind] = {"sizes": found, "bytes_per_further_example": slope}
    path = record.write(options, "streaming", kinds)
    for kind, figures in kinds.items():
        record.show(
            f"{kind} of {SIDE}x{SIDE} PNG images, streamed",
            ("examples", "peak memory", "loading", "statistics", "an epoch without a model"),
            [
                [
                    f"{row['examples']:,}",
                    f"{row['peak_mib']:,.0f} MiB",
                    *(
                        f"{row[f'{what}_seconds']:,.1f} s"
                        for what in ("load", "statistics", "epoch")
                    ),
                ]
                for row in figures["sizes"]
            ],
            [
                "Bytes of memory for each further example: "
                + record.against(figures["bytes_per_further_example"], MOST, 1)
            ],
            path,
        )


def write_records(folder: pathlib.Path, count: int) -> None:
    """Write TFRecord files: `count` images for training, and a tenth as many for tests."""
    import tensorflow as tf

    folder.mkdir()
    contents = []
    for label, png in images():
        features = {
            "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[png])),
            "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        }
        example = tf.train.Example(features=tf.train.Features(feature=features))
        contents.append(example.SerializeToString())
    for part, size in (("train", count), ("test", count // 10)):
        for shard, span in enumerate(np.array_split(np.arange(size), SHARDS)):
            path = folder / f"synthetic-{part}.tfrecord-{shard:05d}-of-{SHARDS:05d}"
            with tf.io.TFRecordWriter(str(path)) as writer:
                for index in span.tolist():
                    writer.write(contents[index % len(contents)])


def write_folders(folder: pathlib.Path, count: int) -> None:
    """Write folders of images as hard links: `count` for training, a tenth as many for tests."""
    originals = folder / "originals"
    originals.mkdir(parents=True)
    files = []
    for index, (label, png) in enumerate(images()):
        files.append((label, originals / f"{index}.png"))
        files[-1][1].write_bytes(png)
    for part, size in (("train", count), ("test", count // 10)):
        for label in range(CLASSES):
            (folder / part / f"class-{label}").mkdir(parents=True)
        for index in range(size):
            label, file = files[index % len(files)]
            os.link(file, folder / part / f"class-{label}" / f"image-{index:07d}.png")
    shutil.rmtree(originals)


KINDS = {"TFRecord files": write_records, "Folders": write_folders}


def images() -> Iterator[tuple[int, bytes]]:
    """Yield 1,000 pairs of a class and a PNG image, which are repeated in larger sets."""
    rng = np.random.default_rng(0)
    for index in range(CLASSES * 100):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), np.uint8)).save(stream, "PNG")
        yield index % CLASSES, stream.getvalue()


def measured(folder: pathlib.Path) -> dict[str, Any]:
    """Load a data set, train and evaluate; return the seconds and the peak memory."""
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
    return {**found, "peak_mib": measure.peak_memory() / 2**20}


if __name__ == "__main__":
    print(json.dumps(measured(pathlib.Path(sys.argv[1]))))
