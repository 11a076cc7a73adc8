"""What Tempest is told of a cloud with virt-usb: its section [usb]."""

from oslo_config import cfg

service_option = cfg.BoolOpt("virt_usb", default=True, help="Whether the cloud has virt-usb.")

usb_group = cfg.OptGroup(name="usb", title="USB devices for servers")

UsbGroup = [
    cfg.StrOpt("catalog_type", default="usb", help="Its type in the service catalogue."),
    cfg.StrOpt("region", default="", help="Its region there; none: that of identity.region."),
    cfg.StrOpt(
        "endpoint_type",
        default="public",
        choices=["public", "admin", "internal", "publicURL", "adminURL", "internalURL"],
        help="Which of its endpoints.",
    ),
    cfg.StrOpt(
        "vendor_id",
        default="0529",
        help="The vendor of the device that the tests take: one that every project may have, and the only one of its kind. Four hexadecimal digits.",
    ),
    cfg.StrOpt("product_id", default="0001", help="And its product. Four hexadecimal digits."),
    cfg.IntOpt(
        "timeout", default=120, help="For so many seconds a device may take until it is given back."
    ),
]
