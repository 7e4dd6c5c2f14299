"""dalorra_core.artifact.manifest: what a label set may say besides its labels."""

import pytest
from pydantic import ValidationError

from dalorra_core.artifact.manifest import LabelsRef


def test_an_older_label_set_scores_a_question_over_its_own_choices() -> None:
    assert LabelsRef.model_validate({"labels": ["A", "B"], "token_ids": [1, 2]}).union == ()


def test_a_union_holds_labels_of_the_adapter_only() -> None:
    values = {"labels": ["A", "B", "E"], "token_ids": [1, 2, 3]}
    assert LabelsRef.model_validate({**values, "union": ["A", "B"]}).union == ("A", "B")
    with pytest.raises(ValidationError, match=r"labels of the adapter only, got \['C', 'D'\]"):
        LabelsRef.model_validate({**values, "union": ["A", "D", "C"]})
