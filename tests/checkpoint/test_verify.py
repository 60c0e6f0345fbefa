"""Verification reads every number and names the file that is wrong."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import TINY, edit, fused_weights, write_shards

from metaseq_api.checkpoint.archive import Archive
from metaseq_api.checkpoint.finding import Finding
from metaseq_api.checkpoint.opening import open_checkpoint
from metaseq_api.checkpoint.part import weights_of
from metaseq_api.checkpoint.to_hugging_face import write_hugging_face
from metaseq_api.checkpoint.trainer import write_trainer_checkpoint
from metaseq_api.checkpoint.verify import verify


def write(folder: Path, weights: dict[str, torch.Tensor], *, num_parts: int = 1, num_shards: int = 3) -> Path:
    write_trainer_checkpoint(
        folder, weights, TINY, num_parts=num_parts, num_shards=num_shards, dtype=torch.float32, optimizer_state=False
    )
    return folder


def sound() -> dict[str, torch.Tensor]:
    """Weights as a training leaves them: norms about 1."""
    return {n: t + (1 if n.endswith("norm.weight") else 0) for n, t in fused_weights(TINY).items()}


def findings(folder: Path) -> list[Finding]:
    return verify(open_checkpoint(folder))


def shard(folder: Path, k: int, part: int = 0) -> Path:
    return folder / f"checkpoint_last-model_part-{part}-shard{k}.pt"


@pytest.mark.parametrize(("num_parts", "num_shards"), [(1, 1), (1, 3), (2, 2)])
def test_a_sound_checkpoint_gives_no_finding(num_parts: int, num_shards: int, tmp_path: Path) -> None:
    assert findings(write(tmp_path, sound(), num_parts=num_parts, num_shards=num_shards)) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_none_is_found_and_its_tensor_named(value: float, tmp_path: Path) -> None:
    weights = sound()
    weights["decoder.layers.1.fc2.weight"][3, 2] = value
    (found,) = findings(write(tmp_path, weights))
    assert "decoder.layers.1.fc2.weight" in found.what
    assert found.fatal


def test_swapped_shards_show_in_the_layer_norms(tmp_path: Path) -> None:
    write(tmp_path, sound(), num_shards=2)
    a, b = shard(tmp_path, 0), shard(tmp_path, 1)
    kept = tmp_path / "kept"
    a.rename(kept)
    b.rename(a)
    kept.rename(b)
    assert any("swapped" in f.what for f in findings(tmp_path))


def test_a_repeated_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, sound())
    shutil.copy(shard(tmp_path, 0), shard(tmp_path, 1))
    assert any(f.path == shard(tmp_path, 1) and "same numbers" in f.what for f in findings(tmp_path))


def test_copies_that_differ_between_parts_are_named(tmp_path: Path) -> None:
    weights = sound()
    write(tmp_path, weights, num_parts=2, num_shards=1)
    weights["decoder.layer_norm.bias"] = weights["decoder.layer_norm.bias"] + 0.5
    write(tmp_path / "other", weights, num_parts=2, num_shards=1)
    shutil.copy(shard(tmp_path / "other", 0, part=1), shard(tmp_path, 0, part=1))
    (found,) = findings(tmp_path)
    assert found.path == shard(tmp_path, 0, part=1)
    assert "decoder.layer_norm.bias differs by up to 0.5" in found.what


@pytest.mark.parametrize("name", ["decoder.layers.0.fc1.weight", "decoder.embed_tokens.weight"])
def test_the_file_that_holds_a_wrong_number_is_the_one_that_is_named(name: str, tmp_path: Path) -> None:
    weights = sound()
    weights[name][-1, -1] = torch.nan
    (found,) = findings(write(tmp_path, weights))
    archive = Archive(found.path)
    assert any(bool(archive.view(t).isnan().any()) for t in weights_of(archive).values())


def overwrite(path: Path, key: str, data: bytes, at: int = 0) -> None:
    """Change bytes of a tensor's record behind the back of the zip format."""
    archive = Archive(path)
    place = archive.place(weights_of(archive)[key])
    with path.open("r+b") as file:
        file.seek(place + at)
        file.write(data)


def test_a_flipped_bit_shows_in_the_checksum_where_the_number_is_still_one(tmp_path: Path) -> None:
    path = shard(write(tmp_path, sound()), 1)
    archive = Archive(path)
    before = archive.view(weights_of(archive)["flat_param_0"]).view(torch.uint8)[0].item()
    overwrite(path, "flat_param_0", bytes([int(before) ^ 1]))
    (found,) = findings(tmp_path)
    assert (found.path, found.fatal) == (path, True)
    assert "its record data/0 has the checksum" in found.what


def test_damage_in_what_is_no_tensor_of_the_model_shows_too(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, parts=1, shards=1)
    data = path.read_bytes()
    at = data.index(b"max_update")
    path.write_bytes(data[:at] + b"n" + data[at + 1 :])
    assert any("record data.pkl has the checksum" in f.what for f in findings(tmp_path))


def test_a_file_without_checksums_is_remarked_once(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        write(tmp_path, sound(), num_shards=1)
    finally:
        torch.serialization.set_crc32_options(True)
    (found,) = findings(tmp_path)
    assert not found.fatal
    assert "states no checksum for" in found.what


def test_a_hugging_face_bin_is_held_against_its_checksums(tmp_path: Path) -> None:
    write(tmp_path / "in", sound())
    write_hugging_face(open_checkpoint(tmp_path / "in"), tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    names = open_checkpoint(tmp_path / "in")
    tensors = {name: names.tensor(name).read_all() for name in names.names()}
    path = tmp_path / "hf" / "pytorch_model.bin"
    torch.save(tensors, path)
    assert findings(tmp_path / "hf") == []
    overwrite(path, "decoder.layers.0.fc1.weight", b"\1")
    (found,) = findings(tmp_path / "hf")
    assert found.path == path


@pytest.mark.parametrize(
    ("kind", "value", "what"),
    [("exp_avg", torch.nan, "holds nan"), ("exp_avg_sq", -1.0, "holds -1, where squares are averaged")],
)
def test_the_optimizer_state_is_looked_at(kind: str, value: float, what: str, tmp_path: Path) -> None:
    write_trainer_checkpoint(tmp_path, sound(), TINY, num_parts=1, num_shards=2, dtype=torch.float32)
    path = shard(tmp_path, 1)
    edit(path, lambda s: s["last_optimizer_state"]["state"][1][kind].__setitem__(0, value))
    (found,) = findings(tmp_path)
    assert found.path == path
    assert f"{kind} of decoder.layers.0" in found.what
    assert what in found.what


def test_an_optimizer_state_copied_from_another_shard_is_named(tmp_path: Path) -> None:
    write_trainer_checkpoint(tmp_path, sound(), TINY, num_parts=1, num_shards=3, dtype=torch.float32)
    other = torch.load(shard(tmp_path, 0), weights_only=False)["last_optimizer_state"]
    edit(shard(tmp_path, 1), lambda s: s.update(last_optimizer_state=other))
    (found,) = findings(tmp_path)
    assert found.path == shard(tmp_path, 1)
    assert "the same optimizer state (exp_avg)" in found.what


def test_pages_that_were_never_written_are_remarked_where_no_checksum_tells(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, ffn_dim=128)
    weights = {n: t + (1 if n.endswith("norm.weight") else 0) for n, t in fused_weights(config).items()}
    weights["decoder.layers.1.fc2.weight"].view(-1)[700:1800] = 0
    weights["decoder.embed_tokens.weight"][1] = 0  # the row of <pad>
    write_trainer_checkpoint(tmp_path, weights, config, num_parts=1, num_shards=1, dtype=torch.float32)
    (found,) = findings(tmp_path)
    assert not found.fatal
    assert "decoder.layers.1.fc2.weight has at least 512 zeros" in found.what


def test_a_layer_that_is_there_twice_is_remarked(tmp_path: Path) -> None:
    weights = sound()
    weights["decoder.layers.1.fc1.weight"] = weights["decoder.layers.0.fc1.weight"]
    (found,) = findings(write(tmp_path / "in", weights))
    assert not found.fatal
    assert "decoder.layers.1.fc1.weight begins with the numbers of decoder.layers.0.fc1.weight" in found.what
    write_hugging_face(open_checkpoint(tmp_path / "in"), tmp_path / "hf")
    assert [f.what for f in findings(tmp_path / "hf")] == [found.what]
