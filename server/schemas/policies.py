"""How a request says which policy decides, and the what-if questions about policies."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.ports import Limit, ScoreName
from server.schemas.fields import Name, NonNegative, Share, Strict, StrictShare

__all__ = [
    "FORM_TAGS",
    "EvaluateRequest",
    "LimitSet",
    "NamedPolicy",
    "PolicyForm",
    "RiskCoverageQuery",
    "RiskPolicy",
    "ThresholdPolicy",
]

_NAMED, _RISK, _THRESHOLDS = "<named>", "<risk>", "<thresholds>"

_SCORE_OF: dict[str, ScoreName] = {
    "min_confidence": "confidence",
    "max_predictive_entropy": "predictive_entropy",
    "max_mutual_information": "mutual_information",
    "min_label_mass": "label_mass",
    "min_combined": "combined",
}


class NamedPolicy(Strict):
    """One of the adapter's policies, by its name."""

    name: Name


class RiskPolicy(Strict):
    """The certified policy with the largest target risk that is at most ``max_risk``."""

    max_risk: StrictShare = Field(
        description="Largest share of errors among accepted answers, above 0 and below 1."
    )


class LimitSet(Strict):
    """Limits on scores; one that is left out is no limit. A value equal to a limit passes."""

    min_confidence: Share | None = Field(default=None, description="0 to 1.")
    max_predictive_entropy: NonNegative | None = Field(default=None, description="Nats, from 0.")
    max_mutual_information: NonNegative | None = Field(
        default=None, description="Nats, from 0. Holds at one num_samples only."
    )
    min_label_mass: Share | None = Field(default=None, description="0 to 1.")
    min_combined: Share | None = Field(
        default=None,
        description="On `combined_score`, 0 to 1; for calibrated adapters that have it.",
    )

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if not self.limits():
            allowed = ", ".join(_SCORE_OF)
            raise PydanticCustomError(
                "no_limit", "needs at least one limit of {allowed}", {"allowed": allowed}
            )
        return self

    def limits(self) -> tuple[Limit, ...]:
        """Return the limits that are set, in the order of the fields."""
        values: dict[ScoreName, float | None] = {
            score: getattr(self, field) for field, score in _SCORE_OF.items()
        }
        return tuple(Limit(score, value) for score, value in values.items() if value is not None)


class ThresholdPolicy(LimitSet):
    """Limits of the request's own: accept what passes all of them."""

    abstain: LimitSet | None = Field(
        default=None, description="Abstain from what fails any of these; nothing if left out."
    )


FORM_TAGS: dict[object, type[BaseModel]] = {
    _NAMED: NamedPolicy,
    _RISK: RiskPolicy,
    _THRESHOLDS: ThresholdPolicy,
    "abstain": LimitSet,
}
"""Tags of the branches below (and the one field with fields of its own) -> what is allowed there.

``<`` cannot begin a field name, so that pointers can leave the tags out.
"""


def _form(value: object) -> str | None:
    """Return which form a policy has; None when it has none, or more than one."""
    if isinstance(value, BaseModel):
        return next(tag for tag, model in _BRANCHES.items() if type(value) is model)
    if not isinstance(value, dict):
        return None
    forms = {_FORM_OF.get(str(key)) for key in value} - {None}
    if len(forms) > 1:
        return None
    return forms.pop() if forms else _THRESHOLDS  # unknown names: say which ones there are


_BRANCHES: dict[str, type[BaseModel]] = {
    _NAMED: NamedPolicy,
    _RISK: RiskPolicy,
    _THRESHOLDS: ThresholdPolicy,
}
_FORM_OF = {name: tag for tag, model in _BRANCHES.items() for name in model.model_fields}

PolicyForm = Annotated[
    Annotated[NamedPolicy, Tag(_NAMED)]
    | Annotated[RiskPolicy, Tag(_RISK)]
    | Annotated[ThresholdPolicy, Tag(_THRESHOLDS)],
    Discriminator(
        _form,
        custom_error_type="policy_forms",
        custom_error_message=(
            'must be an object of one form: {"name": ...}, {"max_risk": ...}, or limits such as '
            '{"min_confidence": ...}'
        ),
    ),
]


class EvaluateRequest(Strict):
    """What would a policy do? Answered from the rows the adapter was calibrated on."""

    model: Name | None = Field(
        default=None,
        description="Adapter, as `name` or `name:revision`. May be left out when one is loaded.",
    )
    policy: PolicyForm
    out_of_scope_share: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, lt=1)] | (
        None
    ) = Field(
        default=None,
        description=(
            "Assumed share of out-of-scope questions, from 0 and below 1; what the adapter's first "
            "certificate assumes if left out, or 0 without one."
        ),
    )
    delta: StrictShare = Field(
        default=0.1, description="The risk's upper bound is wrong with at most this chance."
    )


class RiskCoverageQuery(BaseModel):
    """The query of a risk-coverage curve."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    score: (
        Literal["confidence", "predictive_entropy", "mutual_information", "label_mass", "combined"]
        | None
    ) = Field(
        default=None,
        description="Score whose threshold varies; that of the adapter's first policy if left out.",
    )
    out_of_scope_share: Annotated[float, Field(allow_inf_nan=False, ge=0, lt=1)] | None = Field(
        default=None,
        description=(
            "Assumed share of out-of-scope questions, from 0 and below 1; what the adapter's first "
            "certificate assumes if left out, or 0 without one."
        ),
    )
    delta: Annotated[float, Field(allow_inf_nan=False, gt=0, lt=1)] = Field(
        default=0.1, description="Each upper bound is wrong with at most this chance."
    )
