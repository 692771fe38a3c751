"""Git LFS: what a repository holds in place of a large file until that is fetched."""

from __future__ import annotations

from pathlib import Path

from nudging.errors import CheckpointError

_BEGIN = b"version https://git-lfs"


def refuse_pointer(begin: bytes, file: Path | str) -> None:
    """Raise CheckpointError where a file that begins so is a pointer to the file."""
    if begin.startswith(_BEGIN):
        raise CheckpointError(
            f"{file} is a Git LFS pointer and not the file itself; fetch it by `git lfs pull` in the "
            "repository, or download the checkpoint with the hub's own client"
        )
