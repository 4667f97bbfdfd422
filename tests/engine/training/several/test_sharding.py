"""Settings of sharding, and what it refuses, with the reason and a remedy."""

import pytest

from clp_engine.core.errors import ConfigError
from clp_engine.policy.references import FrozenReference
from clp_engine.training.parallel.sharding import ShardedBase, ShardSettings, check_own

WHOLE_DELTAS = ShardedBase(None, ShardSettings(), None, [], {"layer.delta": None})
FACTORS = ShardedBase(None, ShardSettings(), None, [], {})


class Another:
    pass


@pytest.mark.parametrize(
    "fsdp, config, words",
    [
        ("hybrid_shard", None, "hybrid_shard is not here"),
        (None, {"reshard_after_forward": True}, "without fsdp"),
        ("full_shard", {"version": 1}, "FSDP1"),
        ("full_shard", {"tensor_parallel": 2}, "tensor_parallel is not here"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(fsdp, config, words):
    with pytest.raises(ConfigError, match=words):
        ShardSettings.of(fsdp, config)


def test_fsdp_config_may_be_a_file_as_in_transformers(tmp_path):
    path = tmp_path / "fsdp.json"
    path.write_text('{"fsdp_reshard_after_forward": false}')
    assert ShardSettings.of("full_shard", str(path)) == ShardSettings(reshard_after_forward=False)
    with pytest.raises(ConfigError, match="none.json is damaged"):
        ShardSettings.of("full_shard", str(tmp_path / "none.json"))


def test_parts_of_a_users_own_that_read_deltas_are_refused_where_these_are_cut():
    with pytest.raises(ConfigError, match="optimizers: .* leave it out"):
        check_own(WHOLE_DELTAS, object(), None)
    with pytest.raises(ConfigError, match="reference=Another: .* leave it out"):
        check_own(WHOLE_DELTAS, None, Another())
    check_own(WHOLE_DELTAS, None, FrozenReference())
    for whole in (None, FACTORS):
        check_own(whole, object(), Another())
