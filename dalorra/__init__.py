"""What a program imports that asks a Dalorra server: it needs httpx and pydantic, and no model."""

__all__: list[str] = []
