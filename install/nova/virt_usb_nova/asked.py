"""What a request asks for, read as the hook reads it from the domain that Nova makes of it."""

from __future__ import annotations

import json
from typing import Any, Callable

DEVICES = ("usb:devices", "usb_devices")
REDIRECTION = ("usb:redirection_devices", "usb_redirection_devices")
# Nova keeps no more of an extra spec's value.
LONGEST = 255


class Wrong(ValueError):
    """What the flavor says cannot be read."""


def one(key: str, text: str, stored: Callable[[str], str | None]) -> dict[str, Any]:
    """What the value of one extra spec asks for, as a flavor: its list alone, one entry, a whole flavor, or `@NAME`."""
    text = text.strip()
    if text.startswith("@"):
        return named(text[1:], stored)
    try:
        value = json.loads(text)
    except ValueError as fault:
        raise Wrong(f"{key}: {fault}") from fault
    return value if isinstance(value, dict) and key in value else {key: value}


def named(name: str, stored: Callable[[str], str | None]) -> dict[str, Any]:
    """What the stored flavor of that name asks for."""
    text = stored(name)
    if text is None:
        raise Wrong(f"no flavor of the name {name!r} is stored: 'virt-usb flavor set' stores one")
    try:
        value = json.loads(text)
    except ValueError as fault:
        raise Wrong(f"the stored flavor {name!r}: {fault}") from fault
    if not isinstance(value, dict):
        raise Wrong(f"the stored flavor {name!r} is no object")
    return value


def flavor(spec_obj: Any, stored: Callable[[str], str | None], by_name: bool = False) -> dict[str, Any] | None:
    """The devices that the request asks for, as a flavor of virt-usb; None: it asks for none.

    Redirection asks nothing of a host, and is not part of it.
    """
    asked = getattr(spec_obj, "flavor", None)
    specs: dict[str, Any] = dict(getattr(asked, "extra_specs", None) or {})
    text = next((str(specs[key]) for key in DEVICES if str(specs.get(key) or "").strip()), None)
    if text is not None:
        found = one("usb_devices", text, stored)
    elif by_name and asked is not None and stored(asked.name) is not None:
        found = named(asked.name, stored)
    else:
        return None
    devices = found.get("usb_devices")
    return {"usb_devices": devices} if devices else None


def at_name(spec_obj: Any) -> str | None:
    """`@NAME`, where that is what the extra spec says."""
    specs = dict(getattr(getattr(spec_obj, "flavor", None), "extra_specs", None) or {})
    text = next((str(specs[key]).strip() for key in DEVICES if str(specs.get(key) or "").strip()), "")
    return text if text.startswith("@") else None
