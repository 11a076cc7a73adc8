"""Checks device requests as virt-usb's hook and filter read them; needs nothing of Nova.

`request_keys.json` holds the keys of a request and the values that they take. It is generated from
virt-usb's model (`host-runtime/model/src/request_key.rs`); the test program `selectors` of
virt-usb compares the two, and compares what is accepted here with what the model accepts.
"""

from __future__ import annotations

import json
import math
import re
import string
from dataclasses import dataclass
from importlib import resources
from typing import Any

_FILE = resources.files(__package__).joinpath("request_keys.json")
_TABLE = json.loads(_FILE.read_text(encoding="utf-8"))

MAX_DEVICES: int = _TABLE["max_devices"]
MAX_REDIRECTIONS: int = _TABLE["max_redirections"]
REDIRECTION = {"bus": "usb", "type": "spicevmc"}
# ASCII only: the model folds no other letters.
_FOLDED = str.maketrans(string.ascii_uppercase + "_ ", string.ascii_lowercase + "--")


@dataclass(frozen=True)
class Key:
    """A key of a request, as `RequestKey` in virt-usb's model describes it."""

    name: str
    description: str
    # The range of whole numbers, or "any" for all numbers, or None if the value must be text.
    numbers: Any
    pattern: re.Pattern[str]
    is_folded: bool
    is_list: bool

    def is_absent(self, value: Any) -> bool:
        """Whether a value means the same as a missing key."""
        return value is None or (self.is_list and value == [])

    def accepts(self, value: Any) -> bool:
        """Whether a value is valid for the key."""
        if self.is_list:
            items = value if isinstance(value, list) else [value]
            return all(self._is_text(item) for item in items)
        if isinstance(value, (int, float)):
            return not isinstance(value, bool) and self._is_number(value)
        return self._is_text(value)

    def _is_number(self, value: float) -> bool:
        if not math.isfinite(value) or self.numbers is None:
            return False
        if self.numbers == "any":
            return True
        least, most = self.numbers
        return value == int(value) and least <= value <= most

    def _is_text(self, value: Any) -> bool:
        # A lone surrogate, which JSON can escape, is no character.
        if not isinstance(value, str) or any("\ud800" <= sign <= "\udfff" for sign in value):
            return False
        return bool(self.pattern.fullmatch(value.translate(_FOLDED) if self.is_folded else value))


def _key(entry: dict[str, Any]) -> Key:
    # Python has no \p{...}; \w is letters, digits and the underscore, which stands beside them.
    pattern = re.compile(entry["pattern"].replace(r"\p{L}\p{N}_", r"\w"))
    return Key(**{**entry, "pattern": pattern})


KEYS = {entry["name"]: _key(entry) for entry in _TABLE["keys"]}
# The keys that select devices: all but the last.
SELECTORS = tuple(KEYS)[: _TABLE["selectors"]]


def check_devices(entries: list[Any]) -> None:
    """Checks the entries of `usb_devices`.

    Raises ValueError, which says where the first mistake is, if an entry is not valid or the
    entries request more devices than USB permits.
    """
    total = 0
    for at, entry in enumerate(entries):
        try:
            total += _check_device(entry)
        except ValueError as error:
            raise ValueError(f"[{at}]{error}") from error
    if total > MAX_DEVICES:
        raise ValueError(f"{total} devices in total; the maximum is {MAX_DEVICES}")


def _check_device(entry: Any) -> int:
    """Checks an entry and returns the number of devices that it requests."""
    if not isinstance(entry, dict):
        raise ValueError(': wanted an object such as {"vendor_id":"0529","product_id":"0001"}')
    if unknown := sorted(entry.keys() - KEYS.keys()):
        raise ValueError(f": unknown key {unknown[0]!r}; the keys are {', '.join(KEYS)}")
    named = {key: value for key, value in entry.items() if not KEYS[key].is_absent(value)}
    if not named.keys() & set(SELECTORS):
        raise ValueError(f": no selector; wanted at least one of {', '.join(SELECTORS)}")
    if "product_id" in named and "vendor_id" not in named:
        raise ValueError(": product_id without vendor_id")
    for key, value in named.items():
        if not KEYS[key].accepts(value):
            raise ValueError(f".{key}: found {json.dumps(value)}, wanted {KEYS[key].description}")
    count = int(named.get("count", 1))
    if "id" in named and count > 1:
        raise ValueError(".count: wanted 1: an id names one device")
    return count


def check_redirections(entries: list[Any]) -> None:
    """Checks the entries of `usb_redirection_devices`. Raises ValueError if they are not valid."""
    if any(entry != REDIRECTION for entry in entries):
        raise ValueError(f"wanted a list such as {json.dumps([REDIRECTION])}")
    if len(entries) > MAX_REDIRECTIONS:
        raise ValueError(f"{len(entries)} entries; the maximum is {MAX_REDIRECTIONS}")
