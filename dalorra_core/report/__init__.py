"""Figures of what was measured; matplotlib is imported when one is drawn."""

__all__: list[str] = []
