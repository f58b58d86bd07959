"""A command with further commands behind it: full lines in its help, and the nearest name for a misspelt one."""

from __future__ import annotations

import difflib

import click


class Group(click.Group):
    """click's group, whose help cuts no line short and which says what a wrong name may have meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, name) is None:
            raise click.UsageError(_unknown(ctx, name, self.list_commands(ctx)), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.short_help_of(ctx, name)) for name in self.list_commands(ctx)])

    def short_help_of(self, ctx: click.Context, name: str) -> str:
        """The first sentence of a command's help."""
        command = self.get_command(ctx, name)
        assert command is not None, name
        return command.get_short_help_str(limit=400)


def _unknown(ctx: click.Context, name: str, known: list[str]) -> str:
    behind = " ".join(ctx.command_path.split()[1:])
    full = f"{behind} {name}".strip()
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean `{f'{behind} {near[0]}'.strip()}`?" if near else f"there are {', '.join(known)}"
    return f"there is no command `{full}`; {hint}"
