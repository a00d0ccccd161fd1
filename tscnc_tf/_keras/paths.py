"""Where in a model its weights are: a path for each, the same before saving and after loading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tscnc_tf._keras import flavour, is_graph_model, layers


def weight_paths(model: Any) -> dict[int, str]:
    """Return the path of each weight of a model or layer, by the weight's id.

    It leads from attribute to attribute, as in "encoder/blocks[2]/_kernel". Names that Keras has
    given to layers are a part of it only where the configuration holds them, as that of a
    Sequential or functional model does: whatever is made by the code of a subclassed model or
    layer is named anew when it is built. There, the place in the inner model stands for a name.

    Args:
        model: a built model or layer of either Keras.
    """
    found: dict[int, str] = {}
    entered: set[int] = set()

    def walk(layer: Any, path: str, is_configured: bool) -> None:
        if id(layer) in entered:
            return
        entered.add(id(layer))
        inside = list(layers.parts(layer))
        theirs = {id(weight) for part in inside for weight in getattr(part, "weights", ())}
        own = [weight for weight in layer.weights if id(weight) not in theirs]
        for step, weight in _steps(layer, own, "weights"):
            found.setdefault(id(weight), path + step)
        is_configured = is_configured and _is_kerass_own(layer)
        for step, part in _parts(layer, inside, is_configured):
            if hasattr(part, "weights"):  # an operation of a graph has none
                walk(part, f"{path}{step}/", is_configured)

    walk(model, "", True)
    return found


def _is_kerass_own(layer: Any) -> bool:
    kind = getattr(type(layer), "_plain", type(layer))  # what it is beneath a pruner
    return flavour(layer) == kind.__module__.partition(".")[0]


def _parts(layer: Any, inside: list[Any], is_configured: bool) -> Iterator[tuple[str, Any]]:
    """Yield (name of the step, part) for the parts of a layer or model."""
    if not is_graph_model(layer):
        yield from _steps(layer, inside, "layers")
        return
    for index, part in enumerate(inside):
        yield part.name if is_configured else f"layers[{index}]", part


def _steps(layer: Any, objects: list[Any], others: str) -> Iterator[tuple[str, Any]]:
    """Yield (attribute of a layer, object); by its place among all where it is in no attribute."""
    by_id: dict[int, str] = {}
    for name, value in sorted(vars(layer).items(), key=lambda item: (item[0][0] == "_", item[0])):
        if not name.startswith(_TRACKING):
            for step, each in _unpacked(name, value):
                by_id.setdefault(id(each), step)
    for index, each in enumerate(objects):
        yield by_id.get(id(each), f"{others}[{index}]"), each


# Lists of Keras' own of all that a layer holds; the places in them depend on how it was built.
_TRACKING = (
    "_layers",
    "_flattened_layers",
    "_self_",
    "_tracker",
    "_trainable_",
    "_non_trainable_",
    "_metrics",
    "_functional",
    "_inbound",
    "_outbound",
    "_nodes",
    "_operations",
)


def _unpacked(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _unpacked(f"{name}[{index}]", each)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _unpacked(f"{name}[{key!r}]", each)
    else:
        yield name, value
