"""A real Slurm on this machine: munged, slurmctld and a slurmd per node, in a scratch folder, as root, no systemd.

Its nodes claim four cores and two GPUs each, which are none. They all are this machine, under names of their
own; Slurm allows either several such nodes or one that has the machine's name.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

PACKAGES = ["slurm-wlm", "munge", "libpmix2", "libpmix-dev"]
PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "srun"]
SBIN = "/usr/sbin:/sbin"
GPUS = ["/dev/null", "/dev/zero"]  # devices that every machine has; nobody opens them

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=100000,batch_sched_delay=1,requeue_delay=2
GresTypes=gpu
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}
PartitionName=main Nodes=ALL Default=YES State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000 Gres=gpu:2\n"


def why_not() -> str:
    """Why a Slurm cannot be started here; "" where it can (perhaps after `install`)."""
    if os.geteuid() != 0:
        return "needs root: the daemons of Slurm start jobs as other users"
    missing = [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":" + SBIN) is None]
    if missing and shutil.which("apt-get") is None:
        return f"{', '.join(missing)} not installed, and there is no apt-get to install {', '.join(PACKAGES)} with"
    return ""


def do_without(reason: str) -> NoReturn:
    """Skip the test; or fail, where MOEMPI_REQUIRE_SLURM says that nothing may be missing."""
    (pytest.fail if os.environ.get("MOEMPI_REQUIRE_SLURM") else pytest.skip)(reason)


def install() -> None:
    """Install Slurm and munge from the distribution where they are missing; no service is started."""
    path = os.environ["PATH"] + ":" + SBIN
    if all(shutil.which(name, path=path) for name in PROGRAMS):
        return
    # Nobody may start daemons behind our back: where there is an init system, this keeps them off.
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    quiet = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=3"]
    for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run([*quiet, *words], env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"apt-get {words[0]}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@dataclass
class Cluster:
    """The daemons that run in `folder`; `environ` is what a user of the cluster has in their environment."""

    folder: Path
    nodes: tuple[str, ...] = ("n0", "n1")
    environ: dict[str, str] = field(default_factory=dict)
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Start all daemons and wait until the nodes are idle."""
        host = host_name()
        port, *ports = free_ports(1 + len(self.nodes))
        settings = CONFIGURATION.format(folder=self.folder, host=host, port=port)
        for node, its_port in zip(self.nodes, ports, strict=True):
            settings += NODE.format(name=node, host=host, port=its_port)
        (self.folder / "slurm.conf").write_text(settings)
        (self.folder / "state").mkdir()
        gpus = [f"NodeName={','.join(self.nodes)} Name=gpu File={device}\n" for device in GPUS]
        (self.folder / "gres.conf").write_text("".join(gpus))
        self.environ = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": os.environ["PATH"] + ":" + SBIN,
        }
        self._start_munge()
        self._run("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in self.nodes:
            (self.folder / f"spool-{node}").mkdir()
            self._run("slurmd", "-D", "-N", node)
        self._wait_until_idle(len(self.nodes))

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder / name}" for option, name in names.items()]
        self._run("munged", "--foreground", "--force", f"--key-file={key}", *options)
        end = time.monotonic() + 20
        while not (self.folder / "munge.socket").exists():
            assert time.monotonic() < end and self.daemons[0].poll() is None, f"munged does not start:\n{self.logs()}"
            time.sleep(0.05)

    def _run(self, *words: str) -> None:
        quiet = subprocess.DEVNULL
        # They end with this process, also when it is killed.
        prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
        self.daemons.append(
            subprocess.Popen(
                words,
                env=self.environ,
                stdin=quiet,
                stdout=quiet,
                stderr=quiet,
                start_new_session=True,
                preexec_fn=lambda: prctl(set_death_signal, signal.SIGTERM),
            )
        )

    def _wait_until_idle(self, nodes: int, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while (shown := self.command("sinfo", "-h", "-N", "-o", "%t", check=False)).split().count("idle") < nodes:
            assert time.monotonic() < end, f"nodes are {shown!r}:\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))

    def stop(self) -> None:
        """Cancel what runs, then end the daemons, munged last."""
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.command("scancel", "-u", "root", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def command(self, *words: str | Path, check: bool = True, cwd: Path | None = None, timeout: float = 60) -> str:
        """Run a command of Slurm, or one that calls them, and return what it printed."""
        line = list(map(str, words))
        done = subprocess.run(line, env=self.environ, cwd=cwd, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, f"{line}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def show(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says, as {key: value}; {} once the job is forgotten."""
        shown = self.command("scontrol", "-o", "show", "job", job_id, check=False)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, job_id: str, *states: str, timeout: float = 90) -> dict[str, str]:
        """Wait until the job is in one of these states (default: an end)."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        end = time.monotonic() + timeout
        while (shown := self.show(job_id)).get("JobState") not in wanted:
            assert time.monotonic() < end, f"job {job_id} is {shown}, expected {wanted}\n{self.logs()}"
            time.sleep(0.2)
        return shown


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def host_name() -> str:
    """The name of this machine, as slurmd knows it."""
    return socket.gethostname().split(".")[0]
