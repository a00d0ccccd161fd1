"""Stratified splits and samples, reproducible from a seed on every machine."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from tscnc_tf import _checks

MAX_SEED = 2**63 - 1
# A separate stream of random numbers for each purpose, so that the choices are independent.
TEST, VALIDATION, SUBSET_TRAIN, SUBSET_VALIDATION, SUBSET_TEST = range(5)


def seed(value: Any, name: str = "seed") -> int:
    """Return a seed as an int that fits 64 bits."""
    return _checks.integer(name, value, minimum=0, maximum=MAX_SEED)


def part_size(name: str, value: Any, count: int) -> int:
    """Return the number of examples of a part, given as a count or a fraction < 1 of `count`."""
    if isinstance(value, numbers.Integral):
        return _checks.integer(name, value, minimum=0)
    try:
        return round(_checks.number(name, value, minimum=0.0, below=1.0) * count)
    except ValueError as error:
        raise ValueError(
            f"{error} It is a fraction (a float below 1) or a count (an int)."
        ) from None


def cut(
    name: str, labels: np.ndarray, size: int, seed: int, stream: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the remaining examples and of those split off, both in order.

    About the same fraction of every class is split off, and at least one example remains.

    Raises:
        ValueError: `size` is too large for that.
    """
    counts = np.bincount(labels)
    most = int(np.sum(counts - 1))
    if size > most:
        raise ValueError(
            f"{name} takes {size:,} of {len(labels):,} training images, but one of each of "
            f"the {len(counts)} classes must stay: at most {most:,}."
        )
    taken = _draw(labels, _quotas(counts, size, least=0 * counts, most=counts - 1), seed, stream)
    stays = np.ones(len(labels), bool)
    stays[taken] = False
    return np.flatnonzero(stays), taken


def sample(
    name: str, labels: np.ndarray, size: int, seed: int, stream: int, *, every_class: bool = False
) -> np.ndarray:
    """Return the indices of `size` examples, in order, with about the same fraction of each class.

    Args:
        name: the caller's name for the size, for error messages.
        labels: of all examples.
        size: the number of examples to choose.
        seed: the seed of the choice.
        stream: the stream of random numbers, one of the constants above.
        every_class: whether at least one example of each class must be chosen.

    Raises:
        ValueError: `size` exceeds the number of examples, or is too small for `every_class`.
    """
    counts = np.bincount(labels)
    least = np.minimum(counts, 1) if every_class else 0 * counts
    if not least.sum() <= size <= len(labels):
        raise ValueError(f"{name} must be from {least.sum()} to {len(labels):,}, got {size:,}.")
    return _draw(labels, _quotas(counts, size, least=least, most=counts), seed, stream)


def _draw(labels: np.ndarray, quotas: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Return the indices of examples drawn without replacement by class quotas, in order."""
    # The raw numbers of a bit generator are equal in all versions of NumPy.
    keys = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(len(labels))
    order = np.argsort(keys, kind="stable")
    ordered = labels[order]
    drawn = [order[ordered == label][:quota] for label, quota in enumerate(quotas)]
    return np.sort(np.concatenate([*drawn, np.empty(0, np.int64)]))


def _quotas(counts: np.ndarray, size: int, *, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Return the number of examples of each class, by the method of largest remainders.

    It is computed in integers; among equal remainders the first class is rounded up first.
    """
    total = int(counts.sum())
    if not total:
        return counts
    quotas = np.clip(size * counts // total, least, most)
    while (missing := size - int(quotas.sum())) != 0:
        step = 1 if missing > 0 else -1
        free = quotas < most if missing > 0 else quotas > least
        lack = step * (size * counts - total * quotas)
        quotas[np.argmax(np.where(free, lack, np.iinfo(np.int64).min))] += step
    return quotas
