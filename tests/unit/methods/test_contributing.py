"""CONTRIBUTING.md: the method it writes out is one."""

import re
import types
from pathlib import Path

import torch

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.state import AdapterState
from dalorra_core.methods.method import Draw

PAGE = Path(__file__).parents[3] / "CONTRIBUTING.md"
SPECS = (TargetSpec("layers.0.q", 6, 4, 0), TargetSpec("lm_head", 6, 5, None))


def test_the_worked_example_is_a_method() -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    module = types.ModuleType("gate_noise")
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    method, config = module.METHOD, module.GateNoiseConfig(std=0.3)
    assert method.name == "gate_noise"
    params = method.init(SPECS, 3, 1, config)
    assert {name: tuple(value.shape) for name, value in params.items()} == method.shapes(
        SPECS, 3, config
    )
    state = AdapterState(SPECS, 3, 2.0, params)
    samples = 4000
    pack = method.predict_pack(state, config, Draw(("x",), samples))
    z = torch.stack([pack.modules[spec.name].z for spec in SPECS])  # (L, M, r)
    count = z.numel()
    assert abs(float(z.double().mean()) - 1) < 5 * 0.3 / count**0.5
    assert abs(float(z.double().var()) - 0.09) < 5 * 0.09 * (2 / count) ** 0.5
