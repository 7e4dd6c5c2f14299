"""``python -m dalorra_core.base_models fetch [alias]``: fetch a built-in base model now.

Prints the directory on standard output, progress and errors on standard error.
"""

import argparse
import sys
from collections.abc import Sequence

from dalorra_core.base_models.catalogue import BUILTIN_MODELS, DEFAULT_ALIAS, builtin_model
from dalorra_core.base_models.resolve import resolve_base_model
from dalorra_core.errors import BaseModelError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 1 after a message.

    Args:
        arguments: Command line without the program's name; None reads the real one.
    """
    parser = argparse.ArgumentParser(prog="python -m dalorra_core.base_models")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download and convert a built-in base model once")
    known = ", ".join(BUILTIN_MODELS)
    fetch.add_argument("alias", nargs="?", default=DEFAULT_ALIAS, help=f"one of: {known}")
    chosen = parser.parse_args(arguments)
    try:
        directory = resolve_base_model(builtin_model(chosen.alias).alias)
    except BaseModelError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{directory}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
