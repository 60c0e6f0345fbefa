"""Whatever script left the files, and under whatever names: they are the same model, and can be cut anew.

The layouts are in one table, `support.layouts.LAYOUTS`; docs/layouts.md says where each comes from.
"""

import dataclasses
import logging
import re
import sys
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.checkpoints import edit, fused_weights, load, write_shards
from support.layouts import LAYOUTS, Layout, weights
from support.steps import Driver
from torch import Tensor

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.checkpoint.bare import bare_units
from metaseq_api.checkpoint.contents import Form
from metaseq_api.checkpoint.folder import find
from metaseq_api.checkpoint.reshard import reshard_fsdp, reshard_mp
from metaseq_api.checkpoint.to_hugging_face import write_hugging_face
from metaseq_api.checkpoint.trainer import FlatOPT
from metaseq_api.core.config import OPT_SHAPES, ModelConfig
from metaseq_api.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointNotFound
from metaseq_api.parallel.context import ParallelContext

DOCS = Path(__file__).parents[2] / "docs" / "layouts.md"
DTYPES = ("fp16", "fp32", "bf16")
all_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the files of a layout and say where they are."""

    def made(layout: Layout, dtype: str = "fp16") -> Path:
        if layout.published:
            monkeypatch.setitem(OPT_SHAPES, "opt-tiny", layout.config(dtype))
        layout.make(tmp_path / "in", layout.config(dtype))
        return tmp_path / "in"

    return made


def assert_holds(checkpoint: Any, config: ModelConfig) -> None:
    """All of the model and nothing else, bit for bit, also as each rank of 1, 2 and 4 reads it."""
    wanted = weights(config)
    assert checkpoint.config == config
    assert set(checkpoint.names()) == set(wanted)
    for name, tensor in wanted.items():
        stored = checkpoint.tensor(name)
        assert (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype)
        for ranks in (1, 2, 4):
            dim = stored.split or 0
            shares = [range(r * tensor.shape[dim] // ranks, (r + 1) * tensor.shape[dim] // ranks) for r in range(ranks)]
            read = torch.cat([stored.read(dim, share.start, share.stop) for share in shares], dim)
            assert torch.equal(read, tensor), name


@all_layouts
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_is_the_model_that_was_saved(layout: Layout, dtype: str, make: Any) -> None:
    checkpoint = open_checkpoint(make(layout, dtype))
    assert (checkpoint.num_parts, checkpoint.num_shards) == (layout.parts, layout.shards)
    assert_holds(checkpoint, layout.config(dtype))
    assert "omegaconf" not in sys.modules


@all_layouts
def test_every_layout_becomes_unflattened_parts(layout: Layout, make: Any, tmp_path: Path) -> None:
    files = find(make(layout)).files
    for part, shards in enumerate(files):
        (path,) = reshard_fsdp(shards, f"{tmp_path}/whole/reshard-model_part-{part}.pt", form=Form())
        assert not any("flat_param" in name for name in load(path)["model"])
    assert_holds(open_checkpoint(tmp_path / "whole"), layout.config("fp16"))


@all_layouts
@pytest.mark.parametrize("num_parts", [1, 4])
def test_every_layout_becomes_any_number_of_parts(layout: Layout, num_parts: int, make: Any, tmp_path: Path) -> None:
    files = find(make(layout)).files
    inputs = [path for shards in files for path in shards]
    output = f"{tmp_path}/recut/reshard-model_part-{{i}}.pt"
    reshard_mp(inputs, output, num_output_parts=num_parts, form=Form(skip_optimizer_state=True))
    assert_holds(open_checkpoint(tmp_path / "recut"), layout.config("fp16"))


def test_every_layout_stands_in_the_docs_with_the_test_that_reads_it() -> None:
    rows = [line for line in DOCS.read_text("utf-8").splitlines() if line.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`\[([^\]]+)\]`", row)}
    assert set(LAYOUTS) <= named


# -------------------------------------------------------------------------------------------------- a forward pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Thread(ParallelContext):
    """A rank that is a thread: it sums and gathers through a list that all of them share."""

    barrier: threading.Barrier
    seen: list[Any]

    def _all(self, x: Tensor) -> list[Tensor]:
        self.seen[self.rank] = x.clone()
        self.barrier.wait(30)
        all_ = list(self.seen)
        self.barrier.wait(30)
        return all_

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._all(x)).sum(0))

    def gather(self, x: Tensor) -> list[Tensor] | None:
        parts = self._all(x)
        return parts if self.is_driver else None


def _logits(checkpoint: Any, ranks: int, tokens: list[int]) -> Tensor:
    """Of the last token, as `ranks` ranks compute them together."""
    barrier, seen = threading.Barrier(ranks), [None] * ranks

    def run(rank: int) -> list[Tensor]:
        context = _Thread(rank=rank, tensor_size=ranks, barrier=barrier, seen=seen)
        return Driver(checkpoint.config, checkpoint, context=context).step((tokens, 0, [3]))

    with ThreadPoolExecutor(ranks) as pool:
        (got,), *_ = pool.map(run, range(ranks))
    return got


def _hugging_face(folder: Path, config: ModelConfig) -> None:
    write_shards(folder.with_name("shards"), config, parts=1, shards=1)
    write_hugging_face(open_checkpoint(folder.with_name("shards")), folder)


def _dcp(folder: Path, config: ModelConfig) -> None:
    cfg = {"model": Namespace(decoder_attention_heads=config.num_heads, share_decoder_input_output_embed=True)}
    dcp.save({"model": fused_weights(config), "cfg": cfg}, checkpoint_id=folder, no_dist=True)


FOLDERS = {"Hugging Face": Layout(_hugging_face), "DCP": Layout(_dcp)}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", [*LAYOUTS, *FOLDERS])
def test_logits_do_not_depend_on_the_layout_or_the_ranks(name: str, make: Any) -> None:
    layout = (LAYOUTS | FOLDERS)[name]
    config, tokens = layout.config("fp32"), [2, 5, 11, 23, 7, 3, 0, 14]
    checkpoint = open_checkpoint(make(layout, "fp32"))
    if config.has_projection:  # fairscale's model has none; beside Hugging Face it stands in tests/model
        wanted = _logits(checkpoint, 1, tokens)
    else:
        reference = FlatOPT(config)
        reference.load_state_dict(fused_weights(config), strict=False)
        with torch.inference_mode():
            wanted = reference(torch.tensor([tokens]))[0]
    for ranks in (1, 2, 4):
        torch.testing.assert_close(_logits(checkpoint, ranks, tokens), wanted, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------- flat parameters and no metadata


def test_a_flattened_file_names_the_parts_that_are_not_there(make: Any) -> None:
    folder = make(LAYOUTS["flattened parts, one unit"])
    (folder / "reshard-model_part-1.pt").unlink()
    with pytest.raises(CheckpointNotFound, match=r"part-1\.pt is missing: the tensors are split over 2 parts"):
        open_checkpoint(folder)


@pytest.mark.parametrize("gone", [1, 2])
def test_slices_that_do_not_add_up_are_refused(gone: int, make: Any) -> None:
    folder = make(LAYOUTS["flattened parts in slices"])
    for part in range(2):
        for shard in range(gone, 3):
            (folder / f"reshard-model_part-{part}-shard{shard}.pt").unlink()
    with pytest.raises(CheckpointMismatch, match=r"without shard_metadata, and . x \d+ numbers of .* are those of no"):
        open_checkpoint(folder)


def test_numbers_where_padding_should_be_are_not_cut_off(make: Any) -> None:
    folder = make(LAYOUTS["flattened parts with padding"])
    edit(folder / "reshard.pt", lambda s: s["model"]["decoder.layers.1.flat_param_0"][-1:].fill_(1))
    with pytest.raises(CheckpointCorrupt, match=r"ends decoder\.layers\.1\.flat_param_0 with \d+ numbers too many"):
        open_checkpoint(folder)


@pytest.mark.parametrize("field", ["decoder_layers", "decoder_embed_dim", "decoder_ffn_embed_dim"])
def test_a_cfg_of_another_model_does_not_fit_the_lengths(field: str, make: Any) -> None:
    folder = make(LAYOUTS["flattened parts, one unit"])
    for path in folder.iterdir():
        edit(path, lambda s: setattr(s["cfg"]["model"], field, 48))
    with pytest.raises(CheckpointMismatch, match="holds flat parameters without shard_metadata"):
        open_checkpoint(folder)


def test_published_lengths_are_known() -> None:
    table = {
        ("opt-125m", 2): (20_880_384, 3_546_240, 63_435_264),
        ("opt-1.3b", 2): (55_681_024, 25_185_280, 660_127_744),
        ("opt-2.7b", 4): (37_427_200, 19_680_640, 667_207_680),
        ("opt-6.7b", 2): (111_362_048, 100_702_208, 3_333_832_704),
        ("opt-13b", 2): (139_202_560, 157_335_040, 6_432_604_160),
        ("opt-30b", 2): (194_883_584, 308_349_440, 14_995_656_704),
        ("opt-66b", 8): (76_824_576, 127_465_344, 8_234_606_592),
        ("opt-175b", 8): (102_432_768, 226_576_896, 21_853_814_784),
    }
    for (name, parts), (root, layer, total) in table.items():
        config = OPT_SHAPES[name]
        layers = {f"decoder.layers.{i}.flat_param_0": layer for i in range(config.num_layers)}
        for lengths in ({"flat_param_0": root} | layers, {"flat_param_0": total}):
            units = bare_units(lengths, 1, {})
            assert units is not None, name
            assert {unit.key: unit.numel for unit in units} == lengths
            assert units[0].shapes[0] == (config.vocab_size // parts, config.hidden_dim)


# ------------------------------------------------------------------------------------------------------ tied outputs


def test_a_broken_output_projection_is_one_line_in_the_log(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(LAYOUTS["stitched with a broken output"])
    with caplog.at_level(logging.WARNING):
        open_checkpoint(folder)
    assert [record.message for record in caplog.records] == [
        f"{folder}/checkpoint_last_consolidated.pt: decoder.output_projection.weight is 12 x 16, a piece; it is tied "
        "to the embedding, which is read instead"
    ]


def test_a_broken_output_projection_that_is_not_tied_is_refused(make: Any) -> None:
    folder = make(LAYOUTS["stitched with a broken output"])
    for path in folder.iterdir():
        edit(path, lambda s: setattr(s["cfg"]["model"], "share_decoder_input_output_embed", False))
    with pytest.raises(CheckpointMismatch, match=r"12 x 16 for decoder\.output_projection\.weight"):
        open_checkpoint(folder)


def test_a_file_older_than_cfg_tells_its_heads_in_args(make: Any) -> None:
    folder = make(LAYOUTS["stitched"])
    for path in folder.iterdir():
        edit(path, lambda s: s.update(args=s.pop("cfg")["model"]))
    assert open_checkpoint(folder).config.num_heads == 4


def test_an_untied_output_lies_at_the_end_of_a_flattened_root(tmp_path: Path) -> None:
    config = LAYOUTS["raw shards"].config("fp16")
    config = dataclasses.replace(config, tied_output=False)
    for path in write_shards(tmp_path, config, parts=2, shards=1):
        edit(path, lambda s: s.pop("shard_metadata"))
    assert_holds(open_checkpoint(tmp_path), config)
