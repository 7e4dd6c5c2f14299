"""Bodies of the routes that administrators use: adapters and aliases."""

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictStr

from server.schemas.fields import Name, Strict
from server.schemas.receipts import Body

__all__ = [
    "AdapterEntry",
    "AdapterList",
    "AliasEntry",
    "AliasList",
    "AliasRequest",
    "AliasShadow",
    "AliasTarget",
    "LoadRequest",
    "PinRequest",
    "Removed",
    "ShadowForm",
    "StoredEntry",
    "TargetForm",
]

PlainName = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Weight = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1e6)]
PositiveShare = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1)]


class LoadRequest(Strict):
    """Which adapter to load, and under which name."""

    source: PlainName = Field(description="Name of a directory under the adapter root.")
    name: PlainName | None = Field(
        default=None, description="Name to serve it under; the one in its manifest if left out."
    )
    pin: StrictBool = Field(
        default=False, description="Keep it in memory however long nobody asks it."
    )
    activate: StrictBool = Field(
        default=True,
        description=(
            "Let the bare name mean this revision from now on. The revision it meant before then "
            "leaves, unless it is pinned or an alias names it. With `false` the new one is asked "
            "as `name:revision` or through an alias."
        ),
    )


class PinRequest(Strict):
    """Whether an adapter stays in memory."""

    pinned: StrictBool


class TargetForm(Strict):
    """An adapter that may answer, and how often."""

    model: Name = Field(description="`name` or `name:revision`.")
    weight: Weight = Field(default=1.0, description="Relative to the other targets' weights.")


class ShadowForm(Strict):
    """An adapter that answers besides, unseen."""

    model: Name = Field(description="`name` or `name:revision`.")
    share: PositiveShare = Field(description="Share of the requests that it answers too.")


class AliasRequest(Strict):
    """What an alias stands for."""

    targets: Annotated[list[TargetForm], Field(min_length=1, max_length=16)]
    shadow: ShadowForm | None = None


class AdapterEntry(Body):
    """An adapter that this server knows."""

    id: str = Field(description="`name:revision`.")
    object: Literal["adapter"] = "adapter"
    name: str
    revision: str
    source: str | None = Field(
        description="Its directory under the adapter root; null for one given at start."
    )
    current: bool = Field(description="Whether the bare name means it.")
    state: Literal["resident", "evicted"] = Field(
        description="`evicted`: put out of memory; it is loaded again when it is asked."
    )
    pinned: bool
    aliases: list[str] = Field(description="Aliases that name it.")
    method: str
    num_classes: int
    memory_bytes: int = Field(description="What it takes while it is in memory.")
    signed_by: str | None = Field(description="Id of the trusted key that signed it.")
    in_flight: int = Field(description="Requests that it is answering now.")
    idle_s: float = Field(description="Seconds since it was last asked.")
    loaded_at: int = Field(description="When it was last loaded, in seconds since 1970.")
    saved: bool | None = Field(
        default=None, description="After a change: whether the next start will repeat it."
    )


class StoredEntry(Body):
    """A directory under the adapter root, as its manifest describes it; nothing is verified."""

    source: str
    name: str
    revision: str | None
    method: str | None
    num_classes: int
    num_bytes: int
    signed: bool = Field(description="Whether a signature lies beside it; it is not checked here.")
    calibrated: bool
    problem: str | None = Field(description="Why it cannot be read; null when it can.")


class AdapterList(Body):
    """All known adapters, what lies under the adapter root, and the memory they may take."""

    object: Literal["list"] = "list"
    data: list[AdapterEntry]
    stored: list[StoredEntry]
    memory_bytes: int = Field(description="What the adapters in memory take together.")
    memory_limit_bytes: int | None = Field(description="What they may take; null without bound.")


class AliasTarget(Body):
    """A target of an alias."""

    model: str
    weight: float
    share: float = Field(description="Share of the requests that it answers.")


class AliasShadow(Body):
    """The shadow of an alias."""

    model: str
    share: float


class AliasEntry(Body):
    """A name that stands for adapters."""

    id: str
    object: Literal["alias"] = "alias"
    targets: list[AliasTarget]
    shadow: AliasShadow | None
    saved: bool | None = Field(
        default=None, description="After a change: whether the next start will repeat it."
    )


class AliasList(Body):
    """All aliases."""

    object: Literal["list"] = "list"
    data: list[AliasEntry]


class Removed(Body):
    """What was taken out."""

    id: str
    removed: Literal[True] = True
    saved: bool
