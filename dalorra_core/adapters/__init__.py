"""Low-rank adapters whose factors are lent to the layers for one forward pass."""

__all__: list[str] = []
