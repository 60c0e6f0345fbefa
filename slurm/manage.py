"""metaseq-api-slurm: services on a SLURM cluster, from its login node.

    metaseq-api-slurm doctor --partition gpu                             is this site ready?
    metaseq-api-slurm submit /data/opt/175B --gpus 8 --partition gpu     plans, submits, waits, prints the URL
    metaseq-api-slurm status | url | logs -f | stop NAME, list           from any login shell
    metaseq-api-slurm proxy NAME                                         one address for several replicas

Exit codes: 0 done; 1 doctor found a problem; 30 SLURM refused; 31 there is no such service, or it ended; 130 Ctrl-C
(the job stays); else the code of the error it prints in one line (errors.py).
"""

from __future__ import annotations

import argparse
import getpass
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from metaseq_api import log
from metaseq_api.core import ModelConfig
from metaseq_api.errors import MetaseqApiError, ServiceError, SettingsError
from metaseq_api.launch import cluster, doctor, haproxy, plan, proxy, rendezvous, service, submit, terms
from metaseq_api.launch.door import sbatch_options, slurm_parser
from metaseq_api.launch.registry import Record, Registry, checked_key, read_key
from metaseq_api.launch.standing import Standing
from metaseq_api.settings import DEMO

PROG = "metaseq-api-slurm"
LINE_S = 5.0
"""Units: seconds between two lines of progress where they go to a file, unless something changed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    flags: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, flags = words[:at], words[at + 1 :]
    try:
        args = slurm_parser(PROG).parse_args(words)
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
        if args.command == "proxy":
            return _proxy(registry, args)
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
        found = service.look_at_all(registry)
        for standing in found:
            _print_line(standing, as_json=getattr(args, "json", False))
        if not found:
            print(f"no services in {registry.folder} (--registry, METASEQ_API_REGISTRY)", file=sys.stderr)
        return 0
    if args.command == "stop":
        before = service.stop(registry, args.name)
        print(f"{args.name} had ended already: {before.words}" if before.has_ended else f"{args.name} is stopped")
        return 0
    standing = service.look(registry, args.name)
    if args.command == "url":
        if standing.state != "ready":
            raise ServiceError(f"{args.name} is not ready: {standing.words}")
        print(standing.url)
    elif args.command == "logs":
        _logs(registry, standing, member=args.member, follow=args.follow)
    else:
        _print_line(standing, as_json=args.json)
        if not args.json:
            _print_members(standing)
            if standing.has_ended and (error := service.last_error(standing)):
                print(f"  the last error in its log: {error}")
    return ServiceError.exit_code if args.command == "status" and standing.has_ended else 0


def _print_line(standing: Standing, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_facts(standing) | {"members": [_facts(m) for m in standing.members]}))
    else:
        print(f"{standing.name:<20} job {standing.job or '-':<10} {standing.state:<9} {standing.words}")


def _facts(standing: Standing) -> dict[str, object]:
    facts = {n: getattr(standing, n) for n in ("name", "member", "state", "job", "url", "model", "words")}
    return facts | {"heartbeat": standing.record.heartbeat if standing.record else None}


def _print_members(standing: Standing) -> None:
    """A line for each member, where there are several, and for the proxy."""
    if len(standing.members) > 1 or standing.proxy:
        for m in standing.members:
            print(f"  member {m.member:<12} job {m.job or '-':<10} {m.state:<9} {m.words}")
    if standing.proxy:
        print(f"  proxy{'':<14} job {standing.proxy.job or '-':<10} ready     on {standing.proxy.url}")


def _logs(registry: Registry, standing: Standing, *, member: int | None, follow: bool) -> None:
    paths = service.log_files(standing, member)
    slurm = service.Slurm(pause_s=3.0)

    def going_on() -> bool:
        now = service.find(registry, standing.name, slurm) if follow else None
        return now is not None and not now.has_ended

    for text in service.read_logs(paths, going_on):
        sys.stdout.write(text)
        sys.stdout.flush()


def _submit(registry: Registry, args: argparse.Namespace, flags: list[str]) -> int:
    order = _order(args, flags)
    for line in order.layout.lines():
        print(f"plan: {line}", file=sys.stderr)
    if args.dry_run:
        print(order.script(registry).render(), end="")
        return 0
    submission, made = submit.submit(registry, order)
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
        error = service.last_error(standing)
        words = f"{standing.words}; {error}" if error else standing.words
        raise ServiceError(f"{order.name} ended before it was ready: {words}; {PROG} logs {order.name} tells more")
    print(standing.url)
    print(service.curl_line(standing))
    print(f"from your own machine: {service.ssh_line(standing, getpass.getuser())}")
    if order.replicas > 1 and not standing.proxy:
        print(f"one address for all {order.replicas} members: {PROG} proxy {order.name}", file=sys.stderr)
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


def _order(args: argparse.Namespace, flags: list[str]) -> submit.Order:
    """What is to be submitted, planned. Raises: MetaseqApiError, before anything is submitted."""
    options = sbatch_options(args)
    if args.port and (args.replicas > 1 or args.successor):
        raise SettingsError(
            f"--port {args.port} cannot be had twice on one node, where members of {args.name or 'this service'} may "
            f"meet; leave it out: the registry tells theirs, and `{PROG} proxy` has a --port for all"
        )
    if args.successor:
        submit.check_succession(options)
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
    return submit.Order(
        name=args.name or ("demo" if checkpoint is None else checkpoint.name.removesuffix(".pt")),
        layout=layout,
        checkpoint=checkpoint,
        host=args.host,
        port=args.port,
        key=_key(args.key_file, flags),
        replicas=args.replicas,
        successor=args.successor,
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


def _proxy(registry: Registry, args: argparse.Namespace) -> int:
    options = sbatch_options(args)
    if args.job:
        job = submit.submit_proxy(
            registry,
            args.name,
            python=args.python,
            host=args.host,
            port=args.port,
            program=args.haproxy,
            options=options,
        )
        print(f"submitted: job {job}; `{PROG} url {args.name}` is the proxy's once it runs", file=sys.stderr)
        return 0
    if options:
        raise SettingsError(f"--{next(iter(options))} is for sbatch, and this proxy runs here; give --job too")
    job_here = rendezvous.job_of(os.environ)
    front = proxy.Front(
        name=args.name,
        host=args.host,
        port=args.port,
        node=rendezvous.detect(os.environ).node,
        job=None if job_here is None else job_here.job_id,
        program=haproxy.find(args.haproxy),
    )

    def told(record: Record) -> None:
        print(f"{args.name} is at {record.url}", flush=True)

    return proxy.serve(registry, front, terms.ask(job_here, None), told)


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
    findings = doctor.examine(registry, options.get("partition"), trial)
    for finding in itertools.chain([_readable(args.checkpoint)] if args.checkpoint else [], findings):
        print(
            f"{'OK     ' if finding.ok else 'PROBLEM'} {finding.what}" + (f": {finding.fix}" if finding.fix else ""),
            flush=True,
        )
        bad += not finding.ok
    print("this site is ready" if not bad else f"{bad} problem(s)")
    return 1 if bad else 0


def _readable(checkpoint: Path) -> doctor.Finding:
    """Whether `submit` could read a checkpoint's headers here."""
    try:
        config = _shape(checkpoint.expanduser().absolute())
    except MetaseqApiError as e:
        return doctor.Finding(False, f"{checkpoint} cannot be served: {e}")
    return doctor.Finding(True, f"{checkpoint}: {config.num_params / 1e6:.1f} M parameters, readable from here")


if __name__ == "__main__":
    sys.exit(main())
