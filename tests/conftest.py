"""What all tests share: an environment as in a run, and one readable report when there are many ranks.

Under mpirun, rank 0 reports; the others write their reports to build/mpi-logs/. A test that fails on any rank is
shown at once, with its rank, and ends the launch: the other ranks may be waiting for it and would not come back.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moempi import mpi, threads

LOGS = Path(__file__).parents[1] / "build" / "mpi-logs"

threads.set_environment(os.environ, in_a_rank=mpi.launched_size() > 1)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if mpi.launched_size() == 1:
        return
    if not config.getoption("with_mpi", default=False):
        raise pytest.UsageError("under mpirun give --with-mpi: without it every MPI test is skipped silently")
    if mpi.launched_rank() > 0:
        _report_to_file(config)


def _report_to_file(config: pytest.Config) -> None:
    """Let this rank's report go to a file. Line by line, because an abort flushes nothing."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = (LOGS / f"rank-{mpi.launched_rank():03d}.txt").open("w", buffering=1, encoding="utf-8")
    config.pluginmanager.unregister(name="terminalreporter")
    config.pluginmanager.register(pytest.TerminalReporter(config, log), "terminalreporter")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and mpi.launched_size() > 1:
        # It puts rank and host in front; pytest captures nothing while it reports.
        mpi.end_job(f"{report.nodeid} failed\n{report.longreprtext}", 1)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and mpi.launched_size() > 1:
        mpi.end_job(f"{report.nodeid} cannot be collected\n{report.longreprtext}", 1)
