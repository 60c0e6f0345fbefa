"""What `--metaseq-compat` changes: a body that means what metaseq made of it, and an answer in metaseq's shape.

Knows those of metaseq's quirks that a client may rest on; docs/fields.md lists them all, and why the others are left
alone. Does not know HTTP; what is not a quirk is read as ever, and refused as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metaseq_api.core import EngineProtocol, Request
from metaseq_api.core.request import BOS_ID
from metaseq_api.server import fields

_ROUNDED = (
    "temperature",
    "top_p",
    "omega_bound",
    "lambda_decay",
    "alpha_presence",
    "alpha_frequency",
    "alpha_presence_src",
    "alpha_frequency_src",
)
_INTEGERS = ("min_tokens", "max_tokens", "best_of", "logprobs", "alpha_src_penalty_end_idx")
_PAIRS = (("alpha_presence", "alpha_frequency"), ("alpha_presence_src", "alpha_frequency_src"))
Prompts = tuple[tuple[int, ...], ...]


def translate(
    body: Mapping[str, Any], prompts: Prompts, engine: EngineProtocol, max_beam: int
) -> tuple[dict[str, Any], Prompts]:
    """The body and prompts that mean here what `body` and `prompts` meant to metaseq.

    Source: metaseq f7ffa5f, cli/interactive_hosted.py:269-373, hub_utils.py:300-305, sequence_generator.py:271-284.
    """
    new = dict(body)
    for name in _ROUNDED:
        new[name] = _rounded(body.get(name))
    for name in _INTEGERS:
        new[name] = _integer(body.get(name))
    new["echo"] = bool(body.get("echo"))
    if new["logprobs"] is None:
        new["logprobs"] = 0  # the object is always there
    _bound(new, max_beam)
    _first_tokens(new, engine)
    return _lengths(new, prompts, engine.max_seq_len)


def render_choice(choice: dict[str, Any], request: Request, prompt_index: int) -> dict[str, Any]:
    """A choice as metaseq wrote it, beside what ours holds anyway: with echo the </s> in front is a token of the
    lists, but for text_offset, and offsets count from the start of `text`."""
    logprobs = choice["logprobs"]
    offsets = logprobs["text_offset"]
    if not request.params.echo:
        offsets = [offset - offsets[0] for offset in offsets]
    elif request.prompts[prompt_index][:1] == (BOS_ID,):
        offsets = offsets[1:]
    else:
        logprobs = {
            **logprobs,
            "tokens": ["</s>", *logprobs["tokens"]],
            "token_logprobs": [None, *logprobs["token_logprobs"]],
            "top_logprobs": logprobs["top_logprobs"] and [None, *logprobs["top_logprobs"]],
        }
    return {**choice, "logprobs": {**logprobs, "text_offset": offsets, "finish_reason": choice["finish_reason"]}}


def _rounded(value: Any) -> Any:
    """To one decimal, numbers spelled as strings too; anything else as it is, for its reader to refuse."""
    try:
        return value if value is None or isinstance(value, bool) else round(float(value), 1)
    except (TypeError, ValueError, OverflowError):
        return value


def _integer(value: Any) -> Any:
    try:
        return value if value is None or isinstance(value, bool) else int(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _bound(new: dict[str, Any], max_beam: int) -> None:
    """Cut what metaseq cut without a word."""
    for name in ("top_p", "omega_bound"):
        if isinstance(new[name], float):
            new[name] = min(max(new[name], 0.0), 1.0)
    for pair in _PAIRS:  # a pair without a positive member did nothing
        if all(v is None or (isinstance(v, float) and v <= 0) for v in (new[name] for name in pair)):
            new.update(dict.fromkeys(pair))
    n = new.get("n")
    samples = new["best_of"] or n
    if type(samples) is int and samples > max_beam:
        new["best_of"] = max_beam
        new["n"] = min(n, max_beam) if type(n) is int else n


def _first_tokens(new: dict[str, Any], engine: EngineProtocol) -> None:
    """Of each stop string only the first token counts, and it stays in the text."""
    if new.get("stop") is None:
        return
    ids = []
    for at, stop in enumerate(fields.strings("stop", new.pop("stop"))):
        if not stop:
            raise fields.wrong(f"stop[{at}]", stop, "a string of at least one character")
        ids.append(engine.encode(stop)[0])
    if new.get("stop_token_ids") is not None:
        ids += fields.integers("stop_token_ids", new["stop_token_ids"])
    new["stop_token_ids"] = ids
    if new.get("include_stop_str_in_output") is None:
        new["include_stop_str_in_output"] = True


def _lengths(new: dict[str, Any], prompts: Prompts, window: int) -> tuple[dict[str, Any], Prompts]:
    """max_tokens N gives N - 1 tokens, none given all that the window has; a prompt that leaves no room for N keeps its
    end. Where N alone fills the window (metaseq's slices then cut in odd places) N is cut instead."""
    asked = new["max_tokens"]
    if asked is not None and (type(asked) is not int or asked < 0):
        return new, prompts
    room = window - 1 - (asked or 0)
    if room > 0:
        prompts = tuple(ids[-room:] if len(ids) > room else ids for ids in prompts)
    longest = max(len(ids) + (ids[:1] != (BOS_ID,)) for ids in prompts)
    most = window - longest if asked is None else min(asked, window - longest)
    new["max_tokens"] = max(most - 1, 0)
    if type(new["min_tokens"]) is int:
        new["min_tokens"] = min(new["min_tokens"], new["max_tokens"])
    return new, prompts
