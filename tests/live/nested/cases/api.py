"""The API with real guests and devices."""

import http.client
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from lib.case import case
from lib.shell import expect
from lib.waiting import TIMEOUT_SECONDS, until

from .live import known

PROJECT = "3f0c7a5e9d2b4c1f8a6e5d4c3b2a1908"


class Client:
    """A user with a token."""

    def __init__(self, w, role):
        made = w.product.must(
            "--json", "token", "add", role, "--project", PROJECT, "--role", role
        ).out
        self.headers = {
            "X-Auth-Token": json.loads(made)["token"],
            "Content-Type": "application/json",
        }

    def __call__(self, method, path, body=None):
        """The answer. A slow machine may answer 429 or 503: retry after Retry-After seconds."""
        end = time.monotonic() + TIMEOUT_SECONDS
        while True:
            status, wait, answer = self._ask(method, path, body)
            if status not in (429, 503) or time.monotonic() > end:
                return status, answer
            time.sleep(wait)

    def _ask(self, method, path, body):
        connection = http.client.HTTPConnection("127.0.0.1", 8790, timeout=180)
        connection.request(method, path, json.dumps(body) if body else None, self.headers)
        answer = connection.getresponse()
        return answer.status, int(answer.headers.get("Retry-After", 0)), json.loads(answer.read())

    def act(self, guest, action, *requests):
        return self(
            "POST",
            f"/v3/servers/{guest.uuid}/action",
            {f"{action}_usb_devices": {"usb_devices_requests": list(requests)}},
        )


def message(answer):
    """The message of an error response."""
    (fault,) = answer[1].values()
    return fault["message"]


@case("a stick is plugged in while the guest runs, and attached and detached through the API")
def hot_plug(w):
    w.product.agent.start()
    guest = w.guest("g")
    w.start(guest)
    admin = Client(w, "admin")
    (stick,) = w.drawer.twins(1)
    until(lambda: known(w, stick), "the agent to find the stick")
    (found,) = admin("GET", f"/v3/os-usb-devices?serial={stick.serial}")[1]["usb_devices"]
    status, answer = admin.act(guest, "attach", {"id": found["id"]})
    expect(status == 202 and answer["live"], f"it to be attached: {status} {answer}")
    # The status 202 means that the guest has the device.
    expect(
        w.holds(guest, stick) and w.has_live(guest, stick), "the guest to have it at that moment"
    )
    w.boots_from(guest, stick, reset=True)
    server = admin("GET", f"/v3/servers/{guest.uuid}/os-usb-devices")[1]["server"]
    expect(
        server["status"] == "ACTIVE" and server["usb_devices"][0]["held_by"] == "g",
        f"the server to show it: {server}",
    )
    status, answer = admin.act(guest, "detach", {"id": found["id"]})
    expect(
        status == 202 and answer["usb_devices"][0]["status"] == "available",
        f"it to be detached: {status} {answer}",
    )
    expect(not w.virsh.hostdevs("g") and not w.product.claims_of(guest), "nothing to be left of it")
    member = Client(w, "member")
    status, answer = member.act(guest, "attach", {"id": found["id"]})
    expect(
        status == 404,
        f"a guest without an owner to be visible to administrators only: {status} {answer}",
    )


@case("a hundred concurrent attaches of one device through the API: one guest gets it")
def a_hundred_at_once(w):
    (stick,) = w.drawer.twins(1)
    w.product.agent.start()
    device = until(lambda: known(w, stick), "the agent to find the stick")["id"]
    guests = [w.guest(f"g{n}") for n in range(4)]
    for guest in guests:
        w.start(guest)
    admin = Client(w, "admin")

    # Not by id: an attach of a device that the guest already has would be no conflict.
    def ask(n):
        return admin.act(guests[n % 4], "attach", {"serial": stick.serial})

    with ThreadPoolExecutor(100) as crowd:
        answers = list(crowd.map(ask, range(100)))
    told = Counter((answer[0], answer[0] != 202 and message(answer)) for answer in answers)
    statuses = sorted(status for status, _ in answers)
    expect(statuses == [202] + [409] * 99, f"one 202 and 99 times 409: {told}")
    holders = [guest for guest in guests if w.holds(guest, stick)]
    expect(
        len(holders) == 1
        and [g.name for g in guests if w.virsh.hostdevs(g.name)] == [holders[0].name],
        "one guest to have it",
    )
    for n, answer in enumerate(answers):
        if answer[0] == 409:
            its_own = guests[n % 4] is holders[0]
            wanted = (
                "serves another request of this instance"
                if its_own
                else f"is held by instance {holders[0].uuid} ({holders[0].name})"
            )
            expect(
                f"USB device {device} {wanted}" in message(answer),
                f"the refusal to say that {holders[0].name} has it: {answer}; in all: {told}",
            )
    w.boots_from(holders[0], stick, reset=True)
