"""Print the domains that Nova writes, with the classes of the Nova that is first on sys.path.

    domain.py

Each line of stdin is a request, as JSON:
{"flavor": NAME, "extra_specs": {...}, "project": ID, "spice": true, "image": {PROPERTY: VALUE}}.
The answer is the word DOMAIN and the text of the domain as JSON. A Nova before 32 writes no extra
specs, no redirected ports, and no model of the USB controller.
"""

import json
import sys

import nova.tests.functional  # noqa: F401  must be Nova's first import
from nova import objects
from nova.virt.libvirt import config, driver

UUID = "5d3b9a10-7c41-4f0e-9a3f-2f6f3f9c1e01"


def metadata(asked):
    """The metadata, as `LibvirtDriver._get_guest_config_meta` fills it."""
    flavor = config.LibvirtConfigGuestMetaNovaFlavor()
    flavor.name, flavor.memory, flavor.disk, flavor.swap, flavor.ephemeral, flavor.vcpus = (
        asked["flavor"],
        2048,
        20,
        0,
        0,
        2,
    )
    flavor.id, flavor.extra_specs = "7f0b5c1e", asked["extra_specs"]
    owner = config.LibvirtConfigGuestMetaNovaOwner()
    owner.userid, owner.username = "6b1c0c8f3d1f4d0b8a4a1d2e3f405162", "alice"
    owner.projectid, owner.projectname = asked["project"], "erp"
    whole = config.LibvirtConfigGuestMetaNovaInstance()
    whole.package, whole.name, whole.creationTime, whole.flavor, whole.owner = (
        "34.0.0",
        "erp-1",
        1_700_000_000,
        flavor,
        owner,
    )
    return whole


def domain(asked):
    flavor = objects.Flavor(name=asked["flavor"], extra_specs=asked["extra_specs"])
    image = objects.ImageMeta.from_dict({"id": UUID, "properties": asked.get("image", {})})
    guest = config.LibvirtConfigGuest()
    guest.name, guest.uuid, guest.memory, guest.vcpus, guest.virt_type = (
        "instance-0000002a",
        UUID,
        2 << 20,
        2,
        "kvm",
    )
    guest.os_type, guest.os_mach_type = "hvm", "q35"
    guest.metadata.append(metadata(asked))
    if asked.get("spice", True):
        graphics = config.LibvirtConfigGuestGraphics()
        graphics.type = "spice"
        guest.add_device(graphics)
    # The steps of `_get_guest_config` for USB, on a driver without libvirt.
    maker = driver.LibvirtDriver.__new__(driver.LibvirtDriver)
    maker._is_ppc64_guest = lambda _: False
    maker._check_emulation_arch = lambda _: "x86_64"
    maker._guest_add_pointer_device(guest, image)
    maker._guest_add_usb_root_controller(
        guest, *([flavor] if "flavor" in names(maker._guest_add_usb_root_controller) else []), image
    )
    if hasattr(maker, "_add_redirected_usb_ports"):
        maker._add_redirected_usb_ports(guest, flavor, None, image)
    return guest.to_xml()


def names(function):
    return function.__code__.co_varnames[: function.__code__.co_argcount]


if __name__ == "__main__":
    objects.register_all()
    for line in sys.stdin:
        # Nova also prints to stdout and stderr.
        print("DOMAIN " + json.dumps(domain(json.loads(line))), flush=True)
