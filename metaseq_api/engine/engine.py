"""Rank 0's engine: the batching thread, which admits requests, has the Scheduler order steps, runs them on every rank,
samples and answers. Implements core.protocols.EngineProtocol.

The loop is: take what came in; schedule; broadcast; run; sample; apply; answer (`words`). On a GPU a step is started
before the one before is answered, and what makes steps faster is made between them, or while there is nothing else to
do. Only this thread touches the Scheduler, the sequences and the model; others hand it requests and cancellations
through a queue (`admission`).

Knows the life of a request. Does not know HTTP, files, or how the processes were started.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq

import torch

from metaseq_api.core import Health, Request, Stats
from metaseq_api.core.batch import UNKNOWN
from metaseq_api.engine.admission import Admission
from metaseq_api.engine.book import Book
from metaseq_api.engine.channel import Channel
from metaseq_api.engine.deadlines import Deadlines
from metaseq_api.engine.limits import Limits
from metaseq_api.engine.pulse import Pulse
from metaseq_api.engine.reading import Reading
from metaseq_api.engine.results import ResultCache
from metaseq_api.engine.sampler import Sampler
from metaseq_api.engine.ticket import Ticket
from metaseq_api.engine.words import Words
from metaseq_api.engine.worker import Worker
from metaseq_api.errors import DeadlineExceeded, EngineStopped, MetaseqApiError, RequestError
from metaseq_api.model.paths import score_kernels
from metaseq_api.scheduling.scheduler import Scheduler, Step
from metaseq_api.tokenizer import PAD_ID, Tokenizer

log = logging.getLogger(__name__)


class Engine:
    """Run it with `run` (here) or `start` (in a thread), end it with `stop`.

    The thread that runs it should be the one that loaded the model, and the only one that computes: OpenMP keeps a pool
    of threads for each thread that does, and where these outnumber the cores they no longer spin (a step of OPT-125M
    took 22 ms instead of 13 in a second thread; 2026-11-20, two cores of an EPYC).
    """

    def __init__(
        self,
        *,
        worker: Worker,
        channel: Channel,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        limits: Limits,
        model_name: str,
        heartbeat_s: float = 10.0,
        results: ResultCache | None = None,
    ) -> None:
        self._worker, self._channel, self._scheduler = worker, channel, scheduler
        self._tokenizer, self._model_name, self._heartbeat_s = tokenizer, model_name, heartbeat_s
        self._sampler = Sampler(
            num_tokens=tokenizer.vocab_size,
            banned=[PAD_ID],
            spends=True,
            by=score_kernels(worker.model.context.device),
        )
        self.stats = Stats()
        self._admission = Admission(limits, self.vocab_size, self.stats, results)
        self._book = Book(tokenizer)
        self._words = Words(self._book, scheduler, self.stats, results, self._drop)
        self._unread: Reading | None = None
        self._deadlines = Deadlines()
        self._pulse = Pulse(channel, self.stats, heartbeat_s)
        self._ended = threading.Event()
        self.failure: Exception | None = None
        """What ended it, where nobody told it to."""

    # ---- what other threads call ----

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def max_seq_len(self) -> int:
        return self._admission.limits.max_seq_len

    @property
    def vocab_size(self) -> int:
        return self._worker.model.config.vocab_size

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, token_ids: Seq[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def after_turn(self, call: Callable[[], None]) -> None:
        """Have this called whenever whoever streams was woken: in a turn, at its end, and at that of all. It must not
        fail."""
        self._words.then = call

    def start(self) -> None:
        """Run in a thread of its own."""
        threading.Thread(target=self.run, name="engine", daemon=True).start()

    def submit(self, request: Request) -> Ticket:
        """Admit a request: from here on it is answered exactly once.

        Raises: RequestError where it does not fit the model, Overloaded, EngineStopped.
        """
        return self._admission.submit(request)

    def health(self) -> Health:
        pool, now, closed = self._scheduler.pool, time.monotonic(), self._admission.closed
        stuck = self._pulse.complaint(now)
        return Health(
            alive=not closed,
            reason=closed or stuck,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_free_blocks=pool.num_free,
            num_blocks=pool.num_blocks,
            rank_age_s=self._channel.ages_s(now),
            stuck=bool(stuck),
            ready=self._pulse.begun and not closed and not stuck,
            step_age_s=self._pulse.step_age_s(now),
        )

    def stop(self, grace_s: float = 0.0) -> None:
        """Take no more requests, give running ones `grace_s` seconds, then end the rest and the other ranks' loops."""
        self.end_by(time.monotonic() + grace_s)
        self._ended.wait(grace_s + 10.0)

    def end_by(self, deadline: float) -> int:
        """The same without waiting; a later call can only shorten. How many sequences are in work or wait.

        Units: seconds of the monotonic clock. Any thread, also while a step is held up.
        """
        return self._admission.end_by(deadline)

    @property
    def ended(self) -> bool:
        """Whether every request has been answered and no more will be."""
        return self._ended.is_set()

    def wait_failed(self, timeout: float | None = None) -> bool:
        """Wait for the engine's end; whether it was a failure. Units: seconds."""
        return self._ended.wait(timeout) and self.failure is not None

    # ---- the batching thread ----

    def run(self) -> None:
        """Answer requests until stopped; returns when every one is answered, also where a step failed."""
        self._pulse.begin()
        try:
            while not self._admission.over:
                self.turn()
            self._channel.send_stop()
        except Exception as e:
            log.exception("the engine failed")
            self.failure = e
            self._admission.closed = "the engine failed; the server's log says why"
        finally:
            self._admission.close("the engine has ended")
            try:
                self._end_all()
            finally:
                self._ended.set()

    def turn(self) -> None:
        """One turn: take in what came, run a step. Waits where there is nothing to do."""
        self._take_in()
        for ticket in self._deadlines.over(time.monotonic()):
            self._run_out(ticket)
        self._words.notify()  # of echoes, before the step
        step = self._scheduler.schedule()
        if step is not None or self._unread is not None:
            with torch.inference_mode(), self._pulse.beating():
                self._run(step)
        self._words.notify()
        if self._worker.wanted:
            self._prepare_next()

    def prepare(self) -> None:
        """Make all now that it would make while it runs. For whoever measures; it must not be running."""
        while self._worker.unprepared:
            self._prepare_next()

    def _prepare_next(self) -> None:
        """Make one thing more that steps are faster with: at once where one was, else while there is nothing to do."""
        with self._pulse.beating():
            self._channel.send_prepare()
            self._worker.prepare_next()

    def _take_in(self) -> None:
        """Handle what came in; when there is nothing to run, wait for it and keep the other ranks company."""
        if self._until_heartbeat() == 0:
            self._channel.send_heartbeat()  # requests may have come that needed no step
        idle = not self._book and self._unread is None
        if idle:
            self._scheduler.count_idle()
        while True:
            waits = idle and not self._worker.unprepared
            came = self._admission.take(self._until_heartbeat() if waits else 0.0)
            if came is None:
                if not idle:
                    return
                if self._until_heartbeat() == 0:
                    self._channel.send_heartbeat()
                elif not waits:
                    self._prepare_next()
                continue
            idle, (ticket, what) = False, came
            if what == "add":
                self._add(ticket)
            elif what == "cancel" and ticket in self._book:
                ticket.fail(RequestError("the client went away", code="cancelled"))
                self._drop(ticket)

    def _until_heartbeat(self) -> float:
        """Units: seconds."""
        return max(self._channel.last_heard + self._heartbeat_s - time.monotonic(), 0.0)

    def _add(self, ticket: Ticket) -> None:
        request = ticket.request
        self.stats.ask(request.params.num_samples, request.params.max_tokens, map(len, request.prompts))
        tracks = self._book.open(ticket)
        self._deadlines.add(ticket)
        for track in tracks:
            self.stats.arrive(track.seq.seq_id, ticket.arrived)
        for track in tracks:
            if request.params.max_tokens == 0 and not request.params.scores_prompt:
                self._words.end(track)  # an echo: nothing to compute
                continue
            self._book.compute(track)
            self._scheduler.add(track.seq)
            if track.teller is not None and request.params.logprobs is None:
                self._words.tell(track, track.teller.tell())  # an echo

    def _run(self, step: Step | None) -> None:
        """Start a step on all ranks, and see to the one before; where nothing runs ahead, to this one too.

        On a GPU, what the step before drew is read, written down and told while this one runs; its order names those
        tokens by their rows. So a sequence that they end has been started once more, for nothing.
        """
        before, self._unread = self._unread, None
        if step is None:
            assert before is not None
            self._see_to(before)
            return
        read = Reading(step, self._book, self._sampler, time.monotonic())
        if before is not None:
            step.refer_to(before.drawn)
        self._channel.send_batch(step.batch)
        parts = self._worker.run(step.batch)
        logits = next(parts, None)
        if before is not None:
            self._see_to(before)
            self._words.notify()
        while logits is not None:
            read.take(logits)
            logits = next(parts, None)
        self._scheduler.apply(step, dict.fromkeys(read.drawn, UNKNOWN))
        if self._worker.runs_ahead:
            self._worker.keep(step.batch, read.chosen)
            self._unread = read
        else:
            self._see_to(read)

    def _see_to(self, read: Reading) -> None:
        """Read what a step drew, and answer. Waits for a GPU."""
        drawn = {i: scored for i, scored in read.tokens().items() if self._book.find(i) is not None}
        self._note(read, drawn)
        tokens = {i: scored for i, scored in drawn.items() if scored is not None}
        for seq_id, scored in tokens.items():
            self._book[seq_id].seq.token_ids[-1] = scored.token_id
        for ticket in read.unsound:
            self._give_up(ticket)
        self._words.add(tokens)
        for seq in read.step.sequences:
            scored_only = self._book.find(seq.seq_id) if seq.params.max_tokens == 0 else None
            if scored_only is not None and seq.num_cached == seq.prompt_len:
                self._words.end(scored_only)

    def _note(self, read: Reading, drawn: Collection[int]) -> None:
        """Every rank has done its part of a step, in which tokens of these sequences were drawn."""
        now = time.monotonic()
        self._channel.note_all(now)
        fed = [seq.seq_id for seq in read.step.sequences]
        self.stats.step(fed, read.step.batch.num_tokens, drawn, began=read.began, now=now)
        scheduler = self._scheduler
        self.stats.num_preemptions = scheduler.num_preemptions
        self.stats.prefix_queries = scheduler.prefix_queries_tokens
        self.stats.prefix_hits = scheduler.prefix_hits_tokens

    def _give_up(self, ticket: Ticket) -> None:
        if ticket not in self._book:  # cancelled meanwhile
            return
        log.error("request %s: the model's logits are not numbers", ticket.request.request_id)
        ticket.fail(MetaseqApiError("the model computed values that are not numbers for this prompt"))
        for track in self._book.of(ticket):
            self._scheduler.discard(track.seq)
        self._drop(ticket)

    def _run_out(self, ticket: Ticket) -> None:
        num = sum(track.seq.num_generated for track in self._book.of(ticket))
        ticket.fail(
            DeadlineExceeded(
                f"the time for this request was over after {num} of at most "
                f"{ticket.num_sequences * ticket.request.params.max_tokens} tokens, and it was given up; allow more "
                "(timeout_ms), or ask for fewer tokens",
                param="timeout_ms",
            )
        )
        self._drop(ticket)

    def _drop(self, ticket: Ticket) -> None:
        """Forget a request that has ended, and free what it holds."""
        self._deadlines.remove(ticket)
        for track in self._book.close(ticket):
            self._scheduler.finish(track.seq)
            self.stats.finish(track.seq.seq_id, "abort", time.monotonic())
        self._admission.leave(ticket)

    def _end_all(self) -> None:
        """No request goes unanswered: whoever still waits is told that the engine has stopped."""
        self._words.notify()
        for ticket in self._book.tickets:
            ticket.fail(EngineStopped(self._admission.closed))
            self._drop(ticket)
        while came := self._admission.take():
            ticket, what = came
            if what == "add":
                ticket.fail(EngineStopped(self._admission.closed))
                self._admission.leave(ticket)
        self._words.notify()
