"""What `usb:devices` and `usb:redirection_devices` may be in a flavor's extra specs.

It is said when they are set, not when a server is to start.
"""

from __future__ import annotations

import json
import re
from typing import Any

from nova import exception
from nova.api.validation.extra_specs import base

from virt_usb_nova import asked

MAX_REDIRECTIONS = 15
MAX_DEVICES = 127
# As virt-usb's model reads them.
HEX = re.compile(r"(0[xX])?[0-9a-fA-F]{1,4}")
PORT = re.compile(r"\d{1,3}-\d{1,3}(\.\d{1,3}){0,6}")
TAG = re.compile(r"[\w.:/-]{1,64}")
NAMED = ("id", "vendor_id", "product_id", "serial", "port", "class", "tags")

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
            entries = json.loads(text)
        except ValueError as fault:
            raise refuse(name, f"it is no JSON ({fault}); wanted for instance {EXAMPLE[name]}") from fault
        entries = entries if isinstance(entries, list) else [entries]
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
            raise refuse(name, f"{place}: there is no key {unknown[0]!r}; there are {', '.join(NAMED)}, count")
        said = {key: value for key, value in entry.items() if value not in (None, [])}
        if not said.keys() & set(NAMED):
            raise refuse(name, f"{place}: it names nothing: wanted at least one of {', '.join(NAMED)}")
        if "product_id" in said and "vendor_id" not in said:
            raise refuse(name, f"{place}: a product_id alone; wanted the vendor_id too, for product ids are the vendor's own")
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
    if isinstance(value, bool):
        return False
    text = str(value)
    if key == "count":
        return text.isdecimal() and 1 <= int(text) <= MAX_DEVICES
    if key == "id":
        return text.isdecimal() and 1 <= int(text) < 1 << 53
    if key in ("vendor_id", "product_id"):
        return 0 <= value < 1 << 16 if isinstance(value, int) else isinstance(value, str) and bool(HEX.fullmatch(value))
    if key == "port":
        return isinstance(value, str) and bool(PORT.fullmatch(value))
    if key == "tags":
        tags = value if isinstance(value, list) else [value]
        return all(isinstance(tag, str) and bool(TAG.fullmatch(tag)) for tag in tags)
    # Serials and classes have many spellings: the hook reads them.
    return isinstance(value, (str, int))


def redirections(name: str, entries: list[Any]) -> None:
    """There is one kind of them, and as many as a controller has ports."""
    if any(entry != {"bus": "usb", "type": "spicevmc"} for entry in entries):
        raise refuse(name, f"wanted a list such as {EXAMPLE[name]}")
    if len(entries) > MAX_REDIRECTIONS:
        raise refuse(name, f"{len(entries)} entries; wanted at most {MAX_REDIRECTIONS}")


def register() -> list[base.ExtraSpecValidator]:
    """For Nova, by the entry point `nova.api.extra_spec_validators`."""
    return [Validator(name=name, description=text, value={"type": str, "description": text}) for name, text in HELP.items()]
