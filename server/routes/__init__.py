"""HTTP routes: read a request, call the service, write the answer."""

__all__: list[str] = []
