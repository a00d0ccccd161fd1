"""Configs of frozen dataclasses: from an object to JSON values and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self


@dataclasses.dataclass(frozen=True)
class Configurable:
    """Mixin for frozen dataclasses whose fields are numbers, names, and tuples and dicts of them.

    `cls.from_config(obj.get_config()) == obj`, also after a round trip through JSON, which turns
    tuples into lists: the constructor of the dataclass normalises them. Fields with `init=False`
    are left out.
    """

    def get_config(self) -> dict[str, Any]:
        """Return the fields as a dict of JSON values.

        Raises:
            TypeError: a field holds a value that JSON cannot, such as a function.
        """
        owner = type(self).__name__
        return {
            field.name: _json_value(f"{owner}.{field.name}", getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.init
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an object from the dict of `get_config`."""
        return cls(**config)


def _json_value(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_json_value(name, item) for item in value]
    if isinstance(value, Mapping):
        return {key: _json_value(f"{name}[{key!r}]", item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{name} cannot be written to a config: {value!r} is not a number or text, nor a tuple or "
        "dict of these. Build the object again where the config is read."
    )
