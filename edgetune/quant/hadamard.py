"""Orthogonal matrices that spread outliers over all channels."""

from __future__ import annotations

import torch
from torch import Tensor


def random_rotation(size: int, seed: int) -> Tensor:
    """An orthogonal matrix `(size, size)` in fp64: a Hadamard matrix with random signs, where one of that size is
    known, else random."""
    generator = torch.Generator().manual_seed(seed)
    hadamard = hadamard_matrix(size)
    if hadamard is None:
        normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
        rotation: Tensor
        rotation, triangle = torch.linalg.qr(normal)
        return rotation.mul_(triangle.diagonal().sign())  # uniformly distributed
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    return hadamard.mul_(signs).div_(size**0.5)


def hadamard_matrix(size: int) -> Tensor | None:
    """A Hadamard matrix `(size, size)` of 1 and -1 in fp64, from Sylvester's and Paley's constructions.

    `None`: they give none of this size.
    """
    doubled = torch.ones(1, 1, dtype=torch.float64)
    while size >= 1:
        core = torch.ones(1, 1, dtype=torch.float64) if size == 1 else _paley(size)
        if core is not None:
            return torch.kron(doubled, core)
        if size % 2:
            return None
        doubled = torch.kron(doubled, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
        size //= 2
    return None


def _paley(size: int) -> Tensor | None:
    """For a prime q: of size q + 1 where q = 3 mod 4, of size 2 (q + 1) where q = 1 mod 4."""
    identity = torch.eye(size, dtype=torch.float64)
    if size % 4 == 0 and _is_prime(size - 1):
        return identity + _bordered(size - 1, -1.0)
    half = size // 2
    if size % 4 == 0 and half % 4 == 2 and _is_prime(half - 1):
        ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        zeros = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(half - 1, 1.0), ones) + torch.kron(torch.eye(half, dtype=torch.float64), zeros)
    return None


def _bordered(prime: int, corner: float) -> Tensor:
    """Jacobsthal's matrix of a prime, 1 where i - j is a square, with a row of ones and a column of `corner`."""
    squares = (torch.arange(1, prime) ** 2) % prime
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[squares] = 1.0
    character[0] = 0.0
    numbers = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = character[(numbers.unsqueeze(1) - numbers) % prime]
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = corner
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
