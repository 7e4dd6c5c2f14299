"""From held-out rows to decisions: how thresholds are chosen."""

__all__: list[str] = []
