"""Training objectives: the Bernoulli KL and the negative ELBO."""

__all__: list[str] = []
