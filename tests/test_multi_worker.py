"""Two workers in two processes train as two devices of one process do; and go on after a loss."""

from __future__ import annotations

import json
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import multi_worker
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLAVOURS

from tscnc_tf._keras import flavours

PROGRAM = pathlib.Path(multi_worker.__file__)


def two_free_ports() -> int:
    """Return a port that is free, and whose successor is."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("localhost", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("localhost", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def run(folder: pathlib.Path, stage: str) -> None:
    """Run both workers until the second has ended; then the first ends, or is stopped."""
    command = [sys.executable, str(PROGRAM)]
    port = two_free_ports()
    logs = [folder / f"{stage}-{index}.log" for index in range(2)]
    workers = []
    for index, log in enumerate(logs):
        with log.open("w") as output:
            arguments = [str(index), str(port), str(folder), stage]
            workers.append(
                subprocess.Popen([*command, *arguments], stdout=output, stderr=subprocess.STDOUT)
            )
    try:
        deadline = time.monotonic() + 900
        while workers[1].poll() is None:
            assert not workers[0].poll(), logs[0].read_text()[-3000:]
            assert time.monotonic() < deadline, logs[1].read_text()[-3000:]
            time.sleep(0.2)
        expected = multi_worker.EXIT_CODE if stage == "first" else 0
        assert workers[1].returncode == expected, logs[1].read_text()[-3000:]
        if stage != "first":  # else it waits for the other one, for longer than a test should
            assert workers[0].wait(timeout=300) == 0, logs[0].read_text()[-3000:]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of two workers' results; one was lost at the end, and both were started again."""
    folder = tmp_path_factory.mktemp("workers")
    run(folder, "first")
    assert not list(folder.glob("restored-*"))
    run(folder, "again")
    return folder


def weights(folder: pathlib.Path, name: str) -> list[np.ndarray]:
    """Return what was saved under a name."""
    with np.load(folder / f"{name}.npz") as arrays:
        return list(arrays.values())


def assert_identical(one, two):
    for each, other in zip(one, two, strict=True):
        np.testing.assert_array_equal(each, other)


@pytest.mark.parametrize("case", multi_worker.CASES)
def test_both_workers_end_as_two_devices_of_one_process(trained, case):
    first = weights(trained, f"{case}-0")
    assert_identical(first, weights(trained, f"{case}-1"))
    devices = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    one_process = multi_worker.train(case, devices)
    kernels = [each for each in first if each.shape in ((3, 3, 1, 4), (144, 3))][:2]
    zeros = sum(int(np.sum(each == 0)) for each in kernels)
    assert zeros == (0 if case == "gates" else 0.75 * (36 + 432))
    for each, other in zip(first, one_process, strict=True):
        np.testing.assert_allclose(each, other, atol=1e-6)
        np.testing.assert_array_equal(each == 0, other == 0)


def test_two_workers_evaluate_two_parts(trained):
    whole = multi_worker.withstood(tf.distribute.get_strategy())
    assert 0 < np.mean(whole) < 1
    for index in range(2):
        assert_identical(weights(trained, f"withstood-{index}"), [whole[index::2]])


def test_after_the_loss_of_a_worker_the_end_is_the_same(trained):
    lost, end = multi_worker.LOST_IN, multi_worker.EPOCHS
    undisturbed = weights(trained, f"{multi_worker.BACKED_UP}-0")
    for index in range(2):
        begun, again = (
            [int(epoch) for epoch in (trained / f"epochs-{stage}-{index}.txt").read_text().split()]
            for stage in ("first", "again")
        )
        assert begun[:2] == [0, 1]
        # The first worker may have been stopped before it had written the last epoch's backup.
        assert again in ([*range(lost, end)], [*range(lost - 1, end)])
        assert_identical(weights(trained, f"restored-{index}"), undisturbed)


class Copies(flavours.Callback):
    """Copies the backup when an epoch begins: what a process leaves that ends at this moment."""

    def __init__(self, backup, copy):
        super().__init__()
        self.backup, self.copy = backup, copy

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == multi_worker.LOST_IN:
            shutil.copytree(self.backup, self.copy)


@pytest.mark.parametrize("case", multi_worker.ONE_PROCESS)
@pytest.mark.parametrize("library", FLAVOURS.values(), ids=FLAVOURS)
def test_masks_scores_and_gates_come_back_from_a_backup(library, case, tmp_path):
    """In one process: what continues from the backup ends as what was not disturbed."""

    def train(folder, *more):
        backup = library.callbacks.BackupAndRestore(str(folder))
        return multi_worker.train(case, tf.distribute.get_strategy(), [backup, *more], library)

    undisturbed = train(tmp_path / "one", Copies(tmp_path / "one", tmp_path / "two"))
    epochs = multi_worker.Record(tmp_path / "epochs.txt")
    assert_identical(train(tmp_path / "two", epochs), undisturbed)
    assert epochs.path.read_text().split() == ["2", "3"]


def test_keras_3_is_refused_by_name(trained):
    """Whether it is to be pruned or to be trained."""
    words = (
        "model 'small' is a Keras 3 model, whose fit fails under MultiWorkerMirroredStrategy (here "
        "2 workers), with and without this package: build it of tf_keras.layers, or train on the "
        "devices of one machine by MirroredStrategy."
    )
    for index in range(2):
        said = json.loads((trained / f"refused-{index}.json").read_text())
        assert said == [words, words]
