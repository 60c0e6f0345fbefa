"""JSON in and out: bodies of /completions and /generate to Requests, Completions to answers, errors to objects.

Knows every field of the wire and the bounds of one request. Does not know HTTP or who computes.
Fields that metaseq or OpenAI define and this server does not do yet are taken at their neutral value alone: nothing is
accepted and ignored. `null` means the default throughout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from metaseq_api.core import Completion, EngineProtocol, RankedToken, Request, SamplingParams, TokenLogprobs
from metaseq_api.core.request import BOS_ID
from metaseq_api.errors import MetaseqApiError, RequestError
from metaseq_api.server import compat, fields, params, terms
from metaseq_api.settings import Settings

MAX_PROMPTS = 1024
MAX_USER_LEN = 256
MAX_SCORES = 1 << 23
"""Log-probabilities in one answer: those of 16 samples of 2048 tokens with all the alternatives there may be, twice."""
MAX_MESSAGE_LEN = 1000
MIN_LOGPROB = -9999.0
"""What -inf and NaN become, as OpenAI's and vLLM's answers have it: JSON has neither."""
CHARS_PER_TOKEN = 256
"""No token stands for more characters, so that a text longer than so many windows is refused before it is encoded."""
PROMPT_FORMS = "a string, an array of strings, an array of token ids, or an array of arrays of token ids"

STREAM_FIELDS = ("stream", "stream_options")
# What Alpa's client and page send, with nothing in them where its service asks for no key.
ALPA_KEYS = ("api_key", "g-recaptcha-response")
COMPLETION_FIELDS = frozenset(
    {"model", "prompt", "suffix", "user", *STREAM_FIELDS, *ALPA_KEYS, *terms.FIELDS, *params.READERS}
)
GENERATE_FIELDS = frozenset({"prefix", "length", *terms.FIELDS, *params.OF_ONE_SAMPLE})


def parse_completion(body: Mapping[str, Any], engine: EngineProtocol, settings: Settings, request_id: str) -> Request:
    """What one client asks of /completions. `model` is any string: one service serves one model.

    Raises: RequestError naming the field.
    """
    fields.refuse_unknown(body, COMPLETION_FIELDS)
    if body.get("model") is not None:
        fields.text("model", body["model"])
    _refuse_suffix(body.get("suffix"))
    for name in ALPA_KEYS:
        if body.get(name) not in (None, ""):
            says = f"{name} is no place for a key here; send it in the header Authorization: Bearer KEY"
            raise RequestError(says, param=name, code="unsupported_field")
    user, prompts = _read_user(body.get("user")), read_prompts(body.get("prompt"), engine)
    if settings.metaseq_compat:
        body, prompts = compat.translate(body, prompts, engine, settings.max_beam)
    p = params.read(body, engine.vocab_size)
    if p.max_tokens == 0 and not (p.echo or p.prompt_logprobs is not None or settings.metaseq_compat):
        raise fields.wrong("max_tokens", 0, "1 or more, unless echo is true or prompt_logprobs given (to score it)")
    check_room(prompts, p, engine, settings)
    wants_usage(body)  # refused here like every other field
    stream = _read_flag("stream", body.get("stream"))
    if stream and p.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs are not streamed; ask for them without stream", param="prompt_logprobs")
    return Request(request_id=request_id, prompts=prompts, params=p, user=user, stream=stream)


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream is to end with its usage: `stream_options` {"include_usage": true}. Raises: RequestError."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise fields.wrong("stream_options", options, 'an object such as {"include_usage": true}')
    if not body.get("stream"):
        raise RequestError("stream_options is for streams; send it with stream true", param="stream_options")
    if other := next((name for name in options if name != "include_usage"), None):
        raise fields.wrong("stream_options", other[:40], "an object with include_usage alone")
    return _read_flag("stream_options", options.get("include_usage"))


def parse_generate(body: Mapping[str, Any], engine: EngineProtocol, request_id: str) -> Request:
    """What one client asks of /generate: exactly `length` tokens after `prefix`, end-of-text suppressed.

    A `stop` string, where one is given, may end it earlier. Source: metaseq b8924c0 interactive_hosted.py:327-349.
    Raises: RequestError naming the field.
    """
    fields.refuse_unknown(body, GENERATE_FIELDS)
    for name in ("prefix", "length"):
        if body.get(name) is None:
            raise RequestError(f"{name} is missing; send prefix (a string) and length (a whole number)", param=name)
    length = fields.integer("length", body["length"])
    if length < 1:
        raise fields.wrong("length", length, "1 or more")
    ids = encode_text("prefix", body["prefix"], engine)
    _check_fits(ids, length, engine.max_seq_len, "prefix", "length")
    given = {name: body[name] for name in params.OF_ONE_SAMPLE if body.get(name) is not None}
    defaults = {"temperature": 0.7, "top_p": 0.9, "logprobs": 0, "ignore_eos": True}
    ends_early = given.get("stop") or given.get("stop_token_ids") or given.get("ignore_eos") is False
    defaults["min_tokens"] = 0 if ends_early else length
    p = params.read({**defaults, **given, "max_tokens": length}, engine.vocab_size)
    return Request(request_id=request_id, prompts=(ids,), params=p)


def form_to_body(values: Mapping[str, list[str]]) -> dict[str, Any]:
    """The fields of a form sent to /generate, typed as JSON would have them. Raises: RequestError."""
    return fields.read_form(values, texts=("prefix",), lists=("stop",))


def render_completion(
    request: Request, completions: Seq[Completion], *, model: str, created: int, metaseq_compat: bool = False
) -> dict[str, Any]:
    """The answer of /completions: choices flat, prompts outer, samples inner; usage counts each prompt once."""
    if metaseq_compat:
        completions = [dataclasses.replace(c, logprobs=c.logprobs_of_text) for c in completions]
    choices = [_render_choice(index, c) for index, c in enumerate(completions)]
    if metaseq_compat:
        choices = [
            compat.render_choice(choice, request, c.prompt_index)
            for choice, c in zip(choices, completions, strict=True)
        ]
    prompt_tokens = sum(c.num_prompt_tokens for c in completions[:: request.params.n])
    completion_tokens = sum(c.num_tokens for c in completions)
    return {
        "id": request.request_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": render_usage(prompt_tokens, completion_tokens),
    }


def render_generate(prefix: str, completion: Completion) -> dict[str, Any]:
    """The answer of /generate; offsets count from the start of `text`, which has no prompt in front."""
    logprobs = completion.logprobs_of_text
    assert logprobs is not None, "parse_generate always asks for them"
    wire = render_logprobs(logprobs)
    first = logprobs.text_offset[0] if logprobs.text_offset else 0
    return {
        "text": completion.text,
        "tokens": wire["tokens"],
        "text_offset": [offset - first for offset in logprobs.text_offset],
        "token_scores": wire["token_logprobs"],
        "top_logprobs": wire["top_logprobs"],
        "prompt": prefix.replace("\r\n", "\n").replace("\r", "\n"),
        "result": "success",
    }


def render_error(error: MetaseqApiError, message: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it. Only what a RequestError says reaches a client; others need `message`."""
    assert message is not None or isinstance(error, RequestError)
    says = str(error) if message is None else message
    return {
        "error": {
            "message": says if len(says) <= MAX_MESSAGE_LEN else says[: MAX_MESSAGE_LEN - 3] + "...",
            "type": error.type,
            "param": getattr(error, "param", None),
            "code": error.code,
        }
    }


def _render_choice(index: int, c: Completion) -> dict[str, Any]:
    choice = {
        "index": index,
        "text": c.text,
        "logprobs": None if c.logprobs is None else render_logprobs(c.logprobs),
        "finish_reason": c.finish_reason.value,
    }
    if c.prompt_logprobs is not None:
        choice["prompt_logprobs"] = [None if at is None else _render_ranked(at) for at in c.prompt_logprobs]
    return choice


def _render_ranked(tokens: Mapping[int, RankedToken]) -> dict[str, Any]:
    """As vLLM has it."""
    return {
        str(token_id): {"logprob": finite(t.logprob), "rank": t.rank, "decoded_token": t.text}
        for token_id, t in tokens.items()
    }


def render_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """What was read and what was generated. Units: tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def render_logprobs(logprobs: TokenLogprobs) -> dict[str, Any]:
    """The four lists."""
    top = logprobs.top_logprobs
    return {
        "tokens": list(logprobs.tokens),
        "token_logprobs": [None if p is None else finite(p) for p in logprobs.token_logprobs],
        "text_offset": list(logprobs.text_offset),
        "top_logprobs": None
        if top is None
        else [None if at is None else {token: finite(p) for token, p in at.items()} for at in top],
    }


def finite(logprob: float) -> float:
    """A log-probability as JSON can have it."""
    return logprob if MIN_LOGPROB < logprob < math.inf else MIN_LOGPROB


def _read_flag(name: str, value: Any) -> bool:
    return value is not None and fields.flag(name, value)


def _refuse_suffix(value: Any) -> None:
    if value not in (None, ""):
        raise RequestError(
            f"suffix is {fields.found(value)}; OPT was trained to continue a text, not to fill in before a suffix: "
            "leave it out",
            param="suffix",
            code="unsupported_field",
        )


def _read_user(value: Any) -> str | None:
    if value is None:
        return None
    user = fields.text("user", value)
    if len(user) > MAX_USER_LEN:
        raise fields.wrong("user", user, f"at most {MAX_USER_LEN} characters long")
    return user


def read_prompts(value: Any, engine: EngineProtocol) -> tuple[tuple[int, ...], ...]:
    """Any of the four forms as token ids. "" is the bare start of a text; an empty array is nothing to continue."""
    if value is None:
        raise RequestError(f"prompt is missing; it must be {PROMPT_FORMS}", param="prompt")
    if isinstance(value, str):
        return (encode_text("prompt", value, engine),)
    if not isinstance(value, list) or not value:
        raise fields.wrong("prompt", value, PROMPT_FORMS)
    if isinstance(value[0], (int, float)) and not isinstance(value[0], bool):
        return (_read_ids("prompt", value, engine.vocab_size),)
    if len(value) > MAX_PROMPTS:
        raise fields.wrong("prompt", value, f"at most {MAX_PROMPTS} prompts; send the rest in another request")
    if isinstance(value[0], list):
        return tuple(_read_ids(f"prompt[{i}]", ids, engine.vocab_size) for i, ids in enumerate(value))
    if isinstance(value[0], str):
        return tuple(encode_text(f"prompt[{i}]", text, engine) for i, text in enumerate(value))
    raise fields.wrong("prompt[0]", value[0], "a string, a token id or an array of token ids")


def encode_text(where: str, value: Any, engine: EngineProtocol) -> tuple[int, ...]:
    """The ids of a text. Raises: RequestError, before it is encoded where it is far too long."""
    text = fields.text(where, value)
    if len(text) > CHARS_PER_TOKEN * engine.max_seq_len:
        raise RequestError(
            f"{where} is {len(text)} characters long, far over the model's {engine.max_seq_len} tokens; shorten it",
            param=where.partition("[")[0],
            code="context_length_exceeded",
        )
    return tuple(engine.encode(text))


def _read_ids(where: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise fields.wrong(where, value, "a non-empty array of token ids, as the first of them is")
    for i, v in enumerate(value):
        if type(v) is not int or not 0 <= v < vocab_size:
            raise fields.wrong(f"{where}[{i}]", v, f"a token id, a whole number from 0 to {vocab_size - 1}")
    return tuple(value)


def check_room(prompts: Seq[Seq[int]], p: SamplingParams, engine: EngineProtocol, settings: Settings) -> None:
    """Raises: RequestError where this server does not take so much, or the model's window does not."""
    _check_size(prompts, p, settings)
    for i, ids in enumerate(prompts):
        where = f"prompt[{i}]" if len(prompts) > 1 else "prompt"
        _check_fits(ids, p.max_tokens, engine.max_seq_len, where, "max_tokens")


def _check_size(prompts: Seq[Seq[int]], p: SamplingParams, settings: Settings) -> None:
    name, samples = ("n", p.n) if p.best_of is None else ("best_of", p.best_of)
    if samples > settings.max_beam:
        raise fields.wrong(name, samples, f"at most {settings.max_beam}, this server's MAX_BEAM")
    if len(prompts) * samples > settings.max_queue:
        raise RequestError(
            f"{len(prompts)} prompts with {samples} samples each are more than the {settings.max_queue} sequences "
            "this server queues; send fewer at once",
            param="prompt",
        )
    once = (p.prompt_logprobs or 0) + 1 if p.prompt_logprobs is not None else 0
    each = (p.logprobs or 0) + 1 if p.logprobs is not None else 0
    num = p.n * sum(len(ids) * (once + each * p.echo) + p.max_tokens * each for ids in prompts)
    if num > MAX_SCORES:
        raise RequestError(
            f"up to {num} log-probabilities are asked for; one answer holds at most {MAX_SCORES}: "
            "send fewer prompts at once, or ask for fewer alternatives",
            param="prompt_logprobs" if once else "logprobs",
        )


def _check_fits(ids: Seq[int], max_tokens: int, max_seq_len: int, prompt_name: str, length_name: str) -> None:
    """What the model reads must fit its window: the leading </s>, the prompt, and all generated tokens but the last.

    Raises: RequestError naming the prompt where it is too long by itself, else the length that is too large.
    """
    added = 0 if ids[:1] == (BOS_ID,) else 1
    room = max_seq_len - added - len(ids)
    if room >= 0 and max_tokens <= room + 1:
        return
    window = f"the model's window of {max_seq_len} tokens"
    if room < 0:
        at_most = max_seq_len - added
        says = f"{prompt_name} is {len(ids)} tokens long; {window} takes at most {at_most}, so shorten it"
        raise RequestError(says, param=prompt_name.partition("[")[0], code="context_length_exceeded")
    raise RequestError(
        f"{length_name} is {max_tokens}, but {prompt_name} and the leading </s> take {len(ids) + added} of {window}; "
        f"at most {room + 1} fit (the last needs no place), or shorten the prompt",
        param=length_name,
        code="context_length_exceeded",
    )
