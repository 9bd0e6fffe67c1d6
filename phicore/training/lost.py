"""The error of ranks that cannot go on without another, and how it is known from a collective's error."""

import torch.distributed as dist


class LostRankError(RuntimeError):
    """A rank has ended, has failed or does not answer, so that the others cannot go on."""


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error is a collective's that did not hear from another rank: gloo's are plain RuntimeErrors."""
    texts = ("gloo", "pair closure", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and not isinstance(error, LostRankError)
        and any(text in str(error) for text in texts)
    )


def first_sentence(error: BaseException) -> str:
    """What a long error of a collective begins with."""
    return str(error).strip().partition("\n")[0].partition(". ")[0]
