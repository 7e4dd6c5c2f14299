"""The adapters that are loaded, by name."""

import difflib
from collections.abc import Iterable

from server.errors import ApiError
from server.ports import AdapterCard, Policy

__all__ = ["AdapterRegistry", "close_names", "find_policy", "quoted", "require_policy"]


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


def find_policy(card: AdapterCard, name: str) -> Policy:
    """Return a policy by name.

    Raises:
        ApiError: 422 when the adapter has no policy of that name.
    """
    for policy in card.policies:
        if policy.name == name:
            return policy
    raise ApiError(
        "unknown_policy",
        f"adapter {card.name} has no policy {quoted(name)}; {_known_policies(card)}",
        errors=(
            {
                "pointer": "#/policy/name",
                "close_names": [policy.name for policy in card.policies],
            },
        ),
    )


def require_policy(cards: Iterable[AdapterCard], locked: str | None) -> None:
    """Check that a locked policy exists wherever it could be loosened.

    An adapter without any policy sends everything to review, which nothing can loosen.

    Raises:
        ValueError: An adapter has policies, but none of that name.
    """
    for card in cards:
        if locked is None or not card.policies:
            continue
        if locked not in {policy.name for policy in card.policies}:
            raise ValueError(
                f"locked_policy is {quoted(locked)}, but adapter {card.name} has no policy of that "
                f"name; {_known_policies(card)}"
            )


def _known_policies(card: AdapterCard) -> str:
    names = [policy.name for policy in card.policies]
    return f"it has: {', '.join(names)}" if names else "it has none"


def close_names(name: str, known: Iterable[str]) -> list[str]:
    """Return up to five known names that look like this one, the closest first."""
    return difflib.get_close_matches(name, list(known), n=5, cutoff=0.4)


def quoted(name: str) -> str:
    """Return a client's word in quotes, cut to a length that is safe to send back."""
    return repr(name if len(name) <= 80 else name[:77] + "...")  # noqa: PLR2004 - one line of text
