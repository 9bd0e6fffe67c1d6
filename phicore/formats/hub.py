"""A name on the Hugging Face hub as a directory of its cache, of which only what a model is read from is fetched."""

from collections.abc import Callable, Sequence
from pathlib import Path

from phicore.formats.safetensors_files import INDEX, WEIGHTS, index_files


def snapshot(name: str, beside: Sequence[str], is_whole: Callable[[Path], object]) -> Path:
    """The directory of a model in the hub's cache: as it is there if it is whole, and fetched otherwise.

    Args:
        name: on the hub, "organisation/model".
        beside: patterns of the files to fetch beside the weights, which are model.safetensors or those of the index.
        is_whole: called with a directory of the cache; raises FileNotFoundError if a file is missing.

    Raises:
        OSError: there is none in the cache, and the hub does not answer or has none.
        ValueError: an index that names a file outside its directory; what is_whole raises.
    """
    from huggingface_hub import snapshot_download  # comes with transformers

    try:
        found = Path(snapshot_download(name, local_files_only=True))
        is_whole(found)
        return found
    except FileNotFoundError:  # the hub's own error of what is not in its cache is one
        found = Path(snapshot_download(name, allow_patterns=[*beside, INDEX]))
        weights = index_files(found / INDEX) if (found / INDEX).is_file() else {}
        return Path(snapshot_download(name, allow_patterns=sorted(set(weights.values())) or [WEIGHTS]))
