"""Site profiles, what a job asks for, the script's text, and whether a stopped job comes back: all without Slurm."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from moempi.cli.status import status
from moempi.cli.submit import _submit, submit
from moempi.errors import DataError, FitError, JobError
from moempi.files.committed import Committed
from moempi.files.make_inputs import make_inputs
from moempi.job import load_job
from moempi.planning.gpu_memory import HOST
from moempi.planning.memory import RankMemory, trace_bytes
from moempi.prepare import look
from moempi.slurm import requeue, scheduler
from moempi.slurm.binding import hidden_gpus
from moempi.slurm.needs import needs_of
from moempi.slurm.place import Submitted, folder_of, record, submissions
from moempi.slurm.request import Needs, Request, estimate, resolve, tasks_per_node
from moempi.slurm.requeue import Turn, why_not_again
from moempi.slurm.scheduler import State
from moempi.slurm.script import Batch, write_script
from moempi.slurm.site import Site, load_site
from moempi.slurm.times import parse_time, show_time

ROOT = Path(__file__).parents[2]
MIB = 2**20

# ---------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("text", "seconds", "shown"),
    [
        ("90", 5400, "01:30:00"),
        ("1:30", 90, "00:02:00"),
        ("1:30:00", 5400, "01:30:00"),
        ("2-12", 216000, "2-12:00:00"),
        ("2-12:30", 217800, "2-12:30:00"),
        ("0-00:00:59", 59, "00:01:00"),
        ("1-00:00:00", 86400, "1-00:00:00"),
    ],
)
def test_times_are_read_and_shown_as_slurm_does(text: str, seconds: int, shown: str) -> None:
    assert parse_time(text) == seconds and show_time(seconds) == shown


@pytest.mark.parametrize("text", ["", "0", "soon", "1h", "-5", "1-", "1:2:3:4", "1:30:00; rm -rf x", "\uff15"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a time limit"):
        parse_time(text)


# ---------------------------------------------------------------- sites


def site_file(folder: Path, text: str) -> str:
    (folder / "site.toml").write_text(text)
    return str(folder / "site.toml")


def test_a_site_is_found_by_path_by_name_and_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert load_site(None) == Site()
    sites = tmp_path / "moempi" / "sites"
    sites.mkdir(parents=True)
    (sites / "big.toml").write_text('partition = "gpu"\nmax_time = "2-00"\nenv_file = "env.sh"\n')
    (sites / "default.toml").write_text('memory_per_node = "64 GiB"\n')
    big = load_site("big")
    assert (big.partition, big.max_time, big.env_file) == ("gpu", 2 * 86400, sites / "env.sh")
    assert load_site(str(sites / "big.toml")) == big
    assert load_site(None).memory_per_node == 64 * 2**30
    with pytest.raises(JobError, match=r"nowhere.toml: there is no such site profile; there are big, default"):
        load_site("nowhere")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('partion = "x"', "unknown option `partion`; did you mean `partition`?"),
        ("gpu_per_node = 4", "unknown option `gpu_per_node`; did you mean `gpus_per_node`?"),
        ('gpus_per_node = "4"', "`gpus_per_node` = '4': expected a whole number"),
        ("cores_per_rank = 0", "`cores_per_rank` = 0: expected at least 1"),
        ('max_time = "soon"', "`max_time` = 'soon': expected a time limit like"),
        ('sbatch = ["-p x"]', "expected an option of sbatch in one piece"),
        ('sbatch = ["--mail-user=a\\nb"]', "expected an option of sbatch in one piece"),
        ('partition = "a\\nb"', "expected a text of one line"),
        ('launcher = " "', "expected a command"),
        ("= 3", "cannot be read as TOML"),
    ],
)
def test_a_wrong_site_names_file_option_and_what_was_expected(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(JobError) as refused:
        load_site(site_file(tmp_path, text))
    assert str(refused.value).startswith(f"{tmp_path}/site.toml: ") and said in str(refused.value)


def test_the_example_is_a_valid_site_and_names_every_option() -> None:
    load_site(str(ROOT / "slurm/site.toml"))
    text = (ROOT / "slurm/site.toml").read_text()
    assert [name for name in Site.model_fields if not re.search(rf"^#? ?{name} = ", text, re.MULTILINE)] == []


# ---------------------------------------------------------------- requests

NEEDS = Needs(
    rank_bytes=1000 * MIB,
    gpu_bytes=0,
    weight_bytes=5 * 10**9,
    layers=10,
    flops_per_token=2e9,
    prompt_tokens=4000,
    new_tokens=1000,
    longest_new=100,
    places=8,
)


ON_GPUS = replace(NEEDS, gpu_bytes=2000 * MIB)


def ask(site: Site, needs: Needs = NEEDS, **changes: object) -> Request:
    options: dict = {"nodes": 2, "tasks": 4, "seconds": None, "memory": None, "grace": 30.0}
    return resolve(needs, site, **{**options, **changes})


def test_ranks_per_node_follow_gpus_then_cores() -> None:
    assert tasks_per_node(Site(), None) == 1
    assert tasks_per_node(Site(cores_per_node=64, cores_per_rank=4), None) == 16
    assert tasks_per_node(Site(cores_per_node=64, gpus_per_node=4), None) == 4
    assert tasks_per_node(Site(gpus_per_node=4), 3) == 3
    assert tasks_per_node(Site(cores_per_node=64, cores_per_rank=4, gpus_per_node=4), None, "cpu") == 16


def test_an_estimate_by_hand() -> None:
    # Prefill: 4000 x 2e9 / (8 x 10e9) = 100 s. Decode: max(100, 1000 / 8) = 125 steps of 1 s of reading and 10 x 2 ms;
    # computing 1000 x 2e9 / (8 x 10e9) = 25 s goes on meanwhile. And 120 s to start.
    assert estimate(NEEDS, Site(), 8) == pytest.approx(120 + 100 + 125 * 1.02)
    # Ten times the sequences, on machines that read in no time: computing decides.
    many = replace(NEEDS, new_tokens=10000)
    assert estimate(many, Site(rank_bandwidth=1e15, layer_latency=0.0), 8) == pytest.approx(120 + 100 + 250)


def test_what_is_asked_for() -> None:
    request = ask(Site(cores_per_rank=3))
    assert (request.ranks, request.cores_per_task, request.gpus_per_node) == (8, 3, 0)
    assert request.seconds == pytest.approx(3 * (120 + 100 + 125 * 1.02))
    assert request.memory_per_node == 4 * (1200 + 600) * MIB
    assert request.lead == 120
    assert ask(Site(gpus_per_node=8), ON_GPUS).gpus_per_node == 4  # one for each rank
    assert ask(Site(gpus_per_node=8)).gpus_per_node == 0  # the job computes on cores
    assert ask(Site(gpus_per_node=2), ON_GPUS, share_gpus=True).gpus_per_node == 2
    with pytest.raises(FitError, match=r"4 ranks per node need as many GPUs, but the site's nodes have 2; give fewer"):
        ask(Site(gpus_per_node=2), ON_GPUS)
    with pytest.raises(FitError, match=r"the site's nodes have no GPUs \(gpus_per_node = 0\): give another --site"):
        ask(Site(), ON_GPUS)
    # A plan for GPUs counts the process itself.
    assert ask(Site(), NEEDS).memory_per_node == 4 * (1200 + 600) * MIB
    assert ask(Site(gpus_per_node=4), ON_GPUS).memory_per_node == 4 * 1200 * MIB
    assert ask(Site(exclusive=True)).memory_per_node == 0
    assert ask(Site(exclusive=True), memory=5 * MIB).memory_per_node == 5 * MIB
    assert ask(Site(max_time=900.0)).seconds == 900  # the rest comes after a requeue
    assert ask(Site(), seconds=3600.0, grace=300.0).lead == 390


@pytest.mark.parametrize(
    ("site", "changes", "kind", "said"),
    [
        (Site(cores_per_node=8, cores_per_rank=4), {}, FitError, "16 cores, but the site's nodes have 8"),
        (Site(memory_per_node=2**30), {}, FitError, r"4 ranks per node need 7.0 GiB .* nodes have 1.0 GiB"),
        (Site(max_time=3600.0), {"seconds": 7200.0}, JobError, "--time 02:00:00 is more than the site's max_time"),
        (Site(), {"seconds": 120.0}, JobError, "^--time, 00:02:00, leaves no time to work: .* stop 120 s before"),
        (Site(max_time=120.0), {}, JobError, "^the site's max_time, 00:02:00, leaves .* needs at least 00:03:00"),
        (Site(), {"grace": 2000.0}, JobError, "^the estimated time, 00:18:00, leaves"),
    ],
)
def test_what_does_not_fit_is_refused(site: Site, changes: dict, kind: type, said: str) -> None:
    with pytest.raises(kind, match=said):
        ask(site, **changes)


# ---------------------------------------------------------------- scripts

PLAIN = Batch("demo", Path("/p/out.h5.slurm/job.sbatch"), Path("/p/out.h5.slurm/%j.log"), Path("/p/job.toml"))
REQUEST = Request(2, 4, 1, 0, 7200 * MIB, 5400.0, 120)


def options_of(text: str) -> dict[str, str]:
    """#SBATCH lines as {option: value}, quoting taken away as sbatch and a shell both would."""
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return dict(shlex.split(line)[0].partition("=")[::2] for line in lines)


def test_a_plain_script() -> None:
    text = write_script(PLAIN, REQUEST, Site(partition="gpu", sbatch=["--mail-type=END", "--contiguous"]))
    assert options_of(text) == {
        "--job-name": "demo",
        "--nodes": "2",
        "--ntasks-per-node": "4",
        "--cpus-per-task": "1",
        "--time": "01:30:00",
        "--signal": "B:USR1@120",
        "--requeue": "",
        "--open-mode": "append",
        "--output": "/p/out.h5.slurm/%j.log",
        "--chdir": "/p",
        "--mem": "7200M",
        "--partition": "gpu",
        "--mail-type": "END",
        "--contiguous": "",
    }
    assert '"' not in text.partition("trap")[0], "plain values stay plain"


def test_gpus_are_bound_to_no_rank() -> None:
    options = options_of(write_script(PLAIN, replace(REQUEST, gpus_per_node=4), Site()))
    assert (options["--gpus-per-node"], options["--gpu-bind"]) == ("4", "none")
    assert not {"--gpu-bind", "--gpus-per-task"} & options_of(write_script(PLAIN, REQUEST, Site())).keys()


BITING = "a 'b' \"c\" $(touch evil) `touch evil` \\ ; touch evil # é {} *"


def run_with_stub(text: str, folder: Path, **variables: str) -> list[str]:
    """Run a script's body in bash; what its last command was called with."""
    (folder / "script").write_text(text)
    environ = {"PATH": "/usr/bin:/bin", "SLURM_NTASKS": "8", **variables}
    done = subprocess.run(["bash", "script"], cwd=folder, env=environ, capture_output=True, timeout=10)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().split("\0")[:-1]


def test_no_name_or_path_is_taken_apart(tmp_path: Path) -> None:
    folder = Path("/p") / BITING.replace("\\", "")
    batch = replace(
        PLAIN,
        name=BITING,
        script=folder / "job.sbatch",
        log=folder / "%j.log",
        job=folder / "job.toml",
        overrides=(f"output.file={BITING}",),
        program=("printf", "%s\\0"),
        shards=2,
        shard_files={"input.file": folder / "shard-{}.h5"},
    )
    text = write_script(batch, REQUEST, Site(launcher="srun --mpi=pmix"))
    options = options_of(text)
    assert options["--job-name"] == BITING and options["--chdir"] == str(folder)
    assert options["--array"] == "0-1"
    shown = run_with_stub(text, tmp_path, SLURM_ARRAY_TASK_ID="1")
    assert shown == [
        *("run", str(folder / "job.toml"), "-n", "8", "--mpirun", "srun --mpi=pmix", "--resume", "--requeue"),
        *("--set", f"output.file={BITING}", "--set", f"input.file={folder}/shard-001.h5"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["script"], "nothing was run that a name holds"


def test_what_a_run_shall_tell_is_handed_on(tmp_path: Path) -> None:
    batch = replace(PLAIN, program=("printf", "%s\\0"), quiet=True, log_dir=Path("/p") / BITING)
    shown = run_with_stub(write_script(batch, REQUEST, Site()), tmp_path)
    assert shown[-3:] == ["--quiet", "--log-dir", f"/p/{BITING}"]
    text = write_script(replace(batch, shards=3), REQUEST, Site())
    assert run_with_stub(text, tmp_path, SLURM_ARRAY_TASK_ID="2")[-1] == f"/p/{BITING}/shard-002"


def test_overwrite_is_for_the_first_turn_only(tmp_path: Path) -> None:
    text = write_script(replace(PLAIN, program=("printf", "%s\\0"), overwrite=True), REQUEST, Site())
    assert "--overwrite" in run_with_stub(text, tmp_path)
    again = run_with_stub(text, tmp_path, SLURM_RESTART_COUNT="1")
    assert "--resume" in again and "--overwrite" not in again


def test_patterns_of_sbatch_in_a_folder_are_none() -> None:
    options = options_of(write_script(replace(PLAIN, log=Path("/p/100%j/%j.log")), REQUEST, Site()))
    assert options["--output"] == "/p/100%%j/%j.log"
    with pytest.raises(JobError, match="backslash"):
        write_script(replace(PLAIN, log=Path("/p\\q/%j.log")), REQUEST, Site())


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b", "a\x1b[0m", "a\u2028b"])
def test_control_characters_are_refused(bad: str) -> None:
    for batch in (replace(PLAIN, name=bad), replace(PLAIN, job=Path("/p") / bad / "job.toml")):
        with pytest.raises(JobError, match="control character"):
            write_script(batch, REQUEST, Site())


@pytest.mark.parametrize("kind", ["sbatch", "sh"])
def test_scripts_are_valid_bash_and_every_option_has_its_line(kind: str) -> None:
    scripts = sorted((ROOT / "slurm").glob(f"*.{kind}"))
    assert scripts
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        lines = script.read_text().splitlines()
        options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
        bare = [lines[n] for n in options if not lines[n - 1].startswith("#") or lines[n - 1].startswith("#SBATCH")]
        # --open-mode is explained together with --output.
        assert [line for line in bare if "--open-mode" not in line] == [], script


# ---------------------------------------------------------------- turns


@pytest.mark.parametrize(
    ("before", "after", "again"),
    [
        (Committed(), Committed(), False),
        (Committed(), Committed(9, 0, 2, 5), True),
        (Committed(9, 3, 1, 50), Committed(9, 3, 1, 50), False),
        (Committed(9, 3, 1, 50), Committed(9, 3, 1, 51), True),
        (Committed(9, 3, 1, 50), Committed(9, 4, 0, 50), True),
        (Committed(9, 3, 1, 50), Committed(9, 9, 0, 90, complete=True), False),
    ],
)
def test_a_job_comes_back_only_if_it_got_anywhere(before: Committed, after: Committed, again: bool) -> None:
    assert (why_not_again(before, after) == "") is again


def test_requeue_needs_a_batch_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(JobError, match="SLURM_JOB_ID is not set"):
        Turn(tmp_path / "out.h5")


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Ids that Slurm was asked to requeue; this process is in the running job 7."""
    asked: list[str] = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(scheduler, "states", lambda ids: [])
    monkeypatch.setattr(scheduler, "requeue", asked.append)
    before = signal.getsignal(signal.SIGUSR1)
    yield asked
    signal.signal(signal.SIGUSR1, before)


def test_what_a_run_replaces_is_no_measure_of_its_progress(
    requeued: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.h5"
    output.write_bytes(b"damaged")
    with pytest.raises(DataError):
        Turn(output)
    turn = Turn(output, fresh=True)
    # Less than a finished run has, and more than nothing.
    monkeypatch.setattr(requeue, "committed", lambda path: Committed(9, 0, 2, 5))
    turn.end(75, signal.SIGUSR1)
    assert requeued == ["7"]


@pytest.mark.parametrize(
    ("code", "told", "said"),
    [
        (75, signal.SIGUSR1, "job 7 is requeued: 1 of 9 sequences finished"),
        (137, signal.SIGUSR1, "job 7 is requeued"),  # the drain, or the last merge, took longer than run.grace
        (137, signal.SIGTERM, "job 7 is requeued"),
        (137, signal.SIGINT, "not requeued: it ended with 137"),  # cancelled, and once more
        (137, None, "not requeued: it ended with 137"),  # out of memory, say
        (130, signal.SIGINT, "not requeued: it ended with 130"),
        (3, signal.SIGUSR1, "not requeued: it ended with 3"),
        (1, None, "not requeued: it ended with 1"),
        (0, None, ""),
        (0, signal.SIGUSR1, ""),
    ],
)
def test_a_turn_says_whether_another_follows(
    code: int,
    told: int | None,
    said: str,
    requeued: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    turn = Turn(tmp_path / "out.h5")
    monkeypatch.setattr(requeue, "committed", lambda path: Committed(9, 1, 0, 5))
    turn.end(code, told)
    printed = capsys.readouterr().err
    assert (said in printed) if said else not printed
    assert requeued == (["7"] if "is requeued" in said else [])


def test_killed_without_progress_a_job_does_not_come_back(
    requeued: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    Turn(tmp_path / "out.h5").end(137, signal.SIGUSR1)
    assert "not requeued: no sequence and no token was committed in this turn" in capsys.readouterr().err
    assert requeued == []


@pytest.mark.parametrize(
    ("visible", "on_node", "ranks", "hidden"),
    [
        ("0,1,2,3", "4", 4, False),
        ("2", "4", 4, True),
        ("0", "1", 4, False),  # there is one, which all share
        ("2", "4", 1, False),
        ("", "", 4, False),
    ],
)
def test_a_hidden_gpu_is_warned_of(visible: str, on_node: str, ranks: int, hidden: bool) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": on_node}
    assert bool(hidden_gpus(environ, ranks)) is hidden
    assert hidden_gpus({}, ranks) == ""


# ---------------------------------------------------------------- records and commands


def test_submissions_are_remembered_beside_the_output(tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    assert submissions(folder_of(output)) == []
    folder_of(output).mkdir()
    both = [Submitted("7", "job.toml", ["out.h5"]), Submitted("8", "job.toml", ["a.h5", "b.h5"])]
    for one in both:
        record(output, one)
    assert submissions(folder_of(output)) == both
    (folder_of(output) / "submitted.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="damaged record"):
        submissions(folder_of(output))


def test_a_submitted_job_that_cannot_be_recorded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = load_job(ROOT / "jobs/demo.toml", [f"output.file={tmp_path}/nowhere/out.h5"])
    monkeypatch.setattr(scheduler, "sbatch", lambda script: "12")
    with pytest.raises(DataError, match=r"^submitted as job 12, but not recorded: .*`moempi cancel 12` ends it"):
        _submit(PLAIN, job, ["out.h5"])


def test_what_is_damaged_hides_no_other_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four jobs in the queue: a sound one, one with a damaged output, one with a damaged record, one of others."""
    scripts = []
    for number, name in enumerate(["sound", "damaged", "unreadable"], 1):
        output = tmp_path / name / "out.h5"
        folder_of(output).mkdir(parents=True)
        record(output, Submitted(str(number), "job.toml", [str(output)]))
        scripts.append(folder_of(output) / "job.sbatch")
    (tmp_path / "damaged" / "out.h5").write_bytes(b"damaged")
    (scripts[2].parent / "submitted.jsonl").write_text("{}\n")
    scripts.append(tmp_path / "other.sh")
    found = [State(str(n), "RUNNING", "1:00", "2:00", "n0", script) for n, script in enumerate(scripts, 1)]
    monkeypatch.setattr(scheduler, "states", lambda ids=None: found)
    shown = CliRunner().invoke(status, ["--json"], catch_exceptions=False).output.splitlines()
    rows = [json.loads(line) for line in shown]
    assert [row["id"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["progress"] == "nothing committed yet" and rows[0]["complete"] is False
    assert "out.h5" in rows[1]["progress"] and "complete" not in rows[1]
    assert "damaged record of submissions" in rows[2]["progress"]
    text = CliRunner().invoke(status, [], catch_exceptions=False).output
    assert "job 1: RUNNING on n0" in text and "damaged record of submissions" in text and "other.sh" not in text


@pytest.mark.parametrize("text", ["", "x", "-1", "1;2", "1 2", "12_", "$(id)", "--help"])
def test_what_is_no_id_never_reaches_slurm(text: str) -> None:
    with pytest.raises(JobError, match="is not the id of a job"):
        scheduler.check_id(text)


def test_without_slurm_a_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    shown = CliRunner().invoke(status, ["12"])
    assert isinstance(shown.exception, JobError) and "no squeue on PATH" in str(shown.exception)


def test_a_dry_run_prints_script_and_reasons_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = ["inputs", "make", str(ROOT / "inputs/prompts.jsonl"), str(ROOT / "inputs/tinymoe.h5")]
    command = [*(sys.executable, "-m", "moempi"), *inputs, str(tmp_path / "in.h5")]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert made.returncode == 0, made.stderr
    given = ["--nodes", "2", "--tasks-per-node", "8", "--set", "input.file=in.h5", "--dry-run"]
    given += ["--set", f"output.file={tmp_path}/out.h5", "--set", "run.capacity=4", "--log-dir", "logs", "--quiet"]
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(submit, [str(ROOT / "jobs/demo.toml"), *given], catch_exceptions=False)
    options = options_of(shown.output)
    assert (options["--nodes"], options["--ntasks-per-node"], options["--job-name"]) == ("2", "8", "demo")
    # The script runs in another folder: what begins at the current one is written out.
    assert f"--set 'input.file=\"{tmp_path}/in.h5\"'" in shown.output and "--set run.capacity=4" in shown.output
    assert f"--quiet \\\n  --log-dir {tmp_path}/logs" in shown.output
    assert "# 16 ranks; the fullest is planned with" in shown.output and "estimated" in shown.output
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5"]


def test_the_site_decides_what_an_open_device_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever there is where the job is submitted. On GPUs a node is asked for what the host needs."""
    make_inputs(ROOT / "inputs/prompts.jsonl", ROOT / "inputs/tinymoe.h5", tmp_path / "in.h5")

    def needs(*overrides: str, gpus: bool = True) -> Needs:
        given = [f"input.file={tmp_path}/in.h5", f"output.file={tmp_path}/out.h5", *overrides]
        return needs_of(load_job(ROOT / "jobs/demo.toml", given), 2, gpus=gpus)

    def planned(device: str) -> list[RankMemory]:
        given = [f"input.file={tmp_path}/in.h5", f"run.device={device}"]
        return look(load_job(ROOT / "jobs/demo.toml", given), 2).shape.layout.memory

    on_gpus, direct, staged = planned("cuda"), needs("exchange.gpu_aware=on"), needs()
    assert staged.gpu_bytes == direct.gpu_bytes == max(plan.total for plan in on_gpus)
    assert staged.rank_bytes - direct.rank_bytes == max(plan.message_bytes for plan in on_gpus)
    assert direct.rank_bytes > HOST + trace_bytes("full")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_cores = needs(gpus=False)
    assert on_cores == needs("run.device=cpu") and on_cores.gpu_bytes == 0
    assert on_cores.rank_bytes == max(plan.total for plan in planned("cpu"))
