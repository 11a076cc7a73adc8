"""What no description can say: whose tokens there are, how many devices are asked for in all, which markers there are."""

import itertools
import os
import re

import schemathesis

TOKENS = itertools.cycle(os.environ["TOKENS"].split())
# For one flavor, and for one action, so many devices in all.
MOST = 127


@schemathesis.auth(refresh_interval=None)
class Token:
    """Each request by the next token: one caller's changes are counted."""

    def get(self, case, context):
        return next(TOKENS)

    def set(self, case, data, context):
        case.headers = {**(case.headers or {}), "X-Auth-Token": data}


def devices(requests):
    requests = requests if isinstance(requests, list) else [requests]
    counts = [request.get("count") if isinstance(request, dict) else None for request in requests]
    # In JSON 8.0 is 8; a number may be text.
    return sum(int(float(count)) if re.fullmatch(r"[0-9]+(\.0)?", str(count)) else 1 for count in counts)


@schemathesis.hook
def filter_body(context, body):
    """No schema can add up."""
    if not isinstance(body, dict):
        return True
    actions = [value for value in body.values() if isinstance(value, dict)]
    lists = [body.get("usb_devices"), *(action.get("usb_devices_requests") for action in actions)]
    return all(devices(requests) <= MOST for requests in lists)


@schemathesis.hook
def filter_failure(context, failure, case, response):
    """Nor can it say which markers there are: one that is spelled right and is none is answered as Nova does, 400. And what is wrong in a
    path is replaced by what schemathesis.toml has for it: a device that was there to be forgotten was asked for rightly."""
    is_forgotten = (case.operation.method.upper(), response.status_code) == ("DELETE", 204) and "{usb_device_id}" in case.operation.path
    if is_forgotten and type(failure).__name__ == "AcceptedNegativeData":
        return False
    return not re.search(r'"Marker [0-9]+ could not be found\."', response.text)


@schemathesis.hook
def after_call(context, case, response):
    with open(os.environ["ANSWERED"], "a", encoding="utf-8") as file:
        file.write(f"{response.status_code} {case.operation.method.upper()} {case.operation.path}\n")
