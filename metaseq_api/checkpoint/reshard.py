"""Changes how a checkpoint is cut: into shards of a part, or into parts; weights and optimizer state alike.

A job reads headers and checks everything first, then writes its files, number by number from the old places to the new
ones. What else is in the files comes from the first one, as plain data and Namespaces.

- A shared parameter (the tied output projection) is there again under its second name when weights are unflattened;
  it takes no room, both names have one storage.
- Moments stay flat vectors, one for each FSDP unit as metaseq keeps them, without padding where weights are
  unflattened. They keep their dtype whatever the weights' new one.
- What belongs to one rank and cannot be joined (random states, averaged weights) or is an object of a class that only
  metaseq has, is left out, and one line in the log names it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from metaseq_api.checkpoint.checkpoint import Checkpoint
from metaseq_api.checkpoint.contents import Form, NewPart, contents
from metaseq_api.checkpoint.folder import collect, numbers
from metaseq_api.checkpoint.outputs import Output, job_id, write_all
from metaseq_api.checkpoint.part import Header, Part
from metaseq_api.checkpoint.recut import cut_parts, same_part
from metaseq_api.checkpoint.verify import SAME, copies
from metaseq_api.checkpoint.whole import WholeCheckpoint
from metaseq_api.errors import SettingsError
from metaseq_api.progress import Progress

log = logging.getLogger(__name__)

Begin = Callable[[int], Progress]
"""Told how many bytes there are to write, gives what is told how many were written."""


def reshard_fsdp(
    inputs: Sequence[Path],
    output: str,
    *,
    num_output_shards: int = 1,
    form: Form,
    progress: Begin = lambda total: lambda done: None,
) -> list[Path]:
    """Cut one part into `num_output_shards` shards, named by `{i}` in `output`.

    Raises: SettingsError, CheckpointError, ResourceError; before anything is written, but for the last.
    """
    return write_all(shards_of_part(inputs, output, num_output_shards, form), progress)


def shards_of_part(inputs: Sequence[Path], output: str, num_output_shards: int, form: Form) -> list[Output]:
    """What `reshard_fsdp` writes. Raises: SettingsError, CheckpointError."""
    _check_form(form, num_output_shards)
    paths = _outputs(inputs, output, num_output_shards, "--num-output-shards")
    parts = {number for _, number, _ in map(numbers, inputs)}
    if len(parts) > 1:
        raise SettingsError(
            f"--input matches files of {len(parts)} parts, such as {inputs[0]} and {inputs[-1]}; "
            "name the shards of one part at a time"
        )
    (shards,) = collect(inputs, one_part=True).files
    part = Part(Header.read_all(shards))
    return _shards(same_part(part, form), paths, form, job_id(shards, form))


def reshard_mp(
    inputs: Sequence[Path],
    output: str,
    *,
    num_output_parts: int = 1,
    eps: float = SAME,
    form: Form,
    progress: Begin = lambda total: lambda done: None,
    num_threads: int = 1,
) -> list[Path]:
    """Cut a model into `num_output_parts` parts, named by `{i}` in `output`.

    eps: the difference between parts' copies of one tensor that is not worth a word.
    Raises: ParallelSizeError, SettingsError, CheckpointError, ResourceError; before anything is written, but for the
    last.
    """
    paths = _outputs(inputs, output, num_output_parts, "--num-output-parts")
    checkpoint = Checkpoint(collect(inputs))
    checkpoint.config.check_parallel(num_output_parts, "--num-output-parts")
    return write_all(files_of_model(checkpoint, [[path] for path in paths], form, eps), progress, num_threads)


def reshard(
    checkpoint: Checkpoint | WholeCheckpoint,
    folder: Path,
    *,
    num_parts: int | None = None,
    num_shards: int = 1,
    form: Form,
    progress: Begin = lambda total: lambda done: None,
    num_threads: int = 1,
) -> list[Path]:
    """Write a checkpoint of any layout as metaseq's, `num_parts` (None: as many as it has) times `num_shards` files.

    Raises: ParallelSizeError, SettingsError, CheckpointError, ResourceError; before anything is written, but for the
    last.
    """
    num_parts = checkpoint.num_parts if num_parts is None else num_parts
    checkpoint.config.check_parallel(num_parts, "--parts")
    inputs = inputs_of(checkpoint)
    if folder.resolve() in {path.parent.resolve() for path in inputs}:
        raise SettingsError(f"{folder} holds the files to be resharded; name another folder for the new ones")
    suffix = "" if form.unflatten else "-shard{i}"
    names = [f"{folder}/reshard-model_part-{index}{suffix}.pt" for index in range(num_parts)]
    _check_form(form, num_shards)
    paths = [_outputs(inputs, name, num_shards, "--shards") for name in names]
    strays = set(folder.glob("reshard-model_part-*.pt")) - {path for part in paths for path in part}
    if strays:
        raise SettingsError(
            f"{folder} holds {min(strays).name} of another job; name another folder, or remove all "
            "reshard-model_part-*.pt there"
        )
    return write_all(files_of_model(checkpoint, paths, form), progress, num_threads)


def files_of_model(
    checkpoint: Checkpoint | WholeCheckpoint, paths: Sequence[Sequence[Path]], form: Form, eps: float = SAME
) -> list[Output]:
    """What is written to `paths[part][shard]`, as many parts and shards as there are names."""
    if isinstance(checkpoint, Checkpoint):
        for finding in copies(checkpoint, checkpoint.parts[0].tensors, eps):
            log.warning("%s: %s", finding.path, finding.what)
    job = job_id(inputs_of(checkpoint), form, len(paths))
    parts = cut_parts(checkpoint, len(paths), form)
    return [o for i, part in enumerate(parts) for o in _shards(part, paths[i], form, f"{job}-{i}")]


def inputs_of(checkpoint: Checkpoint | WholeCheckpoint) -> list[Path]:
    """The files a checkpoint is in."""
    if isinstance(checkpoint, Checkpoint):
        return [path for shards in checkpoint.files.files for path in shards]
    return sorted(path for path in checkpoint.path.iterdir() if path.is_file())


def _shards(part: NewPart, paths: Sequence[Path], form: Form, job: str) -> list[Output]:
    lost: list[str] = []
    num = len(paths)
    trees = [contents(part, shard, num, form, lost) for shard in range(num)]
    return [Output.of(trees[shard], paths[shard], f"{job}-{shard}of{num}", lost) for shard in range(num)]


def _check_form(form: Form, num_shards: int) -> None:
    if form.unflatten and num_shards > 1:
        raise SettingsError(
            f"{num_shards} shards cannot be unflattened; give --unflatten-weights False (--flat), or 1 shard"
        )


def _outputs(inputs: Sequence[Path], output: str, count: int, flag: str) -> list[Path]:
    if count < 1:
        raise SettingsError(f"{flag} is {count}; it must be 1 or more")
    if count > 1 and "{i}" not in output:
        raise SettingsError(f"--output {output} names one file, and {flag} {count} makes several; put {{i}} into it")
    paths = [Path(output.replace("{i}", str(i))) for i in range(count)]
    given = {path.resolve() for path in inputs}
    for path in paths:
        if path.is_dir():
            raise SettingsError(f"--output {path} is a folder; name a file in it")
        if path.resolve() in given:
            raise SettingsError(f"--output {path} is one of the inputs, which are still needed; name another file")
    return paths
