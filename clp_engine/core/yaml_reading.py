"""Read configuration files and flag values as YAML. An unreadable value raises a ConfigError that says where it is."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from clp_engine.core.errors import ConfigError, shown

# The most values in a file, with every use of an alias counted: a few lines of aliases can expand to more than memory holds.
_MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue  # construct_mapping of the base class raises for this key
            if key in lines:
                raise ConfigError(f"lines {lines[key]} and {line} both give {shown(key)}; leave one out")
            lines[key] = line
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            if isinstance(error, ConfigError) or not isinstance(node, yaml.ScalarNode):
                raise
            # For example a date that does not exist (2024-99-99), or an integer of thousands of digits.
            raise ConfigError(
                f"line {node.start_mark.line + 1}: {shown(node.value)} cannot be read ({error}); a text belongs in quotes"
            ) from error


def read_file(path: str) -> dict[str, Any]:
    """The settings in a YAML file, by name."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{shown(path)} is not YAML: {error}") from error
    values = _parsed(text, path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected names and values, such as 'max_steps: 500'")
    return {str(name): value for name, value in values.items()}


def read_flag(text: str, config: type, name: str) -> Any:
    """The value of a flag: its text read as YAML, or 'a,b' as a list if the setting takes a list."""
    hint = str(config.__annotations__[name])
    if hint.startswith("dict"):
        return _parsed(text, name)
    if "list" in hint and "," in text or hint.startswith("list"):
        element = (lambda part: part) if "list[str]" in hint else (lambda part: _parsed(part, name))
        return [element(part.strip()) for part in text.split(",")]
    return text if "str" in hint else _parsed(text, name)


def _parsed(text: str, source: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source} is not YAML of settings: it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error


def _check_size(node: yaml.Node) -> None:
    waiting, count = [node], 0
    while waiting:
        node, count = waiting.pop(), count + 1
        if count > _MOST_VALUES:
            raise ConfigError(f"more than {_MOST_VALUES:,} values, aliases written out; expected settings")
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
