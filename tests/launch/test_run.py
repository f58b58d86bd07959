"""Real jobs under a real mpirun: how they end, what they leave behind, and that they go on from there.

All runs are of inputs/tinymoe.h5 on seeded prompts of very different lengths; what comes out in the end is compared,
bit for bit, with one run on one rank that nothing disturbed.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from ranks import Ended, Running, alive, mpirun_line, program, run
from small_jobs import (
    SEQUENCES,
    Tokens,
    causes,
    commits,
    finished,
    moempi,
    mpirun_of,
    rank_pids,
    wait_for_commit,
    wait_until,
    write_job,
)

from moempi.files.init_weights import init_weights
from moempi.files.inputs import Prompts, write_inputs
from moempi.files.outputs import read_outputs
from moempi.files.parts import parts_folder
from moempi.files.placement import write_placement
from moempi.files.trace import write_part
from moempi.launch import session_members
from moempi.planning.placement import Placement
from moempi.recorder import Recorder

SEED = int(os.environ.get("MOEMPI_TEST_SEED", random.SystemRandom().randrange(10**6)))
# Seconds from the error to the end of all ranks: one or two, and many more where the machine stalls.
PROMISE = 30.0

TWO_EXPERTS = {
    "model_type": "qwen3_moe",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_experts": 2,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 5000,
    "eos_token_id": 0,
}

@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """What the job comes to on one rank, without mpirun."""
    print(f"seed {SEED} (MOEMPI_TEST_SEED)")
    job = write_job(tmp_path_factory.mktemp("undisturbed"))
    ended = run(moempi("run", job, "--set", "run.capacity=40"), timeout=120)
    assert ended.code == 0, ended.err
    table = finished(job.parent / "out.h5")
    assert len(table) == SEQUENCES
    return table


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_job(tmp_path)


# ---------------------------------------------------------------- exit codes


def test_a_whole_run_then_an_existing_output_then_nothing_left_to_do(job: Path, undisturbed: Tokens) -> None:
    done = run(moempi("run", job, "-n", "4", "--json"), timeout=120)
    assert done.code == 0, done.err
    outcome = json.loads(done.out)
    assert outcome["ranks"] == 4 and outcome["finished"] == SEQUENCES and outcome["mode"] == "exact"
    assert finished(job.parent / "out.h5") == undisturbed
    assert sorted(p.name for p in job.parent.iterdir()) == ["job.toml", "out.h5", "out.trace.h5", "prompts.h5"]

    again = run(moempi("run", job, "-n", "2"), timeout=60)
    assert again.code == 2 and "exists already" in again.err and "--overwrite" in again.err
    # As if killed between the merge of the output and that of the trace.
    output, trace = job.parent / "out.h5", job.parent / "out.trace.h5"
    trace.unlink()
    notes = Recorder("summary", 0, 1, 1, 2, 2)
    notes.start()
    write_part(trace, 0, 1, notes.take(), {**notes.describe(), "mode": "exact"})
    rest = run(moempi("run", job, "--resume"), timeout=60)
    assert rest.code == 0 and "nothing to do" in rest.out, rest.err
    assert trace.exists() and not parts_folder(trace).exists()

    # The trace is worth as much as the output: it is not lost because the output was moved away.
    before = trace.read_bytes()
    output.rename(job.parent / "kept.h5")
    again = run(moempi("run", job), timeout=60)
    assert again.code == 2 and f"{trace}: exists already; give --overwrite" in again.err, again.err
    assert trace.read_bytes() == before and not output.exists()
    for how in ((), ("--overwrite",)):
        done = run(moempi("run", job, *how, "--set", "trace.level=off"), timeout=60)
        assert done.code == 0 and finished(output) == undisturbed and trace.read_bytes() == before, done.err


@pytest.mark.parametrize(
    ("code", "override", "said"),
    [
        (2, "run.capcity=3", "did you mean `run.capacity`?"),
        (3, "model.weights=no.h5", "no.h5: there is no such file"),
        (4, "memory.limit=1 MiB", "memory.limit"),
    ],
)
def test_a_job_that_cannot_run_is_one_message(job: Path, code: int, override: str, said: str) -> None:
    """Under mpirun, where every rank finds the error."""
    ended = run(mpirun_line(3, moempi("run", job, "--set", override)), timeout=60)
    assert ended.code == code, ended.err
    assert len(causes(ended.err)) == 1 and said in ended.err, ended.err
    assert "Traceback" not in ended.err
    assert not (job.parent / "out.h5.parts").exists() and not (job.parent / "out.h5.lock").exists()


# ---------------------------------------------------------------- told to stop, then going on


def test_interrupted_then_terminated_then_finished_on_four_three_and_two_ranks(job: Path, undisturbed: Tokens) -> None:
    with Running(moempi("run", job, "-n", "4")) as running:
        wait_for_commit(running, job)
        running.signal(signal.SIGINT)
        interrupted = running.wait()
    check_drained(interrupted, 130, job, undisturbed)

    with Running(moempi("run", job, "-n", "3", "--resume")) as running:
        wait_for_commit(running, job, more_than=commits(job))
        running.signal(signal.SIGTERM)
        terminated = running.wait()
    check_drained(terminated, 75, job, undisturbed)

    # Sequences that were half generated go on from where they stood.
    begun = len(read_outputs(job.parent / "out.h5"))
    assert begun > len(finished(job.parent / "out.h5")), "no sequence was under way"
    ended = run(moempi("run", job, "-n", "2", "--resume"), timeout=120)
    assert ended.code == 0, ended.err
    assert finished(job.parent / "out.h5") == undisturbed


def check_drained(ended: Ended, code: int, job: Path, undisturbed: Tokens) -> None:
    assert ended.code == code, ended.err
    assert "stopped early and committed; go on with --resume" in ended.out
    assert not causes(ended.err) and "Traceback" not in ended.err, ended.err
    kept = finished(job.parent / "out.h5")
    assert 0 < len(kept) < SEQUENCES
    assert all(undisturbed[name] == values for name, values in kept.items())
    assert not (job.parent / "out.h5.lock").exists()


def test_a_run_that_is_not_to_be_resumed_or_overwritten_is_refused(job: Path) -> None:
    # One process without mpirun, told to stop by a scheduler, and by a terminal that closes.
    for number in (signal.SIGTERM, signal.SIGHUP):
        with Running(moempi("run", job, "--resume")) as running:
            wait_for_commit(running, job, more_than=commits(job))
            running.signal(number)
            assert running.wait().code == 75
    refused = run(moempi("run", job))
    assert refused.code == 2 and "--resume" in refused.err and "--overwrite" in refused.err
    other = run(moempi("run", job, "--resume", "--set", "generate.stop_at_eos=true"))
    assert other.code == 2, other.err
    assert re.search(r"generate\.stop_at_eos: was 'False', is now 'True'", other.err)


# ---------------------------------------------------------------- killed


def test_after_kill_9_of_mpirun_all_commits_are_readable_and_the_run_goes_on(tmp_path: Path) -> None:
    """The ranks notice only a second or so after mpirun's end, and go on until then: there is work for far longer."""
    (tmp_path / "whole").mkdir()
    whole, job = write_job(tmp_path / "whole", longest="800"), write_job(tmp_path, longest="800")
    assert run(moempi("run", whole, "--set", "run.capacity=40"), timeout=120).code == 0
    undisturbed = finished(whole.with_name("out.h5"))
    chance = random.Random(SEED)
    print(f"seed {SEED} (MOEMPI_TEST_SEED)")
    kept: Tokens = {}
    for ranks in (3, 2, 3):
        with Running(mpirun_line(ranks, moempi("run", job, "--resume"))) as running:
            wait_for_commit(running, job, more_than=commits(job))
            time.sleep(chance.uniform(0, 0.3))
            members = session_members(running.process.pid)
            running.signal(signal.SIGKILL)
            assert running.wait().code == -signal.SIGKILL
            wait_until(lambda: not alive(members), "the end of all ranks", 20)  # noqa: B023
        now = finished(job.parent / "out.h5")
        assert kept.items() <= now.items(), "a committed sequence is lost or another one"
        assert all(undisturbed[name] == values for name, values in now.items())
        kept = now
        if len(kept) > SEQUENCES // 2:  # the ranks' end took that long: too little may be left for a commit and a kill
            break
    assert kept
    ended = run(moempi("run", job, "-n", "2", "--resume"), timeout=120)
    assert ended.code == 0, ended.err
    assert finished(job.parent / "out.h5") == undisturbed


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_the_job_and_commits_stay(job: Path, undisturbed: Tokens, victim: int) -> None:
    with Running(moempi("run", job, "-n", "3")) as running:
        wait_for_commit(running, job)
        pids = rank_pids(mpirun_of(running))
        os.kill(pids[victim], signal.SIGKILL)
        begin = time.monotonic()
        ended = running.wait()
        assert time.monotonic() - begin < PROMISE
        assert ended.code == 137 and "ended by signal 9 (SIGKILL)" in ended.err, ended.err
        wait_until(lambda: not alive(list(pids.values())), "the end of all ranks", 10)
    kept = finished(job.parent / "out.h5")
    assert kept and all(undisturbed[name] == values for name, values in kept.items())


# ---------------------------------------------------------------- one rank fails, or answers no more


@pytest.mark.parametrize("rank", [0, 3])
def test_an_exception_on_a_rank_ends_all_with_its_cause_on_top(job: Path, rank: int) -> None:
    with Running(mpirun_line(4, program("hinders", str(job), "raises", str(rank)))) as running:
        failed = float(running.wait_for(r"failing at ([\d.]+);")[0])
        ended = running.wait()
        assert time.monotonic() - failed < PROMISE
    assert ended.code == 1, ended.err
    assert len(causes(ended.err)) == 1, ended.err
    first = ended.err.lstrip().splitlines()[0]
    assert first.startswith(f"moempi: error: rank {rank} (")
    assert first.endswith("ZeroDivisionError: the expert divides by zero")
    assert ended.err.count("Traceback") == 1


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_lost_answer_is_a_stall_that_says_who_waits_for_whom(tmp_path: Path, microbatches: int) -> None:
    """With two microbatches the rank that waits has other work to do all the time."""
    job = write_job(tmp_path, stall_timeout="3.0", microbatches=str(microbatches))
    with Running(mpirun_line(2, program("hinders", str(job), "drops", "0"))) as running:
        layer, begin = running.wait_for(r"dropped layer (\d+) at ([\d.]+);")[0]
        ended = running.wait()
        assert time.monotonic() - float(begin) < 3.0 + PROMISE
    assert ended.code == 76, ended.err
    assert len(causes(ended.err)) == 1 and "Traceback" not in ended.err, ended.err
    assert f"no answer from rank 0: layer {layer}, microbatch 0, " in causes(ended.err)[0]
    assert "engine.stall_timeout = 3 s" in causes(ended.err)[0]


@pytest.mark.parametrize("victim", [0, 3])
def test_a_stopped_rank_is_a_stall(tmp_path: Path, victim: int) -> None:
    job = write_job(tmp_path, stall_timeout="5.0")
    with Running(moempi("run", job, "-n", "4")) as running:
        wait_for_commit(running, job)
        pids = rank_pids(mpirun_of(running))
        os.kill(pids[victim], signal.SIGSTOP)
        begin = time.monotonic()
        ended = running.wait()
        assert time.monotonic() - begin < 5.0 + PROMISE
        wait_until(lambda: not alive(list(pids.values())), "the end of all ranks", 10)
    assert ended.code == 76, ended.err
    assert len(causes(ended.err)) == 1, ended.err
    who = rf"rank (\d) \(.*no answer from rank {victim}: layer \d+, microbatch \d+, "
    found = re.search(who, causes(ended.err)[0])
    assert found and int(found[1]) != victim, causes(ended.err)
    assert finished(job.parent / "out.h5")


@pytest.mark.parametrize("route", ["leader", "rail"])
def test_a_stopped_relay_is_a_stall_that_names_it(tmp_path: Path, route: str) -> None:
    job = write_job(tmp_path, stall_timeout="5.0")
    pretend = ["--set", f"exchange.route={route}", "--set", "exchange.ranks_per_node=2"]
    with Running(moempi("run", job, "-n", "4", *pretend)) as running:
        wait_for_commit(running, job)
        pids = rank_pids(mpirun_of(running))
        os.kill(pids[2], signal.SIGSTOP)
        ended = running.wait()
        wait_until(lambda: not alive(list(pids.values())), "the end of all ranks", 10)
    assert ended.code == 76, ended.err
    assert len(causes(ended.err)) == 1, ended.err
    # Its peers miss it, or those whose rows another relay has passed on to it; not one that is only home of the rows.
    named = r"no answer from rank (2\b|\d, relay of slots on [\d, ]*\b2\b|\d, by way of rank 2\b)"
    assert re.search(named, causes(ended.err)[0]), causes(ended.err)


@pytest.mark.parametrize("lockstep", ["false", "true"])
@pytest.mark.parametrize("victim", [0, 3])
def test_a_stopped_rank_without_experts_is_missed(tmp_path: Path, victim: int, lockstep: str) -> None:
    """No dispatch goes unanswered: the two experts are on ranks 1 and 2."""
    job = write_job(tmp_path, stall_timeout="5.0")
    slots = {"layer": [0, 0], "expert": [0, 1], "replica": [0, 0], "lo": [0, 0], "hi": [1, 1], "rank": [1, 2]}
    write_placement(tmp_path / "placement.h5", Placement.from_slots(4, 2, 1, (0,), slots))
    (tmp_path / "config.json").write_text(json.dumps(TWO_EXPERTS))
    init_weights(tmp_path / "config.json", tmp_path / "weights.h5", seed=1, dtype="float32")
    new = np.array([1] * 8 + [4000] * 8, dtype=np.int32)  # some to commit early, the rest to be at it for long
    prompts = Prompts([f"p{i}" for i in range(16)], [np.array([1, 2], dtype=np.int32)] * 16, None, new)
    write_inputs(tmp_path / "prompts.h5", prompts, {})
    options = [f"model.weights={tmp_path / 'weights.h5'}", "placement.strategy=file"]
    options += [f"placement.file={tmp_path / 'placement.h5'}"]
    options += [f"exchange.lockstep={lockstep}", "run.capacity=4"]
    settings = [word for option in options for word in ("--set", option)]
    with Running(moempi("run", job, "-n", "4", *settings)) as running:
        wait_for_commit(running, job)
        pids = rank_pids(mpirun_of(running))
        os.kill(pids[victim], signal.SIGSTOP)
        begin = time.monotonic()
        ended = running.wait()
        assert time.monotonic() - begin < 5.0 + PROMISE
        wait_until(lambda: not alive(list(pids.values())), "the end of all ranks", 10)
    assert ended.code == 76, ended.err
    # Usually one: the others are ended before they have noticed.
    missed = [f"no sign of life from rank {victim} for " in cause for cause in causes(ended.err)]
    assert 0 < len(missed) < 4 and all(missed), ended.err
