"""The table of GRPOConfig's fields against the installed TRL, and the page that is made from it."""

import dataclasses
import enum
import importlib.metadata
from pathlib import Path

import pytest

pytest.importorskip("trl")

from trl import GRPOConfig

from clp_engine.training.trl_compat.fields import FIELDS, TRL_VERSION
from tools import trl_page

PAGE = Path(__file__).parents[2] / "docs" / "migrating-from-trl.md"


def trl_s_defaults():
    for field in dataclasses.fields(GRPOConfig):
        factory = field.default_factory
        value = field.default if factory is dataclasses.MISSING else factory()
        yield field.name, value.value if isinstance(value, enum.Enum) else value


def test_the_table_is_of_the_installed_version():
    assert importlib.metadata.version("trl") == TRL_VERSION


def test_every_field_of_grpo_config_has_exactly_one_fate_and_nothing_else_has():
    names = [name for name, _ in trl_s_defaults()]
    assert sorted(names) == sorted(FIELDS)


def test_the_table_knows_trl_s_defaults():
    assert {name: FIELDS[name].default for name, _ in trl_s_defaults()} == dict(trl_s_defaults())


def test_the_migration_page_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert trl_page.render(text) == text, "run: python -m tools.trl_page docs/migrating-from-trl.md"
    for name in FIELDS:
        assert text.count(f"\n| `{name}` |") == 1 + (FIELDS[name].fate == "other default"), name
