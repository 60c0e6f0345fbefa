"""Who started us, read from the environment alone. The variables are those a SLURM 22.05 and torchrun 2.13 set."""

from __future__ import annotations

import pytest

from metaseq_api.errors import ResourceError, SettingsError
from metaseq_api.launch.rendezvous import (
    Job,
    Placement,
    RankInfo,
    detect,
    device_index,
    expand_nodes,
    expand_tasks,
    job_of,
    outside_of_job,
    visible_gpus,
)

BATCH = {
    "SLURM_JOB_ID": "17",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURMD_NODENAME": "n1",
}
STEP = BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def task(procid: int, localid: int, nodeid: int, **more: str) -> dict[str, str]:
    ids = {"SLURM_PROCID": str(procid), "SLURM_LOCALID": str(localid), "SLURM_NODEID": str(nodeid)}
    return STEP | ids | {"SLURMD_NODENAME": f"n{nodeid + 1}"} | more


def one_per_node(nodeid: int, num_nodes: int) -> dict[str, str]:
    n = str(num_nodes)
    return task(nodeid, 0, nodeid, SLURM_STEP_NUM_TASKS=n, SLURM_STEP_NUM_NODES=n, SLURM_STEP_TASKS_PER_NODE="1")


def test_a_shell_starts_us_alone() -> None:
    assert detect({}).kind == "alone"
    assert detect({}).has_rank_0


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290", "batch"])
def test_a_batch_script_and_an_salloc_shell_start_us_alone(step: str | None) -> None:
    assert detect(BATCH | ({"SLURM_STEP_ID": step} if step else {})).kind == "alone"


def test_a_task_per_rank_is_that_rank() -> None:
    placement = detect(task(3, 1, 1))
    assert placement.kind == "rank"
    assert placement.rank == RankInfo(
        rank=3, world_size=4, local_rank=1, local_world_size=2, node="n2", init="step://n1/17.0.0"
    )


def test_all_tasks_of_a_step_meet_at_one_address_and_two_steps_at_two() -> None:
    def init(env: dict[str, str]) -> str:
        rank = detect(env).rank
        assert rank
        return rank.init

    assert len({init(task(p, p % 2, p // 2)) for p in range(4)}) == 1
    others = [{"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "18"}, {"SLURM_RESTART_COUNT": "1"}]
    assert len({init(task(0, 0, 0, **more)) for more in ({}, *others)}) == 4


def test_neighbours_share_a_node_even_where_slurm_deals_its_tasks_out_in_turns() -> None:
    dealt = [detect(task(procid, procid // 2, procid % 2)).rank for procid in range(4)]
    assert [(r.rank, r.local_rank, r.node) for r in dealt if r] == [
        (0, 0, "n1"),
        (2, 0, "n2"),
        (1, 1, "n1"),
        (3, 1, "n2"),
    ]


def test_the_job_is_read_also_in_a_batch_script_and_is_none_in_a_shell() -> None:
    assert job_of({}) is None
    assert job_of(BATCH) == Job(job_id="17")
    again = job_of(BATCH | {"SLURM_RESTART_COUNT": "2", "SLURM_JOB_END_TIME": "1795186366"})
    assert again == Job(job_id="17", restarts=2, end_time=1795186366.0)


def test_an_element_of_a_job_array_is_not_taken_for_the_array() -> None:
    """The last element to begin has the number of the whole array."""
    element = BATCH | {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}
    found = job_of(element)
    assert found
    assert found.job_id == "17_2"


def test_a_job_submitted_from_a_job_has_the_login_shells_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    added = STEP | {"SRUN_CPUS_PER_TASK": "4", "CUDA_VISIBLE_DEVICES": "0", "METASEQ_API_KEY": "a-key-of-a-service"}
    for name, value in added.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("METASEQ_API_REGISTRY", "/shared/services")
    found = outside_of_job()
    assert not set(found) & set(added)
    assert (found["SLURM_CONF"], found["METASEQ_API_REGISTRY"]) == ("/etc/slurm.conf", "/shared/services")


def test_master_addr_and_port_override_what_slurm_says() -> None:
    rank = detect(task(0, 0, 0, MASTER_ADDR="fe80::1", MASTER_PORT="1234")).rank
    assert rank
    assert rank.init == "tcp://[fe80::1]:1234"


def test_the_step_counts_where_it_is_smaller_than_the_job() -> None:
    env = task(1, 1, 0, SLURM_STEP_NUM_NODES="1", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="2")
    rank = detect(env | {"SLURM_STEP_NODELIST": "n2"}).rank
    assert rank
    assert (rank.rank, rank.world_size, rank.local_world_size) == (1, 2, 2)
    assert rank.init == "step://127.0.0.1/17.0.0"


def test_uneven_tasks_are_counted_per_node() -> None:
    env = task(2, 0, 1, SLURM_STEP_NUM_TASKS="3", SLURM_STEP_TASKS_PER_NODE="2,1")
    rank = detect(env).rank
    assert rank
    assert (rank.local_rank, rank.local_world_size, rank.world_size) == (0, 1, 3)


def test_one_task_per_node_starts_the_ranks_of_its_node() -> None:
    second = detect(one_per_node(1, 2))
    assert (second.kind, second.has_rank_0) == ("node", False)
    ranks = second.local_ranks(4, "file:///tmp/x/store")
    assert [(r.rank, r.local_rank, r.local_world_size, r.world_size, r.node) for r in ranks] == [
        (2, 0, 2, 4, "n2"),
        (3, 1, 2, 4, "n2"),
    ]
    assert {r.init for r in ranks} == {"step://n1/17.0.0"}


def test_the_ranks_of_one_node_meet_in_a_file_and_need_no_port() -> None:
    placement = detect(one_per_node(0, 1))
    assert placement.kind == "node"
    assert {r.init for r in placement.local_ranks(2, "file:///tmp/x/store")} == {"file:///tmp/x/store"}


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_ranks_that_do_not_spread_over_the_nodes_are_refused(num_ranks: int) -> None:
    with pytest.raises(SettingsError, match=f"{num_ranks} ranks do not spread evenly over the 2 nodes"):
        detect(one_per_node(0, 2)).local_ranks(num_ranks, "file:///tmp/x/store")


def test_a_torchrun_worker_is_its_rank_and_meets_at_the_agent() -> None:
    placement = detect(TORCHRUN)
    assert placement.kind == "rank"
    assert placement.under_agent
    assert placement.rank
    assert placement.rank.init == "agent://n1:29500"
    assert (placement.rank.rank, placement.rank.local_rank, placement.rank.local_world_size) == (3, 1, 2)


def test_torchrun_inside_srun_counts_and_a_stray_rank_inside_srun_does_not() -> None:
    inside = detect(one_per_node(0, 2) | TORCHRUN)
    assert (inside.kind, inside.under_agent) == ("rank", True)
    stray = detect(task(2, 0, 1, RANK="0", WORLD_SIZE="4")).rank
    assert stray
    assert stray.rank == 2


def test_half_of_torchruns_variables_are_refused_by_name() -> None:
    with pytest.raises(SettingsError, match="LOCAL_RANK, LOCAL_WORLD_SIZE not"):
        detect({k: v for k, v in TORCHRUN.items() if not k.startswith("LOCAL")})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_NODEID", "x"),
        ("SLURM_STEP_NUM_TASKS", "-3"),
        ("SLURM_STEP_TASKS_PER_NODE", "2;3"),
        ("SLURM_NODEID", "7"),
    ],
)
def test_an_unusable_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name.removeprefix("SLURM_").removeprefix("STEP_")):
        detect(task(0, 0, 0) | {name: value})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[1-2,7],other", ["n1", "n2", "n7", "other"]),
        ("a-b[08-11].site", ["a-b08.site", "a-b09.site", "a-b10.site", "a-b11.site"]),
        ("r[1-2]n[0-1]", ["r1n0", "r1n1", "r2n0", "r2n1"]),
        ("z,a[5]", ["z", "a5"]),
    ],
)
def test_a_node_list_expands_in_slurms_order(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


@pytest.mark.parametrize("text", ["", "n[1-", "n[3-1]", "n[a]", "n[]", "a,,b", "a b", "n1]"])
def test_an_unreadable_node_list_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="MASTER_ADDR"):
        expand_nodes(text)


def test_tasks_per_node_expand() -> None:
    assert expand_tasks("2(x3),1") == [2, 2, 2, 1]


def test_a_rank_takes_its_own_gpu_whether_it_sees_all_or_only_that_one() -> None:
    assert [device_index(r, 4) for r in range(4)] == [0, 1, 2, 3]
    assert [device_index(r, 1) for r in range(4)] == [0, 0, 0, 0]
    with pytest.raises(ResourceError, match="shows 2 GPUs"):
        device_index(2, 2)


@pytest.mark.parametrize(
    ("listed", "count"),
    [(None, 2), ("0", 1), ("0,1", 2), ("0,1,2", 2), ("", 0), ("-1", 0), ("1,-1,0", 1), ("MIG-a,MIG-b,MIG-c", 3)],
)
def test_visible_gpus_are_those_listed_and_present(tmp_path, listed: str | None, count: int) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}, tmp_path) == count


def test_a_machine_without_gpus_shows_none_whatever_is_listed(tmp_path) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path) == 0


def test_a_placement_alone_holds_every_rank() -> None:
    ranks = Placement(kind="alone", node="here").local_ranks(3, "file:///tmp/x/store")
    assert [(r.rank, r.local_rank, r.local_world_size) for r in ranks] == [(0, 0, 3), (1, 1, 3), (2, 2, 3)]


@pytest.mark.parametrize("port", ["0", "65536", "x"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(SettingsError, match="MASTER_PORT"):
        detect(TORCHRUN | {"MASTER_PORT": port})
