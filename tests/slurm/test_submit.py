"""`moempi submit`, `status` and `cancel` on a real Slurm: names that bite, signals, requeue, and the same bits."""

from __future__ import annotations

import json
from pathlib import Path

from local_slurm import Cluster
from slurm_jobs import LONG, SEQUENCES, Tokens, finished, moempi, text_of, wait_until, write_job

from moempi.files.committed import Committed, committed
from moempi.files.lock import lock_file


def submit(cluster: Cluster, job: Path, *words: str, cwd: Path | None = None) -> dict:
    """Submit on one node, two ranks."""
    nodes = [] if "--nodes" in words else ["--nodes", "1"]
    words = (*nodes, "--tasks-per-node", "2", "--time", "10", *words, "--json")
    return json.loads(moempi(cluster, "submit", job, *words, cwd=cwd))


def released(cluster: Cluster, job_id: str) -> None:
    """A requeued job waits two minutes: let it start in two seconds, with the whole of its time.

    Ending a turn takes back what it was started with, to the second: a node refuses a job that is started again within
    that same second ("Job credential revoked"), and Slurm calls the job FAILED, though nothing of it has run.
    """
    cluster.wait(job_id, "PENDING", timeout=30)
    cluster.command("scontrol", "update", f"JobId={job_id}", "StartTime=now+2", "TimeLimit=10")


def test_stopped_requeued_and_finished_under_names_that_bite(
    cluster: Cluster, tmp_path: Path, long_undisturbed: Tokens
) -> None:
    folder = tmp_path / "a 'b' \"c\" $(touch evil) %j `touch evil` é"
    folder.mkdir()
    job = write_job(folder, LONG, name="$(touch evil) ; touch evil.toml", output="out $(touch evil) '\" %x.h5")
    output = folder / "out $(touch evil) '\" %x.h5"
    words = ["--nodes", "2", "--name", "x 'y' \"z\" $(touch evil)\\ #; touch evil"]
    # Relative to the folder of the user, which is not the one that the job runs in.
    words += ["--set", "trace.file=my trace.h5", "--log-dir", "my logs"]
    told = submit(cluster, job, *words, cwd=tmp_path)
    log = Path(told["log"])
    cluster.wait(told["id"], "RUNNING")
    assert cluster.command("squeue", "-h", "-o", "%j").strip() == "x 'y' \"z\" $(touch evil)\\ #; touch evil"
    seen = json.loads(moempi(cluster, "status", told["id"], "--json"))
    assert seen["state"] == "RUNNING" and seen["job"] == str(job) and seen["output"] == str(output)

    wait_until(lambda: committed(output).finished, lambda: text_of(log))
    cluster.command("scancel", "--signal=USR1", "--batch", told["id"])
    released(cluster, told["id"])
    stopped = committed(output)
    assert 0 < stopped.finished < SEQUENCES and stopped.partial, "stopped too late to tell anything"
    assert f"job {told['id']} is requeued: {stopped}" in text_of(log)
    assert cluster.show(told["id"])["Restarts"] == "1"

    assert cluster.wait(told["id"])["JobState"] == "COMPLETED", text_of(log)
    assert finished(output) == long_undisturbed
    assert f"{SEQUENCES} of {SEQUENCES} sequences finished" in text_of(log)
    assert f"{SEQUENCES} of {SEQUENCES}" in moempi(cluster, "status", job)
    assert (tmp_path / "my trace.h5").exists() and (tmp_path / "my trace.1.h5").exists(), "one for each turn"
    assert text_of(tmp_path / "my logs" / "rank-00003.log").count("rank 3 of 4 is ready") == 2
    # In the job's folder, the submitter's, or wherever the daemons are: nothing was run that a name holds.
    assert not [*tmp_path.rglob("evil*"), *Path.cwd().glob("evil*"), *cluster.folder.rglob("evil*")]


def test_a_cancelled_job_has_committed_and_does_not_come_back(
    cluster: Cluster, tmp_path: Path, long_undisturbed: Tokens
) -> None:
    # `moempi cancel` takes its time to start: there has to be enough to do.
    job, output = write_job(tmp_path, 900), tmp_path / "out.h5"
    told = submit(cluster, job)
    waiting = submit(cluster, job, "--resume", "--after", told["id"])
    assert moempi(cluster, "cancel", waiting["id"]) == f"job {waiting['id']}: cancelled\n"
    assert cluster.show(waiting["id"])["JobState"] == "CANCELLED"
    wait_until(lambda: committed(output).finished, lambda: text_of(Path(told["log"])))
    assert "commits what it has done and ends" in moempi(cluster, "cancel", job)
    ended = cluster.wait(told["id"])
    assert ended["ExitCode"] == "130:0" and ended["Restarts"] == "0", text_of(Path(told["log"]))
    kept = committed(output)
    assert kept.partial and not kept.complete
    # Longer ones of the same prompts: they begin as those of the long job.
    assert all(found[0].startswith(long_undisturbed[name][0]) for name, found in finished(output).items())

    # scancel gives it some seconds to commit, and for a job that comes back from the dead a reason not to.
    again = submit(cluster, job, "--resume")
    log = Path(again["log"])
    wait_until(lock_file(output).exists, lambda: text_of(log))
    cluster.command("scancel", again["id"])
    ended = cluster.wait(again["id"])
    assert ended["JobState"] == "CANCELLED" and ended["Restarts"] == "0", text_of(log)
    assert committed(output).finished >= kept.finished


def test_at_its_time_limit_a_job_that_overwrites_comes_back_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """The signal is Slurm's own: the limit is brought so near that it is due, whenever the work has begun."""
    many = 4000  # far more than a turn gets done
    job, output = write_job(tmp_path, 1, sequences=many), tmp_path / "out.h5"
    moempi(cluster, "run", job, "--quiet", "--set", "run.capacity=100")
    replaced = committed(output)
    assert replaced.complete and replaced.finished == many
    write_job(tmp_path, 60, sequences=many)
    told = submit(cluster, job, "--overwrite")
    log = Path(told["log"])
    wait_until(lambda: not output.exists() and committed(output).finished, lambda: text_of(log))

    gone = elapsed(cluster, told["id"])
    # A minute or two from now. Slurm looks every 30 s, and sends the signal 120 s before the end (and 30 s early).
    cluster.command("scontrol", "update", f"JobId={told['id']}", f"TimeLimit={gone // 60 + 2}")
    wait_until(lambda: "requeue" in text_of(log), lambda: text_of(log))
    released(cluster, told["id"])
    stopped = committed(output)
    assert (stopped.finished, stopped.new_tokens) < (replaced.finished, replaced.new_tokens) and stopped.partial
    assert f"job {told['id']} is requeued: {stopped}" in text_of(log)
    kept = finished(output)

    # The second turn overwrites nothing.
    wait_until(lambda: text_of(log).count(" is ready") == 2, lambda: text_of(log))
    moempi(cluster, "cancel", told["id"])
    ended = cluster.wait(told["id"])
    assert (ended["ExitCode"], ended["Restarts"]) == ("130:0", "1"), text_of(log)
    assert "not requeued: it ended with 130" in text_of(log)
    assert committed(output).new_tokens >= stopped.new_tokens and kept.items() <= finished(output).items()


def elapsed(cluster: Cluster, job_id: str) -> int:
    """Seconds since the job started."""
    days, _, time = cluster.show(job_id)["RunTime"].rpartition("-")
    hours, minutes, seconds = map(int, time.split(":"))
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def stopped_before_it_begins(cluster: Cluster, job: Path) -> dict:
    """Submit a job, and tell it to stop until it listens, when no rank has begun yet.

    The shell and Python ignore the signal until moempi listens. It ends a shell that has just begun, and with it the
    job: then once more.
    """
    for _ in range(5):
        told = submit(cluster, job)
        state = cluster.wait(told["id"], "RUNNING")["JobState"]
        while state == "RUNNING" and "stop" not in text_of(Path(told["log"])):
            cluster.command("scancel", "--signal=USR1", "--batch", told["id"], check=False)
            state = cluster.wait(told["id"], "RUNNING", "FAILED")["JobState"]
        if state == "RUNNING" or "stop" in text_of(Path(told["log"])):
            return told
    raise AssertionError("the shell was always quicker to end than to ignore the signal")


def test_a_turn_without_progress_is_the_last(cluster: Cluster, tmp_path: Path) -> None:
    told = stopped_before_it_begins(cluster, write_job(tmp_path, LONG))
    log = Path(told["log"])
    ended = cluster.wait(told["id"])
    assert "not requeued: no sequence and no token was committed in this turn" in text_of(log)
    assert ended["ExitCode"] == "75:0" and ended["Restarts"] == "0"
    assert committed(tmp_path / "out.h5") == Committed()


def test_an_array_of_shards_is_merged_in_input_order(cluster: Cluster, tmp_path: Path, undisturbed: Tokens) -> None:
    job = write_job(tmp_path)
    told = submit(cluster, job, "--array", "2")
    for shard in (0, 1):
        assert cluster.wait(f"{told['id']}_{shard}")["JobState"] == "COMPLETED", text_of(Path(told["log"]))
    rows = [json.loads(line) for line in moempi(cluster, "status", job, "--json").splitlines()]
    assert [row["complete"] for row in rows] == [True, True] and sum(row["sequences"] for row in rows) == SEQUENCES
    moempi(cluster, "outputs", "merge", tmp_path / "out.h5", *reversed(told["outputs"]))
    assert list(finished(tmp_path / "out.h5").items()) == list(undisturbed.items())
    # The merged file is what a run of the whole input would have written.
    assert "nothing to do" in moempi(cluster, "run", job, "--resume")
