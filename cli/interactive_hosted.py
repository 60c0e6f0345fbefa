"""metaseq-api-local: load a checkpoint over the GPUs or CPUs at hand and serve it.

    metaseq-api-local [CHECKPOINT] [--model-parallel N] [--port P] ...        the demo where nothing is named
    srun --ntasks-per-node 1 --gpus-per-node 8 python -m metaseq_api.cli.interactive_hosted CHECKPOINT

Started by a shell, or by srun with one task per node, it starts one process per rank and watches over them without ever
loading torch; started by srun or torchrun with one task per rank it is that rank.

Exit codes: 0 after Ctrl-C, SIGTERM or scancel (130 where a second Ctrl-C cut the end short); 20 where a rank died or
was lost; else the code of the error it prints in one line (errors.py).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

from metaseq_api import __version__, log, settings
from metaseq_api.errors import (
    CheckpointNotFound,
    MetaseqApiError,
    RankFailed,
    ResourceError,
    SettingsError,
    TokenizerError,
)
from metaseq_api.flags import Parser
from metaseq_api.launch import child, rendezvous, supervisor, terms
from metaseq_api.launch.meeting import address_of
from metaseq_api.settings import Settings

ENV_NOTIFY = "METASEQ_API_NOTIFY_PID"
"""The batch script's process, which is on rank 0's node and has SIGUSR2 where a rank or a node was lost."""
SPINS = "300"
"""How often a thread of a rank that waits for its next share of a step looks, before it sleeps.

By itself OpenMP takes 300,000 looks, ten milliseconds of a core that HTTP could use. A step of OPT-125M took the same
time with either; the 99th percentile of a one-token request to the demo was 11 ms instead of 22 (2026-11-28, two cores
of a Xeon).
"""
RANKS_PER_CORE = 4
"""CPU ranks beyond this do nothing but wait for each other, from the first import on."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="metaseq-api-local",
        description="Serve an OPT checkpoint over HTTP, straight from its FSDP shards or model parts.",
        epilog="What no flag says is taken from constants.py, then from the checkpoint itself.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CHECKPOINT", help="folder of FSDP shards or model parts (default: the demo)")
    add("--host", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, help="port to listen on; 0 takes a free one (default: 6010)")
    add("--model-parallel", type=int, metavar="N", help="ranks the model is split over (default: every visible GPU)")
    add("--dtype", choices=settings.DTYPES, help="of weights and cache (default: as stored on a GPU, fp32 on a CPU)")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    add("--constants", metavar="FILE", help=f"default: ${settings.ENV_CONSTANTS}, else ./constants.py")
    add("--vocab-filename", dest="bpe_vocab", metavar="FILE", help="default: beside the checkpoint")
    add("--merges-filename", dest="bpe_merges", metavar="FILE", help="default: beside the checkpoint")
    add("--max-seq-len", type=int, metavar="N", help="tokens of prompt and completion (default: the model's window)")
    add("--max-batch-tokens", type=int, metavar="N", help="tokens fed in one step (default: 2048)")
    add("--threads", type=int, metavar="N", help="CPU threads of one rank (default: an even share of the cores)")
    add(
        "--grace",
        dest="grace_s",
        type=float,
        metavar="S",
        help="seconds running requests have when it ends (default: what SLURM leaves, else 30)",
    )
    add("--interface", metavar="NAME", help="network between nodes, e.g. ib0 (default: that of the node's name)")
    add("--no-prefix-cache", dest="prefix_cache", action="store_false", default=None, help="compute every prompt whole")
    add(
        "--no-cuda-graphs", dest="cuda_graphs", action="store_false", default=None, help="on a GPU, run every step anew"
    )
    add(
        "--run-ahead",
        action=argparse.BooleanOptionalAction,
        help="start a step before the one before is answered (default: on a GPU)",
    )
    add("--cache-size", type=int, metavar="N", help="answers kept for requests that are asked again (default: 0, none)")
    add("--cache-list-size", type=int, metavar="N", help="of a request that draws at random, answers kept (default: 0)")
    add(
        "--metaseq-compat",
        action="store_const",
        const=True,
        help="take and answer /completions as metaseq did, quirks included (docs/fields.md)",
    )
    add("--keys", dest="keys_file", metavar="FILE", help="clients must send a key of this file (metaseq-api-keys)")
    add("--api-key-file", metavar="FILE", help="clients must send the one key that this file holds; made if missing")
    add("--no-keys", action="store_true", default=None, help="ask for no key, even where others reach this service")
    add("--cors-origins", metavar="LIST", help="origins whose pages may call this service, with commas; * for any")
    add("--request-timeout-s", type=float, metavar="S", help="most seconds that a request may take (default: no end)")
    add("--guard-metrics", action="store_true", default=None, help="ask for a key at /metrics too")
    add(
        "--chat-template", metavar="FILE", help="Jinja2, for /v1/chat/completions (default: User: and Assistant: lines)"
    )
    add("--registry", metavar="DIR", help="folder where this service tells how it is (metaseq-api-slurm)")
    add("--service", metavar="NAME", help="its name there")
    add("--member", type=int, metavar="N", help="its number among services of one name (default: 0)")
    add(
        "--successor",
        type=int,
        metavar="N",
        help="it is one of N, each of which submits who takes over",
    )
    add("--verbose", action="store_true", help="log more")
    add("--version", action="version", version=f"metaseq-api {__version__}")
    return parser


def main(argv: Sequence[str] | None = None, *, host_module: str = supervisor.HOST_MODULE) -> int:
    """Serve until stopped; returns the exit code."""
    try:
        flags = vars(_parser().parse_args(argv))
        constants, verbose = flags.pop("constants"), flags.pop("verbose")
        log.setup(verbose=verbose)
        chosen, remarks = settings.load(flags, constants=constants)
        for remark in remarks:
            print(f"metaseq-api-local: {remark}", file=sys.stderr)
        return _serve(chosen, host_module, verbose)
    except MetaseqApiError as e:
        _tell(e)
        return e.exit_code
    except KeyboardInterrupt:
        return 130


def _serve(chosen: Settings, host_module: str, verbose: bool) -> int:
    _check_files(chosen)
    placement, job = rendezvous.detect(os.environ), rendezvous.job_of(os.environ)
    num_ranks = _num_ranks(chosen, placement, rendezvous.visible_gpus(os.environ))
    chosen = dataclasses.replace(chosen, model_parallel=num_ranks, job=None if job is None else job.job_id)
    if chosen.chat_template is not None and placement.has_rank_0:  # other nodes need not have it
        from metaseq_api.server import template

        template.load(chosen.chat_template)
    # before anything is started: a port in use is said at once, and nothing has to be undone
    sock = _bind(chosen.host, chosen.port) if placement.has_rank_0 else None
    if sock is not None:
        chosen = _secure(chosen, sock)
    if chosen.interface is not None:
        address_of(chosen.interface)  # or refused by name, now
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, chosen.interface)
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    known = terms.ask(job, chosen.grace_s)
    if job is not None and job.restarts and placement.has_rank_0:
        logging.getLogger(__name__).info("job %s was started again by SLURM, time %d", job.job_id, job.restarts)
    if placement.rank is not None:
        log.setup(placement.rank.rank, verbose=verbose)
        child.child_setup(placement.rank.rank, os.getppid() if placement.under_agent else None)
        child.be(host_module, chosen, placement.rank, sock, known, _tell)
    return supervisor.supervise(
        placement, num_ranks, chosen, terms=known, sock=sock, module=host_module, verbose=verbose
    )


def _secure(chosen: Settings, sock: socket.socket) -> Settings:
    """See to it that a service which others reach asks for a key; what the user must know is said here alone."""
    from metaseq_api.server.keys import secure

    try:
        chosen, remark = secure(chosen, sock.getsockname()[0])
    except SettingsError:
        sock.close()
        raise
    if remark:
        print(f"metaseq-api-local: {remark}", file=sys.stderr, flush=True)
    return chosen


def _tell(error: MetaseqApiError) -> None:
    is_lost = error.exit_code == RankFailed.exit_code
    start = "\n" if is_lost else ""  # a rank that was killed while it wrote its stack leaves half a line
    sys.stderr.write(f"{start}metaseq-api-local: error: {error}\n")  # at once: srun may write beside it
    batch = os.environ.get(ENV_NOTIFY, "")
    if is_lost and batch.isdecimal() and os.environ.get("SLURM_NODEID") == "0":
        with contextlib.suppress(OSError):  # it has ended before
            os.kill(int(batch), signal.SIGUSR2)


def _check_files(chosen: Settings) -> None:
    """Refuse what is not there before a process is started for it.

    A file may be named the way metaseq names one, reshard.pt for reshard-model_part-0.pt and its siblings.
    """
    path = chosen.checkpoint
    siblings = (p.name for p in path.parent.glob("*.pt"))
    if not path.exists() and not any(name.startswith(path.name.removesuffix(".pt") + "-") for name in siblings):
        raise CheckpointNotFound(f"no checkpoint at {path}: no such file or folder; name a folder of its *.pt files")
    for flag, file in (("--vocab-filename", chosen.bpe_vocab), ("--merges-filename", chosen.bpe_merges)):
        if file is not None and not file.is_file():
            raise TokenizerError(f"{flag} (or constants.py) names {file}, which is not a file")


def _num_ranks(chosen: Settings, placement: rendezvous.Placement, num_gpus: int) -> int:
    """How many ranks the model is split over: as told, else the launcher's number, else one per visible GPU, else 1."""
    told = chosen.model_parallel
    if placement.rank is not None:
        if told not in (None, placement.rank.world_size):
            raise SettingsError(
                f"the model is to be split over {told} ranks, but srun or torchrun started {placement.rank.world_size} "
                "tasks; start as many, or leave --model-parallel and MODEL_PARALLEL out"
            )
        return placement.rank.world_size
    on_gpu = num_gpus > 0 and chosen.device != "cpu"
    if told is None:
        return placement.num_nodes * (num_gpus if on_gpu and not chosen.demo else 1)
    here = -(-told // placement.num_nodes)
    cores = os.cpu_count() or 1
    if not on_gpu and here > RANKS_PER_CORE * cores:
        raise ResourceError(
            f"{here} ranks on {placement.node}, which has {cores} cores and no GPU for them; "
            f"pass --model-parallel {cores} or fewer, or add nodes"
        )
    if on_gpu and here > num_gpus:
        raise ResourceError(
            f"{here} ranks on {placement.node} need {here} GPUs, but {num_gpus} are visible; "
            f"pass --model-parallel {num_gpus * placement.num_nodes} or --device cpu, or ask SLURM for more"
        )
    return told


def _bind(host: str, port: int) -> socket.socket:
    from metaseq_api.server.port import bind

    return bind(host, port)


if __name__ == "__main__":
    sys.exit(main())
