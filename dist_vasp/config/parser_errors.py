"""The remarks of jsonargparse, in one sentence that names key, value and what was expected."""

from __future__ import annotations

import re
from dataclasses import fields

from dist_vasp.command_line import did_you_mean
from dist_vasp.config.schema import Config, Stage

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list of {epochs, lr}",
}


def known_keys() -> list[str]:
    """Every `section.key` of the configuration."""
    keys = []
    for section in fields(Config):
        maker = section.default_factory
        keys += (
            [f"{section.name}.{f.name}" for f in fields(maker)]
            if isinstance(maker, type)
            else [section.name]
        )  # type: ignore[arg-type]
    return keys


def readable(message: str) -> str:
    message = (
        " ".join(message.split())
        .replace("Parser key ", "")
        .replace("<class '", "")
        .replace("'>", "")
        .replace("typing.", "")
    )
    unknown = (
        re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
        or re.search(r"unrecognized arguments: --()([^\s=]+)", message)
        or re.search(r"Option '()([\w.]+)' is not accepted", message)
    )
    if unknown:
        key = ".".join(part for part in unknown.groups() if part)
        guess = did_you_mean(key, known_keys()).removeprefix(", ")
        hint = f"{guess} " if guess else ""
        return (
            f"{key} is not a key of the configuration; {hint}`--help-all` lists every key with its "
            "type, default and meaning"
        )
    return f"{_of_type(message)}; `--help-all` lists every key with its type, default and meaning"


def _of_type(message: str) -> str:
    """jsonargparse's remarks on types in our words."""
    key = r'"([\w.]+)"'
    inner = re.search(rf"{key}: Problem with given class_path '[\w.]+': (.*)", message)
    if inner:
        return f"{inner[1]}: {_of_type(inner[2])}"
    wrong = re.search(rf"{key}: Expected an? (.+?)\. Got value: (.*)", message)
    if wrong:
        choice = re.fullmatch(r"Literal\[(.*)\]", wrong[2])
        expected = f"one of {choice[1]}" if choice else _TYPES.get(wrong[2], wrong[2])
        return f"{_name(wrong[1])} is {wrong[3]!r}, expected {expected}"
    union = re.search(rf"{key}: Does not validate .*Union subtypes .*Given value: (.*)", message)
    if union:
        return f"{union[1]} is {union[2]!r}, expected true, false or null"
    section = re.search(rf"{key}: Unable to load config '(.*?)'", message)
    if section:
        return (
            f"{section[1]} is {section[2]!r}, expected a section of keys such as "
            f"--{section[1]}.KEY VALUE"
        )
    stray = re.fullmatch(r"unrecognized arguments: ([^-].*)", message)
    if stray:
        return f"{stray[1]!r} follows no option; name a configuration with --config FILE"
    return message.removeprefix("argument ")


def _name(key: str) -> str:
    """A key of the configuration as it is, an option of a command with its dashes."""
    return (
        key
        if "." in key or key in {f.name for f in fields(Config)} | {f.name for f in fields(Stage)}
        else f"--{key}"
    )
