"""A cfg as omegaconf pickles it, without omegaconf: classes that bear its names while a file is written."""

from __future__ import annotations

import contextlib
import sys
import types
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

NAMES = {
    "omegaconf": (),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.nodes": ("AnyNode",),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
}


@contextlib.contextmanager
def pretending() -> Iterator[dict[str, type]]:
    """Make the classes importable, as pickle demands of what it writes, and take them away afterwards."""
    assert not any(name in sys.modules for name in NAMES), "the real one is here; use it"
    classes: dict[str, type] = {}
    for module_name, names in NAMES.items():
        module = types.ModuleType(module_name)
        for name in names:
            classes[name] = type(name, (), {"__module__": module_name})
            setattr(module, name, classes[name])
        sys.modules[module_name] = module
    try:
        yield classes
    finally:
        for name in NAMES:
            del sys.modules[name]


def config(classes: Mapping[str, type], value: Any, parent: Any = None) -> Any:
    """Wrap dicts, lists and leaves as OmegaConf.create does; a Namespace is a leaf, by metaseq's own hack."""
    kind = {dict: "DictConfig", list: "ListConfig"}.get(type(value), "AnyNode")
    node = classes[kind]()
    metadata = classes["Metadata" if kind == "AnyNode" else "ContainerMetadata"]()
    metadata.__dict__.update(ref_type=Any, object_type=type(value), optional=True, key=None, flags={"struct": True})
    if kind != "AnyNode":
        metadata.__dict__.update(resolver_cache=defaultdict(dict), key_type=Any, element_type=Any)
    node.__dict__.update(_metadata=metadata, _parent=parent)
    if isinstance(value, dict):
        node.__dict__["_content"] = {key: config(classes, item, node) for key, item in value.items()}
    elif isinstance(value, list):
        node.__dict__["_content"] = [config(classes, item, node) for item in value]
    else:
        assert value is None or isinstance(value, (bool, int, float, str, Namespace))
        node.__dict__["_val"] = value
    return node
