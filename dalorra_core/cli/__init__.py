"""The core's commands: train, evaluate, calibrate, predict and inspect. The server adds serve."""

import typer

from dalorra_core.cli.calibrate import calibrate_command
from dalorra_core.cli.evaluate import evaluate_command
from dalorra_core.cli.inspect import inspect_command
from dalorra_core.cli.predict import predict_command
from dalorra_core.cli.train import train_command

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Uncertainty-aware classification with language models.",
)
app.command("train")(train_command)
app.command("evaluate")(evaluate_command)
app.command("calibrate")(calibrate_command)
app.command("predict")(predict_command)
app.command("inspect")(inspect_command)
