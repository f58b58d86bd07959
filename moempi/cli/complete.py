"""What a shell can complete: the options of a job behind `--set`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem


def complete_option(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`section.key=` of every option that begins so; behind the `=`, the values of one that has a list of them."""
    from click.shell_completion import CompletionItem

    from moempi.job_options import choices_of, describe_options

    key, equals, begun = incomplete.partition("=")
    if equals:
        return [CompletionItem(f"{key}={value}") for value in choices_of(key) if value.startswith(begun)]
    return [CompletionItem(f"{name}=", help=text) for name, _, _, text in describe_options() if name.startswith(key)]
