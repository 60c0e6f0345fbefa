"""/tokenize, /detokenize and Alpa's /logprobs: bodies to token ids and back, in vLLM's and Alpa's shapes.

Knows their fields. Does not know HTTP, or how a next token is scored.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from metaseq_api.core import Completion, EngineProtocol, Request, SamplingParams
from metaseq_api.core.request import BOS_ID, MAX_LOGPROBS
from metaseq_api.errors import RequestError
from metaseq_api.server import fields, schema
from metaseq_api.settings import Settings

BOS = "</s>"
DEFAULT_TOP_K = 50
"""What Alpa's client sends; its server's own default is the whole vocabulary."""
TOKENIZE = {
    "model": fields.text,
    "prompt": fields.text,
    "add_special_tokens": fields.flag,
    "return_token_strs": fields.flag,
}
DETOKENIZE = {"model": fields.text, "tokens": fields.integers}
LOGPROBS = {"model": fields.text, "prompt": schema.read_prompts, "top_k": fields.integer, "cache_id": fields.text}


def tokenize(body: Mapping[str, Any], engine: EngineProtocol) -> dict[str, Any]:
    """The ids of a text, with the </s> in front that every completion has unless add_special_tokens is false.

    Raises: RequestError.
    """
    if "messages" in body:
        raise RequestError("messages are not taken here; send prompt, a string", param="messages")
    given = _read(body, TOKENIZE, "prompt")
    ids = [
        *([BOS_ID] if given.get("add_special_tokens", True) else []),
        *schema.encode_text("prompt", given["prompt"], engine),
    ]
    shown = [engine.decode([i]) for i in ids] if given.get("return_token_strs") else None
    return {"count": len(ids), "max_model_len": engine.max_seq_len, "tokens": ids, "token_strs": shown}


def detokenize(body: Mapping[str, Any], engine: EngineProtocol) -> dict[str, Any]:
    """The text of ids, special tokens included. Raises: RequestError."""
    ids = _read(body, DETOKENIZE, "tokens")["tokens"]
    most = 16 * engine.max_seq_len
    if len(ids) > most:
        raise fields.wrong("tokens", list(ids), f"at most {most} token ids")
    for at, token_id in enumerate(ids):
        if not 0 <= token_id < engine.vocab_size:
            raise fields.wrong(f"tokens[{at}]", token_id, f"a token id, from 0 to {engine.vocab_size - 1}")
    return {"prompt": engine.decode(ids)}


def tokenizer_info(engine: EngineProtocol, chat_template: str) -> dict[str, Any]:
    """What lm-eval asks a server whose tokenizer it has not."""
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": BOS,
        "eos_token": BOS,
        "pad_token": "<pad>",
        "unk_token": BOS,
        "add_bos_token": True,
        "vocab_size": engine.vocab_size,
        "model_max_length": engine.max_seq_len,
        "chat_template": chat_template,
    }


def parse_logprobs(body: Mapping[str, Any], engine: EngineProtocol, settings: Settings, request_id: str) -> Request:
    """What Alpa's clients ask: the likeliest next tokens of each prompt.

    One step of each prompt; what an earlier one had in front of it comes from the prefix cache, which knows it by
    content. Raises: RequestError.
    """
    fields.refuse_unknown(body, LOGPROBS)
    if body.get("model") is not None:
        fields.text("model", body["model"])
    read_cache_id(body)
    top_k = DEFAULT_TOP_K if body.get("top_k") is None else fields.integer("top_k", body["top_k"])
    if not 1 <= top_k <= MAX_LOGPROBS:
        raise fields.wrong("top_k", top_k, f"between 1 and {MAX_LOGPROBS}")
    prompts = schema.read_prompts(body.get("prompt"), engine)
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=min(top_k, engine.vocab_size))
    schema.check_room(prompts, params, engine, settings)
    return Request(request_id=request_id, prompts=prompts, params=params)


def read_cache_id(body: Mapping[str, Any]) -> str:
    """The id of a session, a new one where none is given; it goes back as it came, and no answer depends on it.

    Raises: RequestError where it is not a UUID.
    """
    if body.get("cache_id") is None:
        return str(uuid.uuid4())
    given = fields.text("cache_id", body["cache_id"])
    try:
        uuid.UUID(given)
    except ValueError:
        raise fields.wrong("cache_id", given, "a UUID, as the answer to the first call had it") from None
    return given


def render_logprobs(completions: Seq[Completion], cache_id: str) -> dict[str, Any]:
    """A list for each prompt: log-probabilities, likeliest first, and the ids they are of."""
    tops = [c.first_top for c in completions]
    return {
        "cache_id": cache_id,
        "logprobs": [[schema.finite(logprob) for _, logprob in top] for top in tops],
        "indices": [[token_id for token_id, _ in top] for top in tops],
    }


def _read(body: Mapping[str, Any], table: Mapping[str, Any], needed: str) -> dict[str, Any]:
    fields.refuse_unknown(body, table)
    if body.get(needed) is None:
        raise RequestError(f"{needed} is missing; send it", param=needed)
    return {name: reader(name, body[name]) for name, reader in table.items() if body.get(name) is not None}
