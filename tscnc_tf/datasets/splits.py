"""Stratified splits and samples: for one seed the same on every machine."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from tscnc_tf import _checks

MAX_SEED = 2**63 - 1
# A stream of random numbers for each purpose, so that the choices are independent.
TEST, VALIDATION, SUBSET_TRAIN, SUBSET_VALIDATION, SUBSET_TEST = range(5)


def seed(value: Any, name: str = "seed") -> int:
    """Return a seed as an int that fits 64 bits."""
    return _checks.integer(name, value, minimum=0, maximum=MAX_SEED)


def part_size(name: str, value: Any, count: int) -> int:
    """Return how many of `count` examples a part has, given as a fraction below 1 or a count."""
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
    """Return the indices that stay and those that are cut off, both in order.

    Of every class about the same fraction is cut, and at least one example stays.

    Raises:
        ValueError: not so many can be cut.
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
    """Return the indices of `size` examples, in order; of every class about the same fraction.

    Args:
        name: what the caller calls the size.
        labels: of what is chosen from.
        size: how many.
        seed: of the choice.
        stream: of random numbers, one of the constants above.
        every_class: whether each class that there is must be in it.

    Raises:
        ValueError: there are not so many, or too few for every class to be in it.
    """
    counts = np.bincount(labels)
    least = np.minimum(counts, 1) if every_class else 0 * counts
    if not least.sum() <= size <= len(labels):
        raise ValueError(f"{name} must be from {least.sum()} to {len(labels):,}, got {size:,}.")
    return _draw(labels, _quotas(counts, size, least=least, most=counts), seed, stream)


def _draw(labels: np.ndarray, quotas: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Return so many examples of each class, drawn without replacement, as indices in order."""
    # The raw numbers of a bit generator are the same in every version of NumPy.
    keys = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(len(labels))
    order = np.argsort(keys, kind="stable")
    ordered = labels[order]
    drawn = [order[ordered == label][:quota] for label, quota in enumerate(quotas)]
    return np.sort(np.concatenate([*drawn, np.empty(0, np.int64)]))


def _quotas(counts: np.ndarray, size: int, *, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Return how many of each class make up `size`: those of the largest remainders round up.

    In whole numbers throughout; of equal remainders the first class goes first.
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
