"""What Gaussian methods add to LoRA on the shapes of Llama-3.1-8B, from ``Method.shapes`` alone."""

import math

import pytest

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.config import MethodSettings
from dalorra_core.methods import METHODS
from dalorra_core.methods.blob import BlobConfig
from dalorra_core.methods.mask_weight import MaskWeightConfig
from dalorra_core.methods.mle import MleConfig
from dalorra_core.methods.scalabl import ScalablConfig

LLAMA_8B = (
    *(
        TargetSpec(f"model.layers.{i}.self_attn.{name}", 4096, d_out, i)
        for i in range(32)
        for name, d_out in (("q_proj", 4096), ("v_proj", 1024))
    ),
    TargetSpec("lm_head", 4096, 128256, None),
)


def count(config: MethodSettings) -> int:
    shapes = METHODS[config.name].shapes(LLAMA_8B, 8, config)
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(
    ("config", "extra"),
    [
        (BlobConfig(), 2_129_920),
        (ScalablConfig(), 1_040),
        (MaskWeightConfig(), 520 + 2_129_920),
        (MaskWeightConfig(sigma_per="rank"), 520 + 520),
    ],
)
def test_the_published_parameter_counts(config: MethodSettings, extra: int) -> None:
    assert count(MleConfig()) == 4_466_688
    assert count(config) - count(MleConfig()) == extra
