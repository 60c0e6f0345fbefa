"""Tasks of one step find each other's port whoever sits at the places where they ask."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

import pytest
from support.processes import TESTS, clean_env

from metaseq_api.errors import RankFailed, ResourceError, SettingsError
from metaseq_api.launch.meeting import NUM_PLACES, Doorman, address_of, find, places, resolved

HERE = "127.0.0.1"
SOON = 10.0


@pytest.fixture
def ports() -> list[int]:
    """Four ports that were free just now."""
    socks = [socket.create_server(("", 0)) for _ in range(4)]
    found = [s.getsockname()[1] for s in socks]
    for s in socks:
        s.close()
    return found


def test_the_places_of_a_step_are_its_own_and_below_those_linux_gives_away() -> None:
    assert places("17.0.0") == places("17.0.0") != places("18.0.0")
    assert len(set(places("17.0.0"))) == NUM_PLACES
    assert all(20000 <= p < 32000 for p in places("4294967295.12.3"))


def test_two_jobs_whose_places_are_the_same_each_find_their_own(ports: list[int]) -> None:
    first, second = Doorman("17.0.0", "a", 1, at=ports), Doorman("18.0.0", "b", 2, at=ports)
    assert (first.port, second.port) == (ports[0], ports[1])
    assert find("18.0.0", HERE, at=ports, patience_s=SOON) == ("b", 2)
    assert find("17.0.0", HERE, at=ports, patience_s=SOON) == ("a", 1)
    first.close()
    second.close()


def test_a_job_that_was_started_again_is_not_taken_for_its_former_self(ports: list[int]) -> None:
    former, now = Doorman("17.0.0", "a", 1, at=ports), Doorman("17.0.1", "a", 2, at=ports)
    assert find("17.0.1", HERE, at=ports, patience_s=SOON) == ("a", 2)
    former.close()
    now.close()


def test_a_stranger_at_the_door_who_talks_or_is_silent_is_passed_by(ports: list[int]) -> None:
    def greet(sock: socket.socket) -> None:
        with sock.accept()[0] as visitor:
            visitor.sendall(b"220 mail.example ESMTP\r\n")

    with (
        socket.create_server(("", ports[0])) as talks,
        socket.create_server(("", ports[1])),
    ):  # the latter never accepts
        thread = threading.Thread(target=greet, args=(talks,))
        thread.start()
        doorman = Doorman("17.0.0", "a", 1, at=ports)
        assert doorman.port == ports[2]
        assert find("17.0.0", HERE, at=ports, patience_s=SOON) == ("a", 1)
        thread.join()
        doorman.close()


def test_who_comes_before_rank_0_waits_for_it(ports: list[int]) -> None:
    found: list[tuple[str, int]] = []
    early = threading.Thread(target=lambda: found.append(find("17.0.0", HERE, at=ports, patience_s=30)))
    early.start()
    doorman = Doorman("17.0.0", "a", 1, at=ports)
    early.join(SOON)
    assert found == [("a", 1)]
    doorman.close()


def test_a_rank_0_that_never_comes_a_node_nobody_knows_and_no_place_left_are_said(ports: list[int]) -> None:
    with pytest.raises(RankFailed, match=r"rank 0 on 127.0.0.1 did not come"):
        find("17.0.0", HERE, at=ports, patience_s=0.2)
    with pytest.raises(SettingsError, match=r"does not know no.such.node.invalid.*MASTER_ADDR"):
        find("17.0.0", "no.such.node.invalid", at=ports)
    with socket.create_server(("", ports[0])), pytest.raises(ResourceError, match=r"all taken.*MASTER_PORT"):
        Doorman("17.0.0", "a", 1, at=ports[:1])


def test_an_interface_has_its_address_or_the_others_are_named() -> None:
    assert address_of("lo") == HERE
    with pytest.raises(SettingsError, match=r"--interface \(INTERFACE\) is ib7.*there are .*lo"):
        address_of("ib7")


def test_an_address_that_is_known_already_is_left_as_it_is() -> None:
    with resolved("agent://n1:29500", 3, None) as found:
        assert found == ("agent://n1:29500", None)


def test_two_jobs_of_the_same_places_on_one_node_each_meet_their_own_ranks() -> None:
    """Real ranks of jobs whose numbers lead to the same ports."""
    jobs = [f"step://{HERE}/1000.0.0", f"step://{HERE}/13000.0.0"]
    assert places("1000.0.0") == places("13000.0.0")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "support.meeting_rank", init, str(rank), str(100 * job + rank)],
            env=clean_env(PYTHONPATH=str(TESTS), OMP_NUM_THREADS="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
        for job, init in enumerate(jobs)
    ]
    said = [p.communicate(timeout=120)[0].split() for p in ranks]
    assert [p.returncode for p in ranks] == [0] * 4
    assert said == [["0"], ["100"], ["0"], ["100"]]  # the least number of each job, and never the other's
