"""Where base models come from: a directory, the hub, or one fetched and converted once."""

__all__: list[str] = []
