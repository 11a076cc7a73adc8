"""Measure a request for a USB device over 10 000 HostStates, and Nova's filter for PCI devices.

    tests/nova/run bench

Prints a JSON object. The filters take turns, so that other load on the machine affects both alike.
Half of the hosts have a free key, and half have a free function of the requested PCI device.
"""

import json
import os
import statistics
import tempfile
import time

import nova.tests.functional  # noqa: F401  must be Nova's first import
from nova import conf as nova_conf
from nova import objects
from nova.pci import stats
from nova.scheduler import host_manager
from nova.scheduler.filters import pci_passthrough_filter
from virt_usb_nova import conf, filter, oracle

import fleet

HOSTS, DEVICES, ROUNDS = 10_000, 20, 15
CONF = nova_conf.CONF
conf.register(CONF)


def document(number):
    node = number + 2
    devices = [
        fleet.device(
            (node - 1) * 1_000_000 + at + 1, "available" if at or number % 2 else "allocated",
            **({} if at == 0 else {"vendor_id": "046d", "product_id": f"{at:04x}"}),
            port_path=f"1-{at + 1}",
        )
        for at in range(DEVICES)
    ]  # fmt: skip
    return fleet.document(f"host{number}", node, *devices)


def pools(number):
    count = number % 2
    pool = objects.PciDevicePool(
        product_id="1520", vendor_id="8086", numa_node=0, tags={"dev_type": "type-PCI"}, count=count
    )
    return objects.PciDevicePoolList(objects=[pool])


def host_state(number):
    state = host_manager.HostState(f"host{number}", f"host{number}", None)
    state.pci_stats = stats.PciDeviceStats(None, stats=pools(number))
    state.allocation_candidates = [{"mappings": {}}]
    return state


def spec(flavor, requests):
    return objects.RequestSpec(
        project_id="erp",
        flavor=flavor,
        pci_requests=objects.InstancePCIRequests(requests=requests),
        numa_topology=None,
        num_instances=1,
    )


def timed(call):
    begun = time.perf_counter()
    found = call()
    return (time.perf_counter() - begun) * 1000, found


def main():
    objects.register_all()
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "hosts")
        fleet.write(file, *map(document, range(HOSTS)))
        for name, value in {
            "inventory": "file",
            "inventory_file": file,
            "component": fleet.COMPONENT,
            "deadline": 60.0,
            "max_age": 3600,
        }.items():
            CONF.set_override(name, value, "virt_usb")
        oracle.forget()
        states = [host_state(number) for number in range(HOSTS)]
        usb = spec(objects.Flavor(name="erp", extra_specs={"usb:devices": fleet.ASKS}), [])
        wanted = objects.InstancePCIRequest(
            count=1,
            spec=[{"vendor_id": "8086", "product_id": "1520"}],
            request_id="r",
            numa_policy=None,
        )
        pci = spec(objects.Flavor(name="pci", extra_specs={}), [wanted])
        ours, theirs = filter.UsbDevicesFilter(), pci_passthrough_filter.PciPassthroughFilter()
        cold, _ = timed(lambda: list(ours.filter_all(states, usb)))
        times = {"usb": [], "pci": []}
        for _ in range(ROUNDS):
            for _ in range(4):
                took, found = timed(lambda: list(ours.filter_all(states, usb)))
                times["usb"].append(took)
                assert len(found) == HOSTS // 2, len(found)
            took, found = timed(lambda: list(theirs.filter_all(states, pci)))
            times["pci"].append(took)
            assert len(found) == HOSTS // 2, len(found)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    print(json.dumps({
        "hosts": HOSTS, "devices": HOSTS * DEVICES, "matched": HOSTS // 2,
        "first_ms": round(cold, 1),
        "usb_ms": {"median": round(median["usb"], 2), "least": round(min(times["usb"]), 2)},
        "pci_ms": {"median": round(median["pci"], 1), "least": round(min(times["pci"]), 1)},
        "ratio": round(median["pci"] / median["usb"], 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
