"""Hadamard matrices by the constructions of Sylvester and Paley.

A Hadamard matrix of order n has entries 1 and -1 and orthogonal rows: H H' = n I. Beyond orders 1
and 2 the order is a multiple of 4. Three constructions serve here:

    Sylvester   doubles the order: [[H, H], [H, -H]]
    Paley I     order q + 1, for a prime q = 3 mod 4
    Paley II    order 2 (q + 1), for a prime q = 1 mod 4

Together they give all widths of the usual vision transformers: 192, 384, 448, 576, 640, 768, 896,
1024, 1152, 1280, 1408, 1536, 1664, 2048, 3072, 4096. The smallest multiple of 4 that they lack is
52. (R. E. A. C. Paley, On orthogonal matrices, 1933.)
"""

from __future__ import annotations

import functools
import math

import numpy as np


def has_hadamard(order: int) -> bool:
    """Whether ``hadamard`` can make a matrix of this order."""
    return _construction(order) is not None


@functools.lru_cache(maxsize=4)
def hadamard(order: int) -> np.ndarray:
    """A Hadamard matrix, int8 [order, order], read-only; the same at every call.

    Raises:
        ValueError: none of the constructions gives this order.
    """
    construction = _construction(order)
    if construction is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    if construction == "unit":
        matrix = np.ones((1, 1), np.int8)
    elif construction == "sylvester":
        half = hadamard(order // 2)
        matrix = np.block([[half, half], [half, -half]])
    elif construction == "paley 1":
        matrix = _paley(order - 1, sign=-1) + np.eye(order, dtype=np.int8)
    else:
        conference = _paley(order // 2 - 1, sign=1)
        unit = np.array([[1, -1], [-1, -1]], np.int8)  # in place of each zero
        other = np.array([[1, 1], [1, -1]], np.int8)
        matrix = np.kron(conference, other) + np.kron(np.eye(order // 2, dtype=np.int8), unit)
    matrix.flags.writeable = False
    return matrix


def _construction(order: int) -> str | None:
    if order == 1:
        return "unit"
    if order < 1 or order % 2:
        return None
    if _construction(order // 2) is not None:
        return "sylvester"
    if order % 4:
        return None
    if _is_prime(order - 1):
        return "paley 1"
    half = order // 2 - 1
    return "paley 2" if half % 4 == 1 and _is_prime(half) else None


def _paley(q: int, sign: int) -> np.ndarray:
    """Paley's matrix with zeros on its diagonal, int8 [q + 1, q + 1].

    The first row is 1, the first column ``sign``; the rest is the quadratic character of column
    minus row, modulo q.
    """
    character = np.full(q, -1, np.int8)
    character[np.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    matrix = np.zeros((q + 1, q + 1), np.int8)
    matrix[0, 1:] = 1
    matrix[1:, 0] = sign
    difference = np.arange(q)[None] - np.arange(q)[:, None]
    matrix[1:, 1:] = character[difference % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))
