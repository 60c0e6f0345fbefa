"""Tells what kind of checkpoint a path stands for, and opens it. Knows the kinds; nothing of what is in them."""

from __future__ import annotations

from pathlib import Path

from metaseq_api.checkpoint import dcp, hugging_face
from metaseq_api.checkpoint.checkpoint import Checkpoint
from metaseq_api.checkpoint.folder import find
from metaseq_api.checkpoint.whole import WholeCheckpoint


def open_checkpoint(path: Path) -> Checkpoint | WholeCheckpoint:
    """Open the checkpoint in a folder, or the one that a file or metaseq's `folder/reshard.pt` stands for.

    Raises: CheckpointNotFound, CheckpointMismatch, CheckpointCorrupt, naming the file.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.exists() != (path.suffix == ".pt"):  # not a .pt file, and not a name of nothing
        if hugging_face.is_hugging_face(folder):
            return hugging_face.open_hugging_face(folder)
        if dcp.is_dcp(folder):
            return dcp.open_dcp(folder)
    return Checkpoint(find(path))
