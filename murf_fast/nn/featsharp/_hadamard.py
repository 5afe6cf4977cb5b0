"""Hadamard matrices by the constructions of Sylvester, Paley and Kronecker."""

from __future__ import annotations

import functools
import itertools
import math
from typing import cast

import numpy as np


def hadamard(n: int) -> np.ndarray:
    """(n, n) of ones and minus ones, int8, with ``H H^T = n I``.

    The order is 1, 2, ``q + 1`` of a prime power q = 3 mod 4 (Paley's first construction), ``2 (q + 1)`` of one of
    1 mod 4 (his second), or a product of such orders (Sylvester's doubling, Kronecker's product).

    Raises:
        ValueError: None of the constructions gives this order.
    """
    made = _construction(n)
    if made is None:
        raise ValueError(f"no construction gives a Hadamard matrix of order {n}")
    kind, size = made
    return _MAKE[kind](size, n)


def is_constructible(n: int) -> bool:
    """Whether :func:`hadamard` makes a matrix of this order."""
    return _construction(n) is not None


def neighbors(n: int) -> tuple[int, int]:
    """The nearest orders below and above ``n`` that have a matrix."""
    below = next(k for k in range(n - 1, 0, -1) if is_constructible(k))
    return below, next(k for k in itertools.count(n + 1) if is_constructible(k))


@functools.lru_cache(4096)
def _construction(n: int) -> tuple[str, int] | None:
    """A construction and what it is made from: the order of one factor, or of a field."""
    if n in (1, 2):
        return "sylvester", n
    if n < 1 or n % 4:
        return None
    if is_constructible(n // 2):
        return "product", 2
    if _prime_power(n - 1):  # 3 mod 4, as 4 divides n
        return "paley 1", n - 1
    if n % 8 and _prime_power(n // 2 - 1):  # 1 mod 4
        return "paley 2", n // 2 - 1
    for k in range(4, math.isqrt(n) + 1, 4):
        if n % k == 0 and is_constructible(k) and is_constructible(n // k):
            return "product", k
    return None


def _sylvester(_: int, n: int) -> np.ndarray:
    return np.array([[1, 1], [1, -1]], np.int8)[:n, :n]


def _product(size: int, n: int) -> np.ndarray:
    return np.kron(hadamard(size), hadamard(n // size))


def _paley_1(q: int, n: int) -> np.ndarray:
    """``I + S`` with the skew matrix ``S = [[0, 1], [-1, Q]]`` of the quadratic character."""
    matrix = np.ones((n, n), np.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = _characters(q)
    np.fill_diagonal(matrix, 1)
    return matrix


def _paley_2(q: int, n: int) -> np.ndarray:
    """``S (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]`` with the symmetric ``S = [[0, 1], [1, Q]]``."""
    matrix = np.ones((n // 2, n // 2), np.int8)
    matrix[0, 0] = 0
    matrix[1:, 1:] = _characters(q)
    entries, diagonal = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(matrix, entries) + np.kron(np.eye(n // 2, dtype=np.int8), diagonal)


_MAKE = {"sylvester": _sylvester, "product": _product, "paley 1": _paley_1, "paley 2": _paley_2}


def _characters(q: int) -> np.ndarray:
    """(q, q): the quadratic character of the differences of a field's elements: 1 for squares, -1 for others, 0 for 0.

    Elements are polynomials over the integers mod p, numbered by their coefficients as digits.
    """
    p, k = cast("tuple[int, int]", _prime_power(q))  # checked by whoever asks
    weights = p ** np.arange(k)
    of_element = np.zeros(q, np.int8)
    powers = _powers(p, k) @ weights
    of_element[powers[0::2]], of_element[powers[1::2]] = 1, -1
    digits = np.arange(q)[:, None] // weights % p
    differences = sum((digits[:, None, i] - digits[None, :, i]) % p * weights[i] for i in range(k))
    return of_element[differences]


def _powers(p: int, k: int) -> np.ndarray:
    """(q - 1, k): coefficients of the powers of x, modulo the first polynomial for which these are all but zero."""
    count = p**k - 1
    for low in itertools.product(range(p), repeat=k):  # x^k = low[0] + low[1] x + ...
        power: tuple[int, ...] = (1, *[0] * (k - 1))
        found: list[tuple[int, ...]] = []
        while len(found) < count:
            found.append(power)
            power = tuple((a + power[-1] * b) % p for a, b in zip((0, *power[:-1]), low, strict=True))
            if power == found[0] or not any(power):
                break
        if len(found) == count and power == found[0]:
            return np.array(found)
    raise AssertionError("every finite field has a primitive element")


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with ``q = p^k``, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = round(math.log(q, p))
    return (p, k) if p**k == q else None
