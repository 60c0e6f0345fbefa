"""metaseq-api-slurm: services on a SLURM cluster, from its login node.

    metaseq-api-slurm doctor --partition gpu                             is this site ready?
    metaseq-api-slurm submit /data/opt/175B --gpus 8 --partition gpu     plans, submits, waits, prints the URL
    metaseq-api-slurm status | url | logs -f | stop NAME, list           from any login shell

Exit codes: 0 done; 1 doctor found a problem; 30 SLURM refused; 31 there is no such service, or it ended; 130 Ctrl-C
(the job stays); else the code of the error it prints in one line (errors.py).
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from metaseq_api import __version__, log
from metaseq_api.core import ModelConfig
from metaseq_api.errors import MetaseqApiError, ServiceError, SettingsError
from metaseq_api.launch import cluster, doctor, plan, service
from metaseq_api.launch.door import Parser, add_sbatch, count, sbatch_options
from metaseq_api.launch.registry import Registry, checked_key, read_key
from metaseq_api.launch.standing import Standing
from metaseq_api.settings import DEMO, DTYPES

PROG = "metaseq-api-slurm"
LINE_S = 5.0
"""Units: seconds between two lines of progress where they go to a file, unless something changed."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROG, description="Services on a SLURM cluster, from its login node.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"metaseq-api {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--registry", metavar="DIR", help="default: $METASEQ_API_REGISTRY, else ~/.metaseq-api/services"
    )

    def command(name: str, help_: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help_, description=help_, parents=[shared], allow_abbrev=False)

    _add_submit(command("submit", "Plan, submit and wait for a service; print its URL."))
    status = command("status", "How a service stands, or all of them.")
    status.add_argument("name", nargs="?")
    status.add_argument("--json", action="store_true", help="as one JSON object a line")
    command("list", "Every service in one line each.")
    command("url", "The URL of a service that is ready.").add_argument("name")
    logs = command("logs", "What a service wrote.")
    logs.add_argument("name")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until it ends")
    command("stop", "End a service, and forget all of it but its log.").add_argument("name")
    check = command("doctor", "Check this site before anything is submitted.")
    check.add_argument("checkpoint", nargs="?", type=Path, help="is it readable from the nodes?")
    check.add_argument("--nodes", type=count, default=2, help="nodes of the trial job (default: 2)")
    check.add_argument("--gpus", type=int, default=0, help="GPUs of each node that the trial job asks for (default: 0)")
    check.add_argument("--python", default=sys.executable, metavar="FILE", help="the nodes' Python (default: this one)")
    check.add_argument("--no-job", action="store_true", help="look from here only; start no trial job")
    check.add_argument("--wait-s", type=float, default=300.0, metavar="S", help="for the trial job (default: 300)")
    add_sbatch(check)
    Parser.known = [o for p in commands.choices.values() for o in p._option_string_actions]
    return parser


def _add_submit(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CHECKPOINT", help="folder of shards or model parts (default: the demo)")
    add("--name", help="of the service (default: the checkpoint's folder)")
    add("-N", "--nodes", type=count, default=1, help="default: 1")
    add("--gpus", type=int, default=None, metavar="N", help="of each node (default: all of one); 0 serves on CPUs")
    add(
        "--model-parallel",
        type=count,
        metavar="N",
        help="ranks the model is split over (default: as many GPUs as divide it)",
    )
    add("--dtype", choices=DTYPES, help="of weights and cache (default: as stored on a GPU, fp32 on a CPU)")
    add("--max-seq-len", type=count, metavar="N", help="tokens of prompt and completion (default: the model's window)")
    add("--gpu-memory", type=float, metavar="GB", help="of one GPU (default: what gres or features tell)")
    add("--host", default="0.0.0.0", help="address to listen on (default: every one of its node's)")
    add("--port", type=int, default=0, help="default: 0, a free one, bound once; the registry tells which")
    add("--key-file", type=Path, metavar="FILE", help="a key for clients (default: $METASEQ_API_KEY, else one is made)")
    add("--python", default=sys.executable, metavar="FILE", help="the nodes' Python (default: this one)")
    add("--setup", action="append", default=[], metavar="LINE", help="of shell, before the service starts; repeatable")
    add("--dry-run", action="store_true", help="print the plan and the batch script, submit nothing")
    add("--no-wait", action="store_true", help="return once it is submitted")
    add("--cancel-on-interrupt", action="store_true", help="a Ctrl-C while waiting cancels the job too")
    add_sbatch(parser)
    parser.epilog = "Flags of metaseq-api-local may follow `--`."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    flags: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, flags = words[:at], words[at + 1 :]
    try:
        args = _parser().parse_args(words)
        log.setup()
        if flags and args.command != "submit":
            raise SettingsError(
                f"what follows `--` is for metaseq-api-local, and {args.command} starts none; leave it out"
            )
        folder = args.registry or os.environ.get("METASEQ_API_REGISTRY") or "~/.metaseq-api/services"
        registry = Registry(Path(folder).expanduser().resolve())
        if args.command == "submit":
            return _submit(registry, args, flags)
        if args.command == "doctor":
            return _doctor(registry, args)
        return _ask(registry, args)
    except MetaseqApiError as e:
        print(f"{PROG}: error: {e}", file=sys.stderr)
        return e.exit_code
    except BrokenPipeError:  # `logs -f | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _ask(registry: Registry, args: argparse.Namespace) -> int:
    if args.command == "list" or (args.command == "status" and args.name is None):
        for standing in service.look_at_all(registry):
            _print_line(standing, as_json=getattr(args, "json", False))
        return 0
    if args.command == "stop":
        before = service.stop(registry, args.name)
        print(f"{args.name} had ended already: {before.words}" if before.has_ended else f"{args.name} is stopped")
        return 0
    standing = service.look(registry, args.name)
    if args.command == "url":
        if standing.state not in ("ready", "draining"):
            raise ServiceError(f"{args.name} is not ready: {standing.words}")
        print(standing.url)
    elif args.command == "logs":
        _logs(registry, standing, follow=args.follow)
    else:
        _print_line(standing, as_json=args.json)
    return ServiceError.exit_code if args.command == "status" and standing.has_ended else 0


def _print_line(standing: Standing, *, as_json: bool) -> None:
    if as_json:
        facts = {n: getattr(standing, n) for n in ("name", "state", "job", "url", "model", "words")}
        record = standing.record
        print(json.dumps(facts | {"heartbeat": record.heartbeat if record else None}))
    else:
        print(f"{standing.name:<20} job {standing.job or '-':<10} {standing.state:<9} {standing.words}")


def _logs(registry: Registry, standing: Standing, *, follow: bool) -> None:
    path = service.log_file(registry, standing)
    slurm = service.Slurm(pause_s=3.0)

    def going_on() -> bool:
        now = service.find(registry, standing.name, slurm) if follow else None
        return now is not None and not now.has_ended

    for text in service.read_log(path, going_on):
        sys.stdout.write(text)
        sys.stdout.flush()


def _submit(registry: Registry, args: argparse.Namespace, flags: list[str]) -> int:
    order = _order(args, flags)
    for line in order.layout.lines():
        print(f"plan: {line}", file=sys.stderr)
    if args.dry_run:
        print(order.script(registry).render(), end="")
        return 0
    submission, made = service.submit(registry, order)
    print(f"submitted: job {submission.job}, service {order.name}, log {submission.log}", file=sys.stderr)
    if made:
        print(
            f"clients must send this key; it is shown this once, and kept in {submission.key_file}:\n{made}",
            file=sys.stderr,
        )
    if args.no_wait:
        return 0
    try:
        standing = _wait(registry, order.name)
    except KeyboardInterrupt:
        if args.cancel_on_interrupt:
            service.stop(registry, order.name)
            print(f"\njob {submission.job} is cancelled", file=sys.stderr)
        else:
            told = f"{PROG} status {order.name} tells how, {PROG} stop {order.name} ends it"
            print(f"\njob {submission.job} goes on: {told}", file=sys.stderr)
        return 128 + signal.SIGINT
    if standing.has_ended:
        error = service.last_error(registry, standing)
        words = f"{standing.words}; {error}" if error else standing.words
        raise ServiceError(f"{order.name} ended before it was ready: {words}; {PROG} logs {order.name} tells more")
    print(standing.url)
    print(service.curl_line(standing))
    print(f"from your own machine: {service.ssh_line(standing, getpass.getuser())}")
    return 0


def _wait(registry: Registry, name: str) -> Standing:
    """Show how far a service is until it is ready or has ended: in one line on a terminal, in lines elsewhere."""
    terminal, shown, at = sys.stderr.isatty(), "", 0.0
    begun = time.monotonic()
    for standing in service.follow(registry, name):
        now = time.monotonic()
        line = f"{now - begun:5.0f} s  {standing.words}"
        if terminal:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        elif standing.state != shown or now - at >= LINE_S:
            print(line, file=sys.stderr, flush=True)
            shown, at = standing.state, now
    if terminal:
        print(file=sys.stderr)
    return standing


def _order(args: argparse.Namespace, flags: list[str]) -> service.Order:
    """What is to be submitted, planned. Raises: MetaseqApiError, before anything is submitted."""
    options = sbatch_options(args)
    checkpoint = None if args.checkpoint is None else Path(args.checkpoint).expanduser().absolute()
    told = args.gpus == 0 or (args.gpus is not None and args.gpu_memory is not None)
    usable = [] if told else cluster.nodes_of(options.get("partition"))
    gpus = args.gpus if args.gpus is not None else min((n.gpus for n in usable if n.gpus), default=0)
    layout = plan.lay_out(
        _shape(checkpoint or DEMO),
        nodes=args.nodes,
        gpus=gpus,
        model_parallel=args.model_parallel or (args.nodes if checkpoint is None else None),
        dtype=args.dtype,
        max_seq_len=args.max_seq_len,
        gpu_bytes=int(args.gpu_memory * plan.GIB) if args.gpu_memory else plan.gpu_memory(usable),
    )
    return service.Order(
        name=args.name or ("demo" if checkpoint is None else checkpoint.name.removesuffix(".pt")),
        layout=layout,
        checkpoint=checkpoint,
        host=args.host,
        port=args.port,
        key=_key(args.key_file, flags),
        python=args.python,
        options=options,
        setup=args.setup,
        flags=[
            *(["--dtype", args.dtype] if args.dtype else []),
            *(["--max-seq-len", str(args.max_seq_len)] if args.max_seq_len else []),
            *flags,
        ],
    )


def _shape(path: Path) -> ModelConfig:
    """What the checkpoint's headers tell of the model: torch is loaded for this alone."""
    from metaseq_api.checkpoint.opening import open_checkpoint

    return open_checkpoint(path).config


def _key(file: Path | None, flags: list[str]) -> str | None:
    """The key clients must send; None makes one, "" leaves keys to the flags that name them."""
    if file is not None:
        return read_key(file)
    if any(f.partition("=")[0] in ("--keys", "--api-key-file", "--no-keys") for f in flags):
        return ""
    given = os.environ.get("METASEQ_API_KEY")
    return checked_key(given, "METASEQ_API_KEY") if given else None


def _doctor(registry: Registry, args: argparse.Namespace) -> int:
    options = sbatch_options(args)
    trial = None
    if not args.no_job:
        trial = doctor.Trial(
            nodes=args.nodes,
            gpus=args.gpus,
            python=args.python,
            checkpoint=None if args.checkpoint is None else args.checkpoint.expanduser().absolute(),
            options=options,
            wait_s=args.wait_s,
        )
    bad = 0
    for finding in doctor.examine(registry, options.get("partition"), trial):
        print(
            f"{'OK     ' if finding.ok else 'PROBLEM'} {finding.what}" + (f": {finding.fix}" if finding.fix else ""),
            flush=True,
        )
        bad += not finding.ok
    print("this site is ready" if not bad else f"{bad} problem(s)")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
