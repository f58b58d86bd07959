"""A cluster on one machine: nodes that see each other only through links of limited bandwidth. Linux, root, iproute2.

    with Cluster(4, "1gbit") as cluster:
        done = cluster.run(this_program("run", "job.toml"), ranks_per_node=2, timeout=60)
        print(cluster.counters())

Each node is a network, host name and mount namespace of its own; one more network namespace holds the bridge that joins
them. A small process keeps each of them alive and ends when its standard input is closed, so that all of it is gone
when this program is, however it ended. Nothing is made outside these namespaces but one temporary folder.

The nodes share processors, files and clock. MPI sees as many nodes as there are.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moempi.launch import child_environment, find_mpirun

NETWORK = "10.77.0"  # node i has the address of i + 1
BURST, LATENCY = "64kb", "50ms"  # what a link lets through at once, and how long it keeps bytes before it drops them
_PROGRAMS = ("ip", "tc", "unshare", "nsenter", "mount", "hostname")
_START = 20.0  # seconds that a step of the setup may take
_END = 10.0
# What the setup needs of the kernel, tried in a namespace that is gone at the end of the line.
_TRIAL = (
    "mount --bind /etc/hosts /etc/hosts && ip link add one type veth peer name two && ip link add both type bridge && "
    "tc qdisc add dev one root tbf rate 1gbit burst 64kb latency 50ms"
)
# Memory inside a node, TCP between nodes.
_TRANSPORT = {"pml": "ob1", "btl": "self,sm,tcp", "btl_tcp_if_include": "eth0"}
_UNSHARE = ("unshare", "--net", "--uts", "--mount")


@dataclass(frozen=True)
class Done:
    """How a command ended: exit code, what it printed, seconds from its start to its end."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Counters:
    """Bytes that a node's link has carried since it is up, with the headers of Ethernet, IP and TCP."""

    sent: int
    received: int

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(self.sent - earlier.sent, self.received - earlier.received)


def missing() -> str:
    """Why there can be no emulated cluster here; "" where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "an emulated cluster needs Linux and root"
    lacking = [name for name in _PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"an emulated cluster needs {', '.join(lacking)} (iproute2, util-linux)"
    try:
        tried = subprocess.run([*_UNSHARE, "sh", "-c", _TRIAL], capture_output=True, text=True, timeout=_START)
    except subprocess.TimeoutExpired:
        return f"this machine took more than {_START:g} s to make a namespace"
    return "" if tried.returncode == 0 else f"this machine makes no emulated cluster: {tried.stderr.strip()}"


class Cluster:
    """`n_nodes` nodes, each with one link (eth0) of `rate` (as tc writes it: "200mbit") in either direction.

    A context manager; leaving it ends every process on the nodes.

    Raises:
        RuntimeError: a step of the setup failed, with what the failing program said.
    """

    def __init__(self, n_nodes: int, rate: str) -> None:
        self.names = tuple(f"node{i}" for i in range(n_nodes))
        self.rate = rate
        self._holders: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Cluster:
        self._folder = Path(tempfile.mkdtemp(prefix="moempi-cluster-"))
        try:
            self._write_files()
            for name in (*self.names, "switch"):
                self._hold(name)
            self._join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._kill_all()
        for holder in self._holders.values():
            holder.kill()
            holder.communicate(timeout=_END)
        shutil.rmtree(self._folder, ignore_errors=True)

    # ------------------------------------------------------------ what it is used for

    def line(self, command: list[str], ranks_per_node: int) -> list[str]:
        """The command line that runs `command` on every node, as a program of this machine starts it."""
        hosts = ",".join(f"{name}:{ranks_per_node}" for name in self.names)
        options = ["--host", hosts, "--map-by", f"ppr:{ranks_per_node}:node", "--oversubscribe", "--bind-to", "none"]
        parameters = {"plm_rsh_agent": str(self._agent), **_TRANSPORT}
        options += [word for name, value in parameters.items() for word in ("--mca", name, value)]
        n_ranks = ranks_per_node * len(self.names)
        consents = [f"{name}={value}" for name, value in child_environment({}, as_root=True).items()]
        mpirun = ["env", *consents, *find_mpirun(None, os.environ), *options, "-n", str(n_ranks), *command]
        return self.on_node(0, mpirun)

    def on_node(self, node: int, command: list[str]) -> list[str]:
        """The command line that runs `command` on one node, without mpirun."""
        return [str(self._agent), self.names[node], f"exec {shlex.join(command)}"]

    def run(self, command: list[str], ranks_per_node: int, timeout: float) -> Done:
        """Run `command` on every node to its end; after `timeout` seconds all processes on the nodes are killed.

        Raises:
            subprocess.TimeoutExpired: it was, with what had been printed.
        """
        begin = time.monotonic()
        process = subprocess.Popen(
            self.line(command, ranks_per_node),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            self._kill_all()
            process.kill()
            process.wait(_END)
        return Done(process.returncode, out, err, time.monotonic() - begin)

    def counters(self) -> list[Counters]:
        """The byte counters of every node's link."""
        return [link_counters(self._holders[name].pid) for name in self.names]

    def processes(self, node: int) -> list[int]:
        """Process ids of what runs on a node."""
        holder = self._holders[self.names[node]]
        return [pid for pid in _in_network(_network_of(holder.pid)) if pid != holder.pid]

    # ------------------------------------------------------------ how it is made

    @property
    def _agent(self) -> Path:
        return self._folder / "enter"

    def _write_files(self) -> None:
        """The nodes' /etc/hosts, and the program that enters a node: ENTER NAME COMMAND-LINE."""
        lines = [f"{NETWORK}.{i + 1} {name}" for i, name in enumerate(self.names)]
        (self._folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        # mpirun starts its daemon on another node with it, in the place of ssh.
        self._agent.write_text(
            "#!/bin/sh\n"
            f'pid=$(cat {shlex.quote(str(self._folder))}/"$1") || exit\n'
            "shift\n"
            'exec nsenter --target "$pid" --net --uts --mount -- sh -c "cd \\"\\$0\\" && $*" "$(pwd)"\n'
        )
        self._agent.chmod(0o700)

    def _hold(self, name: str) -> None:
        """Make the namespaces of a node (or of the bridge) and a process that keeps them."""
        hosts = shlex.quote(str(self._folder / "hosts"))
        begin = f"hostname {name} && mount --bind {hosts} /etc/hosts && ip link set lo up && echo made && exec cat"
        holder = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", begin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._holders[name] = holder
        assert holder.stdout is not None
        if holder.stdout.readline() != "made\n":
            raise RuntimeError(f"{name}: its namespaces could not be made")
        (self._folder / name).write_text(str(holder.pid))

    def _join(self) -> None:
        """Connect every node to the bridge and limit both ends of each link."""
        limit = f"root tbf rate {self.rate} burst {BURST} latency {LATENCY}"
        bridge = ["link add bridge type bridge", "link set bridge up"]
        for i, name in enumerate(self.names):
            pid = self._holders[name].pid
            bridge.append(f"link add port{i} type veth peer name eth0 netns {pid}")
            bridge.append(f"link set port{i} master bridge up")
        self._configure("switch", "ip", bridge)
        self._configure("switch", "tc", [f"qdisc add dev port{i} {limit}" for i in range(len(self.names))])
        for i, name in enumerate(self.names):
            self._configure(name, "ip", [f"addr add {NETWORK}.{i + 1}/24 dev eth0", "link set eth0 up"])
            self._configure(name, "tc", [f"qdisc add dev eth0 {limit}"])

    def _configure(self, name: str, program: str, commands: list[str]) -> None:
        """Run lines of `ip` or `tc` in a node's network namespace."""
        line = ["nsenter", "--target", str(self._holders[name].pid), "--net", program, "-batch", "-"]
        done = subprocess.run(line, input="\n".join(commands), capture_output=True, text=True, timeout=_START)
        if done.returncode:
            raise RuntimeError(f"{program} on {name}: {done.stderr.strip()}")

    # ------------------------------------------------------------ how it ends

    def _kill_all(self) -> None:
        """Kill what runs on the nodes, again until nothing is left: a daemon may just be starting a rank."""
        end = time.monotonic() + _END
        while time.monotonic() < end:
            nodes = [node for node, name in enumerate(self.names) if name in self._holders]
            found = [pid for node in nodes for pid in self.processes(node)]
            if not found:
                return
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def link_counters(pid: int) -> Counters:
    """The byte counters of the link of the node that a process runs on."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            columns = numbers.split()
            return Counters(sent=int(columns[8]), received=int(columns[0]))
    raise RuntimeError("a node has no eth0")


def _network_of(pid: int) -> str:
    """Name of the network namespace of a process; "" when it is gone (or only waits to be collected)."""
    with suppress(OSError):
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    return ""


def _in_network(network: str) -> Iterator[int]:
    """Processes in a network namespace; none for the name "", nor in the namespace of this program."""
    if network in ("", _network_of(os.getpid())):
        return
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and _network_of(int(entry.name)) == network:
            yield int(entry.name)
