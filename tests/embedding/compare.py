"""Measure a question about 10 000 candidates, and the same rules in plain Python, host by host.

    compare.py [--hosts N] [--rounds N]

Prints the times as a JSON object, in milliseconds, and fails if the answers differ. A call includes
all that a scheduler does for a question: write it as JSON, join the names of the candidates, ask,
and split the answer.
"""

import argparse
import collections
import functools
import json
import statistics
import time

import component
import module

# Half of the hosts have two free keys, and the others have one.
KEY = {"vendor_id": "0529", "product_id": "0001"}
REQUESTS = [{**KEY, "count": 2}]
OTHERS = [
    ("046d", "0825", "0e"),
    ("072f", "2200", "0b"),
    ("0781", "5583", "08"),
    ("1050", "0407", "03"),
]
DEVICES = 20


def host(number):
    node = number + 2
    keys = 2 if number % 2 == 0 else 1
    kinds = [("0529", "0001", "ff")] * 2 + [OTHERS[at % len(OTHERS)] for at in range(DEVICES - 2)]
    devices = []
    for at, (vendor, product, interface) in enumerate(kinds):
        free = at < keys if at < 2 else (number + at) % 5 > 0
        devices.append(
            {
                "id": (node - 1) * 1_000_000 + at + 1,
                "compute_node_id": node,
                "address": f"usb_1_{at + 2}",
                "product_id": product,
                "vendor_id": vendor,
                "bus_id": 1,
                "device_id": at + 2,
                "port_id": at + 1,
                "status": "available" if free else "claimed",
                "status_reason": None,
                "extra_info": None,
                "instance_uuid": None,
                "port_path": f"1-{at + 1}",
                "serial": None,
                "serial_kind": "missing",
                "class": "00",
                "interface_classes": [interface],
                "speed": "full",
                "manufacturer": None,
                "product_name": None,
                "driver": None,
                "host_use": None,
                "tags": [],
                "projects": [],
            }
        )
    return {
        "version": 1,
        "host": f"compute-{number}",
        "compute_node_id": node,
        "revision": 1,
        "devices": devices,
    }


def matches(request, device):
    """Whether a device matches a request. Ids are compared as texts, to measure no parsing."""
    for name, want in request.items():
        if name == "count":
            continue
        if name == "class":
            if want != device["class"] and want not in device["interface_classes"]:
                return False
        elif name == "tags":
            if not all(tag in device["tags"] for tag in want):
                return False
        elif device["port_path" if name == "port" else name] != want:
            return False
    return True


def serves(document, requests, project=None):
    """Whether a host has the devices for all requests, each device once."""
    offered = [
        device
        for device in document["devices"]
        if device["status"] == "available"
        and (not device["projects"] or project in device["projects"])
    ]
    wanted = []
    for request in requests:
        fitting = [at for at, device in enumerate(offered) if matches(request, device)]
        count = request.get("count", 1)
        if len(fitting) < count:
            return False
        wanted += [fitting] * count
    return len(requests) == 1 or distinct(wanted)


def distinct(wanted):
    """Whether each place can have its own device, by augmenting paths."""
    holder = {}

    def place(at, seen):
        for device in wanted[at]:
            if device not in seen:
                seen.add(device)
                if device not in holder or place(holder[device], seen):
                    holder[device] = at
                    return True
        return False

    return all(place(at, set()) for at in range(len(wanted)))


def measure(ways, rounds):
    """The answers, and the times of each way: the least, the median, and the median of cold calls.

    A cold call follows a call of another way, and finds little of its data in the processor's
    caches. The ways take turns, so that other load on the machine affects all alike.
    """
    answers, warm, cold = {}, collections.defaultdict(list), collections.defaultdict(list)
    for _ in range(rounds):
        for name, call in ways.items():
            for times in [cold] + [warm] * (1 if name == "pure_python" else 5):
                start = time.perf_counter()
                answers[name] = call()
                times[name].append((time.perf_counter() - start) * 1000)
    summary = {
        name: {
            "least": round(min(warm[name]), 3),
            "median": round(statistics.median(warm[name]), 3),
            "cold": round(statistics.median(cold[name]), 3),
        }
        for name in ways
    }
    return answers, summary


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--hosts", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()

    documents = {document["host"]: document for document in map(host, range(arguments.hosts))}
    candidates = list(documents)
    # The keys are in the order of the hosts' documents, without white space. Reading any other JSON
    # takes six times as long.
    lines = [json.dumps(document, separators=(",", ":")) + "\n" for document in documents.values()]
    feed = [("".join(lines[at : at + 250]), 0) for at in range(0, len(lines), 250)]
    question = {"flavor": {"usb_devices": REQUESTS}}

    ways = {
        "pure_python": lambda: [name for name in candidates if serves(documents[name], REQUESTS)]
    }
    for name, kind in (("component", component.Filter), ("module", module.Filter)):
        filter = kind(feed=lambda: feed, deadline=10)
        # The first call feeds the filter.
        filter.select_names(question, limit=1)
        ways[name] = functools.partial(filter.select_names, question, candidates, len(candidates))

    answers, times = measure(ways, arguments.rounds)
    wanted = [f"compute-{number}" for number in range(0, arguments.hosts, 2)]
    for name, answer in answers.items():
        if sorted(answer) != sorted(wanted):
            raise AssertionError(
                f"{name}: found {len(answer)} hosts, wanted {len(wanted)}: every second one"
            )

    def ratio(name):
        return {
            which: round(times["pure_python"][which] / times[name][which], 1)
            for which in times[name]
        }

    print(
        json.dumps(
            {
                "hosts": arguments.hosts,
                "devices": arguments.hosts * DEVICES,
                "matched": len(answers["component"]),
                "component_ms": times["component"],
                "module_ms": times["module"],
                "pure_python_ms": times["pure_python"],
                "ratio_component": ratio("component"),
                "ratio_module": ratio("module"),
            }
        )
    )


if __name__ == "__main__":
    main()
