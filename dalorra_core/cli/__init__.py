"""The core's commands, from train to verify. The server adds its own, such as serve."""

import typer

from dalorra_core.cli.bench import bench_app
from dalorra_core.cli.calibrate import calibrate_command
from dalorra_core.cli.evaluate import evaluate_command
from dalorra_core.cli.export import export_command
from dalorra_core.cli.fixing import fix_gates_command
from dalorra_core.cli.importing import import_command
from dalorra_core.cli.inspect import inspect_command
from dalorra_core.cli.predict import predict_command
from dalorra_core.cli.sign import sign_command
from dalorra_core.cli.train import train_command
from dalorra_core.cli.verify import verify_command

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
app.command("fix-gates")(fix_gates_command)
app.command("export")(export_command)
app.command("import")(import_command)
app.command("sign")(sign_command)
app.command("verify")(verify_command)
app.add_typer(bench_app, name="bench")
