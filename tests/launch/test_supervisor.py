"""Real processes: however the service ends, all of it ends, in time, with the right exit code and last line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.processes import TESTS, Family, clean_env, family, until

from metaseq_api.launch.order import Order
from metaseq_api.launch.rendezvous import RankInfo
from metaseq_api.launch.supervisor import DISMISS_S, SLACK_S
from metaseq_api.launch.terms import INTERRUPT_S, Terms
from metaseq_api.settings import Settings

GRACE = 0.3


def supervise(num_ranks: int = 2, grace_s: float = GRACE) -> list[str]:
    return [sys.executable, "-m", "support.supervise", str(num_ranks), str(grace_s)]


def test_one_ctrl_c_takes_less_than_five_seconds_at_worst() -> None:
    assert INTERRUPT_S + SLACK_S + DISMISS_S < 5


def test_every_rank_gets_its_number_the_settings_and_one_private_meeting_place(tmp_path: Path) -> None:
    with family(supervise(3), tmp_path) as f:
        told = f.up(3)
        assert [t["rank"]["rank"] for t in told] == [t["rank"]["local_rank"] for t in told] == [0, 1, 2]
        assert {(t["rank"]["world_size"], t["rank"]["local_world_size"], t["rank"]["node"]) for t in told} == {
            (3, 3, "here")
        }
        assert told[0]["store"][2:] == ["0o600", 0]
        assert [t["store"] for t in told] == [told[0]["store"]] * 3
        assert list(f.temp.iterdir()) == []
        assert told[0]["settings"]["checkpoint"] == str(Settings().checkpoint)
        assert [t["settings"]["model_parallel"] for t in told] == [3, 3, 3]


def test_only_rank_0_inherits_the_socket_and_the_port_is_free_afterwards(tmp_path: Path) -> None:
    with family(supervise(), tmp_path) as f:
        ports = [t["port"] for t in f.up(2)]
        assert ports[1] is None
        socket.create_connection(("127.0.0.1", ports[0]), timeout=5).close()
        os.kill(f.pids()[0], signal.SIGKILL)
        f.end()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", ports[0]), timeout=5)


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2], ids=lambda s: s.name
)
@pytest.mark.parametrize("whole_group", [False, True], ids=["parent", "group"])
def test_one_signal_ends_everything_with_exit_code_0(tmp_path: Path, signum: signal.Signals, whole_group: bool) -> None:
    with family(supervise(), tmp_path) as f:
        f.up(2)
        (os.killpg if whole_group else os.kill)(f.parent.pid, signum)
        assert f.end() == (0, "")
        f.assert_nothing_left()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_one_signal_ends_everything_also_where_the_shell_started_it_with_an_ampersand(
    tmp_path: Path, signum: signal.Signals
) -> None:
    script = f"{' '.join(supervise())} & echo $! >pid.part; mv pid.part pid; wait $!; exit $?"
    with family(["bash", "-c", script], tmp_path) as f:
        f.up(2)
        os.kill(int((tmp_path / "cwd" / "pid").read_text()), signum)
        assert f.end() == (0, "")
        f.assert_nothing_left()


def test_a_signal_while_the_ranks_start_ends_everything(tmp_path: Path) -> None:
    with family(supervise(4), tmp_path) as f:
        until(lambda: psutil.Process(f.parent.pid).children(), "the supervisor to begin")
        os.killpg(f.parent.pid, signal.SIGINT)
        assert f.end() == (0, "")
        f.assert_nothing_left()


def test_rank_0_ends_its_requests_while_the_others_still_help(tmp_path: Path) -> None:
    with family(supervise(grace_s=10), tmp_path, DUMMY_RANK0="drain") as f:
        f.up(2)
        os.kill(f.parent.pid, signal.SIGTERM)
        assert f.end()[0] == 0
        assert (tmp_path / "drained").read_text() == "SIGTERM with rank 1"
        f.assert_nothing_left()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_ignores_sigterm_is_killed(tmp_path: Path, rank: int) -> None:
    with family(supervise(), tmp_path, **{f"DUMMY_RANK{rank}": "ignore-term"}) as f:
        f.up(2)
        os.kill(f.parent.pid, signal.SIGTERM)
        code, err = f.end()
        assert code == 0
        assert f"rank {rank} of 2" in err
        assert "is killed" in err
        f.assert_nothing_left()


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    with family(supervise(grace_s=300), tmp_path, DUMMY_RANK0="ignore-term") as f:
        f.up(2)
        os.kill(f.parent.pid, signal.SIGINT)
        until((tmp_path / "term0").exists, "rank 0 to be told")
        os.kill(f.parent.pid, signal.SIGINT)
        assert f.end()[0] == 130
        f.assert_nothing_left()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_ended_too(tmp_path: Path, rank: int) -> None:
    with family(supervise(), tmp_path) as f:
        os.kill(f.up(2)[rank]["pid"], signal.SIGSTOP)
        os.kill(f.parent.pid, signal.SIGINT)
        assert f.end()[0] == 0
        f.assert_nothing_left()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_killed_rank_ends_the_job_and_is_named(tmp_path: Path, rank: int) -> None:
    with family(supervise(3), tmp_path) as f:
        pid = f.up(3)[rank]["pid"]
        os.kill(pid, signal.SIGKILL)
        code, err = f.end()
        assert code == 20
        assert err.splitlines()[-1].startswith(f"error: rank {rank} of 3 (pid {pid} on here) was killed by SIGKILL")
        f.assert_nothing_left()


def test_a_killed_rank_ends_the_job_even_where_another_is_stopped(tmp_path: Path) -> None:
    with family(supervise(3), tmp_path) as f:
        told = f.up(3)
        os.kill(told[2]["pid"], signal.SIGSTOP)
        os.kill(told[1]["pid"], signal.SIGKILL)
        code, err = f.end()
        assert code == 20
        assert "rank 1 of 3" in err.splitlines()[-1]
        f.assert_nothing_left()


def test_what_a_rank_has_to_say_is_the_last_line_and_its_exit_code_the_jobs(tmp_path: Path) -> None:
    with family(supervise(), tmp_path, DUMMY_RANK1="error") as f:
        f.up(2)
        f.go()
        code, err = f.end()
        assert code == 4
        assert err == "error: reshard-model_part-1.pt is cut short; copy it again (rank 1 of 2 on here)\n"
        f.assert_nothing_left()


def test_a_rank_that_lost_its_peer_does_not_bury_what_the_peer_has_to_say(tmp_path: Path) -> None:
    with family(supervise(), tmp_path, DUMMY_RANK0="lose-a-peer", DUMMY_RANK1="error-after-peer") as f:
        f.up(2)
        f.go()
        code, err = f.end()
        assert code == 4
        assert "reshard-model_part-1.pt is cut short" in err.splitlines()[-1]


def test_a_rank_that_lost_a_peer_who_never_ends_speaks_for_the_job(tmp_path: Path) -> None:
    with family(supervise(), tmp_path, DUMMY_RANK0="lose-a-peer") as f:
        f.up(2)
        f.go()
        code, err = f.end()
        assert code == 20
        assert err.splitlines()[-1].startswith("error: rank 1 closed its connection (rank 0 of 2")
        f.assert_nothing_left()


def test_a_crash_shows_its_stack_and_names_the_rank(tmp_path: Path) -> None:
    with family(supervise(), tmp_path, DUMMY_RANK1="crash") as f:
        f.up(2)
        f.go()
        code, err = f.end()
        assert code == 1
        assert "ZeroDivisionError: nobody foresaw this" in err
        assert "ended with exit code 1; its stack is above" in err.splitlines()[-1]
        f.assert_nothing_left()


def test_an_exit_code_that_is_not_ours_becomes_rank_failed(tmp_path: Path) -> None:
    with family(supervise(), tmp_path, DUMMY_RANK0="exit-77") as f:
        f.up(2)
        f.go()
        code, err = f.end()
        assert code == 20
        assert "rank 0 of 2" in err
        assert "ended with exit code 77" in err


@pytest.mark.parametrize("how", ["done", "done-with-thread"])
def test_rank_0_may_end_the_service_and_no_thread_holds_it(tmp_path: Path, how: str) -> None:
    with family(supervise(), tmp_path, DUMMY_RANK0=how) as f:
        f.up(2)
        f.go()
        assert f.end() == (0, "")
        f.assert_nothing_left()


def test_a_follower_that_leaves_alone_is_a_failure(tmp_path: Path) -> None:
    with family(supervise(), tmp_path, DUMMY_RANK1="done") as f:
        f.up(2)
        f.go()
        code, err = f.end()
        assert code == 20
        assert "rank 1 of 2" in err.splitlines()[-1]
        assert "ended with exit code 0" in err.splitlines()[-1]
        f.assert_nothing_left()


def kill_parent(f: Family) -> None:
    os.kill(f.parent.pid, signal.SIGKILL)


def kill_parent_of_deaf_ranks(f: Family) -> None:
    for pid in f.pids():
        os.kill(pid, signal.SIGSTOP)
    kill_parent(f)


@pytest.mark.parametrize("kill", [kill_parent, kill_parent_of_deaf_ranks])
def test_no_orphan_outlives_a_killed_supervisor(tmp_path: Path, kill: Callable[[Family], None]) -> None:
    with family(supervise(3), tmp_path, DUMMY_RANK1="ignore-term") as f:
        f.up(3)
        kill(f)
        f.parent.wait(timeout=10)
        f.assert_nothing_left()


def test_a_rank_started_by_hand_says_who_starts_it() -> None:
    argv = [sys.executable, "-m", "metaseq_api.launch.child", "support.dummy_host"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0
    assert done.stderr == "metaseq-api: error: this module is started by metaseq-api-local, not by hand\n"


def test_a_rank_whose_supervisor_is_gone_before_it_begins_does_not_begin(tmp_path: Path) -> None:
    rank = RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1, node="here", init="file:///nowhere")
    stranger = os.getppid()
    order = Order(
        settings=Settings(), rank=rank, terms=Terms(), listen_fd=None, words_fd=2, parent_pid=stranger, verbose=False
    )
    argv = [sys.executable, "-m", "metaseq_api.launch.child", "support.dummy_host"]
    env = clean_env(DUMMY_DIR=str(tmp_path), PYTHONPATH=str(TESTS))
    done = subprocess.run(argv, input=order.to_json(), env=env, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert not (tmp_path / "rank0.json").exists()
