"""Host documents for tests."""

import json
import os

KEY = {"vendor_id": "0529", "product_id": "0001"}
ASKS = json.dumps([KEY])
COMPONENT = os.path.join(os.path.dirname(__file__), "../../target/release/virt-usb-filter.wasm")
COMPONENT = os.environ.get("VIRT_USB_FILTER", COMPONENT)


def device(number, status="available", **more):
    """A key with this number as its id."""
    return {
        "id": number, "compute_node_id": (number - 1) // 1_000_000 + 1, "address": "usb_1_5", **KEY,
        "bus_id": 1, "device_id": 5, "port_id": 1, "status": status, "port_path": "1-1",
        "class": "00", **more,
    }  # fmt: skip


def document(host, node, *devices, revision=1):
    """The document of a host, as in etcd and in a file."""
    whole = {
        "version": 1,
        "host": host,
        "compute_node_id": node,
        "revision": revision,
        "devices": list(devices),
    }
    return json.dumps(whole, separators=(",", ":"))


def write(path, *documents, age=0.0):
    """Replace the file of documents in one step, with a timestamp `age` seconds ago."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in documents))
    if age:
        then = os.stat(f"{path}.new").st_mtime - age
        os.utime(f"{path}.new", (then, then))
    os.replace(f"{path}.new", path)
