"""Answers whether the API's JSON schema and Nova's validator accept a request, a request per line.

A line of input is {"entry": ENTRY, "folded": ENTRY, "schema": NAME}: a request as text, the same
with the texts that are read without regard to case in their usual spelling, and the name of the
schema. A line of output holds a 0 or a 1 each for: the schema and the entry, the schema and the
folded entry, Nova's validator and the entry.

The validator of JSON schemas knows what the API's schemas of requests use, and no more: it fails
for other keywords.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "install/nova"))

from virt_usb_nova import asked, device_requests  # noqa: E402

OPENAPI = json.loads((ROOT / "host-runtime/src/api/openapi.json").read_text())
SCHEMAS = OPENAPI["components"]["schemas"]
ANNOTATIONS = {"description", "example"}


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


TYPES = {
    "null": lambda value: value is None,
    "integer": lambda value: is_number(value) and value == int(value),
    "number": is_number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def has_type(value, kinds):
    return any(TYPES[kind](value) for kind in (kinds if isinstance(kinds, list) else [kinds]))


def matches(value, pattern):
    assert pattern.startswith("^") and pattern.endswith("$"), pattern
    python = pattern.replace(r"\p{L}\p{N}_", r"\w")
    return not isinstance(value, str) or bool(re.fullmatch(python, value))


def valid(value, schema):
    """Whether a value is valid for a schema."""
    members = value if isinstance(value, dict) else {}
    items = value if isinstance(value, list) else []
    keywords = {
        "type": lambda kinds: has_type(value, kinds),
        "pattern": lambda pattern: matches(value, pattern),
        "minimum": lambda least: not is_number(value) or value >= least,
        "maximum": lambda most: not is_number(value) or value <= most,
        "anyOf": lambda schemas: any(valid(value, one) for one in schemas),
        "items": lambda item: all(valid(one, item) for one in items),
        "minItems": lambda least: not has_type(value, "array") or len(items) >= least,
        "required": lambda keys: not has_type(value, "object") or set(keys) <= members.keys(),
        "properties": lambda known: all(
            valid(members[key], one) for key, one in known.items() if key in members
        ),
        "additionalProperties": lambda _: members.keys() <= schema["properties"].keys(),
    }
    rules = {keyword: how for keyword, how in schema.items() if keyword not in ANNOTATIONS}
    return all(keywords[keyword](how) for keyword, how in rules.items())


def nova_accepts(text):
    try:
        device_requests.check_devices([asked.read(text, asked.once)])
    except ValueError:
        return False
    return True


for line in sys.stdin:
    question = json.loads(line)
    schema = SCHEMAS[question["schema"]]
    entry, folded = (json.loads(question[key]) for key in ("entry", "folded"))
    answers = (valid(entry, schema), valid(folded, schema), nova_accepts(question["entry"]))
    print(*map(int, answers), flush=True)
