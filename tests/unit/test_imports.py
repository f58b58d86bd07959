"""Who may import what, read from the source, and tried: commands that need no MPI, torch or GPU load none."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "moempi"

MPI = ("moempi.bench", "moempi.exchange", "moempi.router", "moempi.run", "moempi.mpi")
CUDA = "moempi.device.cuda"  # and all modules whose names begin with it
# Used on login nodes, and by people who have a trace or a plan and no MPI.
WITHOUT_MPI = (
    "moempi.planning",
    "moempi.analysis",
    "moempi.plots",
    "moempi.job",
    "moempi.cli",
    "moempi.slurm",
    "moempi.files",
)
# Loading torch takes seconds: nothing of this does, until it is told to do something that needs it.
WITHOUT_TORCH = (
    "moempi.__main__",
    "moempi.analysis",
    "moempi.bench.fit",
    "moempi.cli",
    "moempi.doctor",
    "moempi.errors",
    "moempi.exchange.plan",
    "moempi.exchange.slots",
    "moempi.exchange.tasks",
    "moempi.files.committed",
    "moempi.files.completions",
    "moempi.files.inputs",
    "moempi.files.links",
    "moempi.files.outputs",
    "moempi.files.placement",
    "moempi.files.schema",
    "moempi.files.shards",
    "moempi.files.together",
    "moempi.files.trace",
    "moempi.job",
    "moempi.job_errors",
    "moempi.job_schema",
    "moempi.launch",
    "moempi.layout",
    "moempi.mpi",
    "moempi.planning",
    "moempi.plots",
    "moempi.progress",
    "moempi.recorder",
    "moempi.router",
    "moempi.slurm",
    "moempi.threads",
)
# Tools that know nothing of a run.
OFFLINE = ("moempi.planning", "moempi.analysis", "moempi.plots")
OF_A_RUN = ("moempi.run", "moempi.build", "moempi.prepare", "moempi.home", "moempi.layer", "moempi.router")


def module_name(path: Path) -> str:
    parts = ["moempi", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def statements(node: ast.AST, *, inside_functions: bool) -> Iterator[ast.AST]:
    """All that runs when a module is imported, or also what its functions do; nothing that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not inside_functions:
            continue
        yield child
        yield from statements(child, inside_functions=inside_functions)


def imports(tree: ast.AST, *, inside_functions: bool) -> set[str]:
    found: set[str] = set()
    for node in statements(tree, inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports would escape this test"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(names & MODULES.keys())
            if not names <= MODULES.keys():
                found.add(node.module)
    return found


AT_IMPORT = {name: imports(tree, inside_functions=False) for name, tree in MODULES.items()}
EVER = {name: imports(tree, inside_functions=True) for name, tree in MODULES.items()}


def loads(name: str) -> set[str]:
    """Everything that importing a module loads, in the end, itself included."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo += [one.rpartition(".")[0], *AT_IMPORT.get(one, ())]
    return seen


def needs(name: str) -> set[str]:
    """Modules that a module names, and those that they name, and so on; not itself, unless there is a circle."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        new = (AT_IMPORT[todo.pop()] & MODULES.keys()) - seen
        seen |= new
        todo += new
    return seen


def belongs(name: str, families: tuple[str, ...]) -> bool:
    return any(name == family or name.startswith(f"{family}.") for family in families)


def users(library: str) -> set[str]:
    """Modules that import a library anywhere."""
    return {name for name, found in EVER.items() if any(belongs(one, (library,)) for one in found)}


# ---------------------------------------------------------------- the rules


def test_the_source_is_read_as_python_reads_it() -> None:
    assert "moempi.exchange.engine" in loads("moempi.run") and "mpi4py" in loads("moempi.run")
    assert "torch" in loads("moempi.layer") and "torch" not in AT_IMPORT["moempi.mpi"]
    assert "moempi.mpi" in users("mpi4py"), "what a function imports counts"


def test_mpi4py_and_cupy_have_their_places() -> None:
    assert not {name for name in users("mpi4py") if not belongs(name, MPI)}
    assert not {name for name in users("cupy") | users("triton") if not name.startswith(CUDA)}


@pytest.mark.parametrize(
    ("families", "heavy"),
    [(WITHOUT_MPI, ("mpi4py", "cupy")), (OFFLINE, OF_A_RUN)],
    ids=["no MPI", "nothing of a run"],
)
def test_importing_these_loads_none_of_those(families: tuple[str, ...], heavy: tuple[str, ...]) -> None:
    for name in MODULES:
        if belongs(name, families):
            assert not {one for one in loads(name) if belongs(one, heavy)}, name


def test_modules_without_torch() -> None:
    light = [name for name in MODULES if belongs(name, WITHOUT_TORCH) and name != "moempi.router.control"]
    assert len(light) > 30
    for name in light:
        assert not {one for one in loads(name) if belongs(one, ("torch", "mpi4py"))}, name


def test_no_circles() -> None:
    assert not [name for name in MODULES if name in needs(name)]


# ---------------------------------------------------------------- tried


def loaded_by(code: str) -> set[str]:
    """Names of the libraries that a fresh Python has loaded after running `code`."""
    shown = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return {name.split(".")[0] for name in shown.stdout.split()}


def test_light_modules_load_neither_torch_nor_mpi4py() -> None:
    light = [name for name in MODULES if belongs(name, WITHOUT_TORCH) and name != "moempi.router.control"]
    found = loaded_by("\n".join(f"import {name}" for name in light if name != "moempi.__main__"))
    assert not found & {"torch", "mpi4py", "cupy"}
    assert "numpy" in found


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["outputs", "--help"]])
def test_help_is_light(arguments: list[str]) -> None:
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "moempi", *arguments], capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0 and "moempi" in shown.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in shown.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"torch", "mpi4py", "cupy"}


def test_a_plan_needs_no_mpi(tmp_path: Path) -> None:
    """`moempi run JOB --dry-run` works on a login node."""
    (tmp_path / "job.toml").write_text('model.weights = "no.h5"\ninput.file = "i.h5"\noutput.file = "o.h5"\n')
    code = (
        "import sys\nfrom moempi.__main__ import run_command\nfrom moempi.errors import DataError\n"
        "sys.stdout = sys.stderr\n"
        f"try: run_command(['run', {str(tmp_path / 'job.toml')!r}, '--dry-run'])\nexcept DataError: pass\n"
        "sys.stdout = sys.__stdout__"
    )
    assert "mpi4py" not in loaded_by(code)
