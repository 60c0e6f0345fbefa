"""The optimizer's state in a folder of torch.distributed.checkpoint: which vector belongs to which parameter.

Knows the names that torch.distributed.checkpoint.state_dict gives (`optim.state.<parameter>.exp_avg`, and
`optim.param_groups.0.lr` or, flattened, `optim.param_groups.<parameter>.lr`), under any prefix, and a plain optimizer's
numbers (`optim.state.0.exp_avg`). Reads nothing before it is asked. Does not know what the vectors are for.

Source: torch/distributed/checkpoint/state_dict.py (torch 2.13).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

from metaseq_api.checkpoint import rules
from metaseq_api.checkpoint.dcp_metadata import Metadata
from metaseq_api.checkpoint.hugging_face import HEAD, our_name
from metaseq_api.checkpoint.whole import BoxedTensor
from metaseq_api.errors import CheckpointMismatch

log = logging.getLogger(__name__)
STATE, GROUPS, STEP = "state", "param_groups", "step"
MAX_DIGITS = 9
_PLAIN = (bool, int, float, str, type(None))
Key = str | int
"""A parameter by its stored name in metaseq, or by its number."""


class DcpOptimizer:
    """What an optimizer left beside a model.

    entries: names in the metadata by the same without wrappers. names: those of the model's tensors by their stored
    names in metaseq. shapes: by the latter.
    """

    def __init__(
        self,
        metadata: Metadata,
        entries: Mapping[str, str],
        names: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._metadata, self._entries, self._names, self._shapes = metadata, entries, names, shapes

    def moments(self) -> dict[str, dict[str, BoxedTensor]]:
        """Find the vectors by kind and logical name. A kind is there for all parameters, or refused.

        Raises: CheckpointMismatch, CheckpointCorrupt, naming the file.
        """
        kinds = {kind: None for entry in self._states.values() for kind in entry if self._is_vector(entry[kind])}
        return {
            kind: {third.name: third for name in self._shapes for third in self._vector(kind, name).thirds()}
            for kind in kinds
        }

    def plain(self) -> dict[str, Any]:
        """Read the step, which all parameters must agree on, and the groups of parameters.

        Raises: CheckpointMismatch, CheckpointCorrupt, naming the file.
        """
        return {"step": self._step(), "param_groups": list(self._groups())} if self._states else {}

    def _vector(self, kind: str, name: str) -> BoxedTensor:
        entry = self._states.get(name, {}).get(kind)
        if entry is None:
            hint = '; if it is the embedding, say "tie_word_embeddings": true in a config.json beside it'
            raise self._mismatch(
                f"optimizer state {kind} of some parameters and none of {name}{hint if name == rules.OUTPUT else ''}"
            )
        shape = self._metadata.shape(entry)
        if shape != self._shapes[name]:
            raise self._mismatch(f"optimizer state {kind} of shape {shape} for {name}, which is {self._shapes[name]}")
        tensor = self._metadata.tensor(entry, name)
        if not tensor.dtype.is_floating_point:
            raise self._mismatch(f"optimizer state {kind} of {name} in {tensor.dtype}")
        return tensor

    def _mismatch(self, what: str) -> CheckpointMismatch:
        return CheckpointMismatch(f"{self._metadata.file.path} has {what}; leave the optimizer state out")

    def _is_vector(self, entry: str) -> bool:
        return bool(self._metadata.shape(entry))

    def _step(self) -> int | None:
        steps = {name: self._metadata.value(entry[STEP]) for name, entry in self._states.items() if STEP in entry}
        for name, step in steps.items():
            if not isinstance(step, (int, float)) or step != step // 1 or not 0 <= step < 2**53:
                raise self._mismatch(f"a step of {name} that is no count")
        if len(set(steps.values())) > 1:
            first, last = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
            raise self._mismatch(
                f"parameters at different steps: {first} at {int(steps[first])}, {last} at {int(steps[last])}"
            )
        return int(next(iter(steps.values()))) if steps else None

    @cached_property
    def _found(self) -> tuple[str, dict[Key, dict[str, str]]]:
        """The optimizer's prefix, and its entries by parameter and kind."""
        roots: dict[str, dict[Key, dict[str, str]]] = {}
        for name, entry in self._entries.items():
            head, _, kind = name.rpartition(".")
            root, param = _cut(head, STATE)
            key = self._key(param)
            if key is not None:
                roots.setdefault(root, {}).setdefault(key, {})[kind] = entry
        chosen = [root for root, states in roots.items() if any(isinstance(key, str) for key in states)]
        chosen = chosen or [root for root in roots if self._group_entries(root)]
        if len(chosen) > 1:
            raise self._mismatch(f"several optimizers ({', '.join(map(ascii, chosen[:4]))})")
        return (chosen[0], roots[chosen[0]]) if chosen else ("", {})

    @cached_property
    def _states(self) -> dict[str, dict[str, str]]:
        """Entries by the parameter's stored name and by kind."""
        _, found = self._found
        named = {key: entry for key, entry in found.items() if isinstance(key, str)}
        if found and not named:
            order = self._order
            return {} if order is None else {name: found[i] for i, name in enumerate(order)}
        if rules.OUTPUT in named and rules.OUTPUT not in self._shapes:
            output = named.pop(rules.OUTPUT)
            named.setdefault(rules.EMBED, output)
        return named

    def _key(self, param: str) -> Key | None:
        if _is_number(param):
            return int(param)
        _, rest = _cut(param, "decoder")
        name = our_name(f"decoder.{rest}") if rest else rules.OUTPUT if f".{param}".endswith(f".{HEAD}") else ""
        return name if name in self._shapes or name == rules.OUTPUT else None

    @cached_property
    def _order(self) -> tuple[str, ...] | None:
        """Which parameter each number stands for: what order fits all shapes. None, with a warning, where none does."""
        _, found = self._found
        numbers = {key: entry for key, entry in found.items() if isinstance(key, int)}
        groups = [group.get("params") for group in self._raw_groups.values()]
        fitting = [order for order in self._orders(groups) if self._fits(order, numbers)]
        if fitting:
            return fitting[0]
        log.warning(
            "%s numbers the optimizer's parameters, and their shapes do not prove which is which: it is left out; save "
            "torch.distributed.checkpoint.state_dict.get_state_dict's instead",
            self._metadata.file.path,
        )
        return None

    def _orders(self, groups: Sequence[Any]) -> Iterator[tuple[str, ...]]:
        """Orders that trainers have: the model's, or in two groups matrices and vectors, for weight decay's sake."""
        places = self._metadata.order()
        if places is None or not all(entry in places for entry in self._names.values()):
            return
        model = sorted(self._names, key=lambda name: places[self._names[name]])
        for names in (model, [name for name in model if name != rules.OUTPUT]):
            matrices = [name for name in names if len(self._shapes[name]) == 2]
            vectors = [name for name in names if len(self._shapes[name]) == 1]
            for order in ([names], [matrices, vectors], [vectors, matrices]):
                joined = tuple(name for group in order for name in group)
                numbers = iter(range(len(joined)))
                if groups == [list(islice(numbers, len(group))) for group in order]:
                    yield joined

    def _fits(self, order: Sequence[str], numbers: Mapping[int, Mapping[str, str]]) -> bool:
        if set(numbers) != set(range(len(order))):
            return False
        return all(
            {self._metadata.shape(entry) for entry in numbers[i].values() if self._is_vector(entry)}
            == {self._shapes[name]}
            for i, name in enumerate(order)
        )

    def _group_entries(self, root: str) -> dict[str, str]:
        """Entries of an optimizer's groups by what follows `param_groups` in their names."""
        at = f"{root}{GROUPS}"
        return {name.removeprefix(at): e for name, e in self._entries.items() if f"{name}.".startswith(f"{at}.")}

    @cached_property
    def _raw_groups(self) -> dict[str, dict[str, Any]]:
        """What is said of the groups, by number, or of the parameters, by name."""
        out: dict[str, dict[str, Any]] = {}
        for rest, entry in self._group_entries(self._found[0]).items():
            value = self._metadata.value(entry)
            if not rest:  # the list as one object
                groups = value if isinstance(value, list) else []
                return {str(i): group for i, group in enumerate(groups) if isinstance(group, dict)}
            param, _, key = rest.removeprefix(".").rpartition(".")
            out.setdefault(param, {})[key] = value
        return dict(sorted(out.items(), key=lambda item: int(item[0]) if _is_number(item[0]) else 0))

    def _groups(self) -> Iterator[dict[str, Any]]:
        """The groups, with logical names for their parameters; what was flattened is put together by what is equal."""
        merged: dict[Any, dict[str, Any]] = {}
        for param, group in self._raw_groups.items():
            values = {key: value for key, value in group.items() if key != "params"}
            listed = group.get("params") if _is_number(param) else [param]
            same = param if _is_number(param) else tuple((key, _frozen(values[key])) for key in sorted(values))
            names = merged.setdefault(same, values | {"params": []})["params"]
            stored = [self._named(each) for each in (listed if isinstance(listed, list) else [])]
            names += [logical for name in stored if name for logical in rules.logical_names(name)]
        yield from merged.values()

    def _named(self, param: Any) -> str | None:
        """The stored name of a parameter that a group lists by name or number."""
        if type(param) is int:
            order = self._order or ()
            return order[param] if 0 <= param < len(order) else None
        key = self._key(param) if isinstance(param, str) else None
        if key == rules.OUTPUT and key not in self._shapes:
            return rules.EMBED
        return key if isinstance(key, str) else None


def _is_number(param: str) -> bool:
    return param.isdecimal() and len(param) <= MAX_DIGITS


def _cut(name: str, word: str) -> tuple[str, str]:
    """Take a dotted name apart at the last component `word`: what stands up to it, and after; empty without it."""
    before, found, after = f".{name}".rpartition(f".{word}.")
    return (f"{before}.".removeprefix("."), after) if found else ("", "")


def _frozen(value: Any) -> Any:
    """What is the same for equal numbers, texts, and flat lists of them; anything else is the same as itself alone."""
    if isinstance(value, (tuple, list)) and all(isinstance(v, _PLAIN) for v in value):
        return type(value), tuple(map(_frozen, value))
    return (type(value), value) if isinstance(value, _PLAIN) else id(value)
