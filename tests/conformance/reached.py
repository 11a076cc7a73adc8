"""Check that the agent still serves, and that each call has succeeded, below each prefix."""

import collections
import json
import sys
import urllib.request

URL, TOKEN, ANSWERED = sys.argv[1:]


def get(path):
    with urllib.request.urlopen(
        urllib.request.Request(URL + path, headers={"X-Auth-Token": TOKEN})
    ) as answer:
        return json.load(answer)


devices = get("/v2.1/os-usb-devices")["usb_devices"]
assert len(devices) == 4, devices
statuses = {
    f"{method.upper()} {path}": collections.Counter()
    for path, item in get("/openapi.json")["paths"].items()
    for method in item
}
with open(ANSWERED, encoding="utf-8") as file:
    for line in file:
        status, call = line.rstrip("\n").split(" ", 1)
        statuses[call][status] += 1
for call, counted in sorted(statuses.items()):
    print(f"{call}: " + ", ".join(f"{status} x{n}" for status, n in sorted(counted.items())))
missed = [
    call
    for call, counted in statuses.items()
    if not any(status.startswith("2") for status in counted)
]
if missed:
    sys.exit(f"calls that never succeeded: {', '.join(missed)}")
