"""Random streams and the sampling designs drawn from them."""

__all__: list[str] = []
