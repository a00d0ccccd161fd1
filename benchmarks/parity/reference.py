"""The reference, AutoAttack from torchattacks, and attacks of other libraries as witnesses.

torchattacks' own `AutoAttack` runs 10 iterations of APGD and FAB. Here its attacks are combined
with the constants of the publication: 100 iterations, 9 target classes, 5,000 queries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import tscnc_tf as tscnc
from benchmarks.parity.networks import EPSILONS, Examples

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}  # the names in torch libraries
_ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}

Judged = Callable[[], np.ndarray]  # returns for each example whether the network is correct


class Budget(NamedTuple):
    """The budgets of the attacks.

    Attributes:
        steps: iterations of APGD and FAB.
        queries: queries of Square.
        witness_steps: iterations of the witnesses.
    """

    steps: int = 100
    queries: int = 5000
    witness_steps: int = 200


def torch_network(model: Any) -> Any:
    """Return a torch network with the same layers and weights, for images `(n, 1, 8, 8)`."""
    import torch

    class Channelslast(torch.nn.Module):
        """Flattens with the channels last, as the dense layer expects."""

        def forward(self, x: Any) -> Any:
            return x.permute(0, 2, 3, 1).flatten(1)

    parts: list[Any] = []
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            kernel, bias = map(torch.tensor, layer.get_weights())
            height, width, channels, filters = kernel.shape
            part = torch.nn.Conv2d(channels, filters, (height, width), padding="same")
            part.weight.data, part.bias.data = kernel.permute(3, 2, 0, 1).contiguous(), bias
        elif isinstance(layer, keras.layers.Dense):
            kernel, bias = map(torch.tensor, layer.get_weights())
            part = torch.nn.Linear(*kernel.shape)
            part.weight.data, part.bias.data = kernel.T.contiguous(), bias
        elif isinstance(layer, keras.layers.MaxPooling2D):
            part = torch.nn.MaxPool2d(layer.pool_size, layer.strides)
        else:
            part = Channelslast()
        parts.append(part)
        if getattr(layer, "activation", None) is keras.activations.relu:
            parts.append(torch.nn.ReLU())
    return torch.nn.Sequential(*parts).eval()


def equal_network(model: Any, data: Examples) -> Any:
    """Return `torch_network(model)`, and set torch to one thread.

    Raises:
        ValueError: its logits differ from the model's by more than 1e-4.
    """
    import torch

    torch.set_num_threads(1)
    network = torch_network(model)
    gap = np.max(np.abs(torch_logits(network, data.x) - model(data.x, training=False)))
    if gap > 1e-4:
        raise ValueError(f"the logits of the network in torch differ by {gap:g}.")
    return network


def torch_images(x: np.ndarray) -> Any:
    """Return images as a torch tensor, channels first."""
    import torch

    return torch.tensor(np.moveaxis(x, -1, 1))


def torch_logits(network: Any, x: np.ndarray) -> np.ndarray:
    """Return the logits of a torch network."""
    import torch

    with torch.no_grad():
        return network(torch_images(x)).numpy()


def references(
    model: Any, data: Examples, norm: str, budget: Budget, *, timed: bool
) -> dict[str, Judged]:
    """Return torchattacks' attacks on the network in torch, by name.

    Each is a function that returns for each example whether the torch network is correct. With
    `timed` there is also "standard": one attack after the other, each on the examples that are
    left. Without it, "standard" follows from the others: what withstands all four.
    """
    import torch
    import torchattacks

    network = equal_network(model, data)
    x, y = torch_images(data.x), torch.tensor(data.y.astype("int64"))
    common = {"norm": NORMS[norm], "eps": EPSILONS[norm], "seed": 0}
    attacks = {
        "apgd-ce": torchattacks.APGD(network, loss="ce", steps=budget.steps, **common),
        "apgd-t": torchattacks.APGDT(network, steps=budget.steps, n_classes=10, **common),
        "fab-t": torchattacks.FAB(
            network, steps=budget.steps, multi_targeted=True, n_classes=10, **common
        ),
        "square": torchattacks.Square(network, n_queries=budget.queries, **common),
    }
    if timed:
        attacks["standard"] = torchattacks.MultiAttack(list(attacks.values()))

    def judged(attack: Any) -> np.ndarray:
        found = attack(x, y).detach()
        require_ball(np.moveaxis(found.numpy(), 1, -1), data, norm)
        with torch.no_grad():
            return (network(found).argmax(1) == y).numpy()

    return {name: functools.partial(judged, attack) for name, attack in attacks.items()}


def witnesses(
    model: Any, data: Examples, norm: str, budget: Budget, *, timed: bool
) -> dict[str, Judged]:
    """Return the attacks of foolbox (in torch) and CleverHans, with `timed` also ART's, by name."""
    found: dict[str, Judged] = {}
    if norm == "l2":
        found |= _foolbox(model, data, norm, budget)
        ours = tscnc.attacks.CleverHans(
            "carlini_wagner_l2",
            epsilon=EPSILONS[norm],
            norm=norm,
            options={"max_iterations": budget.witness_steps, "learning_rate": 0.02},
        )
        found["CleverHans C&W"] = functools.partial(judge, ours, model, data)
    step = EPSILONS[norm] / 10
    momentum = tscnc.attacks.CleverHans(
        "momentum_iterative_method",
        epsilon=EPSILONS[norm],
        norm=norm,
        options={"eps_iter": step, "nb_iter": budget.witness_steps},
    )
    found["CleverHans MIM"] = functools.partial(judge, momentum, model, data)
    if timed:
        found["ART AutoAttack"] = functools.partial(_art, model, data, norm)
    return found


def judge(attack: Any, model: Any, data: Examples) -> np.ndarray:
    """Return for each example whether the Keras network is correct under an attack."""
    found = np.asarray(attack(model, data.x, data.y, seed=0))
    require_ball(found, data, attack.norm)
    return np.argmax(model(found, training=False), axis=1) == data.y


def _foolbox(model: Any, data: Examples, norm: str, budget: Budget) -> dict[str, Judged]:
    import foolbox
    import torch

    network = foolbox.PyTorchModel(torch_network(model), bounds=(0, 1), device="cpu")
    x, y = torch_images(data.x), torch.tensor(data.y.astype("int64"))
    attacks = {
        "foolbox DDN": foolbox.attacks.DDNAttack(steps=budget.witness_steps),
        "foolbox C&W": foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=5, steps=budget.witness_steps, stepsize=0.02
        ),
    }

    def judged(attack: Any) -> np.ndarray:
        right = torch.argmax(network(x), 1) == y  # foolbox attacks correct examples only
        broken = torch.ones_like(right)
        _, _, broken[right] = attack(network, x[right], y[right], epsilons=EPSILONS[norm])
        return ~broken.numpy()

    return {name: functools.partial(judged, attack) for name, attack in attacks.items()}


def _art(model: Any, data: Examples, norm: str) -> np.ndarray:
    """Return for each example whether a network is correct under ART's AutoAttack, unchanged."""
    from art.attacks.evasion import AutoAttack
    from art.estimators.classification import TensorFlowV2Classifier

    classifier = TensorFlowV2Classifier(
        model=model,
        nb_classes=10,
        input_shape=data.x.shape[1:],
        clip_values=(0.0, 1.0),
        loss_object=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    order = _ORDERS[norm]
    epsilon = EPSILONS[norm]
    attack = AutoAttack(classifier, norm=order, eps=epsilon, eps_step=epsilon / 4, batch_size=1000)
    found = attack.generate(data.x, data.y)
    return np.argmax(model(found, training=False), axis=1) == data.y


def require_ball(found: np.ndarray, data: Examples, norm: str) -> None:
    """Raise a ValueError if adversarial examples are not in the ball and in [0, 1]."""
    delta = (found.astype("float64") - data.x).reshape(len(found), -1)
    far = np.max(np.linalg.norm(delta, _ORDERS[norm], axis=1))
    if far > EPSILONS[norm] * (1 + 1e-5) + 1e-5 or found.min() < 0 or found.max() > 1:
        raise ValueError(f"an attack left the ball in {norm}: it moved an example by {far:g}.")
