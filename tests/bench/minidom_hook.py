"""A hook in Python: the yardstick of 'make bench'.

It works like vdsm's hooks (https://github.com/oVirt/vdsm, vdsm_hooks): it reads the domain into
minidom, appends elements to <devices>, and writes the domain. It does less than virt-usb's hook: it
claims nothing, does not read sysfs, and writes no record. The devices are in a JSON file.

    minidom_hook.py DEVICES.json NAME OPERATION SUBOPERATION EXTRA < DOMAIN.xml
"""

import json
import sys
from xml.dom import minidom

NAMESPACE = "urn:virt-usb:flavor:1"


def requests(dom):
    """The request of the flavor in the metadata."""
    for element in dom.getElementsByTagNameNS(NAMESPACE, "flavor"):
        text = "".join(node.data for node in element.childNodes)
        return json.loads(text).get("usb_devices", [])
    return []


def matches(device, request):
    keys = ("vendor_id", "product_id", "serial", "port_path")
    return device["status"] == "available" and all(
        device[key] == request[key] for key in keys if key in request
    )


def pick(devices, wanted):
    """Devices for all requests; None if there are not enough."""
    picked = []
    for request in wanted:
        free = [device for device in devices if matches(device, request) and device not in picked]
        count = request.get("count", 1)
        if len(free) < count:
            return None
        picked += free[:count]
    return picked


def child(dom, parent, tag, /, **attributes):
    element = dom.createElement(tag)
    for key, value in attributes.items():
        element.setAttribute(key, value)
    parent.appendChild(element)
    return element


def add(dom, device):
    devices = dom.getElementsByTagName("devices")[0]
    hostdev = child(dom, devices, "hostdev", mode="subsystem", type="usb")
    source = child(dom, hostdev, "source")
    child(dom, source, "vendor", id="0x" + device["vendor_id"])
    child(dom, source, "product", id="0x" + device["product_id"])
    child(dom, source, "address", bus=str(device["bus_id"]), device=str(device["device_id"]))
    child(dom, hostdev, "alias", name="ua-usb-%d" % device["id"])


def main(devices_file, name, operation, _suboperation, _extra):
    dom = minidom.parse(sys.stdin.buffer)
    wanted = requests(dom)
    if operation != "prepare" or not wanted:
        return 0
    with open(devices_file) as file:
        picked = pick(json.load(file), wanted)
    if picked is None:
        print("%s: not enough devices" % name, file=sys.stderr)
        return 1
    for device in picked:
        add(dom, device)
    sys.stdout.write(dom.toxml())
    return 0


sys.exit(main(*sys.argv[1:]))
