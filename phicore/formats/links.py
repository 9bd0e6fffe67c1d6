"""Symbolic links in a directory that nobody vouches for.

A directory that comes from an archive or a clone can hold a link to any file of the reader's machine: a LICENSE that is
a private key would be copied into the model that is written, and published with it. So a link is followed only within
the directory, as an index may name only files beside it, and within one repository of huggingface_hub's cache, where
every file is a link: models--org--name/snapshots/<revision>/<file> -> ../../blobs/<hash>, and one in a folder of the
repository (checkpoint-500/adapter_config.json) leads one level further up.
"""

from pathlib import Path

FOLDERS = ("additional_chat_templates",)  # of a model directory, beside the files that lie in it


def check_links(directory: Path) -> None:
    """Looks at the files of a directory and at those of FOLDERS in it.

    Raises:
        ValueError: one of them lies elsewhere.
    """
    root = directory.resolve()
    roots = [root, *(above.parent / "blobs" for above in root.parents if above.name == "snapshots")]
    for file in [*directory.iterdir(), *(file for name in FOLDERS for file in directory.glob(f"{name}/*"))]:
        # a link to itself is no file, and resolve raises on it
        if file.is_file() and not any(file.resolve().is_relative_to(place) for place in roots):
            raise ValueError(
                f"{file} is a link that leads out of its directory, to {file.resolve()}; if that is what you want to "
                f"be read, put the file itself there (ln without -s, or cp)"
            )
