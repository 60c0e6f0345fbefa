"""OPT-175B's case in small: 96 layers in 8 parts x 124 shards, 992 files, by the commands that the real one takes.

The files are cut by fairscale's own code, though no 992 processes ran (see support.many_shards). Width and vocabulary
are tiny, so that many trailing shards of every layer hold nothing but padding. Moments over 124 shards are tested in
checkpoint/test_checkpoint.py. All commands run with 1024 open files allowed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from metaseq_api.cli.inspect_checkpoint import main as inspect
from support import tiny_tokenizer
from support.checkpoints import edit, fused_weights, load, logical_weights
from support.many_shards import write_many_shards
from support.processes import clean_env
from support.service import DOOR, Service

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.checkpoint.checkpoint import Checkpoint
from metaseq_api.checkpoint.folder import find
from metaseq_api.checkpoint.trainer import FlatOPT, fsdp_wrap, split_part, trainer_state
from metaseq_api.checkpoint.verify import glance
from metaseq_api.core.config import ModelConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CONFIG = ModelConfig(
    num_layers=96, hidden_dim=16, num_heads=8, ffn_dim=16, vocab_size=tiny_tokenizer.VOCAB_SIZE, max_positions=62
)
PARTS, SHARDS = 8, 124
FEW_FILES = ["bash", "-c", 'ulimit -n 1024; exec "$@"', "sh"]
BIN = Path(sys.executable).parent
QUESTION: dict[str, Any] = {"prompt": "the theatre", "max_tokens": 6, "temperature": 0, "logprobs": 2}


def weights() -> dict[str, torch.Tensor]:
    """Norms about 1, as --verify expects them; the rest small, so that 96 layers do not overflow."""
    return {
        name: 1 + tensor / 8 if name.endswith("norm.weight") else tensor / 8
        for name, tensor in fused_weights(CONFIG).items()
    }


def start(*line: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*FEW_FILES, *map(str, line)],
        env=clean_env(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 992 files, and the tokenizer's beside them."""
    folder = tmp_path_factory.mktemp("raw")
    assert len(write_many_shards(folder, weights(), CONFIG, num_parts=PARTS, num_shards=SHARDS)) == 992
    tiny_tokenizer.write(folder)
    return folder


@pytest.fixture(scope="module")
def opened(raw: Path) -> Checkpoint:
    checkpoint = open_checkpoint(raw)
    assert isinstance(checkpoint, Checkpoint)
    return checkpoint


@pytest.fixture(scope="module")
def verified(raw: Path) -> Iterator[subprocess.Popen[str]]:
    """Verification of the raw files, which runs beside what else is done with them."""
    with start(BIN / "metaseq-api-inspect", raw, "--verify") as process:
        yield process


@pytest.fixture(scope="module")
def resharded(raw: Path, verified: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 8 parts, made by the one command."""
    folder = tmp_path_factory.mktemp("resharded")
    done = start(
        *(sys.executable, "-m", "metaseq_api.scripts.reshard_fsdp"),
        *("--input", f"{raw}/checkpoint_last-model_part-{{part}}-shard*.pt"),
        *("--output", f"{folder}/reshard-model_part-{{part}}.pt"),
        *("--num-output-shards", "1", "--skip-optimizer-state", "True", "--unflatten-weights", "True"),
    )
    assert said(done).split() == [str(folder / f"reshard-model_part-{j}.pt") for j in range(PARTS)]
    tiny_tokenizer.write(folder)
    return folder


@pytest.fixture(scope="module")
def answers(raw: Path, resharded: Path) -> dict[str, Any]:
    """What the service says of each set of files, over so many ranks."""
    out = {}
    for name, folder, ranks in (("raw", raw, 2), ("resharded", resharded, 2), ("one rank", resharded, 1)):
        service = Service(folder, str(folder), "--model-parallel", str(ranks), "--device", "cpu", door=FEW_FILES + DOOR)
        try:
            out[name] = service.complete(**QUESTION)["choices"][0]
            assert len(service.ranks) == ranks
            assert any(f"{PARTS} part(s)" in line for line in service.lines)
            service.process.terminate()
            assert service.end(10) == 0
        finally:
            service.kill()
    return out


@pytest.mark.parametrize(("part", "shard"), [(0, 0), (3, 99), (7, 98), (7, 123)])
def test_a_file_is_what_a_model_wrapped_for_that_rank_gives(part: int, shard: int, raw: Path) -> None:
    share = split_part(weights(), part, PARTS)
    share["decoder.output_projection.weight"] = share["decoder.embed_tokens.weight"]
    model = FlatOPT(CONFIG, PARTS)
    model.load_state_dict({"decoder.version": model.decoder.version, **share})
    wanted = trainer_state(fsdp_wrap(model.half(), shard, SHARDS), CONFIG, num_parts=PARTS)
    found = load(raw / f"checkpoint_last-model_part-{part}-shard{shard}.pt")
    assert found["shard_metadata"] == wanted["shard_metadata"]
    assert found["cfg"] == wanted["cfg"]
    assert list(found["model"]) == list(wanted["model"])
    for name, tensor in wanted["model"].items():
        assert torch.equal(found["model"][name], tensor), name


def test_many_trailing_shards_are_all_padding(opened: Checkpoint) -> None:
    assert "8 parts x 124 shards" in opened.layout
    headers = opened.parts[0].headers
    key = "decoder.layers.95.flat_param_0"
    assert [h.padding[key] == h.weights[key].numel for h in headers] == [k > 98 for k in range(SHARDS)]


def test_the_one_command_joins_all_parts_bit_for_bit(resharded: Path) -> None:
    checkpoint = open_checkpoint(resharded)
    wanted = logical_weights(weights())
    assert sorted(checkpoint.names()) == sorted(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(checkpoint.tensor(name).read_all(), tensor), name


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_any_number_of_ranks_reads_its_slices_of_the_992_files(ranks: int, opened: Checkpoint) -> None:
    wanted = logical_weights(weights())
    for name in [n for n in wanted if ".layers." not in n or ".95." in n]:
        for dim, size in enumerate(wanted[name].shape):
            for rank in range(ranks if size % ranks == 0 else 0):
                start, stop = rank * size // ranks, (rank + 1) * size // ranks
                part = opened.tensor(name).read(dim, start, stop)
                assert torch.equal(part, wanted[name].narrow(dim, start, stop - start)), name


def test_the_shards_give_the_text_of_the_parts(answers: dict[str, Any]) -> None:
    assert answers["raw"]["text"]
    assert answers["raw"] == answers["resharded"]


def test_one_rank_says_what_two_say(answers: dict[str, Any]) -> None:
    one, two = answers["one rank"], answers["raw"]
    assert one["text"] == two["text"]
    assert one["logprobs"]["token_logprobs"] == pytest.approx(two["logprobs"]["token_logprobs"], abs=1e-3)


def test_both_are_verified(verified: subprocess.Popen[str], resharded: Path) -> None:
    parts = start(BIN / "metaseq-api-inspect", resharded, "--verify")
    for process, layout in ((verified, "flattened, 8 parts x 124 shards"), (parts, "unflattened, 8 parts x 1 shards")):
        text = said(process)
        assert re.search(rf"^layout +{layout}$", text, re.MULTILINE)
        assert re.search(r"^findings +none$", text, re.MULTILINE)
        assert "1, 2, 4, 8 rank(s)" in text


def linked(raw: Path, folder: Path) -> Path:
    """The 992 files again, by other names of the same bytes."""
    for file in raw.glob("*.pt"):
        os.link(file, folder / file.name)
    return folder


def missing(victim: Path) -> None:
    victim.unlink()


def twice(victim: Path) -> None:
    shutil.copy(victim, victim.with_name(victim.name.replace("shard", "shard0")))


def another_step(victim: Path) -> None:
    copy = victim.with_suffix(".new")
    shutil.copy(victim, copy)
    edit(copy, lambda state: state["optimizer_history"][-1].update(num_updates=2000))
    copy.replace(victim)


@pytest.mark.parametrize(
    ("damage", "code", "says"),
    [
        (missing, 3, "{name} is missing"),
        (twice, 5, "{name} have the same part and shard"),
        (another_step, 5, "{name} was saved at another update than"),
    ],
    ids=["missing", "twice", "another step"],
)
def test_one_bad_file_of_992_is_named(
    damage: Callable[[Path], None],
    code: int,
    says: str,
    raw: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    victim = linked(raw, tmp_path) / "checkpoint_last-model_part-5-shard77.pt"
    damage(victim)
    assert inspect([str(tmp_path)]) == code
    assert says.format(name=victim.name) in capsys.readouterr().err


def test_a_shard_copied_over_another_is_named_by_the_glance_of_every_start(raw: Path, tmp_path: Path) -> None:
    victim = linked(raw, tmp_path) / "checkpoint_last-model_part-5-shard77.pt"
    victim.unlink()
    shutil.copy(tmp_path / "checkpoint_last-model_part-5-shard76.pt", victim)
    found = [f for f in glance(Checkpoint(find(tmp_path))) if f.fatal]
    assert [f.path for f in found] == [victim]
    assert "shard76.pt" in found[0].what
