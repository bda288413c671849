"""The command line. Exit codes: 0 done, 2 bad input found before the first step, 3 stopped in order
(the same command resumes), 4 a typed failure, 1 a bug."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from raygrpo.config_file import describe_keys, dump_config, load_config
from raygrpo.errors import ConfigError, DataError, RayGrpoError, RewardError
from raygrpo.signals import Stopped

EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_FAILED = 2, 3, 4
_INPUT = (ConfigError, DataError, RewardError)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train causal language models with GRPO on Ray.",
)
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=_OVERRIDES)
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
) -> None:
    """Train, or resume, the run that CONFIG describes; then export the model.

    Keys are overridden by --section.key=value.
    """
    from raygrpo.session import Session

    session = None
    try:
        resolved = load_config(config, context.args)
        with Session(resolved) as session:
            session.prepare()
            outcome = session.run()
    except RayGrpoError as error:
        started = session is not None and session.started
        _fail(error, EXIT_BAD_INPUT if isinstance(error, _INPUT) and not started else EXIT_FAILED)
    except Stopped:
        typer.echo("stopped before the first step; run the same command to start or resume")
        raise typer.Exit(EXIT_STOPPED) from None
    if not outcome.finished:
        typer.echo(f"stopped, all committed; run the same command to resume ({outcome.run_dir})")
        raise typer.Exit(EXIT_STOPPED)
    if outcome.first_group_s:
        typer.echo(
            f"driver {outcome.driver_ms_per_group:.1f} ms a group; "
            f"first group after {outcome.first_group_s:.0f} s"
        )
    typer.echo(f"run directory   {outcome.run_dir}")
    typer.echo(f"curve           {outcome.run_dir / 'curve.png'}")
    typer.echo(f"exported model  {outcome.export}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint to take; none: the newest.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload it too, as ORG/NAME.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.")] = None,
) -> None:
    """Write the model of a checkpoint, with its card, to RUN/export, and to the hub if asked.

    The hub's token is HF_TOKEN, or that of `hf auth login`. A new repository is private.
    """
    from raygrpo.export import export_run
    from raygrpo.publish import publish_run

    try:
        if push_to_hub is None:
            path: object = export_run(run, step)
        else:
            path = publish_run(run, push_to_hub, step=step, public=public, branch=revision)
    except RayGrpoError as error:
        _fail(error, EXIT_BAD_INPUT if isinstance(error, _INPUT) else EXIT_FAILED)
    typer.echo(str(path))


@app.command(name="config", context_settings=_OVERRIDES)
def show_config(
    context: typer.Context,
    path: Annotated[Path | None, typer.Argument(help="YAML file to resolve.")] = None,
) -> None:
    """List every key with its default, unit and meaning; with PATH, print the resolved file."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if path is not None:
        try:
            typer.echo(dump_config(load_config(path, context.args)))
        except RayGrpoError as error:
            _fail(error, EXIT_BAD_INPUT)
        return
    table = Table("key", "default", "unit", "meaning", box=None)
    for row in describe_keys():
        table.add_row(*(escape(cell) for cell in row))
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)


def _fail(error: RayGrpoError, code: int) -> NoReturn:
    typer.echo(f"{type(error).__name__}: {error}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the ``raygrpo`` command."""
    app(prog_name="raygrpo", standalone_mode=True, args=sys.argv[1:])
