"""Print the torch to install into this environment, or nothing where the one that is there will do.

Usage: python torch_build.py pyproject.toml

Where no GPU answers, a CPU build is chosen if the package index of this machine offers one: the usual build brings
gigabytes of CUDA libraries. Runs in a fresh environment: the standard library and pip only.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.version import InvalidVersion, Version


def wanted(pyproject: Path) -> Requirement:
    """The project's own requirement on torch."""
    requirements = map(Requirement, tomllib.loads(pyproject.read_text())["project"]["dependencies"])
    return next(each for each in requirements if each.name == "torch")


def installed() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return b"GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout


def offered() -> list[str]:
    """Versions of torch that pip would find; empty where it cannot tell."""
    asked = subprocess.run([sys.executable, "-m", "pip", "index", "versions", "torch"], capture_output=True, text=True)
    line = re.search(r"^Available versions: (.*)$", asked.stdout, re.MULTILINE)
    return line[1].split(", ") if line else []


def newest_cpu_build(requirement: Requirement, versions: list[str]) -> str | None:
    """The newest version whose local part says cpu and which the requirement admits."""
    fitting = []
    for text in versions:
        try:
            version = Version(text)
        except InvalidVersion:
            continue
        if version.local == "cpu" and requirement.specifier.contains(version):
            fitting.append(version)
    return str(max(fitting)) if fitting else None


def main() -> None:
    requirement, there = wanted(Path(sys.argv[1])), installed()
    if there is not None and requirement.specifier.contains(there, prereleases=True):
        return
    build = None if has_gpu() else newest_cpu_build(requirement, offered())
    print(f"torch=={build}" if build else str(requirement))


if __name__ == "__main__":
    main()
