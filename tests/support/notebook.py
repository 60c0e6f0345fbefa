"""What a user's own program does with LLM, run as one: `python -m support.notebook WHAT`."""

from __future__ import annotations

import contextlib
import sys
import threading

from support.processes import until

from metaseq_api import LLM, SamplingParams
from metaseq_api.errors import EngineStopped

LONG = SamplingParams(max_tokens=400, ignore_eos=True, temperature=0)


def say(word: str) -> None:
    print(word, flush=True)


def forget() -> None:
    """End without closing, with a generation running in another thread."""
    llm = LLM(model_parallel=2)

    def read() -> None:
        with contextlib.suppress(EngineStopped):
            for _ in llm.stream([7, 8, 9], LONG):
                begun.set()

    begun = threading.Event()
    threading.Thread(target=read, daemon=True).start()
    begun.wait()
    say("ready")


def wait() -> None:
    """Live until killed."""
    llm = LLM(model_parallel=2)
    say("ready")
    while True:
        llm.generate([[7, 8, 9]] * 16, LONG)


def interrupted() -> None:
    """Generate until Ctrl-C, then ask something short."""
    llm = LLM()
    want = llm.generate("Return the", SamplingParams(temperature=0))[0].text

    def tell() -> None:
        until(lambda: llm._resident.engine.health().num_running == 64, "all to run")
        say("ready")

    threading.Thread(target=tell).start()
    try:
        llm.generate([[7, 8, 9]] * 64, LONG)
    except KeyboardInterrupt:
        say("interrupted")
    assert llm.generate("Return the", SamplingParams(temperature=0))[0].text == want
    health = llm._resident.engine.health()
    say(f"{health.num_running} {health.num_waiting}")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
