"""What the doors share that ask a model: where it is, what is asked of it, and many questions at once.

Knows flags and the API's field names. Does not know torch (a model is loaded where no server is named), nor what a door
does with an answer.
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from metaseq_api import settings
from metaseq_api.client import Client
from metaseq_api.errors import MetaseqApiError, SettingsError

Item = TypeVar("Item")
Result = TypeVar("Result")
_FIELDS: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "tokens at most"),
    "min_tokens": (int, "tokens before an end is allowed"),
    "temperature": (float, "0 takes the likeliest token every time"),
    "top_p": (float, "likeliest tokens of this mass together"),
    "top_k": (int, "the K likeliest tokens"),
    "n": (int, "continuations of each prompt"),
    "best_of": (int, "continuations to take the n best of"),
    "seed": (int, "the same seed, the same text"),
    "logprobs": (int, "likeliest tokens to tell at each place"),
}
_MODEL = ("checkpoint", "model_parallel", "dtype", "device", "max_seq_len")


class Source(Protocol):
    """A server, or a model in this process."""

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]: ...

    def stream(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]: ...

    def close(self) -> None: ...


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the source and, by the API's names, of the fields."""
    add = parser.add_argument_group("the model: a server's, or a checkpoint loaded here").add_argument
    add("--url", metavar="URL", help="a running server, http://host:port; its key is taken from $METASEQ_API_KEY")
    add("--model-parallel", type=int, metavar="N", help="ranks the model is split over (default: every visible GPU)")
    add("--dtype", choices=settings.DTYPES, help="default: as stored on a GPU, fp32 on a CPU")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    add("--max-seq-len", type=int, metavar="N", help="tokens of prompt and completion (default: the model's window)")
    add("--constants", metavar="FILE", help=f"default: ${settings.ENV_CONSTANTS}, else ./constants.py")
    add = parser.add_argument_group("the question: the API's fields, with the API's defaults").add_argument
    for name, (kind, says) in _FIELDS.items():
        add(f"--{name.replace('_', '-')}", type=kind, metavar="X" if kind is float else "N", help=says)
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")
    add("--echo", action="store_true", help="the prompt goes in front of the answer")
    add("--ignore-eos", action="store_true", help="go on to max_tokens")
    add("--field", action="append", default=[], metavar="NAME=VALUE", help="any other field, as JSON")


def fields_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that flags name. Raises: SettingsError."""
    named = {name: getattr(args, name) for name in (*_FIELDS, "stop")}
    out = {name: value for name, value in named.items() if value is not None}
    out |= {name: True for name in ("echo", "ignore_eos") if getattr(args, name)}
    for text in args.field:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise SettingsError(f"--field {text} has no value; write --field NAME=VALUE")
        out[name] = value_of(value)
    return out


def value_of(text: str) -> Any:
    """A value as typed: JSON where it is that, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def open_source(args: argparse.Namespace) -> Source:
    """The server that --url names, else the checkpoint, loaded. Raises: MetaseqApiError."""
    flags = {name: getattr(args, name) for name in _MODEL}
    if args.url is None:
        from metaseq_api.local import Local  # with it comes torch

        return Local(settings.load(flags, constants=args.constants)[0])
    if given := [name for name, value in flags.items() if value is not None]:
        raise SettingsError(f"{given[0].replace('_', '-')} is given with --url; a server has its model already")
    return Client(args.url, key=settings.api_key())


def in_order(items: Iterable[Item], job: Callable[[Item], Result], at_once: int) -> Iterator[Result]:
    """Do `job` on all items, `at_once` of them at a time, and yield the results in the items' order as they come.

    Items are read in a thread of their own, so that a slow writer of them holds no result back.
    """
    results: queue.SimpleQueue[Future[Result] | None] = queue.SimpleQueue()
    room, over = threading.Semaphore(at_once), threading.Event()
    pool = ThreadPoolExecutor(at_once)

    def feed() -> None:
        try:
            for item in items:
                room.acquire()
                if over.is_set():
                    return
                results.put(pool.submit(job, item))
            results.put(None)
        except MetaseqApiError as e:  # what cannot be read ends it in its place
            failed: Future[Result] = Future()
            failed.set_exception(e)
            results.put(failed)

    threading.Thread(target=feed, name="feed", daemon=True).start()
    try:
        while (future := results.get()) is not None:
            yield future.result()
            room.release()
    finally:
        over.set()
        room.release()
        pool.shutdown(wait=False, cancel_futures=True)
