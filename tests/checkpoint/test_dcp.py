"""Folders of torch.distributed.checkpoint, written by torch itself, are read as they are."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.checkpoints import TINY, fused_weights, logical_weights
from support.hf_opt import logits, metaseq_weights, tiny_opt
from support.processes import clean_env
from support.steps import Driver
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.checkpoint.whole import Box, is_covered
from metaseq_api.errors import CheckpointCorrupt, CheckpointError, CheckpointMismatch, CheckpointNotFound

PROMPT = [2, *range(10, 40)]
HEADS = '{"num_attention_heads": 4}'
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(state: dict[str, Any], folder: Path, config: str | None = HEADS) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    if config is not None:
        (folder / "config.json").write_text(config)
    return folder


def refusal(job: Callable[[], object]) -> str:
    """What is said where a job refuses its files; empty where it does not."""
    try:
        job()
    except CheckpointError as error:
        return str(error)
    return ""


def read_all(folder: Path) -> list[Tensor]:
    checkpoint = open_checkpoint(folder)
    return [checkpoint.tensor(name).read_all() for name in checkpoint.names()]


def check_same(folder: Path, wanted: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.layout == "DCP"
    assert set(checkpoint.names()) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(checkpoint.tensor(name).read_all(), tensor)


@pytest.mark.parametrize("variant", ["pre-norm", "350m"])
def test_what_fsdp2_left_is_read_and_gives_the_same_logits(variant: str, trained: Path) -> None:
    model = tiny_opt(variant, window=63)
    model.config.save_pretrained(trained / variant)
    assert len(list((trained / variant).glob("*.distcp"))) == 2
    check_same(trained / variant, metaseq_weights(model))
    checkpoint = open_checkpoint(trained / variant)
    (got,) = Driver(checkpoint.config, checkpoint).step((PROMPT, 0, [9, 3, 4, 20]))
    torch.testing.assert_close(got, logits(model, PROMPT), atol=1e-4, rtol=0)
    for dim in (0, 1):
        tensor = checkpoint.tensor("decoder.layers.1.fc2.weight")
        whole = metaseq_weights(model)["decoder.layers.1.fc2.weight"]
        assert torch.equal(tensor.read(dim, 13, 50), whole.narrow(dim, 13, 37))


@pytest.mark.parametrize("prefix", ["model", "app.model", "app", "", "state.model._orig_mod", "model.module"])
def test_metaseqs_names_are_found_under_any_prefix(prefix: str, tmp_path: Path) -> None:
    weights = fused_weights()
    dots = f"{prefix}." if prefix else ""
    state: dict[str, Any] = {f"{dots}{name}": tensor for name, tensor in weights.items()}
    state |= {f"{dots}decoder.version": torch.tensor([3.0]), f"optim.{dots}decoder.embed_tokens.weight": torch.ones(3)}
    check_same(save(state, tmp_path), logical_weights(weights))


@pytest.mark.parametrize("variant", ["pre-norm", "350m"])
@pytest.mark.parametrize("base", [True, False])
def test_hugging_faces_names_are_known(variant: str, base: bool, tmp_path: Path) -> None:
    model = tiny_opt(variant)
    state = model.model.state_dict() if base else model.state_dict()
    check_same(save({"app": {"model": state}}, tmp_path), metaseq_weights(model))


def test_without_a_config_the_output_is_what_is_stored(tmp_path: Path) -> None:
    weights = fused_weights()
    output = torch.ones_like(weights["decoder.embed_tokens.weight"])
    state = {"model": weights | {"decoder.output_projection.weight": output}}
    cfg = {"cfg": {"model": Namespace(decoder_attention_heads=4)}}
    check_same(save(state, tmp_path / "with", HEADS), logical_weights(weights))
    wanted = logical_weights(weights) | {"decoder.output_projection.weight": output}
    check_same(save(state | cfg, tmp_path / "without", None), wanted)


@pytest.mark.parametrize("nested", [Namespace, dict])
def test_heads_and_activation_come_from_metaseqs_cfg_where_it_was_saved(nested: Any, tmp_path: Path) -> None:
    model = nested(decoder_attention_heads=2, activation_fn="gelu", share_decoder_input_output_embed=True)
    config = open_checkpoint(save({"model": fused_weights(), "cfg": {"model": model}}, tmp_path, None)).config
    assert (config.num_heads, config.activation, config.dtype) == (2, "gelu", TINY.dtype)


def test_heads_that_nobody_tells_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match=r'put a config\.json beside it with "num_attention_heads"'):
        open_checkpoint(save({"model": fused_weights()}, tmp_path, None))


def test_a_state_dict_without_an_opt_or_with_two_is_refused(tmp_path: Path) -> None:
    for name, state in (("none", {"x": torch.ones(2)}), ("several", {"a": fused_weights(), "b": fused_weights()})):
        with pytest.raises(CheckpointMismatch, match=f"lists {name}"):
            open_checkpoint(save(state, tmp_path / name))
    check_same(
        save({"model": fused_weights(), "ema": fused_weights()}, tmp_path / "ema"), logical_weights(fused_weights())
    )


def test_nothing_of_torchs_own_reader_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save({"model": fused_weights()}, tmp_path)
    for owner, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.delattr(owner, name)
    code = (
        "import sys; from pathlib import Path; from metaseq_api.checkpoint import open_checkpoint;"
        f"c = open_checkpoint(Path({str(tmp_path)!r})); [c.tensor(n).read_all() for n in c.names()];"
        "sys.exit('torch.distributed.checkpoint.filesystem' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=clean_env(), check=False).returncode == 0
    check_same(tmp_path, logical_weights(fused_weights()))


def change_metadata(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


EMBED = "model.decoder.embed_tokens.weight"
SPOTS: dict[str, Callable[[Any, Evil], object]] = {
    "planner": lambda m, evil: setattr(m, "planner_data", evil),
    "entry": lambda m, evil: m.state_dict_metadata.update({EMBED: evil}),
    "sizes": lambda m, evil: setattr(m.state_dict_metadata[EMBED], "size", evil),
    "dtype": lambda m, evil: setattr(m.state_dict_metadata[EMBED].properties, "dtype", evil),
    "chunk": lambda m, evil: m.state_dict_metadata[EMBED].chunks.append(evil),
    "offsets": lambda m, evil: setattr(m.state_dict_metadata[EMBED].chunks[0], "offsets", evil),
    "place": lambda m, evil: setattr(next(iter(m.storage_data.values())), "relative_path", evil),
    "storage": lambda m, evil: m.storage_data.update(dict.fromkeys(m.storage_data, evil)),
}


@pytest.mark.parametrize("spot", SPOTS)
def test_a_payload_in_the_metadata_executes_nothing(spot: str, tmp_path: Path) -> None:
    save({"model": fused_weights()}, tmp_path / "dcp")
    mark = tmp_path / "mark"
    change_metadata(tmp_path / "dcp", lambda metadata: SPOTS[spot](metadata, Evil(mark)))
    message = refusal(lambda: open_checkpoint(tmp_path / "dcp"))
    assert not message or ".metadata" in message or ".distcp" in message
    assert not mark.exists()
    with (tmp_path / "dcp" / ".metadata").open("rb") as file:
        pickle.load(file)
    assert mark.exists(), "the payload must be one that works"


def test_a_payload_as_the_whole_metadata_or_in_a_chunk_executes_nothing(tmp_path: Path) -> None:
    mark, folder = tmp_path / "mark", save({"model": fused_weights()}, tmp_path / "dcp")
    buffer = io.BytesIO()
    torch.save(Evil(mark), buffer)
    data = buffer.getvalue()
    (folder / "__9_0.distcp").write_bytes(data)

    def redirect(metadata: Any) -> None:
        place = next(v for k, v in metadata.storage_data.items() if k.fqn == EMBED)
        place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(data)

    change_metadata(folder, redirect)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointCorrupt, match=r"__9_0\.distcp"):
        checkpoint.tensor("decoder.embed_tokens.weight").read_all()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(CheckpointCorrupt, match=r"\.metadata"):
        open_checkpoint(folder)
    assert not mark.exists()


def _place(**changes: Any) -> Callable[[Any], object]:
    return lambda m: [setattr(v, k, x) for v in m.storage_data.values() for k, x in changes.items()]


def _chunks(*chunks: tuple[tuple[int, int], tuple[int, int]]) -> Callable[[Any], object]:
    made = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks]
    return lambda m: setattr(m.state_dict_metadata[EMBED], "chunks", made)


LIES: dict[str, tuple[Callable[[Any], object], str]] = {
    "a path outside": (_place(relative_path="../x"), "does not say where"),
    "an absolute path": (_place(relative_path="/etc/passwd"), "does not say where"),
    "a file that is not there": (_place(relative_path="__7_7.distcp"), "__7_7.distcp does not exist"),
    "past the end": (_place(offset=2**40), "is cut off"),
    "before the beginning": (_place(offset=-5), "is cut off"),
    "a length that is none": (_place(length=None), "is cut off"),
    "compressed": (_place(transform_descriptors=["zstd"]), "lists compressed data"),
    "no boxes": (_chunks(), "do not make up its shape"),
    "a hole": (_chunks(((0, 0), (23, 16))), "do not make up its shape"),
    "an overlap": (_chunks(((0, 0), (24, 16)), ((0, 0), (24, 16))), "do not make up its shape"),
    "no place": (lambda m: m.storage_data.clear(), "does not say where"),
    "a size too large": (
        lambda m: setattr(m.state_dict_metadata[EMBED], "size", torch.Size([48, 16])),
        "do not make up",
    ),
    "a vector": (lambda m: setattr(m.state_dict_metadata[EMBED], "size", torch.Size([384])), "does not describe"),
    "no tensors": (lambda m: m.state_dict_metadata.clear(), "lists none"),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lies_is_one_line_that_names_the_file(lie: str, tmp_path: Path) -> None:
    change, words = LIES[lie]
    change_metadata(save({"model": fused_weights()}, tmp_path), change)
    with pytest.raises(CheckpointError, match=words) as found:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(found.value)


def test_a_chunk_that_is_damaged_is_named_when_it_is_read(tmp_path: Path) -> None:
    save({"model": fused_weights()}, tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    good = file.read_bytes()
    for at in range(0, len(good), len(good) // 150):
        file.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        message = refusal(lambda: read_all(tmp_path))
        assert not message or file.name in message
    file.write_bytes(good[:-100])
    with pytest.raises(CheckpointCorrupt, match="is cut off"):
        open_checkpoint(tmp_path)
    file.unlink()
    (tmp_path / "other.distcp").touch()
    with pytest.raises(CheckpointNotFound, match=file.name):
        open_checkpoint(tmp_path)


def test_damaged_metadata_is_refused_or_read(tmp_path: Path) -> None:
    save({"model": fused_weights()}, tmp_path)
    path = tmp_path / ".metadata"
    good = path.read_bytes()
    for at in range(0, len(good), 11):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x15]) + good[at + 1 :])
        message = refusal(lambda: open_checkpoint(tmp_path))
        assert not message or str(tmp_path) in message


def test_a_chunk_of_a_zip_that_torch_did_not_write_is_refused(tmp_path: Path) -> None:
    folder = save({"model": fused_weights()}, tmp_path)
    with zipfile.ZipFile(folder / "__9_0.distcp", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(1))
    length = (folder / "__9_0.distcp").stat().st_size
    change_metadata(folder, _place(relative_path="__9_0.distcp", offset=0, length=length))
    with pytest.raises(CheckpointCorrupt, match=r"__9_0\.distcp is cut off or damaged"):
        open_checkpoint(folder).tensor("decoder.embed_tokens.weight").read_all()


def _box(top: int, bottom: int, left: int, right: int) -> Box:
    return Box(range(top, bottom), range(left, right), lambda start, stop: torch.empty(0))


def test_boxes_cover_a_matrix_where_they_meet_and_do_not_overlap() -> None:
    grid = [_box(0, 2, 0, 3), _box(2, 5, 0, 3), _box(0, 4, 3, 4), _box(4, 5, 3, 4)]
    assert is_covered((5, 4), grid)
    assert is_covered((5, 4), grid[::-1])
    for index in range(4):
        assert not is_covered((5, 4), grid[:index] + grid[index + 1 :])
        assert not is_covered((5, 4), [*grid, grid[index]])
    assert not is_covered((5, 4), [_box(0, 5, 0, 3), _box(0, 5, 2, 4)])
    assert not is_covered((5, 4), [_box(0, 5, 0, 5)])
    assert not is_covered((5, 4), [_box(0, 6, 0, 4)])
