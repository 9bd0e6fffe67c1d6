"""Where a low-rank pair starts: at a zero product, or at a part of the weight."""

import math

import torch
from torch import Tensor, nn


def top_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [out, rank] and A [rank, in] whose product is the best approximation of a matrix by its rank: the largest
    singular vectors, with the roots of their values in both (Meng et al. 2024, "PiSSA", equations 2 and 3)."""
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return _widened(U[:, :rank] * S[:rank].sqrt(), S[:rank, None].sqrt() * V[:rank], rank)


def first_of_qr(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [out, rank] with orthonormal columns and A [rank, in]: the first of a matrix's QR decomposition (Buyukakyuz
    2024, "OLoRA", section 3)."""
    Q, R = torch.linalg.qr(matrix)
    return _widened(Q[:, :rank], R[:rank], rank)


def _widened(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """With zeros up to the rank, where the matrix has a smaller one."""
    missing = rank - A.shape[0]
    return (nn.functional.pad(B, (0, missing)), nn.functional.pad(A, (0, 0, 0, missing))) if missing else (B, A)


def start_pair(A: Tensor, B: Tensor, init: str) -> None:
    """Fills A [rank, ...] by "kaiming" or "gaussian" and B with zeros, in place."""
    if init == "kaiming":
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    else:
        nn.init.normal_(A, std=1 / A.shape[0])
    nn.init.zeros_(B)
