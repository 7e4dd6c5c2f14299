"""Bayesian low-rank adapters for causal language models: train, evaluate, store and predict."""

__all__ = ["__version__"]

__version__ = "0.1.0"
