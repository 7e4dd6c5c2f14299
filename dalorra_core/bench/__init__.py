"""A grid of methods, tasks and seeds: trained, scored and compared by one command."""

__all__: list[str] = []
