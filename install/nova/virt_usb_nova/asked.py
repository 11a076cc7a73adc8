"""Read the devices that a request asks for, as the hook reads them from Nova's domain XML."""

from __future__ import annotations

import json
from typing import Any, Callable

DEVICES = ("usb:devices", "usb_devices")
REDIRECTION = ("usb:redirection_devices", "usb_redirection_devices")
# Nova's limit for the value of an extra spec, in characters.
LONGEST = 255

# A function that returns the flavor for a question, by its name; None if none is stored.
Stored = Callable[[str], Any]


class Wrong(ValueError):
    """The flavor's request is invalid."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a duplicate key, which readers interpret differently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return found


def constant(name: str) -> Any:
    """Refuse `NaN` and `Infinity`, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is not JSON")


def read(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON. Raises ValueError if the text is not JSON or is nested too deeply."""
    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError as fault:
        raise ValueError("it is nested too deeply") from fault


def extra_spec(spec_obj: Any) -> tuple[str, str] | None:
    """The extra spec that requests devices, and its value; None if the flavor has none."""
    specs = dict(getattr(getattr(spec_obj, "flavor", None), "extra_specs", None) or {})
    said = ((key, str(specs.get(key) or "").strip()) for key in DEVICES)
    return next(((key, text) for key, text in said if text), None)


def flavor(key: str, text: str, stored: Stored) -> Any:
    """The request in that extra spec: a list, one entry, a whole flavor, or `@NAME`.

    None if it requests no device. Redirections are left out, because any host can serve them.
    """
    if text.startswith("@"):
        name = text[1:].strip()
        found = stored(name)
        if found is None:
            raise Wrong(f"no flavor named {name!r} is stored: create it with 'virt-usb flavor set'")
        return devices(found)
    try:
        value = read(text, once)
    except ValueError as fault:
        raise Wrong(f"{key}: {fault}") from fault
    whole = isinstance(value, dict) and "usb_devices" in value
    return devices(value if whole else {"usb_devices": value})


def devices(found: Any) -> Any:
    """A flavor without its redirections; None if it requests no devices. A name is unchanged."""
    if not isinstance(found, dict):
        return found
    wanted = found.get("usb_devices")
    return None if wanted is None or wanted == [] else {"usb_devices": wanted}
