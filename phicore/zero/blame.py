"""Which rank a sum got what was not finite from."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Blame:
    """Collects it since the last `clear`, at a rank's own sums or at what it gives to others'.

    Attributes:
        ranks: that a sum here has shown to have given something that was not finite; add what others have seen.
    """

    def __init__(self) -> None:
        self.ranks: set[int] = set()
        self._given: list[Tensor] = []  # a sum of each, not looked at before somebody asks

    def of_sum(self, total: Tensor, parts: Sequence[Tensor]) -> None:
        """Looks at what ranks 0, 1, ... gave, if their sum says that it is worth it."""
        if not total.sum().isfinite():
            self.ranks.update(rank for rank, part in enumerate(parts) if not part.isfinite().all())

    def of_given(self, tensor: Tensor, wide: torch.dtype) -> None:
        """Keeps what tells whether this rank's part was finite, where nobody sees it before it is summed. The sum is in
        a wide dtype: a float16 one would overflow."""
        self._given.append(tensor.sum(dtype=wide))

    def is_on(self, own_rank: int) -> bool:
        return own_rank in self.ranks or not all(total.isfinite() for total in self._given)

    def clear(self) -> None:
        self.ranks.clear()
        self._given.clear()
