"""Training: the step, the loop, checkpoints, and evaluation on held-out rows."""

__all__: list[str] = []
