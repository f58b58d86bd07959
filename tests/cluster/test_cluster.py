"""Jobs on four nodes: the nodes are seen, the bits are those of one machine, the links carry what is predicted, and a
rank that dies or falls silent on another node ends the job.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import NODES
from emulation import Cluster, Counters, missing
from ranks import Ended, Running, alive, run

from moempi import analysis
from moempi.exchange.nodes import Nodes
from moempi.exchange.predict import RowSizes, messages_from_routes
from moempi.exchange.predict_relays import relayed_from_routes
from moempi.exchange.relay_plan import RELAYED, Ways
from moempi.exchange.slots import layer_tables
from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, write_inputs
from moempi.files.links import read_links
from moempi.files.outputs import Outputs, read_outputs
from moempi.job import load_job
from moempi.launch import this_program
from moempi.prepare import look

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(150)]

TINYMOE = Path(__file__).parents[2] / "inputs" / "tinymoe.h5"
PER_NODE = 2
RANKS = NODES * PER_NODE
LIMIT = 60.0  # seconds of a launch
PROMISE = 30.0  # seconds from the error to the end of all ranks: one or two, and more where the machine stalls
CLOSED = 14  # Open MPI's exit code where a peer sees the end of a TCP connection before mpirun hears of a dead rank

# Bytes that a link may carry besides the rows: see `test_links_carry_what_is_predicted`.
HEADERS = 106
ACKNOWLEDGEMENT = 66
START = 30_000


# Every token goes to all experts, one on each rank: two rows for every other node, or one by relay.
TO_ALL = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 512,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_experts": RANKS,
    "num_experts_per_tok": RANKS,
    "max_position_embeddings": 256,
}


def write_job(folder: Path, new_tokens: int, stall_timeout: float = 60.0, weights: Path = TINYMOE) -> Path:
    """24 prompts of 1 to 40 tokens, and a job that takes them through a model."""
    chance = np.random.default_rng(7)
    tokens = [chance.integers(5, 500, n, dtype=np.int32) for n in chance.integers(1, 40, 24)]
    new = np.full(24, new_tokens, dtype=np.int32)
    write_inputs(folder / "prompts.h5", Prompts([f"p{i}" for i in range(24)], tokens, None, new), {})
    (folder / "job.toml").write_text(
        f"""
        model.weights = "{weights}"
        input.file = "prompts.h5"
        output = {{ file = "out.h5", commit_every = 0.2 }}
        generate.stop_at_eos = false
        run = {{ capacity = 3, threads = 1 }}
        engine.stall_timeout = {stall_timeout}
        progress.every = 0.5
        trace.level = "routes"
        """
    )
    return folder / "job.toml"


class Finished(NamedTuple):
    """A job that ran on the cluster by one route, and what each node's link carried meanwhile."""

    job: Path
    route: str
    carried: list[Counters]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "config.json").write_text(json.dumps(TO_ALL))
    init_weights(folder / "config.json", folder / "weights.h5", seed=3, dtype="float32")
    return folder / "weights.h5"


@pytest.fixture(scope="module")
def alone(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """The same job on one machine."""
    job = write_job(tmp_path_factory.mktemp("alone"), new_tokens=12, weights=weights)
    ended = run(this_program("run", str(job), "--set", "run.capacity=24"), timeout=LIMIT)
    assert ended.code == 0, ended.err
    return read_outputs(job.parent / "out.h5")


@pytest.fixture(scope="module", params=["direct", *RELAYED])
def finished(
    cluster: Cluster, weights: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Finished:
    job = write_job(tmp_path_factory.mktemp("cluster"), new_tokens=12, weights=weights)
    before = cluster.counters()
    command = this_program("run", str(job), "--json", "--set", f"exchange.route={request.param}")
    done = cluster.run(command, PER_NODE, LIMIT)
    assert done.code == 0, done.err
    outcome = json.loads(done.out)
    assert (outcome["ranks"], outcome["nodes"], outcome["route"]) == (RANKS, NODES, request.param)
    carried = [new - old for new, old in zip(cluster.counters(), before, strict=True)]
    return Finished(job, request.param, carried)


def test_mpi_sees_the_nodes(finished: Finished, cluster: Cluster) -> None:
    ranks = analysis.load(finished.job.parent / "out.trace.h5").ranks
    assert [rank["node"] for rank in ranks] == [rank // PER_NODE for rank in range(RANKS)]
    assert [rank["host"] for rank in ranks] == [cluster.names[rank // PER_NODE] for rank in range(RANKS)]


def test_the_bits_are_those_of_one_machine(finished: Finished, alone: Outputs) -> None:
    found = read_outputs(finished.job.parent / "out.h5")
    assert found.ids == alone.ids and len(found) == 24
    for name in ("offsets", "tokens", "logprobs", "finish_reason"):
        assert getattr(found, name).tobytes() == getattr(alone, name).tobytes(), name


def test_nodes_of_one_kernel_have_one_clock(finished: Finished) -> None:
    clocks = analysis.load(finished.job.parent / "out.trace.h5").clocks
    assert clocks["offset"].tolist() == clocks["error"].tolist() == [0] * RANKS


def test_links_carry_what_is_predicted(finished: Finished) -> None:
    """The rows that the routes say, and no more besides than what the protocols add to them. That is at most

    - HEADERS of a message: 66 bytes of Ethernet, IP and TCP (with time stamps), up to 40 of MPI;
    - an ACKNOWLEDGEMENT of each message in the other direction, a packet with headers alone;
    - START for each rank of the job: connections, MPI's start, job and prompts, completions, signs of life.

    Rows sent twice would break the bound. By relay a token crosses to a node once, and the links carry less than the
    rows alone of the direct route.
    """
    rows, messages = predicted(finished, finished.route)
    direct, _ = predicted(finished, "direct")
    for node, carried in enumerate(finished.carried):
        out, back = messages[node].sum(), messages[:, node].sum()
        sent = HEADERS * out + ACKNOWLEDGEMENT * back + START * RANKS
        received = HEADERS * back + ACKNOWLEDGEMENT * out + START * RANKS
        assert 0 < rows[node].sum() < carried.sent < rows[node].sum() + sent, (node, out, back)
        assert 0 < rows[:, node].sum() < carried.received < rows[:, node].sum() + received, (node, out, back)
        assert sent < rows[node].sum(), "a bound that lets everything pass"
        if finished.route in RELAYED:
            assert carried.sent < direct[node].sum() and carried.received < direct[:, node].sum()


def predicted(finished: Finished, route: str) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and messages from node to node by a route, int64 [nodes, nodes], 0 within a node.

    Both are pure functions of the routes; but how many parcels share a message of a relay is as the ranks counted it.
    """
    nodes = Nodes(tuple(rank // PER_NODE for rank in range(RANKS)))
    shape = look(load_job(finished.job), RANKS, nodes).shape
    trace = analysis.load(finished.job.parent / "out.trace.h5")
    tables = layer_tables(shape.layout.placement)
    sizes = RowSizes(shape.config.d_model, shape.dtype.itemsize, shape.layout.piece_rows)
    if route == "direct":
        found = counted = messages_from_routes(trace.routes, tables, sizes)
    else:
        found = relayed_from_routes(trace.routes, tables, sizes, Ways(route, nodes), fast=False)
        counted = trace.traffic
    return between_nodes(found, "bytes", nodes), between_nodes(counted, "messages", nodes)


def between_nodes(links: Mapping[str, np.ndarray], column: str, nodes: Nodes) -> np.ndarray:
    """Totals of a column from node to node, int64 [nodes, nodes], 0 within a node."""
    of, table = np.array(nodes.of), np.zeros((NODES, NODES), dtype=np.int64)
    np.add.at(table, (of[links["source"]], of[links["destination"]]), links[column])
    np.fill_diagonal(table, 0)
    return table


# ---------------------------------------------------------------- links


def test_measured_links_tell_nodes_apart(cluster: Cluster, tmp_path: Path) -> None:
    """No link between nodes is faster than it is limited to; those inside a node are not limited."""
    command = this_program("bench", "links", str(tmp_path / "links.h5"), "--largest", "1 MiB", "--repeats", "3")
    done = cluster.run(command, PER_NODE, LIMIT)
    assert done.code == 0, done.err
    links = read_links(tmp_path / "links.h5")
    assert links.node.tolist() == [rank // PER_NODE for rank in range(RANKS)]
    assert len(links.source) == RANKS * (RANKS - 1) // 2 and links.between.sum() == 24
    assert "8 ranks on 4 nodes" in done.out
    # 1 Gbit/s, but for what the two ends of a link let pass at once: 64 KB each. Slower is possible on a busy machine.
    assert links.time[links.between, -1].min() > (2**20 - 128_000) / 125e6


# ---------------------------------------------------------------- ends


def test_leaving_a_cluster_ends_what_runs_on_it() -> None:
    if reason := missing():
        pytest.skip(reason)
    with pytest.raises(ZeroDivisionError), Cluster(2, "1gbit") as small:
        left = subprocess.Popen(small.on_node(1, ["sleep", "60"]))
        wait_until(lambda: small.processes(1) == [left.pid], "the process on its node")
        assert left.pid not in small.processes(0)
        raise ZeroDivisionError
    assert left.wait(10) == -signal.SIGKILL


def test_a_launch_that_takes_too_long_is_ended_on_all_nodes(cluster: Cluster) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.run(["sleep", "60"], ranks_per_node=1, timeout=5)
    assert not any(cluster.processes(node) for node in range(NODES))


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGKILL, (137, CLOSED)), (signal.SIGSTOP, (76,))])
def test_a_lost_or_silent_rank_on_another_node_ends_the_job(
    cluster: Cluster, tmp_path: Path, number: int, codes: tuple[int, ...]
) -> None:
    job = write_job(tmp_path, new_tokens=900, stall_timeout=5.0)
    with Running(cluster.line(this_program("run", str(job)), ranks_per_node=1)) as running:
        wait_for_rows(running, job)
        ranks = {rank: pid for node in range(NODES) for rank, pid in ranks_of(cluster, node).items()}
        assert sorted(ranks) == list(range(NODES))
        os.kill(ranks[NODES - 1], number)
        begin = time.monotonic()
        ended = running.wait(LIMIT)
        assert time.monotonic() - begin < PROMISE + (5.0 if number == signal.SIGSTOP else 0.0)
        wait_until(lambda: not alive(list(ranks.values())), "the end of all ranks", 10)
    check_end(ended, codes)


def check_end(ended: Ended, codes: tuple[int, ...]) -> None:
    assert ended.code in codes, ended.err
    if ended.code == 76:
        causes = [line for line in ended.err.splitlines() if "moempi: error:" in line]
        # One a node at most, and usually one in all: the others are ended before they have noticed.
        assert 0 < len(causes) < NODES and all(f" from rank {NODES - 1}" in cause for cause in causes), ended.err


def ranks_of(cluster: Cluster, node: int) -> dict[int, int]:
    """Process id of every rank on a node."""
    pids = {}
    for pid in cluster.processes(node):
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        found = re.search(rb"(?:^|\0)OMPI_COMM_WORLD_RANK=(\d+)", environ)
        if found:
            pids[int(found[1])] = pid
    return pids


def wait_for_rows(running: Running, job: Path) -> None:
    """Until the ranks are at work: progress is told."""
    assert running.process.poll() is None
    wait_until(lambda: "tokens/s" in running.out + running.err, "a line of progress")


def wait_until(condition: Callable[[], bool], what: str, timeout: float = LIMIT) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout} s"
        time.sleep(0.02)
