"""Options declared once, as dataclass fields. Flags, checks and the JSON form are derived from the declaration."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

from utils.errors import ConfigError, FlagError

Config = TypeVar("Config")
_MAX_NUMBER = 2**53  # up to which a float represents every integer


@dataclass(frozen=True)
class Declaration:
    """The declaration of an option field: its help text, its permitted values and how its flag is parsed."""

    help: str
    choices: tuple[Any, ...] | None
    above: float | None
    minimum: float | None
    maximum: float | None
    aliases: tuple[str, ...]
    parse: Callable[[str], Any] | None

    def problem(self, value: Any) -> str | None:
        """Why `value` is not permitted, or None if it is."""
        if self.choices is not None and value not in self.choices:
            return f"is one of {', '.join(map(str, self.choices))}, got {value!r}"
        if isinstance(value, str) and not value.strip():
            return "is empty; give a value, or drop the flag"
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return None
        if not abs(value) <= _MAX_NUMBER:  # nor is it NaN
            return f"must be a number up to {_MAX_NUMBER}, got {value}"
        low = -math.inf if self.minimum is None else self.minimum
        high = math.inf if self.maximum is None else self.maximum
        if low <= value <= high and (self.above is None or value > self.above):
            return None
        if self.maximum is not None:
            lower = f"({self.above:g}" if self.above is not None else f"[{self.minimum:g}"
            return f"must lie in {lower}, {self.maximum:g}], got {value}"
        if self.above == 0:
            return f"must be positive, got {value}"
        return f"must not be negative, got {value}" if self.minimum == 0 else f"must be at least {low:g}, got {value}"


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    above: float | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    aliases: Sequence[str] = (),
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """Declare a dataclass field that is also a command-line flag of the same name.

    Args:
        default: value of the field if the flag is not given.
        help: text for `--help`.
        choices: the permitted values; None permits all.
        above, minimum, maximum: bounds of a number, or of every element of a tuple of numbers.
        aliases: further names of the flag, which `--help` does not list.
        parse: converts the text of the flag; None converts by the type hint of the field, see `parse_tuple` for tuples.
    """
    permitted = None if choices is None else tuple(choices)
    declaration = Declaration(help, permitted, above, minimum, maximum, tuple(aliases), parse)
    return dataclasses.field(default=default, metadata={"option": declaration})


def declarations(config: Any) -> dict[str, Declaration]:
    """The declared options of a dataclass or of an instance of one, by field name."""
    fields = dataclasses.fields(config)
    return {item.name: item.metadata["option"] for item in fields if "option" in item.metadata}


class Options:
    """Base class of option dataclasses. Creating an instance checks every value against its declaration.

    Raises:
        ConfigError: a value is not permitted; the message names the flag and what is permitted.
    """

    def __post_init__(self) -> None:
        for name, declaration in declarations(self).items():
            for element in _elements(getattr(self, name)):
                problem = None if element is None else declaration.problem(element)
                if problem:
                    raise ConfigError(f"--{name} {problem}")


def _elements(value: Any) -> Iterator[Any]:
    """The elements of a tuple, which may be nested, or the value itself."""
    if isinstance(value, tuple):
        for part in value:
            yield from _elements(part)
    else:
        yield value


def require(condition: bool, message: str) -> None:
    """Raise a `ConfigError` with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


# ---------------------------------------------------------------------------------------------------- flags


def parse_bool(text: str) -> bool:
    """Parse `True`, `yes`, `1`, ... and `False`, `no`, `0`, ... in any case, as the original did."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def parse_tuple(text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Parse values separated by commas: `1,0.25` to (1.0, 0.25) if `kind` is float, and the empty text to ()."""
    parts = [part.strip() if kind is str else part for part in text.split(",")]
    try:
        return tuple(kind(part) for part in parts if part)
    except ValueError:
        expected = "integers like 70,90" if kind is int else "numbers like 1,0.25"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None


@dataclass(frozen=True)
class Flags:
    """The flags that were given on a command line, by name."""

    given: Mapping[str, Any]

    def apply(self, config: Config) -> Config:
        """A copy of `config` in which every field that was given as a flag has the value of the flag."""
        names = {item.name for item in dataclasses.fields(config)}  # type: ignore[arg-type]
        return dataclasses.replace(config, **{k: v for k, v in self.given.items() if k in names})  # type: ignore[type-var]


class Parser(argparse.ArgumentParser):
    """Raises a `FlagError` instead of ending the process, and accepts no abbreviated flags."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **keywords)

    def error(self, message: str) -> NoReturn:
        raise FlagError(f"{message} (see {self.prog} --help)")


def parse_flags(description: str, groups: Sequence[Any], argv: Sequence[str] | None = None) -> Flags:
    """Parse a command line whose flags are the declared options of `groups`.

    Args:
        description: text for `--help`.
        groups: instances of the options; `--help` shows their values as defaults.
        argv: arguments of the command line; None means those of the process.

    Raises:
        FlagError: a flag is unknown, its value is malformed or not permitted, or flags contradict each other.
    """
    parser = Parser(description=description)
    for group in groups:
        section = parser.add_argument_group((group.__doc__ or "").split("\n")[0].rstrip("."))
        hints = typing.get_type_hints(type(group))
        for name, declaration in declarations(group).items():
            _add_flag(section, name, declaration, hints[name], getattr(group, name))
    namespace = parser.parse_args(argv)
    flags = Flags({name: value for name, value in vars(namespace).items() if value is not None})
    try:
        for group in groups:
            flags.apply(group)
    except ConfigError as error:
        raise FlagError(str(error)) from None
    return flags


def _add_flag(section: Any, name: str, declaration: Declaration, hint: Any, default: Any) -> None:
    if isinstance(default, tuple):  # as it is typed
        default = ",".join(map(str, default)) or "none"
    shown = "" if default is None else f" (default: {default})"
    keywords: dict[str, Any] = {"help": declaration.help + shown, "dest": name}
    kind = _plain_type(hint)
    if kind is bool:
        keywords |= {"nargs": "?", "const": True, "type": parse_bool, "metavar": "BOOL"}
    elif declaration.parse:
        keywords |= {"type": declaration.parse}
    elif typing.get_origin(kind) is tuple:  # `Options` checks the choices of every element
        keywords |= {"type": partial(parse_tuple, kind=typing.get_args(kind)[0])}
    else:
        keywords |= {"type": kind, "choices": declaration.choices}
    section.add_argument(f"--{name}", **keywords)
    for alias in declaration.aliases:
        section.add_argument(f"--{alias}", **keywords | {"help": argparse.SUPPRESS})


def _plain_type(hint: Any) -> Any:
    """`str` for `str | None`, and the hint itself otherwise."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


# ----------------------------------------------------------------------------------------------------- JSON


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a configuration to plain dictionaries, lists, strings and numbers."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def from_dict(cls: type[Config], values: Any, where: str) -> Config:
    """Invert `to_dict`. Absent fields take their defaults.

    A class with a static method `upgrade`, which takes `values` and `where`, translates the fields of earlier versions.

    Raises:
        ConfigError: a field is malformed; the message names `where`, the field and what was expected.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected an object with the fields of {cls.__name__}, got {values!r}")
    hints = typing.get_type_hints(cls)
    upgrade: Callable[[Mapping[str, Any], str], Mapping[str, Any]] | None = getattr(cls, "upgrade", None)
    if upgrade is not None:
        values = upgrade(values, where)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(sorted(hints))}")
    try:
        return cls(**{name: _convert(hints[name], value, f"{where}: {name}") for name, value in values.items()})
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    except TypeError as error:  # a required field is absent
        raise ConfigError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType) and value is None:
        return None
    kind = _plain_type(hint)
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        kinds = typing.get_args(kind)
        repeated = kinds[0] if kinds[-1] is Ellipsis else None
        if repeated is None and len(kinds) != len(value):
            raise ConfigError(f"{where}: expected {len(kinds)} values, got {value!r}")
        return tuple(_convert(repeated or kinds[i], part, f"{where}[{i}]") for i, part in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value
