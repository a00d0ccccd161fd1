"""Libraries that only the extras of this package install: imported where they are needed."""

from __future__ import annotations

import importlib
import types


def require_extra(module: str, extra: str) -> types.ModuleType:
    """Import a module that an extra of this package installs, and return it.

    Raises:
        ImportError: it is not installed; the error says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'This needs {module.partition(".")[0]}, of the extra "{extra}": '
            f'pip install ".[{extra}]" in a checkout of tscnc_tf.'
        ) from error
