"""AutoAttack against the one in torch, on two small networks; skipped where that is missing."""

from __future__ import annotations

import json
import pathlib
import sys
import types

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

for library in ("torch", "torchattacks", "foolbox"):
    pytest.importorskip(library)

from benchmarks import parity, parity_authors
from benchmarks.__main__ import main
from benchmarks.parity import networks, reference

EXAMPLES = 128
# torch warns of a name of its own as soon as something walks over all objects.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.distributed.reduce_op:FutureWarning"),
    pytest.mark.filterwarnings("ignore:CUDA initialization:UserWarning"),  # without a driver
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a smoke run of the benchmark wrote."""
    folder = tmp_path_factory.mktemp("parity")
    main(["parity", "--smoke", "--output", str(folder)])
    return json.loads((folder / "parity.json").read_text())["networks"]


def test_the_network_in_torch_is_the_same(tmp_path):
    training, data = networks.examples(EXAMPLES)
    model = networks.trained("standard", training, 1, tmp_path)
    logits = reference.torch_logits(reference.torch_network(model), data.x)
    np.testing.assert_allclose(logits, model(data.x, training=False), atol=1e-4)
    again = networks.trained("standard", training, 1, tmp_path)
    for stored, weight in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(stored, weight)


def test_each_attack_leaves_about_what_the_reference_leaves(found):
    """Half as many steps as is usual, and 2 of 128 examples of leeway: 1.6 points."""
    assert {(each["network"], each["norm"]) for each in found} == {
        (network, norm) for network in ("standard", "adversarial") for norm in parity.NORMS
    }
    for each in found:
        assert each["clean"] > 0.8
        left = {name: figures["accuracy"] for name, figures in each["ours"].items()}
        assert left["standard"] <= min(left.values()) + 1 / EXAMPLES < each["clean"]
        for name in ("apgd-ce", "apgd-t", "fab-t"):
            assert abs(each["difference"][name]) <= 2 / EXAMPLES
        assert each["difference"]["square"] <= 5 / EXAMPLES  # which draws at random
        assert each["difference"]["standard"] <= 2 / EXAMPLES


def test_no_witness_breaks_what_is_left(found):
    for each in found:
        assert {"CleverHans MIM"} <= each["witnesses"].keys()
        assert all(witness["broken"] <= 1 / EXAMPLES for witness in each["witnesses"].values())
        assert 0 <= each["missed"]["robust_with_restarts"] <= each["missed"]["examples"]
        assert each["goals_met"]["witness"] == all(
            witness["broken"] <= parity.GOALS["witness"] for witness in each["witnesses"].values()
        )


def test_a_run_is_kept(tmp_path):
    calls = []

    def attack():
        calls.append(0)
        return np.array([True, False])

    first = parity.Run.kept(tmp_path / "a" / "run.npz", attack)
    again = parity.Run.kept(tmp_path / "a" / "run.npz", attack)
    assert first.accuracy == again.accuracy == 0.5 and first.wall == again.wall >= 0
    assert len(calls) == 1


def test_the_authors_attacks_leave_about_what_ours_leave(tmp_path):
    pytest.importorskip("pyautoattack")
    main(["parity_authors", "--smoke", "--output", str(tmp_path)])
    [(norm, found)] = json.loads((tmp_path / "parity_authors.json").read_text())["norms"].items()
    names = {*parity_authors.SINGLES, *parity_authors.VERSIONS, "rand reset"}
    assert norm == "linf" and set(found) == names
    for name, each in found.items():
        count = len(parity_authors.SEEDS.get(name.partition(" ")[0], (0,)))
        assert len(each["ours"]) == len(each["authors"]) == count
        assert each["difference"]["authors"] == pytest.approx(
            np.mean(each["ours"]) - np.mean(each["authors"])
        )
        leeway = 8 if name.startswith("rand") else 3  # of noisy networks, which differ more
        assert all(abs(value) <= leeway / 64 for value in each["difference"].values())
        assert ("to_the_edges" in each) == (name in ("square", "standard"))
    assert max(found["plus"]["ours"]) <= min(found["apgd-t"]["ours"])


def test_the_authors_windows_leave_out_the_last_place():
    square = pytest.importorskip("pyautoattack.square").SquareAttack(None, device="cpu")

    def places():
        return {int(square.random_int(0, 2)) for _ in range(200)}

    assert places() == {0, 1}
    parity_authors.reach_the_edges(types.SimpleNamespace(square=square))
    assert places() == {0, 1, 2}
