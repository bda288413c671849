"""The command line.

Exit codes: 0 done, 2 bad input found before the first step, 3 stopped in order (the same command
resumes), 4 a typed failure, 1 a bug. A command's modules are imported when it runs, so that
``--help`` and ``config`` wait for no torch.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from raygrpo.commands.signals import Stopped
from raygrpo.config.describe import describe_keys
from raygrpo.config.file import dump_config, dump_recipe, load_config
from raygrpo.errors import ConfigError, DataError, RayGrpoError, RewardError

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
    profile_step: Annotated[
        int | None, typer.Option(help="Step to trace with torch's profiler, into RUN/profile/.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Two steps on a tiny model of the same architecture.")
    ] = False,
) -> None:
    """Train, or resume, the run that CONFIG describes; then export the model.

    Keys are overridden by --section.key=value.
    """
    resumable = "stopped before the first step; run the same command to start or resume"
    with _watched(resumable) as watch:
        given = load_config(config, context.args)
        if dry_run:
            from raygrpo.commands.dry_run import print_plan

            print_plan(given)
            return
        from raygrpo.commands.smoke import smoke_run
        from raygrpo.commands.train import run

        small = smoke_run(given, typer.echo) if smoke else contextlib.nullcontext(given)
        with small as chosen:
            outcome = run(chosen, profile_step=profile_step, on_start=lambda: watch("started", {}))
    if not outcome.finished:
        typer.echo(f"stopped, all committed; run the same command to resume ({outcome.run_dir})")
        raise typer.Exit(EXIT_STOPPED)
    if smoke:
        typer.echo("smoke run passed; its directory is removed")
        return
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
    step: Annotated[
        int | None, typer.Option(help="Checkpoint; none: the best, else the last.")
    ] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload it too, as ORG/NAME.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.")] = None,
) -> None:
    """Write the model of a checkpoint, with its card, to RUN/export, and to the hub if asked.

    The hub's token is HF_TOKEN, or that of `hf auth login`. A new repository is private.
    """
    from raygrpo.commands.export import export_run
    from raygrpo.commands.hub import push_run

    with _watched():
        if push_to_hub is None:
            place = str(export_run(run, step))
        else:
            place = push_run(run, push_to_hub, step=step, public=public, branch=revision)
    typer.echo(place)


_Target = Annotated[
    Path, typer.Argument(metavar="CONFIG|RUN", help="YAML file, or directory of a run.")
]
_Step = Annotated[
    str | None,
    typer.Option(help="Checkpoint of a run: a step, best or last; none: the best, else the last."),
]


@app.command(name="eval", context_settings=_OVERRIDES)
def evaluate_model(
    context: typer.Context,
    target: _Target,
    step: _Step = None,
    out: Annotated[Path | None, typer.Option(help="Write the numbers here, as JSON.")] = None,
) -> None:
    """Evaluate the model of a configuration, or of a run's checkpoint, without training.

    Keys are overridden by --section.key=value.
    """
    from raygrpo.commands.evaluate import evaluate

    with _watched() as watch:
        found = evaluate(target, _step(step), context.args, watch, out)
    greedy = f"1 greedy and {found.num_completions} sampled completions each"
    typer.echo(f"{found.model} after {found.step} steps: {found.num_prompts} prompts, {greedy}")
    _print_numbers(found.metrics)


@app.command(name="generate", context_settings=_OVERRIDES)
def generate_groups(
    context: typer.Context,
    target: _Target,
    num_groups: Annotated[
        int | None, typer.Option(min=1, help="Groups; none: train.groups_per_step.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the Parquet file.")] = Path("generated"),
    step: _Step = None,
) -> None:
    """Generate and score a run's first groups without training, and write them as Parquet.

    Shows what a prompt and a reward make of a model. Keys are overridden by --section.key=value.
    """
    from raygrpo.commands.evaluate import generate

    with _watched() as watch:
        made = generate(
            target,
            num_groups=num_groups,
            out=out,
            step=_step(step),
            overrides=context.args,
            on_event=watch,
        )
    typer.echo(f"{made.model}: {made.num_groups} groups in {made.seconds:.1f} s")
    _print_numbers(made.metrics)
    typer.echo(f"completions     {made.path}")


def _step(text: str | None) -> int | str | None:
    if text is None or text in ("best", "last"):
        return text
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is no step, best or last", param_hint="--step")
    return int(text)


class _Watch:
    """Shows on standard error how far a command is."""

    def __init__(self) -> None:
        self.started = False

    def __call__(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Counts groups on a terminal; tells of everything else as a line."""
        self.started = True
        if kind not in ("started", "group"):
            typer.echo(f"{kind.replace('_', ' ')}: {fields}", err=True)
        elif kind == "group" and sys.stderr.isatty():
            typer.echo(f"\r{fields['finished']}/{fields['of']} groups ", err=True, nl=False)
            if fields["finished"] == fields["of"]:
                typer.echo(err=True)


@contextlib.contextmanager
def _watched(stopped: str = "stopped") -> Iterator[_Watch]:
    """Turns failures into exit codes; ``stopped`` is said after a signal.

    Bad input is what is found wrong with it before anything has started.
    """
    watch = _Watch()
    try:
        yield watch
    except RayGrpoError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        bad_input = isinstance(error, _INPUT) and not watch.started
        raise typer.Exit(EXIT_BAD_INPUT if bad_input else EXIT_FAILED) from None
    except Stopped:
        typer.echo(stopped, err=True)
        raise typer.Exit(EXIT_STOPPED) from None


def _print_numbers(metrics: Mapping[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value", box=None)
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.4g}")
    Console().print(table)


@app.command(name="replay", context_settings=_OVERRIDES)
def replay_run(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; none: RUN/replay.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; none: all.")] = None,
) -> None:
    """Train again on the rollouts that RUN has stored, with the learner alone.

    Keys of the run's configuration are overridden by --section.key=value.
    """
    from raygrpo.commands.replay import replay

    def show(step: int, metrics: Mapping[str, float]) -> None:
        shown = {name: metrics[name] for name in ("loss", "grad_norm") if name in metrics}
        typer.echo(f"step {step}  " + "  ".join(f"{n} {v:.6g}" for n, v in shown.items()))

    with _watched("stopped; the same command starts again"):
        done = replay(run, out, steps=steps, overrides=context.args, on_step=show)
    for change in done.changes:
        typer.echo(f"the run changed {change} on the way; the replay used its last configuration")
    typer.echo(f"replayed {done.steps} steps: {done.directory}")


@app.command(context_settings=_OVERRIDES)
def plan(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")],
) -> None:
    """Estimate a run's batch, placement and memory of each actor; exit 2 where it does not fit.

    Reads the model's configuration alone. Keys are overridden by --section.key=value.
    """
    from raygrpo.commands.plan import print_plan

    with _watched():
        print_plan(load_config(path, context.args))


@app.command(name="config", context_settings=_OVERRIDES)
def show_config(
    context: typer.Context,
    path: Annotated[Path | None, typer.Argument(help="YAML file to resolve.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe to print, or to resolve with.")] = None,
) -> None:
    """List every key with its default, unit and meaning; with PATH, print the resolved file.

    --recipe NAME alone prints what that recipe sets.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    if path is not None or recipe is not None:
        chosen = [] if recipe is None else [f"recipe={recipe}"]
        with _watched():
            if path is None:
                typer.echo(dump_recipe(recipe or ""), nl=False)
            else:
                typer.echo(dump_config(load_config(path, [*chosen, *context.args])))
        return
    table = Table("key", Column("type", max_width=30), "default", "unit", "meaning", box=None)
    for row in describe_keys():
        table.add_row(*(escape(cell) for cell in row))
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)


def main() -> None:
    """Entry point of the ``raygrpo`` command."""
    app(prog_name="raygrpo", standalone_mode=True, args=sys.argv[1:])
