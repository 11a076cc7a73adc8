"""The options, in the group `[virt_usb]` of nova.conf."""

from __future__ import annotations

from typing import Any

from oslo_config import cfg

GROUP = cfg.OptGroup(
    "virt_usb",
    title="USB devices",
    help="Where the scheduler learns which host has which USB device.",
)

OPTIONS = [
    cfg.StrOpt(
        "inventory",
        default="etcd",
        choices=[
            ("etcd", "what the fleet's agents publish in etcd"),
            ("scheduler", "a `virt-usb scheduler` is asked; nothing is read here"),
            (
                "file",
                "a file of host documents, one a line, as `virt-usb hosts --documents` prints them",
            ),
        ],
        help="Where the devices of the hosts are learnt from.",
    ),
    cfg.ListOpt(
        "etcd_endpoints",
        default=["http://127.0.0.1:2379"],
        help="etcd's members; the next one is asked when one fails. All http:// or all https://.",
    ),
    cfg.StrOpt(
        "etcd_prefix",
        default="/virt-usb/",
        help="What all keys of the fleet begin with: its `fleet.prefix`.",
    ),
    cfg.StrOpt(
        "etcd_cafile",
        help="The authority that has signed etcd's certificates (PEM); none: the machine's own.",
    ),
    cfg.StrOpt("etcd_certfile", help="This client's certificate (PEM), where etcd wants one."),
    cfg.StrOpt("etcd_keyfile", help="The key to it (PEM)."),
    cfg.StrOpt(
        "etcd_user", help="etcd's user, where etcd has users: one with the role virt-usb-reader."
    ),
    cfg.StrOpt("etcd_password_file", help="A file whose first line is that user's password."),
    cfg.StrOpt(
        "scheduler_url",
        default="http://127.0.0.1:8791",
        help="Where `virt-usb scheduler` listens: `http://HOST:PORT`, or `unix:/run/virt-usb-scheduler/scheduler.sock`.",
    ),
    cfg.FloatOpt(
        "scheduler_timeout",
        default=5.0,
        min=0.1,
        help="How long it may take to answer, in seconds.",
    ),
    cfg.StrOpt(
        "inventory_file",
        help="The file of host documents, for inventory = file. Read again when it changes.",
    ),
    cfg.StrOpt(
        "flavors_file",
        help="For inventory = file: what `@NAME` stands for, as `virt-usb --json flavor list` prints it.",
    ),
    cfg.StrOpt(
        "component",
        default="/usr/lib/virt-usb/virt-usb-filter.wasm",
        help="The filter: a WebAssembly component.",
    ),
    cfg.FloatOpt(
        "deadline",
        default=1.0,
        min=0.01,
        help="How long one question may take the filter, in seconds.",
    ),
    cfg.IntOpt(
        "max_age",
        default=60,
        min=30,
        help="Seconds without an update after which the inventory is stale. For a file: its age.",
    ),
    cfg.StrOpt(
        "on_stale_inventory",
        default="refuse",
        choices=[
            ("refuse", "a flavor that asks for USB devices finds no host"),
            (
                "pass",
                "all hosts pass, and the host that is chosen decides when the instance starts",
            ),
        ],
        help="What becomes of a request for USB devices when what is known is stale, or nothing is known.",
    ),
    cfg.StrOpt(
        "host_name",
        default="host",
        choices=[
            ("host", "the compute service's name"),
            ("node", "the hypervisor's name"),
        ],
        help="Which of Nova's two names is the one that the hosts publish: their kernel's host name.",
    ),
    cfg.BoolOpt(
        "flavor_names",
        default=False,
        help="Whether a flavor without our extra specs is looked up by its name among the fleet's flavors, as the "
        "hook does where the hypervisors run a Nova before 32, which tells a domain nothing else.",
    ),
    cfg.FloatOpt(
        "weight_multiplier",
        default=1.0,
        help="How much UsbDevicesWeigher counts beside the other weighers; 0: not at all.",
    ),
]


def register(conf: cfg.ConfigOpts) -> Any:
    """Registers the options, and returns the group with their values."""
    conf.register_group(GROUP)
    conf.register_opts(OPTIONS, GROUP)
    return conf.virt_usb


def list_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """For `oslo-config-generator`."""
    return [(GROUP, OPTIONS)]
