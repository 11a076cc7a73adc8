"""Validator of the extra specs `usb:devices` and `usb:redirection_devices`.

Nova calls it when an extra spec is set. A mistake is then reported to the operator who makes it,
and not to the user whose server does not start.
"""

from __future__ import annotations

from typing import Any

from nova import exception
from nova.api.validation.extra_specs import base

from virt_usb_nova import asked, device_requests

EXAMPLE = {
    "usb:devices": '[{"vendor_id":"0529","product_id":"0001"}]',
    "usb:redirection_devices": '[{"bus":"usb","type":"spicevmc"}]',
}
CHECKS = {
    "usb:devices": device_requests.check_devices,
    "usb:redirection_devices": device_requests.check_redirections,
}
HELP = {
    "usb:devices": (
        f"USB devices of the host for the server, as a JSON list: {EXAMPLE['usb:devices']}. "
        f"An entry has one or more of the keys {', '.join(device_requests.SELECTORS)}, and count. "
        f"Nova stores at most {asked.LONGEST} characters. For a longer list, store it with "
        "'virt-usb flavor set NAME JSON' and write @NAME."
    ),
    "usb:redirection_devices": (
        "USB ports for redirection from a SPICE client, as a JSON list of at most "
        f"{device_requests.MAX_REDIRECTIONS} entries: {EXAMPLE['usb:redirection_devices']}. "
        f"For more than {asked.LONGEST} characters, write @NAME, as for usb:devices."
    ),
}


def refuse(name: str, why: str) -> exception.ValidationError:
    """The error for an extra spec that is not valid."""
    return exception.ValidationError(f"Validation failed; extra spec {name!r}: {why}")


class Validator(base.ExtraSpecValidator):  # type: ignore[misc]
    """Validator of one extra spec. Nova itself can only compare the text with a pattern."""

    def validate(self, name: str, value: str) -> None:
        """Raises ValidationError if the value is not valid."""
        super().validate(name, value)
        if len(value) > asked.LONGEST:
            raise refuse(
                name,
                f"it has {len(value)} characters, and Nova stores at most {asked.LONGEST}: "
                "store it under a name ('virt-usb flavor set NAME JSON') and write @NAME",
            )
        text = value.strip()
        if text.startswith("@"):
            if not text[1:].strip():
                raise refuse(name, "the name after the @ is missing: write @NAME")
            return
        try:
            parsed = asked.read(text, asked.once)
        except ValueError as error:
            example = EXAMPLE[name]
            why = f"invalid JSON ({error}); wanted for instance {example}"
            raise refuse(name, why) from error
        try:
            CHECKS[name](entries(name, parsed))
        except ValueError as error:
            raise refuse(name, str(error)) from error


def entries(name: str, value: Any) -> list[Any]:
    """The requests in a value: a list, one entry, or a flavor with no other key."""
    key = name.replace(":", "_")
    if isinstance(value, dict) and value.keys() == {key}:
        value = value[key]
    return value if isinstance(value, list) else [value]


def register() -> list[base.ExtraSpecValidator]:
    """The validators, for Nova's entry point `nova.api.extra_spec_validators`."""
    value = {name: {"type": str, "description": text} for name, text in HELP.items()}
    return [Validator(name=name, description=HELP[name], value=value[name]) for name in HELP]
