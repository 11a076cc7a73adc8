"""The options in the section [usb] of tempest.conf."""

from oslo_config import cfg

service_option = cfg.BoolOpt("virt_usb", default=True, help="Whether the cloud has virt-usb.")

usb_group = cfg.OptGroup(name="usb", title="USB devices for servers")

UsbGroup = [
    cfg.StrOpt("catalog_type", default="usb", help="Service type in the catalogue."),
    cfg.StrOpt("region", default="", help="Region in the catalogue. Default: identity.region."),
    cfg.StrOpt(
        "endpoint_type",
        default="public",
        choices=["public", "admin", "internal", "publicURL", "adminURL", "internalURL"],
        help="Type of the endpoint.",
    ),
    cfg.StrOpt(
        "vendor_id",
        default="0529",
        help="Vendor id of the device for the tests, as four hexadecimal digits. "
        "All projects may have the device, and it is the only one of its kind.",
    ),
    cfg.StrOpt(
        "product_id", default="0001", help="Product id of the device, as four hexadecimal digits."
    ),
    cfg.IntOpt("timeout", default=120, help="Timeout for the release of a device, in seconds."),
]
