"""From tokens to label probabilities: the fused forward, the label head and the predictor."""

__all__: list[str] = []
