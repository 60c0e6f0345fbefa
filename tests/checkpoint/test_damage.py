"""Random damage to what a file says ends in numbers or in one line that is an error of ours, never in a traceback."""

import random
import zipfile
from pathlib import Path

import pytest
from support.checkpoints import edit, write_shards

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.checkpoint.contents import Form
from metaseq_api.checkpoint.reshard import reshard_fsdp, reshard_mp
from metaseq_api.errors import CheckpointCorrupt, CheckpointError, MetaseqApiError


def _damaged(path: Path, chance: random.Random) -> bytes:
    """The file with a few bytes of its pickle flipped, replaced or copied over one another."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        info = next(i for i in file.infolist() if i.filename.endswith("data.pkl"))
    begin = data.index(b"\x80\x02", info.header_offset)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = begin + chance.randrange(info.file_size - 8)
        kind = chance.randrange(3)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at] = chance.randrange(256)
        else:
            source = begin + chance.randrange(info.file_size - 8)
            data[at : at + 5] = data[source : source + 5]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [False, True])
def test_a_damaged_pickle_never_breaks_the_reader_or_the_jobs(whole: bool, tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "in", parts=1, shards=2)
    if whole:
        paths = reshard_fsdp(paths, f"{tmp_path}/whole/reshard.pt", form=Form())
    chance, sound = random.Random(0), paths[-1].read_bytes()
    refused = 0
    for _ in range(60):
        paths[-1].write_bytes(_damaged(paths[-1], chance))
        try:
            checkpoint = open_checkpoint(paths[0].parent)
            for name in checkpoint.names():
                checkpoint.tensor(name).read_all()
            reshard_mp(paths, f"{tmp_path}/x-{{i}}.pt", num_output_parts=2, form=Form())
            reshard_fsdp(paths, f"{tmp_path}/y-{{i}}.pt", num_output_shards=3, form=Form(unflatten=False))
        except MetaseqApiError as error:
            refused += isinstance(error, CheckpointError)
            assert str(error).isprintable()  # noqa: PT017
        paths[-1].write_bytes(sound)
    assert refused > 20


def test_a_name_that_would_write_to_the_terminal_is_refused(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, parts=1, shards=1)
    edit(path, lambda state: state["model"].update({"decoder.\x1b[2Jx\n": state["model"]["flat_param_0"]}))
    with pytest.raises(CheckpointCorrupt, match="whose name is not a text"):
        open_checkpoint(tmp_path)


def test_a_checkpoint_without_moments_has_none(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "in", parts=2, shards=2, optimizer_state=False)
    assert open_checkpoint(tmp_path / "in").moments() == {}
    reshard_fsdp(paths[:2], f"{tmp_path}/out/x.pt", form=Form())
