"""dalorra_core.predictive.scoring: cutting rows into forward passes."""

import pytest
import torch

from dalorra_core.predictive.scoring import padded_token_limit, score_rows
from tests.support.tiny_models import gated_pack, random_rows, tiny_adapter


def test_progress_counts_every_row_and_mass_is_the_mean_over_samples() -> None:
    tiny, rows = tiny_adapter(), random_rows((7, 3, 11))
    z = (torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    pack, seen = gated_pack(tiny.state, z), []
    found = score_rows(
        tiny.model,
        pack,
        rows,
        num_labels=5,
        max_padded_tokens=14,
        label_mass=True,
        on_progress=seen.append,
    )
    assert (sum(seen), len(seen)) == (3, 3)
    singles = [
        score_rows(
            tiny.model,
            pack.narrow(m, m + 1),
            rows,
            num_labels=5,
            max_padded_tokens=500,
            label_mass=True,
        ).label_mass
        for m in range(4)
    ]
    assert found.label_mass is not None
    expected = torch.stack([s for s in singles if s is not None]).mean(0)
    torch.testing.assert_close(found.label_mass, expected, rtol=1e-5, atol=1e-7)
    without = score_rows(tiny.model, pack, rows, num_labels=5, max_padded_tokens=14)
    assert without.label_mass is None
    assert torch.equal(without.log_probs, found.log_probs)


@pytest.mark.parametrize(("device", "limit"), [("cpu", 512), ("cuda", 65536)])
def test_the_default_size_of_a_pass(device: str, limit: int) -> None:
    assert padded_token_limit(torch.device(device)) == limit
