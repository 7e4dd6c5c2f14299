"""dalorra_core.training.settings: settings files, overrides, and what a wrong value is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dalorra_core.errors import ConfigError
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.methods.mle import MleConfig
from dalorra_core.training.settings import TrainConfig, load_config

SMALL = ("name=demo", "data.source=rows")

YAML = """
name: demo
method: {name: dalorra, tau: 0.5}
adapter: {target_modules: [q_proj], layers: [1, 3]}
data: {source: rows, validation_split: null}
optim: {lr: 1e-3, steps: 7}
"""
TOML = """
name = "demo"
[method]
name = "dalorra"
tau = 0.5
[adapter]
target_modules = ["q_proj"]
layers = [1, 3]
[data]
source = "rows"
validation_split = "none-of-these"
[optim]
lr = 1e-3
steps = 7
"""
JSON = json.dumps(
    {
        "name": "demo",
        "method": {"name": "dalorra", "tau": 0.5},
        "adapter": {"target_modules": ["q_proj"], "layers": [1, 3]},
        "data": {"source": "rows", "validation_split": None},
        "optim": {"lr": 1e-3, "steps": 7},
    }
)


def config_of(*overrides: str) -> TrainConfig:
    return load_config(None, [*SMALL, *overrides])


@pytest.mark.parametrize(("suffix", "text"), [("yaml", YAML), ("toml", TOML), ("json", JSON)])
def test_three_formats_say_the_same(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"run.{suffix}"
    path.write_text(text, encoding="utf-8")
    config = load_config(path, ["data.validation_split=null"])
    expected = config_of(
        "method.name=dalorra",
        "method.tau=0.5",
        "adapter.target_modules=[q_proj]",
        "adapter.layers=[1, 3]",
        "data.validation_split=null",
        "optim.lr=0.001",
        "optim.steps=7",
    )
    assert config == expected
    assert isinstance(config.method, DalorraConfig)
    assert (config.optim.lr, config.method.tau, config.adapter.layers) == (1e-3, 0.5, (1, 3))


def test_the_defaults_are_those_of_the_design() -> None:
    """methods.md, sections 4.11 and 9."""
    config = config_of()
    method, optim, adapter = config.method, config.optim, config.adapter
    assert isinstance(method, DalorraConfig)
    assert (method.prior_prob, method.tau, method.mask_lr) == (0.5, pytest.approx(2 / 3), 1e-2)
    assert (method.num_train_samples, method.kl_weight, method.kl_scale) == (1, 1.0, "per_example")
    assert (method.train_masks, method.test_masks) == ("relaxed", "hard")
    assert (optim.lr, optim.eps, optim.weight_decay) == (1e-4, 1e-6, 0.0)
    assert (optim.steps, optim.batch_size, optim.warmup_ratio) == (5000, 4, 0.06)
    assert (adapter.r, adapter.lora_alpha, adapter.scaling) == (8, 16.0, 2.0)
    assert adapter.target_modules == ("q_proj", "v_proj", "lm_head")
    assert config.data.max_tokens == 300
    assert (config.predictive.num_samples, config.predictive.design) == (10, "iid")


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(YAML, encoding="utf-8")
    config = load_config(path, ["optim.steps=9", "method.tau=0.25", "run.seed=3"])
    assert config.optim.steps == 9
    assert config.optim.lr == 1e-3
    assert config.run.seed == 3
    assert isinstance(config.method, DalorraConfig)
    assert config.method.tau == 0.25


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("method=mle",), MleConfig()),
        (("method.name=mle",), MleConfig()),
        (("method=dalorra", "method.tau=0.5"), DalorraConfig(tau=0.5)),
        (("method.tau=0.5",), DalorraConfig(tau=0.5)),
        (("method.tau=5e-1",), DalorraConfig(tau=0.5)),
    ],
)
def test_the_method_and_its_settings_can_be_overridden(
    overrides: tuple[str, ...], expected: DalorraConfig | MleConfig
) -> None:
    assert config_of(*overrides).method == expected


BAD = [
    ("adapter.r=0", "greater than or equal to 1"),
    ("adapter.r=513", "less than or equal to 512"),
    ("adapter.r=8.5", "valid integer"),
    ("adapter.lora_alpha=0", "greater than 0"),
    ("adapter.lora_alpha=.inf", "finite"),
    ("adapter.target_modules=[]", "at least 1 item"),
    ("adapter.layers=[1]", "required"),
    ("method.prior_prob=0", "greater than 0"),
    ("method.prior_prob=1", "less than 1"),
    ("method.tau=0", "greater than 0"),
    ("method.tau=5.5", "less than or equal to 5"),
    ("method.tau=.nan", "finite"),
    ("method.num_train_samples=0", "greater than or equal to 1"),
    ("method.num_train_samples=65", "less than or equal to 64"),
    ("method.kl_weight=-1", "greater than or equal to 0"),
    ("method.kl_weight=.inf", "finite"),
    ("method.kl_scale=per_batch", "'per_example' or 'unit'"),
    ("method.train_masks=hard", "'relaxed' or 'straight_through'"),
    ("method.test_masks=soft", "'hard' or 'relaxed'"),
    ("method.mask_lr=0", "greater than 0"),
    ("data.max_tokens=1", "greater than or equal to 2"),
    ("data.truncate=middle", "'none', 'start' or 'end'"),
    ("data.source=7", "valid string"),
    ("optim.lr=0", "greater than 0"),
    ("optim.lr=.inf", "finite"),
    ("optim.lr=fast", "valid number"),
    ("optim.weight_decay=-0.1", "greater than or equal to 0"),
    ("optim.eps=0", "greater than 0"),
    ("optim.steps=0", "greater than or equal to 1"),
    ("optim.batch_size=0", "greater than or equal to 1"),
    ("optim.gradient_accumulation=0", "greater than or equal to 1"),
    ("optim.warmup_ratio=1", "less than 1"),
    ("optim.warmup_ratio=-0.1", "greater than or equal to 0"),
    ("run.seed=-1", "greater than or equal to 0"),
    ("run.seed=18446744073709551616", "less than 18446744073709551616"),
    ("run.device=tpu", "'auto', 'cpu' or 'cuda'"),
    ("run.precision=float16", "'auto', 'float32' or 'bfloat16'"),
    ("run.attention=flash", "'sdpa' or 'eager'"),
    ("run.checkpoint_every=0", "greater than or equal to 1"),
    ("run.eval_every=0", "greater than or equal to 1"),
    ("run.eval_rows=0", "greater than or equal to 1"),
    ("run.tensorboard=perhaps", "valid boolean"),
    ("predictive.num_samples=0", "greater than or equal to 1"),
    ("predictive.num_samples=257", "less than or equal to 256"),
    ("predictive.seed=-1", "greater than or equal to 0"),
    ("predictive.design=sobol", "'iid', 'stratified' or 'antithetic'"),
    ("name=", "valid string"),
    ("name='../up'", "should match pattern"),
]


@pytest.mark.parametrize(("override", "domain"), BAD)
def test_a_wrong_value_is_refused_with_setting_domain_and_value(override: str, domain: str) -> None:
    key, _, text = override.partition("=")
    with pytest.raises(ConfigError) as caught:
        config_of(override)
    message = str(caught.value)
    assert "the command line: 1 wrong setting(s)" in message
    assert key.rpartition(".")[2] in message.splitlines()[1].partition(": ")[0]
    assert domain in message
    value: Any = yaml.safe_load(text)
    shown = repr(value[0]) if "layers" in key else repr(value)
    assert f"got {shown}" in message or shown in message.partition("; got ")[2]


@pytest.mark.parametrize(
    "method", ["mle", "ensemble", "laplace", "mc_dropout", "c_lora", "rank_dropout", "blob"]
)
def test_a_design_that_the_method_cannot_follow_is_refused(method: str) -> None:
    flips = ("method.test_noise=flipout",) if method == "blob" else ()
    with pytest.raises(ConfigError) as caught:
        config_of(f"method.name={method}", *flips, "predictive.design=stratified")
    line = str(caught.value).splitlines()[1]
    assert line.startswith("  predictive: ")
    assert f"design must be iid for method {method} with these settings, got stratified" in line


@pytest.mark.parametrize("design", ["stratified", "antithetic"])
def test_a_design_of_gates_or_of_noise_is_taken(design: str) -> None:
    for method in ("dalorra", "mask_mixture", "blob"):
        config = config_of(f"method.name={method}", f"predictive.design={design}")
        assert config.predictive.design == design


def test_every_wrong_setting_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: demo\ndata: {source: rows}\noptim: {lr: -1, stepz: 3}\n", "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert f"{path}: 2 wrong setting(s)" in message
    assert "optim.lr: Input should be greater than 0; got -1" in message
    assert "optim.stepz: Extra inputs are not permitted; got 3" in message


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("speed=1", "speed"),
        ("method.taus=1", "method.dalorra.taus"),
        ("data.splits=1", "data.splits"),
        ("method={name: mle, tau: 0.5}", "method.mle.tau"),
    ],
)
def test_an_unknown_setting_is_refused(override: str, where: str) -> None:
    with pytest.raises(ConfigError, match=f"{where}: Extra inputs are not permitted"):
        config_of(override)


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'dalorra', 'mle'.*got \{'name': 'sgld'\}"):
        config_of("method=sgld")


def test_what_must_be_said_is_asked_for() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["data.train_split=x"])
    assert "name: Field required" in str(caught.value)
    assert "data.source: Field required" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lr", r"must read KEY=VALUE.*got 'optim\.lr'"),
        ("=3", "must read KEY=VALUE"),
        ("name.first=x", "name"),
        ("run.seed.low=1", "seed"),
        ("adapter.layers=[1, 2", r"override 'adapter\.layers=\[1, 2': the value cannot be read"),
    ],
)
def test_an_override_that_cannot_be_read_is_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of("run.seed=1", override)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.yaml", b"name: [", "cannot be parsed"),
        ("a.toml", b"name = ", "cannot be parsed"),
        ("a.json", b"{", "cannot be parsed"),
        ("a.yaml", b"- 1\n- 2\n", "must hold a mapping, found list"),
        ("a.json", b"3", "must hold a mapping, found int"),
        ("a.yaml", b"", "must hold a mapping, found NoneType"),
        ("a.yaml", b"\xff\xfe\x00", "cannot read config file"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config file .*none\.yaml"):
        load_config(tmp_path / "none.yaml")


def test_settings_cannot_be_changed_after_they_were_checked() -> None:
    config = config_of()
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = -1.0  # pyright: ignore[reportAttributeAccessIssue]
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config
