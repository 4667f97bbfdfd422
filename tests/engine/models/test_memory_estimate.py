"""What `info` says about memory is what training then has."""

import pytest
from engine.conftest import CONFIGS, build_model, build_policy

from clp_engine.core.errors import ConfigError
from clp_engine.core.sizes import size
from clp_engine.models.memory import by_conditioning, estimate, skeleton

FORMS = [
    {"conditioning": "lora"},
    {"conditioning": "lora", "rank": (2, 6)},
    {"conditioning": "full"},
    {"conditioning": "attention"},
    {"conditioning": "logit"},
    {"conditioning": "logit", "rank": 32},
    {"conditioning": "attention+lora"},
    {"conditioning": "prompt"},
    {"conditioning": "none", "carrier": "full"},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_the_estimate_is_what_the_policy_has(family, form):
    policy = build_policy(family, **form)
    trained = sum(p.numel() for p in policy.adapter_parameters().values())
    options = {"rank": 4, **form}
    memory = estimate(build_model(family), options.pop("conditioning"), 2, **options)
    assert memory.trained == trained and memory == policy.memory
    assert memory.total == memory.base + 4 * 4 * trained


# The untied head of the test model t5-v1.1 is not in its configuration.
@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"t5-v1.1"}))
def test_a_model_need_not_be_loaded(family, tmp_path):
    model = build_model(family)
    model.config.save_pretrained(tmp_path)
    empty = skeleton(tmp_path)
    assert all(p.is_meta for p in empty.parameters())
    assert by_conditioning(empty, 3) == by_conditioning(model, 3)


def test_a_missing_configuration_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the configuration of"):
        skeleton(tmp_path)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (14 * 2**30, "14 GiB")]
)
def test_sizes_read_well(count, text):
    assert size(count) == text
