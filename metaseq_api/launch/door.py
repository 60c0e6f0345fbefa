"""The flags of the door to a cluster: a parser that explains, and sbatch's options as its own.

Knows flags. Does not know what the door does with them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from metaseq_api import __version__, flags
from metaseq_api.launch import sbatch
from metaseq_api.settings import DTYPES


class Parser(flags.Parser):
    """Knows sbatch's options, and why some are not passed on."""

    def hint(self, flag: str) -> list[str]:
        why = sbatch.OURS.get(flag.lstrip("-"))
        return [f"{flag} is not passed on to sbatch: {why}"] if why else super().hint(flag)


def add_sbatch(parser: argparse.ArgumentParser) -> None:
    """Add every option of sbatch that a service leaves to its user; `sbatch_options` finds what was given."""
    names = "options of sbatch, passed on as they are"
    group = parser.add_argument_group(
        names, " ".join(f"--{n}" for n in sorted([*sbatch.VALUED, *sbatch.OPTIONAL, *sbatch.BARE]))
    )
    for name in (*sbatch.VALUED, *sbatch.OPTIONAL, *sbatch.BARE):
        flags = [f"--{name}", *([f"-{sbatch.SHORT[name]}"] if name in sbatch.SHORT else [])]
        keep = {"dest": f"sbatch {name}", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if name in sbatch.VALUED:
            group.add_argument(*flags, **keep)  # type: ignore[arg-type]
        elif name in sbatch.OPTIONAL:
            group.add_argument(*flags, nargs="?", **keep)  # type: ignore[arg-type]
        else:
            group.add_argument(*flags, action="store_const", const=None, **keep)  # type: ignore[arg-type]


def sbatch_options(args: argparse.Namespace) -> dict[str, str | None]:
    """Those of sbatch's options that were given, by name; None for one without a value."""
    return {k.removeprefix("sbatch "): v for k, v in vars(args).items() if k.startswith("sbatch ")}


def port(text: str) -> int:
    """A port's number, or 0."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535, or 0 for a free one")
    return int(text)


def slurm_parser(prog: str) -> argparse.ArgumentParser:
    """The flags of every command of metaseq-api-slurm."""
    parser = Parser(prog=prog, description="Services on a SLURM cluster, from its login node.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"metaseq-api {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    shared = Parser(add_help=False)
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
    logs.add_argument("--member", type=int, metavar="K", help="of one member alone (default: of every one)")
    command("stop", "End a service, and forget all of it but its log.").add_argument("name")
    _add_proxy(command("proxy", "One address in front of the members of a service, by HAProxy, until Ctrl-C."))
    check = command("doctor", "Check this site before anything is submitted.")
    check.add_argument("checkpoint", nargs="?", type=Path, help="is it readable from the nodes?")
    check.add_argument("--nodes", type=flags.count, default=2, help="nodes of the trial job (default: 2)")
    check.add_argument("--gpus", type=int, default=0, help="GPUs of each node that the trial job asks for (default: 0)")
    check.add_argument("--python", default=sys.executable, metavar="FILE", help="the nodes' Python (default: this one)")
    check.add_argument("--no-job", action="store_true", help="look from here only; start no trial job")
    check.add_argument("--wait-s", type=float, default=300.0, metavar="S", help="for the trial job (default: 300)")
    add_sbatch(check)
    return parser


def _add_submit(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CHECKPOINT", help="folder of shards or model parts (default: the demo)")
    add("--name", help="of the service (default: the checkpoint's folder)")
    add("-N", "--nodes", type=flags.count, default=1, help="default: 1")
    add("--gpus", type=int, default=None, metavar="N", help="of each node (default: all of one); 0 serves on CPUs")
    add(
        "--model-parallel",
        type=flags.count,
        metavar="N",
        help="ranks the model is split over (default: as many GPUs as divide it)",
    )
    add("--dtype", choices=DTYPES, help="of weights and cache (default: as stored on a GPU, fp32 on a CPU)")
    add(
        "--max-seq-len",
        type=flags.count,
        metavar="N",
        help="tokens of prompt and completion (default: the model's window)",
    )
    add("--gpu-memory", type=float, metavar="GB", help="of one GPU (default: what gres or features tell)")
    add("--replicas", type=flags.count, default=1, metavar="N", help="members, each with the model whole (default: 1)")
    add("--successor", action="store_true", help="before its time is over, each member submits the job that takes over")
    add("--host", default="0.0.0.0", help="address to listen on (default: every one of its node's)")
    add("--port", type=port, default=0, help="default: 0, a free one, bound once; the registry tells which")
    add("--key-file", type=Path, metavar="FILE", help="a key for clients (default: $METASEQ_API_KEY, else one is made)")
    add("--python", default=sys.executable, metavar="FILE", help="the nodes' Python (default: this one)")
    add("--setup", action="append", default=[], metavar="LINE", help="of shell, before the service starts; repeatable")
    add("--dry-run", action="store_true", help="print the plan and the batch script, submit nothing")
    add("--no-wait", action="store_true", help="return once it is submitted")
    add("--cancel-on-interrupt", action="store_true", help="a Ctrl-C while waiting cancels the job too")
    add_sbatch(parser)
    parser.epilog = "Flags of metaseq-api-local may follow `--`."


def _add_proxy(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name")
    add("--host", default="0.0.0.0", help="address to listen on (default: every one of this machine's)")
    add("--port", type=port, default=0, help="default: 0, a free one; `url NAME` tells which")
    add("--haproxy", metavar="FILE", help="the program (default: haproxy, wherever it is)")
    add("--job", action="store_true", help="run it as a job of its own; takes options of sbatch")
    add("--python", default=sys.executable, metavar="FILE", help="of that job (default: this one)")
    add_sbatch(parser)
