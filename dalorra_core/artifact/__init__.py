"""Artifact v1: one adapter as a directory of JSON and safetensors, every byte accounted for."""

__all__: list[str] = []
