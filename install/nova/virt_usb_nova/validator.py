"""Check `usb:devices` and `usb:redirection_devices` in a flavor's extra specs.

A user learns of an error when setting them, and not when a server starts.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from nova import exception
from nova.api.validation.extra_specs import base

from virt_usb_nova import asked

MAX_REDIRECTIONS = 15
MAX_DEVICES = 127
# The same formats as in virt-usb's model (host-runtime/model).
HEX = re.compile(r"(0[xX])?[0-9a-fA-F]{1,4}")
PORT = re.compile(r"[0-9]{1,3}-[0-9]{1,3}(\.[0-9]{1,3}){0,6}")
PATH = re.compile(
    r"[A-Za-z0-9_.:@,+-]{1,200}-usbv0{0,2}[1-9]-0:(?P<ports>[0-9]{1,3}(\.[0-9]{1,3}){0,6})"
)
TAG_SIGNS = "-_.:/"
CLASS = re.compile(r"(0x)?[0-9a-f]{1,2}")
CLASSES = (
"per-interface", "audio", "communications", "hid", "physical", "image", "printer",
"mass-storage", "hub", "cdc-data", "smart-card", "content-security", "video", "healthcare",
"audio-video", "billboard", "type-c-bridge", "diagnostic", "wireless", "miscellaneous",
"application-specific", "vendor-specific",
)  # fmt: skip
NAMED = ("id", "vendor_id", "product_id", "serial", "port", "path", "class", "tags")

HELP = {
    "usb:devices": (
        "USB devices of the host that the server gets, as a JSON list: "
        '[{"vendor_id":"0529","product_id":"0001"}]. An entry has one or more of id, vendor_id, '
        "product_id, serial, port, class, tags, and count. The limit is 255 characters. For a "
        "longer list, write @NAME and store NAME with 'virt-usb flavor set NAME JSON'."
    ),
    "usb:redirection_devices": (
        "USB ports for devices of a SPICE client, as a JSON list of at most 15 entries: "
        '[{"bus":"usb","type":"spicevmc"}]. For more than 255 characters, write @NAME, as for '
        "usb:devices."
    ),
}


def refuse(name: str, why: str) -> exception.ValidationError:
    return exception.ValidationError(f"Validation failed; extra spec {name!r}: {why}")


class Validator(base.ExtraSpecValidator):  # type: ignore[misc]
    """A validator for JSON. Nova's own class only matches patterns."""

    def validate(self, name: str, value: str) -> None:
        super().validate(name, value)
        if len(value) > asked.LONGEST:
            raise refuse(
                name,
                f"it has {len(value)} characters, Nova allows {asked.LONGEST}: store it under a "
                "name ('virt-usb flavor set NAME JSON') and write @NAME",
            )
        text = value.strip()
        if text.startswith("@"):
            if not text[1:].strip():
                raise refuse(name, "the name after the @ is missing: write @NAME")
            return
        try:
            value = asked.read(text)
        except ValueError as fault:
            raise refuse(
                name, f"invalid JSON ({fault}); wanted, for example, {EXAMPLE[name]}"
            ) from fault
        key = name.replace(":", "_")
        if isinstance(value, dict) and value.keys() == {key}:
            value = value[key]
        entries = value if isinstance(value, list) else [value]
        if name == "usb:devices":
            devices(name, entries)
        else:
            redirections(name, entries)


EXAMPLE = {
    "usb:devices": '[{"vendor_id":"0529","product_id":"0001"}]',
    "usb:redirection_devices": '[{"bus":"usb","type":"spicevmc"}]',
}


def devices(name: str, entries: list[Any]) -> None:
    """Check each entry, and the total number of devices."""
    total = 0
    for at, entry in enumerate(entries):
        place = f"[{at}]"
        if not isinstance(entry, dict):
            raise refuse(name, f"{place}: wanted an object such as {EXAMPLE[name][1:-1]}")
        if unknown := sorted(entry.keys() - {*NAMED, "count"}):
            raise refuse(
                name,
                f"{place}: unknown key {unknown[0]!r}; known keys: {', '.join(NAMED)}, count",
            )
        said = {
            key: value
            for key, value in entry.items()
            if value is not None and not (key == "tags" and value == [])
        }
        if not said.keys() & set(NAMED):
            raise refuse(name, f"{place}: no selector: wanted at least one of {', '.join(NAMED)}")
        if "product_id" in said and "vendor_id" not in said:
            raise refuse(
                name,
                f"{place}: product_id without vendor_id: each vendor has its own product ids",
            )
        for key, value in said.items():
            if not right(key, value):
                raise refuse(name, f"{place}.{key}: {json.dumps(value)} is invalid")
        count = int(said.get("count", 1))
        if "id" in said and count > 1:
            raise refuse(name, f"{place}.count: wanted 1, because an id names one device")
        total += count
    if total > MAX_DEVICES:
        raise refuse(name, f"{total} devices in total; wanted at most {MAX_DEVICES}")


def right(key: str, value: Any) -> bool:
    """Whether a value is valid for that key."""
    if key == "tags":
        return all(
            isinstance(tag, str) and is_tag(tag)
            for tag in (value if isinstance(value, list) else [value])
        )
    if isinstance(value, float) and value.is_integer() and key != "serial":
        value = int(value)
    if isinstance(value, bool) or not isinstance(
        value, (str, int) if key != "serial" else (str, int, float)
    ):
        return False
    text = str(value)
    if key in ("count", "id"):
        most = MAX_DEVICES if key == "count" else (1 << 53) - 1
        return text.isascii() and text.isdecimal() and len(text) <= 16 and 1 <= int(text) <= most
    if key in ("vendor_id", "product_id"):
        return 0 <= value < 1 << 16 if isinstance(value, int) else bool(HEX.fullmatch(text))
    if key == "port":
        return (
            isinstance(value, str)
            and bool(PORT.fullmatch(value))
            and all(1 <= int(part) <= 255 for part in re.split("[-.]", value))
        )
    if key == "path":
        found = PATH.fullmatch(value) if isinstance(value, str) else None
        return found is not None and all(
            1 <= int(part) <= 255 for part in found["ports"].split(".")
        )
    if key == "class":
        plain = text.lower().replace("_", "-").replace(" ", "-")
        return (
            0 <= value <= 255
            if isinstance(value, int)
            else plain in CLASSES or bool(CLASS.fullmatch(plain))
        )
    return 1 <= len(text) <= 126 and not any(
        unicodedata.category(sign) in ("Cc", "Cs") for sign in text
    )


def is_tag(text: str) -> bool:
    return 1 <= len(text) <= 64 and all(sign.isalnum() or sign in TAG_SIGNS for sign in text)


def redirections(name: str, entries: list[Any]) -> None:
    """Check each entry, and that a controller has enough ports."""
    if any(entry != {"bus": "usb", "type": "spicevmc"} for entry in entries):
        raise refuse(name, f"wanted a list such as {EXAMPLE[name]}")
    if len(entries) > MAX_REDIRECTIONS:
        raise refuse(name, f"{len(entries)} entries; wanted at most {MAX_REDIRECTIONS}")


def register() -> list[base.ExtraSpecValidator]:
    """The validators, for Nova's entry point `nova.api.extra_spec_validators`."""
    return [
        Validator(name=name, description=text, value={"type": str, "description": text})
        for name, text in HELP.items()
    ]
