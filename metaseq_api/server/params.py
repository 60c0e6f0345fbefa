"""The fields of a body that say how to continue: read strictly into SamplingParams, which owns their ranges.

Knows the names and types of the wire, and the values by which clients say "off". Does not know prompts or answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metaseq_api.core import SamplingParams
from metaseq_api.core.request import MAX_LOGIT_BIAS, MAX_STOP, MAX_STOP_LEN, MAX_STOP_TOKEN_IDS
from metaseq_api.errors import RequestError
from metaseq_api.server import fields

READERS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": fields.integer,
    "min_tokens": fields.integer,
    "temperature": fields.number,
    "top_p": fields.number,
    "top_k": fields.integer,
    "min_p": fields.number,
    "seed": fields.integer,
    "stop": fields.strings,
    "stop_token_ids": fields.integers,
    "include_stop_str_in_output": fields.flag,
    "n": fields.integer,
    "best_of": fields.integer,
    "echo": fields.flag,
    "logprobs": fields.integer,
    "prompt_logprobs": fields.integer,
    "ignore_eos": fields.flag,
    "presence_penalty": fields.number,
    "frequency_penalty": fields.number,
    "repetition_penalty": fields.number,
    "logit_bias": fields.biases,
    "alpha_presence": fields.number,
    "alpha_frequency": fields.number,
    "alpha_presence_src": fields.number,
    "alpha_frequency_src": fields.number,
    "alpha_src_penalty_end_idx": fields.integer,
    "lambda_decay": fields.number,
    "omega_bound": fields.number,
}
OF_ONE_SAMPLE = tuple(n for n in READERS if n not in ("max_tokens", "n", "best_of", "echo", "prompt_logprobs"))
"""What /generate takes too, whose answer is one sample without its prompt."""

OFF_BELOW = ("lambda_decay", "alpha_src_penalty_end_idx")
"""metaseq: all from 0 down is "off"."""


def read(body: Mapping[str, Any], vocab_size: int) -> SamplingParams:
    """The parameters a body asks for; null is a field's default. Raises: RequestError naming the field."""
    given = {name: reader(name, body[name]) for name, reader in READERS.items() if body.get(name) is not None}
    _check_amounts(given)
    for token_id in given.get("stop_token_ids", ()):
        _check_id("stop_token_ids", token_id, vocab_size)
    for token_id, _ in given.get("logit_bias", ()):
        _check_id("logit_bias", token_id, vocab_size)
    if given.get("top_k") in (-1, 0):  # as vLLM and Hugging Face say "off"
        given["top_k"] = None
    elif given.get("top_k", 0) > vocab_size:
        given["top_k"] = vocab_size  # the same choice, and an integer of a sane size
    for name in OFF_BELOW:
        if given.get(name, 1) <= 0:
            given[name] = None
    return SamplingParams(**given)


def _check_amounts(given: Mapping[str, Any]) -> None:
    """Refuse what is far too much before a message quotes it."""
    stop = given.get("stop", ())
    if len(stop) > MAX_STOP or any(len(s) > MAX_STOP_LEN for s in stop):
        says = f"stop is too much; at most {MAX_STOP} strings of 1 to {MAX_STOP_LEN} characters"
        raise RequestError(says, param="stop")
    for name, most in (("stop_token_ids", MAX_STOP_TOKEN_IDS), ("logit_bias", MAX_LOGIT_BIAS)):
        if len(given.get(name, ())) > most:
            raise RequestError(f"{name} holds {len(given[name])} tokens; at most {most} are taken", param=name)


def _check_id(name: str, token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        shown = fields.found(token_id)
        raise RequestError(f"{name} holds {shown}; token ids go from 0 to {vocab_size - 1}", param=name)
