"""Strings with ``{fields}``: split, check, fill; no examples, no wording.

Filling never looks at what was filled in, so a text that itself holds ``{text}`` stays as it is.
"""

import string
from collections.abc import Collection, Mapping
from functools import lru_cache

from dalorra_core.errors import ConfigError

__all__ = ["check_fields", "fill", "fill_around"]


@lru_cache(maxsize=256)
def _segments(template: str) -> tuple[tuple[str, str | None], ...]:
    """Return (literal, field that follows or None) pairs in order.

    Raises:
        ConfigError: A brace is not closed, or a field has a format or conversion.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"template {template!r} is not well formed ({error}); "
            "write {{ and }} for braces that are text"
        ) from error
    for _, field, spec, conversion in parsed:
        if spec or conversion:
            raise ConfigError(
                f"template {template!r} must have plain fields such as {{text}}, "
                f"got a format or conversion on {field!r}"
            )
    return tuple((literal, field) for literal, field, _, _ in parsed)


def check_fields(
    template: str, *, once: Collection[str], setting: str, optional: Collection[str] = ()
) -> None:
    """Refuse a template that lacks a field, repeats one or has one nobody fills.

    Args:
        template: A string with ``{fields}``.
        once: Fields that must appear exactly once.
        setting: What the template is, for the message.
        optional: Fields that may appear any number of times.

    Raises:
        ConfigError: Names the setting, the fields allowed and the template.
    """
    found = [field for _, field in _segments(template) if field is not None]
    needed = " and ".join(f"{{{field}}}" for field in once)
    for field in once:
        if found.count(field) != 1:
            raise ConfigError(
                f"{setting} must contain {needed} exactly once, got {found.count(field)} times "
                f"{{{field}}} in {template!r}"
            )
    unknown = sorted(set(found) - {*once, *optional})
    if unknown:
        raise ConfigError(
            f"{setting} must have no fields besides {needed}, got {{{unknown[0]}}} in {template!r}"
        )


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return the template with every field replaced by its value.

    Example:
        >>> fill("{label}) {text}", {"label": "A", "text": "the sun"})
        'A) the sun'
    """
    return "".join(
        literal + ("" if field is None else values[field]) for literal, field in _segments(template)
    )


def fill_around(template: str, values: Mapping[str, str], body: str) -> tuple[str, str]:
    """Return what stands before and after the field ``body``, all other fields filled.

    Args:
        template: Has ``{body}`` once.
        values: Values of all fields but ``body``.
        body: Name of the field to leave open.

    Example:
        >>> fill_around("Read: {text} Label:", {}, "text")
        ('Read: ', ' Label:')
    """
    before: list[str] = []
    after: list[str] = []
    side = before
    for literal, field in _segments(template):
        side.append(literal)
        if field == body:
            side = after
        elif field is not None:
            side.append(values[field])
    return "".join(before), "".join(after)
