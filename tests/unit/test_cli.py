"""The command line itself: help with examples, names that are nearly right, what a shell completes."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner
from test_docs import parse

from moempi.cli import moempi
from moempi.cli.complete import complete_option
from moempi.cli.results import plural
from moempi.cli.run import word_of_kill
from moempi.job import known_options
from moempi.job_options import choices_of


def commands(group: click.Group = moempi, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, groups too."""
    context = click.Context(group)
    for name in group.list_commands(context):
        yield (*path, name)
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = [(), *commands()]
every_command = pytest.mark.parametrize("words", ALL, ids=lambda words: " ".join(words) or "moempi")


def help_of(words: tuple[str, ...]) -> str:
    done = CliRunner().invoke(moempi, [*words, "--help"], prog_name="moempi", terminal_width=80)
    assert done.exit_code == 0, done.output
    return done.output


def test_there_are_commands() -> None:
    assert {("run",), ("doctor",), ("job", "schema"), ("trace", "plot"), ("weights", "import")} <= set(ALL)


@every_command
def test_help_is_whole_and_fits_a_terminal(words: tuple[str, ...]) -> None:
    text = help_of(words)
    assert "..." not in text.replace("[ARGS]...", "").replace("FILES...", "") and "…" not in text
    assert max(map(len, text.splitlines())) <= 80


@every_command
def test_help_has_an_example_that_parses(words: tuple[str, ...]) -> None:
    text = " ".join(help_of(words).split("Options:")[0].split())
    after_usage = text.split("]", 1)[1] if words else text
    examples = re.findall(r"moempi (?:[a-z]+ )+[^ ].*?(?= {2}|$| (?:mpirun |srun .{1,8})?moempi |  )", after_usage)
    of_this = [one for one in examples if one.removeprefix("moempi ").startswith(" ".join(words))]
    assert of_this, text
    # Several examples of a paragraph run into each other here; the documents' own are parsed one by one.
    assert all(word in of_this[0] for word in words)


@pytest.mark.parametrize(
    "example",
    [line.strip() for words in ALL for line in help_of(words).splitlines() if re.match(r"  (Example: )?moempi ", line)],
)
def test_examples_in_help_parse(example: str) -> None:
    command = re.split(r" {2,}", example.removeprefix("Example: "))[0]
    parse(shlex.split(command)[1:])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu", "JOB"], "there is no command `rnu`; did you mean `run`?"),
        (["trace", "sumary", "FILE"], "there is no command `trace sumary`; did you mean `trace summary`?"),
        (["xyzzy"], "there is no command `xyzzy`; there are run, doctor, job, submit, status, cancel, weights, "),
    ],
)
def test_a_misspelt_command_gets_the_nearest_name(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(moempi, arguments, prog_name="moempi")
    assert done.exit_code == 2 and said in " ".join(done.output.split())


def test_one_is_singular() -> None:
    assert [plural(n, "step") for n in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]


# ---------------------------------------------------------------- completion


def completed(incomplete: str) -> list[str]:
    context = click.Context(moempi)
    return [item.value for item in complete_option(context, click.Option(["--set"]), incomplete)]


def test_set_completes_options_and_the_values_of_those_that_have_some() -> None:
    assert completed("") == [f"{name}=" for name in known_options()]
    assert completed("run.c") == ["run.capacity="]
    assert completed("model.dtype=") == ["model.dtype=auto", "model.dtype=float32", "model.dtype=bfloat16"]
    assert completed("placement.strict=t") == ["placement.strict=true"]
    assert completed("run.capacity=") == completed("no.such=") == []


def test_choices() -> None:
    assert choices_of("trace.level") == ["off", "summary", "full", "routes"]
    assert choices_of("output.file") == choices_of("nothing") == choices_of("run.nothing") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_a_script(shell: str) -> None:
    environment = {**os.environ, "_MOEMPI_COMPLETE": f"{shell}_source"}
    if shell == "bash" and not _bash_is_new_enough():
        pytest.skip("click completes for bash 4.4 or newer")
    done = subprocess.run([sys.executable, "-m", "moempi"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "_MOEMPI_COMPLETE" in done.stdout, done.stderr


def _bash_is_new_enough() -> bool:
    done = subprocess.run(["bash", "-c", "echo $BASH_VERSION"], capture_output=True, text=True, timeout=20)
    found = re.match(r"(\d+)\.(\d+)", done.stdout)
    return found is not None and (int(found[1]), int(found[2])) >= (4, 4)


def test_a_shell_gets_verbs_and_options_of_a_job() -> None:
    def answers(line: str) -> list[str]:
        environment = {**os.environ, "_MOEMPI_COMPLETE": "bash_complete", "COMP_WORDS": line}
        environment["COMP_CWORD"] = str(len(line.split(" ")) - 1)
        done = subprocess.run(
            [sys.executable, "-m", "moempi"], env=environment, capture_output=True, text=True, timeout=60
        )
        return [one.partition(",")[2] for one in done.stdout.splitlines()]

    assert answers("moempi tr") == ["trace"]
    assert answers("moempi run job.toml --set exchange.lo") == ["exchange.lockstep="]


@pytest.mark.parametrize(
    ("code", "told", "word"),
    [
        (137, None, "signal 9 (SIGKILL): the machine may be out of memory; what"),
        (139, None, "signal 11 (SIGSEGV); what was committed is kept"),
        (137, signal.SIGINT, ""),  # whoever sent it knows
        (130, signal.SIGINT, ""),
        (1, None, ""),  # a rank has said why
        (0, None, ""),
    ],
)
def test_ranks_that_were_killed_get_a_word(code: int, told: int | None, word: str) -> None:
    assert word in word_of_kill(code, told) and bool(word) == bool(word_of_kill(code, told))
