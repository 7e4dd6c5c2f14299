"""Data files to token batches: read, name labels, lay out prompts, encode, pad."""

__all__: list[str] = []
