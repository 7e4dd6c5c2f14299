"""The adapters that are loaded, by name."""

import difflib
from collections.abc import Iterable

from server.errors import ApiError
from server.ports import AdapterCard, Policy

__all__ = ["AdapterRegistry", "close_names", "find_policy"]


class AdapterRegistry:
    """Name -> card. A name that is not there is an error, never another adapter."""

    def __init__(self) -> None:
        self._cards: dict[str, AdapterCard] = {}

    def publish(self, cards: Iterable[AdapterCard]) -> None:
        """Make adapters answerable, by their names."""
        self._cards.update({card.name: card for card in cards})

    @property
    def cards(self) -> tuple[AdapterCard, ...]:
        """All loaded adapters, by name."""
        return tuple(self._cards[name] for name in sorted(self._cards))

    def find(self, model: str | None) -> AdapterCard:
        """Return the adapter a request means.

        Args:
            model: ``name`` or ``name:revision``; None when there is only one adapter to mean.

        Raises:
            ApiError: 404 with close names; 422 when the name is left out and several are loaded.
        """
        if model is None:
            if len(self._cards) == 1:
                return next(iter(self._cards.values()))
            names = ", ".join(sorted(self._cards))
            raise ApiError(
                "invalid_request",
                f"model is required, because several adapters are loaded: {names}",
                errors=({"pointer": "#/model", "code": "missing_field"},),
            )
        name, _, revision = model.partition(":")
        card = self._cards.get(name)
        if card is not None and revision in ("", card.revision):
            return card
        known = [f"{card.name}:{card.revision}"] if card else close_names(name, self._cards)
        advice = f"; close names: {', '.join(known)}" if known else ""
        raise ApiError(
            "model_not_found",
            f"no adapter {quoted(model)} is loaded{advice}",
            errors=({"pointer": "#/model", "close_names": known},),
        )


def find_policy(card: AdapterCard, name: str | None) -> Policy | None:
    """Return the policy a request means: the named one, else the adapter's first, else None.

    Raises:
        ApiError: 422 when the adapter has no policy of that name.
    """
    if name is None:
        return card.policies[0] if card.policies else None
    for policy in card.policies:
        if policy.name == name:
            return policy
    names = [policy.name for policy in card.policies]
    known = f"it has: {', '.join(names)}" if names else "it has none"
    raise ApiError(
        "unknown_policy",
        f"adapter {card.name} has no policy {quoted(name)}; {known}",
        errors=({"pointer": "#/policy/name", "close_names": names},),
    )


def close_names(name: str, known: Iterable[str]) -> list[str]:
    """Return up to five known names that look like this one, the closest first."""
    return difflib.get_close_matches(name, list(known), n=5, cutoff=0.4)


def quoted(name: str) -> str:
    """Return a client's word in quotes, cut to a length that is safe to send back."""
    return repr(name if len(name) <= 80 else name[:77] + "...")  # noqa: PLR2004 - one line of text
