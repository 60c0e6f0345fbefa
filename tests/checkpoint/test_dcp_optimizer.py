"""The optimizer's state beside the model in folders of torch.distributed.checkpoint lands on its parameters."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from metaseq_api.cli.inspect_checkpoint import main as inspect
from support.checkpoints import TINY, logical_weights
from support.hf_opt import tiny_opt
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.checkpoint.hugging_face import our_name
from metaseq_api.checkpoint.trainer import FlatOPT
from metaseq_api.checkpoint.whole import WholeCheckpoint
from metaseq_api.errors import CheckpointCorrupt, CheckpointError, CheckpointMismatch

HEADS = '{"num_attention_heads": 4}'
KINDS = ("exp_avg", "exp_avg_sq")
Moments = dict[str, dict[str, Tensor]]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Trainer(Stateful):
    """A model and its optimizer after some steps, as an application hands them to DCP."""

    def __init__(self, model: nn.Module, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        self.model, self.optimizer = model, optimizer(model)
        generator = torch.Generator().manual_seed(7)
        for _ in range(3):
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=generator)
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return self.saved()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("nothing is loaded here")

    def saved(self, *, flattened: bool = False) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=flattened)
        model, optim = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optim": optim}

    def moments(self) -> Moments:
        """What the optimizer itself holds, by our names."""
        return {
            kind: logical_weights(
                {our_name(name): self.optimizer.state[p][kind] for name, p in self.model.named_parameters()}
            )
            for kind in KINDS
        }


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)


def in_groups(*dims: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """One group for the parameters of each number of dimensions, with a decay of its own."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        params = list(model.parameters())
        groups = [{"params": [p for p in params if p.dim() == dim], "weight_decay": 0.1 * (dim - 1)} for dim in dims]
        return torch.optim.AdamW(groups, lr=0.01)

    return make


def backwards(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(model.parameters())[::-1], lr=0.01)


def flat_opt() -> nn.Module:
    torch.manual_seed(0)
    return FlatOPT(TINY)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "separate": lambda: tiny_opt("pre-norm"),
    "350m": lambda: tiny_opt("350m"),
    "fused": flat_opt,
}
STATES: dict[str, Callable[[Trainer], dict[str, Any]]] = {
    "named": Trainer.saved,
    "stateful": lambda trainer: {"app": trainer},
    "flattened": lambda trainer: {"app": trainer.saved(flattened=True)},
    "plain": lambda trainer: {"model": trainer.model, "optimizer": trainer.optimizer, "step": 5},
    "nested": lambda trainer: {
        "state": {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    },
}


def save(state: dict[str, Any], folder: Path) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (folder / "config.json").write_text(HEADS)
    return folder


def opened(folder: Path) -> WholeCheckpoint:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, WholeCheckpoint)
    return checkpoint


def check_same(checkpoint: WholeCheckpoint, wanted: Moments) -> None:
    found = checkpoint.moments()
    assert set(found) == set(wanted)
    for kind, vectors in wanted.items():
        assert set(found[kind]) == set(vectors) == set(checkpoint.names())
        for name, vector in vectors.items():
            assert found[kind][name].shape == checkpoint.tensor(name).shape
            assert torch.equal(found[kind][name].read_all(), vector)


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize("kind", STATES)
def test_moments_are_bit_for_bit_the_optimizers_own(variant: str, kind: str, tmp_path: Path) -> None:
    trainer = Trainer(MODELS[variant](), adam)
    checkpoint = opened(save(STATES[kind](trainer), tmp_path))
    check_same(checkpoint, trainer.moments())
    assert checkpoint.optimizer["step"] == 3
    (group,) = checkpoint.optimizer["param_groups"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.9, 0.95), 0.1)
    assert sorted(group["params"]) == sorted(checkpoint.names())


@pytest.mark.parametrize("dims", [(2, 1), (1, 2)])
@pytest.mark.parametrize("kind", STATES)
def test_groups_for_weight_decay_are_told_apart(dims: tuple[int, int], kind: str, tmp_path: Path) -> None:
    trainer = Trainer(flat_opt(), in_groups(*dims))
    checkpoint = opened(save(STATES[kind](trainer), tmp_path))
    check_same(checkpoint, trainer.moments())
    found = {group["weight_decay"]: set(group["params"]) for group in checkpoint.optimizer["param_groups"]}
    assert found == {
        0.1 * (dim - 1): {n for n in checkpoint.names() if len(checkpoint.tensor(n).shape) == dim} for dim in dims
    }


@pytest.mark.parametrize("made", [backwards, in_groups(1), lambda m: in_groups(2, 1)(m.decoder.layers)])
def test_numbers_that_the_shapes_do_not_explain_are_left_out_with_a_warning(
    made: Callable[[Any], torch.optim.Optimizer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(flat_opt(), made)
    checkpoint = opened(save(STATES["plain"](trainer), tmp_path))
    with caplog.at_level(logging.WARNING):
        assert (checkpoint.moments(), checkpoint.optimizer) == ({}, {})
    (line,) = (r.getMessage() for r in caplog.records if r.name.startswith("metaseq_api"))
    assert "do not prove which is which" in line
    assert str(tmp_path) in line


@pytest.mark.parametrize(
    "change",
    [lambda m: setattr(m, "planner_data", None), lambda m: m.planner_data.pop("model.decoder.layer_norm.bias")],
)
def test_without_the_order_of_the_state_dict_numbers_mean_nothing(
    change: Callable[[Any], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ranks share replicated tensors out, so that the entries' own order is no model's."""
    trainer = Trainer(flat_opt(), adam)
    state = {"optimizer": trainer.optimizer, "model": trainer.model}
    change_metadata(save(state, tmp_path), change)
    assert opened(tmp_path).moments() == {}
    assert "do not prove" in caplog.text


def test_without_an_optimizer_or_without_vectors_there_is_nothing(tmp_path: Path) -> None:
    model = flat_opt()
    sgd = Trainer(model, lambda m: torch.optim.SGD(m.parameters(), lr=0.01))
    for name, state in (("none", {"model": model}), ("sgd", {"model": model, "optimizer": sgd.optimizer})):
        checkpoint = opened(save(state, tmp_path / name))
        assert (checkpoint.moments(), checkpoint.optimizer) == ({}, {})


def test_one_vector_without_a_step_is_read(tmp_path: Path) -> None:
    sgd = Trainer(flat_opt(), lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9))
    checkpoint = opened(save({"model": sgd.model, "optimizer": sgd.optimizer}, tmp_path))
    assert (set(checkpoint.moments()), checkpoint.optimizer["step"]) == ({"momentum_buffer"}, None)


def change_metadata(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


NORM = "decoder.layers.1.fc1.weight"


def _without(state: dict[str, Any], name: str, kind: str) -> None:
    del state["optim"]["state"][name][kind]


PARTIAL: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda s: _without(s, NORM, "exp_avg"), f"exp_avg of some parameters and none of {NORM}"),
    "frozen": (lambda s: s["optim"]["state"].pop(NORM), f"exp_avg of some parameters and none of {NORM}"),
    "shape": (lambda s: s["optim"]["state"][NORM].update(exp_avg=torch.ones(16, 32)), r"exp_avg of shape \(16, 32\)"),
    "integers": (
        lambda s: s["optim"]["state"][NORM].update(exp_avg=torch.ones(32, 16, dtype=torch.int8)),
        "in torch.int8",
    ),
    "two": (lambda s: s.update(critic={"state": s["optim"]["state"]}), "several optimizers"),
}


@pytest.mark.parametrize("what", PARTIAL)
def test_moments_of_only_some_parameters_are_refused_and_the_weights_are_read(what: str, tmp_path: Path) -> None:
    change, words = PARTIAL[what]
    state = Trainer(flat_opt(), adam).saved()
    change(state)
    checkpoint = opened(save(state, tmp_path))
    checkpoint.tensor(NORM).read_all()
    with pytest.raises(CheckpointMismatch, match=words) as found:
        checkpoint.moments()
    assert str(tmp_path) in str(found.value)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (torch.tensor(4.0), "at 3, .*fc1.weight at 4"),
        (torch.tensor(float("nan")), "no count"),
        ("x", "no count"),
        (2.5, "no count"),
    ],
)
def test_steps_that_disagree_or_are_none_are_refused(step: Any, words: str, tmp_path: Path) -> None:
    state = Trainer(flat_opt(), adam).saved()
    state["optim"]["state"][NORM]["step"] = step
    checkpoint = opened(save(state, tmp_path))
    assert set(checkpoint.moments()) == set(KINDS)
    with pytest.raises(CheckpointMismatch, match=words):
        _ = checkpoint.optimizer


def test_an_output_that_nobody_says_is_tied_is_asked_for(tmp_path: Path) -> None:
    trainer = Trainer(tiny_opt("pre-norm"), adam)
    folder = save(trainer.saved() | {"cfg": {"model": {"decoder_attention_heads": 4}}}, tmp_path)
    check_same(opened(folder), trainer.moments())
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointMismatch, match='"tie_word_embeddings": true'):
        opened(folder).moments()


def test_a_tied_output_that_was_kept_under_the_heads_name_is_the_embeddings(tmp_path: Path) -> None:
    trainer = Trainer(tiny_opt("pre-norm"), adam)
    state = trainer.saved()
    entries = state["optim"]["state"]
    entries["lm_head.weight"] = entries.pop("model.decoder.embed_tokens.weight")
    check_same(opened(save(state, tmp_path)), trainer.moments())


def test_opening_reads_no_file_but_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(Trainer(flat_opt(), adam).saved(), tmp_path)
    monkeypatch.delattr(zipfile, "ZipFile")
    assert set(opened(tmp_path).moments()) == set(KINDS)


STORED = "optim.state.decoder.layers.1.fc1.weight.exp_avg"
LIES: dict[str, Callable[[Any], object]] = {
    "no boxes": lambda m: m.state_dict_metadata[STORED].chunks.clear(),
    "size": lambda m: setattr(m.state_dict_metadata[STORED], "size", (1,) * 40),
    "huge": lambda m: setattr(m.state_dict_metadata[STORED], "size", torch.Size([2**39, 2**20])),
    "entry": lambda m: m.state_dict_metadata.update({STORED: 3}),
    "places": lambda m: m.storage_data.clear(),
    "past the end": lambda m: [setattr(place, "offset", 2**50) for place in m.storage_data.values()],
    "name": lambda m: m.state_dict_metadata.update({STORED + "\n": m.state_dict_metadata[STORED]}),
    "digits": lambda m: m.state_dict_metadata.update({f"optim.state.{'9' * 9999}.exp_avg": 1}),
    "groups": lambda m: m.state_dict_metadata.update({"optim.param_groups": 1}),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lies_of_the_optimizer_is_one_line_that_names_the_file(lie: str, tmp_path: Path) -> None:
    folder = save(Trainer(flat_opt(), adam).saved(), tmp_path)
    change_metadata(folder, LIES[lie])
    if lie == "digits":
        assert set(opened(folder).moments()) == set(KINDS)
        return
    with pytest.raises(CheckpointError) as found:
        _ = opened(folder).moments(), opened(folder).optimizer
    assert str(tmp_path) in str(found.value)


def test_an_object_of_the_optimizer_is_not_as_large_as_it_likes(tmp_path: Path) -> None:
    state = Trainer(flat_opt(), adam).saved()
    state["optim"]["param_groups"][0]["lr"] = bytes(17 << 20)
    with pytest.raises(CheckpointCorrupt, match=r"\.distcp .*no object"):
        _ = opened(save(state, tmp_path)).optimizer


@pytest.mark.parametrize("variant", ["pre-norm", "350m", "fused"])
@pytest.mark.parametrize("kind", ["", "-named", "-flattened"])
def test_moments_that_fsdp2_sharded_over_two_ranks_are_whole(variant: str, kind: str, trained: Path) -> None:
    folder = trained / f"{variant}{kind}"
    (folder / "config.json").write_text(HEADS)
    kept: dict[str, dict[str, Tensor]] = torch.load(trained / f"{variant}.pt")
    wanted = {k: logical_weights({our_name(name): vectors[k] for name, vectors in kept.items()}) for k in KINDS}
    checkpoint = opened(folder)
    check_same(checkpoint, wanted)
    assert any(len(tensor.boxes) == 2 for tensor in checkpoint.moments()["exp_avg"].values())
    assert checkpoint.optimizer["step"] == 2
    for dim in (0, 1):
        name = "decoder.layers.1.fc2.weight"
        assert torch.equal(
            checkpoint.moments()["exp_avg"][name].read(dim, 3, 14), wanted["exp_avg"][name].narrow(dim, 3, 11)
        )


def test_a_folder_whose_optimizer_is_of_no_use_is_inspected_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = Trainer(flat_opt(), adam).saved()
    _without(state, NORM, "exp_avg")
    assert inspect([str(save(state, tmp_path))]) == 0
    assert f"of no use: {tmp_path}/.metadata has optimizer state exp_avg" in capsys.readouterr().out
