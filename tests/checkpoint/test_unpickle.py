"""Nothing that a file names is imported or called; bombs do not go off."""

import contextlib
import os
import pickle
import struct
from argparse import Namespace
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import edit, write_shards

from metaseq_api.checkpoint import open_checkpoint
from metaseq_api.checkpoint.archive import Archive
from metaseq_api.checkpoint.inert import plain, writable
from metaseq_api.checkpoint.unpickle import Stub, read_pickle
from metaseq_api.errors import CheckpointError


class Evil:
    """Runs a command when an ordinary unpickler meets it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


OPCODES = {
    "reduce": lambda c: b"cposix\nsystem\n(" + _text(c) + b"tR.",
    "stack_global": lambda c: b"\x80\x04" + _text("posix") + _text("system") + b"\x93" + _text(c) + b"\x85R.",
    "inst": lambda c: b"(" + _text(c) + b"iposix\nsystem\n.",
    "obj": lambda c: b"(cposix\nsystem\n" + _text(c) + b"o.",
    "newobj": lambda c: b"\x80\x02csubprocess\nPopen\n(](" + _text("sh") + _text("-c") + _text(c) + b"etR.",
    "build": lambda c: (
        b"\x80\x02cargparse\nNamespace\n)\x81}" + _text("__setstate__") + b"cposix\nsystem\nsb" + _text(c) + b"b."
    ),
    "getattr": lambda c: (
        (b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(" + _text("os") + b"tR" + _text("system") + b"tR(")
        + _text(c)
        + b"tR."
    ),
    "eval": lambda c: b"cbuiltins\neval\n(" + _text(f"__import__('os').system({c!r})") + b"tR.",
    "setitem": lambda c: b"}" + _text("k") + b"cposix\nsystem\n(" + _text(c) + b"tRs.",
    "append": lambda c: b"]cposix\nsystem\n(" + _text(c) + b"tRa.",
}


@pytest.mark.parametrize("kind", OPCODES)
def test_every_way_to_call_something_executes_nothing(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    data = OPCODES[kind](f"touch {mark}")
    value = pickle.loads(data)
    if kind == "newobj":
        value.wait()
    assert mark.exists(), "the payload must be one that works"
    mark.unlink()
    plain(read_pickle(data))
    assert not mark.exists()


def _in_cfg(state: dict[str, Any], evil: Evil) -> None:
    state["cfg"]["model"].decoder_layers = evil


def _as_namespace(state: dict[str, Any], evil: Evil) -> None:
    state["cfg"]["model"] = Namespace(a=[{"b": (evil,)}])


def _as_model(state: dict[str, Any], evil: Evil) -> None:
    state["model"] = evil


def _as_tensor(state: dict[str, Any], evil: Evil) -> None:
    state["model"]["flat_param_0"] = evil


def _as_metadata(state: dict[str, Any], evil: Evil) -> None:
    state["shard_metadata"]["param_metadata"][0]["params"]["flat_param_0"]["numels"] = evil


def _as_moment(state: dict[str, Any], evil: Evil) -> None:
    state["last_optimizer_state"]["state"][0]["exp_avg"] = evil


def _in_a_tensors_attributes(state: dict[str, Any], evil: Evil) -> None:
    parameter = torch.nn.Parameter(state["model"]["flat_param_0"].float())
    parameter.extra = evil  # type: ignore[attr-defined]
    state["model"]["flat_param_0"] = parameter


@pytest.mark.parametrize(
    "place", [_in_cfg, _as_namespace, _as_model, _as_tensor, _as_metadata, _as_moment, _in_a_tensors_attributes]
)
def test_a_checkpoint_with_a_payload_anywhere_executes_nothing(place: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for path in write_shards(tmp_path / "ck", parts=1, shards=2):
        edit(path, lambda state: place(state, Evil(f"touch {mark}")))
    torch.load(path, weights_only=False)
    assert mark.exists(), "the payload must be one that works"
    mark.unlink()
    with contextlib.suppress(CheckpointError):
        open_checkpoint(tmp_path / "ck").moments()
    assert not mark.exists()


class _Colour(Enum):
    RED = "red"


class LockingArray:
    """Looks like the class that metaseq leaves in train_iterator."""

    def __init__(self) -> None:
        self.data = [1]


def test_foreign_objects_become_plain_data_or_are_named_as_lost() -> None:
    tree = {
        "namespace": Namespace(a=1, b=Namespace(c="x")),
        "ordered": OrderedDict(z=1, y=2),
        "default": defaultdict(list, k=[1]),
        "size": torch.Size([2, 3]),
        "half": np.float16(1.5),
        "count": np.int64(7),
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "enum": _Colour.RED,
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "dtype": torch.float16,
        "lost": LockingArray(),
    }
    read = read_pickle(pickle.dumps(tree, protocol=2))
    assert isinstance(read["namespace"], Stub)
    data, lost = writable(read, lambda stored: stored)
    assert data["namespace"] == Namespace(a=1, b=Namespace(c="x"))
    assert data["ordered"] == OrderedDict(z=1, y=2)
    assert data["default"] == {"k": [1]}
    assert data["size"] == torch.Size([2, 3])
    assert (data["half"], data["count"]) == (1.5, 7)
    assert data["array"] == [[0, 1, 2], [3, 4, 5]]
    assert data["enum"] == "red"
    assert data["bytes"] == b"\x00\xff"
    assert data["dtype"] == torch.float16
    assert data["lost"] is None
    assert [name.split(" ")[0] for name in lost] == ["lost"]
    assert "LockingArray" in lost[0]
    assert plain(read)["namespace"] == {"a": 1, "b": {"c": "x"}}


def test_omegaconf_containers_are_read_by_their_content() -> None:
    node = Stub(_named("omegaconf.nodes", "AnyNode"), state={"_val": 12, "_metadata": None})
    inner = Stub(_named("omegaconf.dictconfig", "DictConfig"), state={"_content": {"decoder_layers": node}})
    items = Stub(_named("omegaconf.listconfig", "ListConfig"), state={"_content": [node]})
    assert plain({"model": inner, "list": items}) == {"model": {"decoder_layers": 12}, "list": [12]}


def _named(module: str, name: str) -> Any:
    return read_pickle(f"c{module}\n{name}\n.".encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02}q\x00",  # ends early
        b"\x80\x02K\x01)R.",  # calls a number
        b"\x80\x02K\x01K\x02b.",  # state for a number
        b"\x80\x02K\x01(K\x02e.",  # items for a number
        b"\x80\x02K\x01(K\x02K\x03u.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # a text of 2 GiB in three bytes
        b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\xff\x00.",  # a bytearray of 72 PB
        b"\x80\x02\x82\x01.",  # an extension
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch\nSize\n(](J\xff\xff\xff\xffetR.",
        b"Pid\n.",
    ],
)
def test_a_damaged_pickle_is_one_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="damaged"):
        read_pickle(data)


def test_a_key_that_would_take_for_ever_to_hash_is_harmless() -> None:
    nest = b"\x80\x02}K\x01\x85q\x000"
    nest += b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) + b"0" for i in range(100))
    assert list(read_pickle(nest + b"h\x64Ns.").values()) == [None]


def _doubling(times: int) -> bytes:
    pairs = (b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(times))
    return b"\x80\x02]q\x00" + b"".join(pairs)


def test_nests_that_no_one_could_write_out_are_refused_and_those_that_hold_themselves_are_harmless() -> None:
    with pytest.raises(ValueError, match="refers to the same items again and again"):
        read_pickle(_doubling(90) + b".")
    assert plain(read_pickle(_doubling(10) + b"."))
    plain(read_pickle(b"\x80\x02]q\x00(h\x00h\x00e."))
    with pytest.raises(ValueError, match="nests deeper"):
        read_pickle(b"\x80\x02" + b"](" * 50_000 + b"e" * 50_000 + b".")


@pytest.mark.parametrize("where", [lambda n: n, lambda n: {"a": [(n,)]}, lambda n: {n: 1}, lambda n: {1: -n}])
def test_a_number_of_thousands_of_digits_is_refused(where: Callable[[int], Any]) -> None:
    assert read_pickle(pickle.dumps(where(2**1000), 2)) == where(2**1000)
    with pytest.raises(ValueError, match="a number of 16610 bits"):
        read_pickle(pickle.dumps(where(10**5000), 2))


def test_many_numbers_of_one_list_are_no_nest() -> None:
    numbers = list(range(200_000))
    assert read_pickle(pickle.dumps([numbers] * 9, 2)) == [numbers] * 9


def test_a_memo_number_takes_no_memory() -> None:
    assert read_pickle(b"\x80\x02K\x05r\xff\xff\xff\x7f.") == 5


def test_a_tensor_that_reaches_past_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": {"a": torch.zeros(4)[1:3]}}, path)
    assert Archive(path).tree["model"]["a"].shape == (2,)
    data = path.read_bytes()
    # The storage's length 4 becomes 2: offset 1 and two numbers no longer fit.
    (tmp_path / "y.pt").write_bytes(data.replace(b"K\x04tq", b"K\x02tq"))
    assert (tmp_path / "y.pt").read_bytes() != data
    with pytest.raises(CheckpointError, match=r"y\.pt"):
        Archive(tmp_path / "y.pt")
