"""Adds what the API's description cannot express: valid tokens, removable resources, device totals, and markers."""

import collections
import itertools
import os
import re

import schemathesis

# What is there to be removed once (run), by the parameter that names it, and below how many prefixes.
REMOVABLE = {
    "usb_device_id": range(7, 485),
    "flavor_name": [f"f{n}" for n in range(12, 70)],
    "grant_name": [f"f{n}" for n in range(12, 70)],
}
PREFIXES = 4

# An action that is always served, and the server that it is asked of (host.toml).
SERVED = {"set_usb_owner": {"project_id": "erp-team"}}, "33333333-2222-4333-8444-555555555555"

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
    return sum(
        int(float(count)) if re.fullmatch(r"[0-9]+(\.0)?", str(count)) else 1 for count in counts
    )


# What a call has not removed yet, by its path.
_shares = {}
# How many right requests each call has had.
_asked = collections.Counter()


def removes_what_is_there(case):
    """Each path has a share of its own of what can be removed."""
    path = case.operation.path
    for name in case.path_parameters.keys() & REMOVABLE.keys():
        if path not in _shares:
            number = sum(f"{{{name}}}" in other for other in _shares)
            _shares[path] = iter(REMOVABLE[name][number::PREFIXES])
        case.path_parameters[name] = next(_shares[path], case.path_parameters[name])


@schemathesis.hook
def before_call(context, case, kwargs):
    """Where chance serves few right requests some are replaced by one that is served."""
    method, path = case.operation.method.upper(), case.operation.path
    if case.meta is None or case.meta.generation.mode.is_negative:
        return
    number = _asked[method, path]
    _asked[method, path] += 1
    if method == "DELETE" and number % 2 == 0:
        removes_what_is_there(case)
    if path.endswith("/servers/{server_id}/action") and number % 8 == 0:
        case.body, case.path_parameters["server_id"] = SERVED


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
    is_forgotten = (case.operation.method.upper(), response.status_code) == (
        "DELETE",
        204,
    ) and "{usb_device_id}" in case.operation.path
    if is_forgotten and type(failure).__name__ == "AcceptedNegativeData":
        return False
    return not re.search(r'"Marker [0-9]+ could not be found\."', response.text)


@schemathesis.hook
def after_call(context, case, response):
    with open(os.environ["ANSWERED"], "a", encoding="utf-8") as file:
        file.write(
            f"{response.status_code} {case.operation.method.upper()} {case.operation.path}\n"
        )
