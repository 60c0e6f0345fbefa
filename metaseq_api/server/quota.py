"""How much of each key's limits is used up: requests and tokens a minute, and requests in work at once.

Knows Keys and time. Does not know HTTP. Each limit by the minute is a bucket that fills evenly and holds one minute's
worth; a request takes prompt and max_tokens from it when admitted, and gets back what it did not use.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from metaseq_api.core import Completion, Request
from metaseq_api.errors import QuotaExceeded, RateLimited
from metaseq_api.server.key_file import Key

BUSY_S = 1.0
"""Units: seconds after which a key whose requests are all in work may ask again; when one ends nobody can tell."""


class Bucket:
    """One limit by the minute."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level, self._at = float(per_minute), now

    def level(self, now: float) -> float:
        """What is left."""
        self._level = min(self.per_minute, self._level + max(now - self._at, 0.0) * self.per_minute / 60)
        self._at = now
        return self._level

    def wait_s(self, amount: float, now: float) -> float:
        """How long until `amount` is there. Units: seconds."""
        return max(amount - self.level(now), 0.0) * 60 / self.per_minute

    def take(self, amount: float, now: float) -> None:
        """Take an amount, or with a negative one give it back."""
        self._level = min(self.per_minute, self.level(now) - amount)


class _Account:
    """What one key has used."""

    def __init__(self, key: Key, now: float) -> None:
        self.num_running = 0
        self.take_over(key, now)

    def take_over(self, key: Key, now: float) -> None:
        """Go by the limits of `key`, which has changed in its file; a new limit begins full."""
        self.key = key
        self.requests = None if key.requests_per_minute is None else Bucket(key.requests_per_minute, now)
        self.tokens = None if key.tokens_per_minute is None else Bucket(key.tokens_per_minute, now)


class Charge:
    """What one admitted request holds of its key's limits, until it is settled; settling it again does nothing.

    `num_used` is None until it is known: then nothing is given back, as where a client left half-way.
    """

    def __init__(self, quotas: Quotas, account: _Account, num_tokens: int) -> None:
        self._quotas, self._account, self.num_tokens = quotas, account, num_tokens
        self.num_used: int | None = None
        self._settled = False

    def settle(self) -> None:
        """End the request: free its place and give back the tokens that it did not use."""
        with self._quotas.lock:
            if not self._settled:
                self._settled = True
                self._account.num_running -= 1
                if self._account.tokens is not None and self.num_used is not None:
                    self._account.tokens.take(min(self.num_used - self.num_tokens, 0), self._quotas.clock())


MAX_CONCURRENCY = 512
"""Of a key that has no limit of its own: half of the connections, so that there is always room for another key's."""


class Quotas:
    """The accounts of all keys; any thread may ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.lock = clock, threading.Lock()
        self._accounts: dict[str, _Account] = {}

    def count_request(self, key: Key) -> None:
        """Take one request. Raises: RateLimited."""
        with self.lock:
            now, account = self.clock(), self._account(key)
            bucket = account.requests
            if bucket is None:
                return
            if wait_s := bucket.wait_s(1, now):
                raise RateLimited(
                    f"this key's {bucket.per_minute} requests a minute are used up; try again in {wait_s:.1f} s",
                    retry_after_s=wait_s,
                )
            bucket.take(1, now)

    def admit(self, key: Key, num_tokens: int) -> Charge:
        """Take a place and tokens for one request.

        Raises: RateLimited; QuotaExceeded where it asks for more than the key gets in a minute.
        """
        with self.lock:
            now, account = self.clock(), self._account(key)
            most = MAX_CONCURRENCY if key.concurrency is None else key.concurrency
            if key.name and account.num_running >= most:
                raise RateLimited(
                    f"this key has {account.num_running} requests in work and may have {most}; wait for one to end",
                    retry_after_s=BUSY_S,
                )
            if (bucket := account.tokens) is not None:
                if num_tokens > bucket.per_minute:
                    raise QuotaExceeded(
                        f"prompt and max_tokens come to {num_tokens} tokens, and this key gets {bucket.per_minute} "
                        "a minute; ask for less at once",
                        param="max_tokens",
                    )
                if wait_s := bucket.wait_s(num_tokens, now):
                    raise RateLimited(
                        f"this key's {bucket.per_minute} tokens a minute are used up but for {int(bucket.level(now))}, "
                        f"and prompt and max_tokens come to {num_tokens}; try again in {wait_s:.1f} s",
                        retry_after_s=wait_s,
                    )
                bucket.take(num_tokens, now)
            account.num_running += 1
            return Charge(self, account, num_tokens)

    def headers(self, key: Key) -> dict[str, str]:
        """What is left of a key's limits, under the names that OpenAI's answers have."""
        with self.lock:
            now, account = self.clock(), self._account(key)
            found: dict[str, str] = {}
            for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
                if bucket is not None:
                    found[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                    found[f"x-ratelimit-remaining-{name}"] = str(max(int(bucket.level(now)), 0))
                    found[f"x-ratelimit-reset-{name}"] = _span(bucket.wait_s(bucket.per_minute, now))
            return found

    def _account(self, key: Key) -> _Account:
        account = self._accounts.get(key.name)
        if account is None:
            account = self._accounts[key.name] = _Account(key, self.clock())
        elif account.key != key:
            account.take_over(key, self.clock())
        return account


def cost(request: Request) -> int:
    """Most tokens a request can come to: each prompt once, and every sample at its full length."""
    return (
        sum(map(len, request.prompts)) + len(request.prompts) * request.params.num_samples * request.params.max_tokens
    )


def used(request: Request, completions: list[Completion]) -> int:
    """Tokens a request did come to. Samples that best_of left out count in full: nobody has seen how long they were."""
    hidden = len(request.prompts) * request.params.num_samples - len(completions)
    generated = sum(c.num_tokens for c in completions)
    return sum(map(len, request.prompts)) + generated + hidden * request.params.max_tokens


def _span(seconds: float) -> str:
    """A time as OpenAI writes it in headers: 120ms, 7s, 1m30s."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
