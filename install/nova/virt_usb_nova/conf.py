"""Options in the group `[virt_usb]` of nova.conf."""

from __future__ import annotations

from typing import Any

from oslo_config import cfg

GROUP = cfg.OptGroup(
    "virt_usb",
    title="USB devices",
    help="How the scheduler learns which host has which USB device.",
)

OPTIONS = [
    cfg.StrOpt(
        "inventory",
        default="etcd",
        choices=[
            ("etcd", "read what the agents of the fleet publish in etcd"),
            ("scheduler", "ask a `virt-usb scheduler`, and read nothing here"),
            (
                "file",
                "read a file of host documents, as `virt-usb hosts --documents` prints them",
            ),
        ],
        help="Source of the hosts' devices.",
    ),
    cfg.ListOpt(
        "etcd_endpoints",
        default=["http://127.0.0.1:2379"],
        help="URLs of etcd's members. If one fails, the next one is used. "
        "All http:// or all https://.",
    ),
    cfg.StrOpt(
        "etcd_prefix",
        default="/virt-usb/",
        help="Prefix of all keys of the fleet, as `fleet.prefix` on the hosts.",
    ),
    cfg.StrOpt(
        "etcd_cafile",
        help="CA certificate for etcd (PEM). Default: the machine's CA certificates.",
    ),
    cfg.StrOpt("etcd_certfile", help="Client certificate for etcd (PEM), if etcd requires one."),
    cfg.StrOpt("etcd_keyfile", help="Private key of the client certificate (PEM)."),
    cfg.StrOpt("etcd_user", help="User of etcd with the role virt-usb-reader, if etcd has users."),
    cfg.StrOpt("etcd_password_file", help="File with that user's password in its first line."),
    cfg.StrOpt(
        "scheduler_url",
        default="http://127.0.0.1:8791",
        help="URL of `virt-usb scheduler`: `http://HOST:PORT`, or "
        "`unix:/run/virt-usb-scheduler/scheduler.sock`.",
    ),
    cfg.FloatOpt(
        "scheduler_timeout",
        default=5.0,
        min=0.1,
        help="Timeout of a request to `virt-usb scheduler`, in seconds.",
    ),
    cfg.StrOpt(
        "inventory_file",
        help="File of host documents, for inventory = file. It is read again when it changes.",
    ),
    cfg.StrOpt(
        "flavors_file",
        help="File of flavors for `@NAME`, for inventory = file, as `virt-usb --json flavor list` "
        "prints them.",
    ),
    cfg.StrOpt(
        "component",
        default="/usr/lib/virt-usb/virt-usb-filter.wasm",
        help="File of the filter, a WebAssembly component.",
    ),
    cfg.FloatOpt(
        "deadline",
        default=1.0,
        min=0.01,
        help="Timeout of a question to the filter, in seconds.",
    ),
    cfg.IntOpt(
        "max_age",
        default=60,
        min=30,
        help="Time without an update after which the inventory is stale, in seconds. "
        "For a file: its age.",
    ),
    cfg.StrOpt(
        "on_stale_inventory",
        default="refuse",
        choices=[
            ("refuse", "no host passes for a flavor that requests USB devices"),
            (
                "pass",
                "all hosts pass, and the hook of the chosen host decides when the instance starts",
            ),
        ],
        help="What happens to a request for USB devices if the inventory is stale or unknown.",
    ),
    cfg.StrOpt(
        "host_name",
        default="host",
        choices=[
            ("host", "the name of the compute service"),
            ("node", "the hypervisor's name"),
        ],
        help="Which of Nova's two names equals the name that the hosts publish, "
        "their kernel's host name.",
    ),
    cfg.BoolOpt(
        "flavor_names",
        default=False,
        help="Whether to look up a flavor without USB extra specs by its name among the fleet's "
        "flavors. Set it if the hypervisors run Nova before 32, which writes only the name of a "
        "flavor into a domain, so that the hook does the same.",
    ),
    cfg.FloatOpt(
        "weight_multiplier",
        default=1.0,
        help="Weight of UsbDevicesWeigher among the weighers. 0 disables it.",
    ),
]


def register(conf: cfg.ConfigOpts) -> Any:
    """Register the options and return the group with their values."""
    conf.register_group(GROUP)
    conf.register_opts(OPTIONS, GROUP)
    return conf.virt_usb


def list_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """Options for `oslo-config-generator`."""
    return [(GROUP, OPTIONS)]
