"""How Tempest finds all this."""

from pathlib import Path

from tempest import config
from tempest.test_discover import plugins

from virt_usb_tempest_plugin import config as usb


class VirtUsbTempestPlugin(plugins.TempestPlugin):
    """Tests, options and a client for virt-usb."""

    def load_tests(self):
        """Where the tests are."""
        folder = Path(__file__).resolve().parent
        return str(folder / "tests"), str(folder.parent)

    def register_opts(self, conf):
        """The section [usb]."""
        conf.register_opt(usb.service_option, group="service_available")
        config.register_opt_group(conf, usb.usb_group, usb.UsbGroup)

    def get_opt_lists(self):
        """For `tempest init` and the sample."""
        return [(usb.usb_group.name, usb.UsbGroup), ("service_available", [usb.service_option])]

    def get_service_clients(self):
        """`os_primary.usb.UsbClient()`."""
        params = {
            "name": "usb",
            "service_version": "usb",
            "module_path": "virt_usb_tempest_plugin.client",
            "client_names": ["UsbClient"],
        }
        params.update(config.service_client_config("usb"))
        return [params]
