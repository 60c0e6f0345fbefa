"""Ten thousand requests nobody would wish for, and how they are sent: seeded, each one different.

Knows HTTP and the names of our fields. Does not know what the service is made of.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PATHS = ("/v1/completions", "/completions", "/v1/engines/175b/completions", "/v2/engines/a/b/completions")
ANSWERED = (200, 400, 504)
"""504: of those that give themselves a millisecond or two."""
REFUSED = (400, 404, 405, 413, 415, 431, 504)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -0.0, -1, 1, 2, 7, 95, 97, 100, 2**31, 2**53, 2**63, -(2**63), 2**64, 10**30, 0.5, 1e-320),
    *(1e308, -1e308, 16.0, 1.5, "", "x", "1", "true", "\x00", "\u20ac", "\ud800", "NaN", "\u202e", "a" * 300, [], {}),
    *(
        [0],
        [1, 2, 3],
        [-1],
        [271],
        [272],
        [2**40],
        [True],
        [None],
        ["a", 1],
        [[]],
        [[1], "a"],
        [""],
        ["a"] * 70,
        {"5": 1},
    ),
    *({"5": -100}, {"-1": 1}, {"999999": 1}, {"a": []}, {"include_usage": True}, {"include_usage": 1}, [[[[[]]]]]),
)
NAMES = (
    *(
        "model",
        "prompt",
        "suffix",
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "best_of",
    ),
    *("seed", "stop", "stop_token_ids", "include_stop_str_in_output", "echo", "logprobs", "prompt_logprobs", "user"),
    *("ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "alpha_presence"),
    *("alpha_frequency", "alpha_presence_src", "alpha_frequency_src", "alpha_src_penalty_end_idx", "lambda_decay"),
    *(
        "omega_bound",
        "stream",
        "stream_options",
        "timeout_ms",
        "priority",
        "prefix",
        "length",
        "promt",
        "Temperature",
        "",
    ),
)
TEXTS = ("", "a", "the ", "Hello\r\nthere", "\u20ac\U0001f600", "a\x00b", "</s>", "e\u0301" * 9, "\u202e", "x" * 90)
TYPES = (
    *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "multipart/form-data; boundary=x", ""),
    *("application/json; charset=utf-16", "application/JSON", "application/vnd.x+json", ";;;=", "a" * 500, "\xff/\xff"),
)
TARGETS = (
    *(
        "/",
        "/health",
        "/v1/models",
        "/generate",
        "/nothing",
        "//",
        "/%00",
        "/%ff%fe",
        "/v1/../v1/completions",
        "*",
        "/?a=%",
    ),
    *(
        "http://elsewhere/v1/completions",
        "/v1/engines//completions",
        "/v1/engines/" + "a" * 900 + "/completions",
        "/;/#",
    ),
)
METHODS = ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "BREW", "post", "POST")
HEADERS = (
    *(
        b"X-Request-Id: \xff\x80",
        b"X-Request-Id: ok-1",
        b"Host: [::1",
        b"Host: a, b",
        b"Cookie: ;=;",
        b"Range: bytes=9-1",
    ),
    *(b"Accept: \xff", b"Content-Encoding: gzip", b"Expect: 100-continue", b"Expect: nothing", b"Upgrade: h2c", b"A:"),
    *(b"Connection: close", b"Connection: keep-alive, x", b"X: " + b"y" * 9000, b"X_Y: 1", b"Authorization: Bearer x"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """What is sent, how many answers it must have, and which statuses these may bear.

    how: whole; pieces (one now and then); late (nobody reads for a while); or, without waiting for an answer, leave
    (after all was sent), half (after a part), begun (after the answer's first byte).
    """

    kind: str
    raw: bytes
    how: str = "whole"
    methods: tuple[str, ...] = ("POST",)
    statuses: tuple[int, ...] = ANSWERED


def make(number: int) -> Case:
    """The request of this number."""
    r = random.Random(f"bad request {number}")
    kinds: tuple[Callable[[random.Random], Case], ...] = (_good, _wrong, _mangled, _odd_http, _pipelined, _huge, _gone)
    (kind,) = r.choices(kinds, (20, 34, 16, 12, 6, 1, 11))
    return kind(r)


def http(
    body: bytes, path: str = PATHS[0], *headers: bytes, method: str = "POST", content_type: str = "application/json"
) -> bytes:
    head = [f"{method} {path} HTTP/1.1".encode("latin1"), b"Host: x", *headers]
    if content_type:
        head.append(b"Content-Type: " + content_type.encode("latin1"))
    return b"\r\n".join([*head, b"Content-Length: %d" % len(body), b"", body])


def fine(r: random.Random) -> dict[str, Any]:
    """A body that is answered with a text."""
    prompt = r.choice([r.choice(TEXTS), [r.choice(TEXTS) for _ in range(3)], _ids(r), [_ids(r) for _ in range(2)]])
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": r.randrange(1, 4)}
    maybe: dict[str, Any] = {
        "temperature": r.choice([0, 0.7, 1, 100]),
        "top_p": r.choice([0, 0.5, 1]),
        "top_k": r.choice([-1, 0, 1, 5, 10**30]),
        "min_p": r.random(),
        "n": r.randrange(1, 4),
        "seed": r.choice([0, -(2**63), 2**63 - 1]),
        "stop": r.choice(["e", ["\n", "th"], ["\u20ac"] * 64]),
        "stop_token_ids": [r.randrange(272)],
        "echo": r.random() < 0.5,
        "logprobs": r.choice([0, 1, 5, 100]),
        "prompt_logprobs": r.choice([0, 100]),
        "ignore_eos": True,
        "presence_penalty": r.uniform(-2, 2),
        "frequency_penalty": r.uniform(-2, 2),
        "repetition_penalty": r.choice([0.01, 1.2, 100]),
        "logit_bias": {str(r.randrange(272)): r.choice([-100, 100])},
        "alpha_presence": r.random(),
        "alpha_frequency_src": r.random(),
        "lambda_decay": r.random(),
        "user": r.choice(TEXTS),
        "stream": True,
    }
    for name in r.sample(sorted(maybe), r.choice([0, 1, 2, 5])):
        body[name] = maybe[name]
    if body.get("stream") and "prompt_logprobs" in body:
        del body["stream"]
    return body


def _ids(r: random.Random) -> list[int]:
    return [r.randrange(272) for _ in range(r.choice([1, 2, 9, 60]))]


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()


def _good(r: random.Random) -> Case:
    how = r.choices(["whole", "pieces", "late"], [8, 1, 1])[0]
    body = _json(fine(r))
    raw = _chunked(r, body) if r.random() < 0.15 else http(body, r.choice(PATHS))
    return Case("good", raw, how, statuses=(200,))


def _chunked(r: random.Random, body: bytes) -> bytes:
    cut = r.randrange(1, len(body))
    parts = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (body[:cut], body[cut:]) if p)
    head = b"POST /completions HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + parts + b"0\r\n\r\n"


def _wrong(r: random.Random) -> Case:
    """Fields of other types, ranges and names."""
    body: Any = fine(r) if r.random() < 0.8 else {}
    for _ in range(r.randrange(1, 4)):
        value = r.choice(VALUES)
        body[r.choice(NAMES)] = [value] * r.randrange(4) if r.random() < 0.1 else value
    if r.random() < 0.05:
        body = r.choice([[body], None, 1, "x", [], True, 10**400 if r.random() < 0.1 else 1e300])
    path = r.choice((*PATHS, "/generate"))
    return Case("wrong", http(_json(body), path), r.choice(["whole", "whole", "whole", "pieces"]))


def _mangled(r: random.Random) -> Case:
    """Bytes that are nearly the JSON, or the text, they should be."""
    body = _json(fine(r))
    at = r.randrange(len(body))
    other = bytes(r.randrange(256) for _ in range(r.randrange(1, 5)))
    body = r.choice(
        [
            body[:at],
            body[:at] + other + body[at:],
            body[:at] + other + body[at + len(other) :],
            body.decode().encode("utf-16"),
            body.decode().encode("utf-32-be"),
            b"\xef\xbb\xbf" + body,
            body + b"\x00",
            b'{"prompt": "\\ud800", "max_tokens": 1}',
            b'{"prompt": "\xed\xa0\x80"}',
            b'{"prompt": "a", "temperature": ' + r.choice([b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"01"]) + b"}",
            b"[" * r.choice([5, 100_000]),
            b'{"a":' * 3000,
            b'{"prompt": "a", "prompt": [5], "max_tokens": 2, "max_tokens": 1}',
            b"",
        ]
    )
    if r.random() < 0.2:
        form = b"prefix=%b&length=%b" % (other, r.choice([b"1", b"3", b"-1", b"x", b"", b"1&length=2", b"9" * 20]))
        return Case("mangled", http(form, "/generate", content_type="application/x-www-form-urlencoded"))
    return Case("mangled", http(body, r.choice((*PATHS, "/generate"))))


def _odd_http(r: random.Random) -> Case:
    """Methods, targets, types and headers; then what is hardly HTTP, after which the connection ends."""
    body = _json(fine(r))
    if r.random() < 0.6:
        method = r.choice(METHODS)
        kind = r.choice([*TYPES, "application/json"])
        raw = http(body, r.choice((*TARGETS, *PATHS)), *r.sample(HEADERS, 2), method=method, content_type=kind)
        return Case("odd", raw, methods=(method,), statuses=(200, *REFUSED))
    noise = bytes(r.randrange(256) for _ in range(r.randrange(1, 60))).replace(b"\n", b"x")
    raw = r.choice(
        [
            noise + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + noise + b"\r\n\r\n",
            b"POST /completions\r\n\r\n",
            b"POST /completions HTTP/9.9\r\nContent-Length: 0\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + noise + b"\r\n\r\n",
            http(body).replace(b"Content-Length: ", b"Content-Length: -"),
            http(body).replace(b"Content-Length: ", b"Content-Length: 0x"),
            http(body, "/completions", b"Content-Length: 1"),
            http(body, "/completions", b"Transfer-Encoding: chunked") + b"\r\n",
            http(body, "/completions", b"Transfer-Encoding: gzip, chunked") + b"\r\n",
            b"POST /completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
            b"POST /completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
            b"GET / HTTP/1.1\r\nX: " + b"y" * (70 << 10) + b"\r\n\r\n",
            b"GET /" + b"y" * (70 << 10) + b" HTTP/1.1\r\n\r\n",
        ]
    )
    return Case("hardly HTTP", raw, methods=("?",), statuses=(200, *REFUSED, 501))


def _pipelined(r: random.Random) -> Case:
    bodies = [fine(r) for _ in range(r.randrange(2, 6))]  # behind a stream, which ends its connection, none is answered
    raw = b"".join(
        http(_json(b if r.random() < 0.8 else {"prompt": r.choice(VALUES)}), r.choice(PATHS)) for b in bodies
    )
    return Case("pipelined", raw, methods=("POST",) * len(bodies))


def _huge(r: random.Random) -> Case:
    body: Any = r.choice(
        [
            {"prompt": "the " * r.choice([300, 10_000, 400_000])},
            {"prompt": [5] * 100_000},
            {"prompt": ["a"] * 5000},
            {"prompt": [[5]] * 900, "n": 8},
            {"prompt": "a", "stop": ["\u20ac" * 2000] * 60},
            {"prompt": "a", "logit_bias": {str(i): 1 for i in range(9000)}},
            {"prompt": "a", **{f"field{i}": 1 for i in range(9000)}},
            {"prompt": "a" * (9 << 20)},
        ]
    )
    return Case("huge", http(_json(body)), statuses=(400, 413))


def _gone(r: random.Random) -> Case:
    """Clients that leave, soon or late."""
    body = fine(r) | {
        "max_tokens": r.choice([5, 60]),
        "ignore_eos": True,
        "prompt": _ids(r)[:9],
        "stream": r.random() < 0.5,
    }
    body.pop("prompt_logprobs", None)
    raw = _chunked(r, _json(body)) if r.random() < 0.3 else http(_json(body), r.choice(PATHS))
    how = r.choice(["leave", "half", "half", "begun"])
    if how == "half":
        raw = raw[: r.randrange(1, len(raw))]
    return Case("gone", raw, how)
