"""Looking things up by name: policies of an adapter, and names that look alike."""

import difflib
from collections.abc import Iterable

from server.errors import ApiError
from server.ports import AdapterCard, Policy

__all__ = ["close_names", "find_policy", "quoted", "require_policy"]


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
