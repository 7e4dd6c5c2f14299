"""The server under load: overload, hot swap, fuzz, soak and the targets of docs/operations.md."""
