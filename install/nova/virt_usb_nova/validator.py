"""What `usb:devices` and `usb:redirection_devices` may be in a flavor's extra specs.

It is said when they are set, not when a server is to start.
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
# As virt-usb's model reads them.
HEX = re.compile(r"(0[xX])?[0-9a-fA-F]{1,4}")
PORT = re.compile(r"[0-9]{1,3}-[0-9]{1,3}(\.[0-9]{1,3}){0,6}")
PATH = re.compile(
    r"[A-Za-z0-9_.:@,+-]{1,200}-usbv0{0,2}[1-9]-0:(?P<ports>[0-9]{1,3}(\.[0-9]{1,3}){0,6})"
)
TAG_SIGNS = "-_.:/"
CLASS = re.compile(r"(0x)?[0-9a-f]{1,2}")
CLASSES = (
    "per-interface", "audio", "communications", "hid", "physical", "image", "printer", "mass-storage", "hub", "cdc-data", "smart-card",
    "content-security", "video", "healthcare", "audio-video", "billboard", "type-c-bridge", "diagnostic", "wireless", "miscellaneous",
    "application-specific", "vendor-specific",
)  # fmt: skip
NAMED = ("id", "vendor_id", "product_id", "serial", "port", "path", "class", "tags")

HELP = {
    "usb:devices": (
        "The USB devices of the host that the server gets, as a JSON list: "
        '[{"vendor_id":"0529","product_id":"0001"}]. An entry names one or more of id, vendor_id, product_id, serial, '
        "port, class, tags, and count. Nova keeps 255 characters: for more write @NAME, and store NAME with "
        "'virt-usb flavor set NAME JSON'."
    ),
    "usb:redirection_devices": (
        "The USB ports that a SPICE client fills, as a JSON list of at most 15 entries: "
        '[{"bus":"usb","type":"spicevmc"}]. For more than 255 characters write @NAME, as for usb:devices.'
    ),
}


def refuse(name: str, why: str) -> exception.ValidationError:
    return exception.ValidationError(f"Validation failed; extra spec {name!r}: {why}")


class Validator(base.ExtraSpecValidator):  # type: ignore[misc]
    """Nova's own checks a text by a pattern; JSON has none."""

    def validate(self, name: str, value: str) -> None:
        super().validate(name, value)
        if len(value) > asked.LONGEST:
            raise refuse(
                name,
                f"it has {len(value)} characters, and Nova keeps {asked.LONGEST}: store it under a name "
                "('virt-usb flavor set NAME JSON') and write @NAME",
            )
        text = value.strip()
        if text.startswith("@"):
            if not text[1:].strip():
                raise refuse(name, "no name follows the @: write @NAME")
            return
        try:
            value = asked.read(text)
        except ValueError as fault:
            raise refuse(
                name, f"it is no JSON ({fault}); wanted for instance {EXAMPLE[name]}"
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
    """Each names something that can be, and all together no more than USB can have."""
    total = 0
    for at, entry in enumerate(entries):
        place = f"[{at}]"
        if not isinstance(entry, dict):
            raise refuse(name, f"{place}: wanted an object such as {EXAMPLE[name][1:-1]}")
        if unknown := sorted(entry.keys() - {*NAMED, "count"}):
            raise refuse(
                name,
                f"{place}: there is no key {unknown[0]!r}; there are {', '.join(NAMED)}, count",
            )
        said = {
            key: value
            for key, value in entry.items()
            if value is not None and not (key == "tags" and value == [])
        }
        if not said.keys() & set(NAMED):
            raise refuse(
                name, f"{place}: it names nothing: wanted at least one of {', '.join(NAMED)}"
            )
        if "product_id" in said and "vendor_id" not in said:
            raise refuse(
                name,
                f"{place}: a product_id alone; wanted the vendor_id too, for product ids are the vendor's own",
            )
        for key, value in said.items():
            if not right(key, value):
                raise refuse(name, f"{place}.{key}: {json.dumps(value)} is none")
        count = int(said.get("count", 1))
        if "id" in said and count > 1:
            raise refuse(name, f"{place}.count: wanted 1, for an id names one device")
        total += count
    if total > MAX_DEVICES:
        raise refuse(name, f"{total} devices in all; USB has at most {MAX_DEVICES}")


def right(key: str, value: Any) -> bool:
    """Whether a value can stand at that key."""
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
    """There is one kind of them, and as many as a controller has ports."""
    if any(entry != {"bus": "usb", "type": "spicevmc"} for entry in entries):
        raise refuse(name, f"wanted a list such as {EXAMPLE[name]}")
    if len(entries) > MAX_REDIRECTIONS:
        raise refuse(name, f"{len(entries)} entries; wanted at most {MAX_REDIRECTIONS}")


def register() -> list[base.ExtraSpecValidator]:
    """For Nova, by the entry point `nova.api.extra_spec_validators`."""
    return [
        Validator(name=name, description=text, value={"type": str, "description": text})
        for name, text in HELP.items()
    ]
