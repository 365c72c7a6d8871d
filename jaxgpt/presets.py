"""Configurations as files: presets in Python, JSON that round-trips, and what differs between two of them."""

import dataclasses
import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from jaxgpt.config import TrainConfig
from jaxgpt.errors import ConfigError, JaxgptError, nearest, require
from jaxgpt.files import read_json

ROOT = Path(__file__).parents[1]


def to_json(config: TrainConfig) -> str:
    """The configuration as indented JSON, of which `validated` makes the same object again."""
    return TypeAdapter(TrainConfig).dump_json(config, indent=2).decode() + "\n"


def validated(kind: type, value: Any, where: str) -> Any:
    """`value`, of JSON's types, as an instance of a dataclass. Raises ConfigError, naming the field, for one that is
    unknown or of another type, and what the dataclass raises."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "unexpected_keyword_argument":
            near = nearest(place.rpartition(".")[2], _names(kind))
            raise ConfigError(f"{where}: unknown key {place}{near}") from None
        raise ConfigError(": ".join(filter(None, [where, place, first["msg"]]))) from None  # a lone surrogate: no place


def _names(kind: Any) -> Iterator[str]:
    """The fields of a dataclass, and of those in it."""
    for field in dataclasses.fields(kind):
        yield field.name
        if dataclasses.is_dataclass(field.type):
            yield from _names(field.type)


def load_preset(name: str) -> TrainConfig:
    """The TrainConfig that `config()` in a Python file returns, or that a .json file holds. A relative path is looked
    up here, then beside train.py. Raises ConfigError when there is no such preset."""
    path = next((path for path in (Path(name), ROOT / name) if path.is_file()), None)
    if path is None:
        presets = [f"configs/{preset.name}" for preset in sorted((ROOT / "configs").glob("*.py"))]
        near = nearest(name, presets) or f"; there are {', '.join(presets) or 'none here, so give a path'}"
        raise ConfigError(f"configuration {name}: there is no such file{near}")
    if path.suffix == ".json":
        return validated(TrainConfig, read_json(path, limit=2**20), str(path))
    require(path.suffix == ".py", f"configuration {name}: it must be a .py preset or a .json file")
    try:
        config = runpy.run_path(str(path)).get("config", lambda: None)()
    except JaxgptError:
        raise
    except Exception as error:  # the user's own code; the usual mistake is a field that does not exist
        near = nearest(str(error).rpartition("keyword argument '")[2].rstrip("'"), _names(TrainConfig))
        what = f"{type(error).__name__}: {error}{near}"  # newer Pythons propose a field themselves
        raise ConfigError(f"configuration {name}: {what}; mend it, --debug shows where") from error
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"configuration {name}: it must define a function config() that returns a TrainConfig")
    return config


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Every field of nested dataclasses that differs, as `section.field -> (old, new)`."""
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(new):
        name, before, after = prefix + field.name, getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(after):
            found |= differences(before, after, f"{name}.")
        elif before != after:
            found[name] = before, after
    return found
