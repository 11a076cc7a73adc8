"""What a request asks for, read as the hook reads it from the domain that Nova makes of it."""

from __future__ import annotations

import json
from typing import Any, Callable

DEVICES = ("usb:devices", "usb_devices")
REDIRECTION = ("usb:redirection_devices", "usb_redirection_devices")
# Nova keeps no more of an extra spec's value.
LONGEST = 255

# What a question says for the stored flavor of a name; None: none is stored.
Stored = Callable[[str], Any]


class Wrong(ValueError):
    """What the flavor says cannot be read."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a duplicate key, which readers would interpret differently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice"
        )
    return found


def read(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """JSON; ValueError: it is none, or nested too deeply to be any that is meant."""
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError as fault:
        raise ValueError("it is nested too deeply") from fault


def extra_spec(spec_obj: Any) -> tuple[str, str] | None:
    """The extra spec that requests devices, and its value; None if the flavor has none."""
    specs = dict(getattr(getattr(spec_obj, "flavor", None), "extra_specs", None) or {})
    said = ((key, str(specs.get(key) or "").strip()) for key in DEVICES)
    return next(((key, text) for key, text in said if text), None)


def flavor(key: str, text: str, stored: Stored) -> Any:
    """The request in that extra spec: a list, one entry, a whole flavor, or `@NAME`. None: nothing.

    Redirection asks nothing of a host, and is not part of it.
    """
    if text.startswith("@"):
        name = text[1:].strip()
        found = stored(name)
        if found is None:
            raise Wrong(
                f"no flavor of the name {name!r} is stored: 'virt-usb flavor set' stores one"
            )
        return devices(found)
    try:
        value = read(text, once)
    except ValueError as fault:
        raise Wrong(f"{key}: {fault}") from fault
    whole = isinstance(value, dict) and "usb_devices" in value
    return devices(value if whole else {"usb_devices": value})


def devices(found: Any) -> Any:
    """A flavor without its redirections; None if it requests no devices. A name stays a name."""
    if not isinstance(found, dict):
        return found
    wanted = found.get("usb_devices")
    return None if wanted is None or wanted == [] else {"usb_devices": wanted}
