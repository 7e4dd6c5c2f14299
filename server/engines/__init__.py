"""Engines: the only place in the server that imports torch."""

__all__: list[str] = []
