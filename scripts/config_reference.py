"""Write the table of settings in docs/training.md from the settings classes.

Run it after a change of those models: ``python scripts/config_reference.py``. A test fails while
the page and the models differ. Only what stands between the two markers is rewritten.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dalorra_core.errors import ConfigError
from dalorra_core.training.settings import TrainConfig

__all__ = ["BEGIN", "END", "PAGE", "main", "reference", "with_reference"]

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
BEGIN = "<!-- config reference: written by scripts/config_reference.py, do not edit -->"
END = "<!-- end of config reference -->"

_HEADER = "| key | domain | default | meaning |\n|---|---|---|---|"
_TYPES = {
    "boolean": "true or false",
    "integer": "integer",
    "null": "`null`",
    "number": "number",
    "string": "text",
}

_Schema = dict[str, Any]


def reference() -> str:
    """Return the reference as Markdown: one table for each group of settings, in file order."""
    schema = TrainConfig.model_json_schema()
    groups = "\n\n".join(
        "\n".join((f"### {heading}", "", *_lead(group, heading), _HEADER, *_rows(prefix, group)))
        for heading, prefix, group in _groups(schema)
    )
    return groups + "\n"


def with_reference(page: str) -> str:
    """Return ``page`` with the text between the two markers replaced by the reference.

    Raises:
        ConfigError: If the markers are not there exactly once, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ConfigError(f"the page must hold {BEGIN!r} and then {END!r}, each once")
    return f"{before}{BEGIN}\n\n{reference()}\n{END}{after}"


def main() -> int:
    """Rewrite the page in place and say whether it changed."""
    old = PAGE.read_text(encoding="utf-8")
    new = with_reference(old)
    if new != old:
        PAGE.write_text(new, encoding="utf-8")
    sys.stdout.write(f"{PAGE.name}: {'rewritten' if new != old else 'up to date'}\n")
    return 0


def _groups(schema: _Schema) -> Iterator[tuple[str, str, _Schema]]:
    """Yield (heading, prefix of the keys, schema) of the top level and of each group."""
    yield "Top level", "", schema
    for name, field in schema["properties"].items():
        members = [_resolved(option, schema) for option in _options(field)]
        for member in members:
            if member.get("type") == "object":
                own = member["properties"].get("name", {}).get("const")
                heading = f"`{name}`" if own is None else f"`{name}`: `{own}`"
                yield heading, f"{name}.", member


def _options(field: _Schema) -> list[_Schema]:
    return field.get("oneOf") or [field]


def _resolved(field: _Schema, schema: _Schema) -> _Schema:
    reference_to = field.get("$ref")
    return field if reference_to is None else schema["$defs"][reference_to.rpartition("/")[2]]


def _lead(group: _Schema, heading: str) -> tuple[str, ...]:
    return () if heading == "Top level" else (str(group["description"]), "")


def _rows(prefix: str, group: _Schema) -> Iterator[str]:
    """Yield the table's rows; a field that is a group of its own has a table, not a row."""
    for name, field in group["properties"].items():
        if "$ref" in field or ("oneOf" in field and not prefix):
            continue
        default = f"`{_shown(field['default'])}`" if "default" in field else "required"
        cells = (f"`{prefix}{name}`", _domain(field), default, _meaning(field))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _meaning(field: _Schema) -> str:
    if "const" in field and "description" not in field:
        return "Chooses this method."
    return str(field["description"]).replace("<", "&lt;")  # <split> would be taken for a tag


def _shown(value: object) -> str:
    """Return a default as YAML that gives it back (numbers to six digits)."""
    if isinstance(value, list):
        return f"[{', '.join(_shown(item) for item in value)}]"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return str(value["name"])  # settings of a method
    return value if isinstance(value, str) else json.dumps(value)


def _domain(field: _Schema) -> str:
    """Return the values a field may have, in words."""
    if "oneOf" in field:
        names = ", ".join(f"`{name}`" for name in field["discriminator"]["mapping"])
        return f"{names}, or the settings of one of them"
    if "anyOf" in field:
        return " or ".join(_domain(option) for option in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return _list_domain(field)
    if "pattern" in field:
        return f"text matching `{field['pattern']}`"
    return _TYPES[field["type"]] + _bounds(field)


def _list_domain(field: _Schema) -> str:
    if "prefixItems" in field:
        items = ", ".join(_domain(item) for item in field["prefixItems"])
        return f"list of {len(field['prefixItems'])}: [{items}]"
    least = f", at least {field['minItems']}" if "minItems" in field else ""
    return f"list of {_domain(field['items'])}{least}"


def _bounds(field: _Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {_number(field[key])}" for key, sign in signs.items() if key in field]
    return f" {' and '.join(found)}" if found else ""


def _number(value: float) -> str:
    """Return a bound; a large power of two as such, since its digits say nothing."""
    exponent = int(value).bit_length() - 1
    is_large_power = exponent >= 16 and value == 2**exponent  # noqa: PLR2004  65536 and more
    return f"2^{exponent}" if is_large_power else f"{value:g}"


if __name__ == "__main__":
    sys.exit(main())
