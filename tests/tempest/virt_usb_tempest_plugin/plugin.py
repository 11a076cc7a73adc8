"""The entry point for Tempest."""

from pathlib import Path

from tempest import config
from tempest.test_discover import plugins

from virt_usb_tempest_plugin import config as usb


class VirtUsbTempestPlugin(plugins.TempestPlugin):
    """A plugin with tests, options and a client for virt-usb."""

    def load_tests(self):
        """The folder of the tests."""
        folder = Path(__file__).resolve().parent
        return str(folder / "tests"), str(folder.parent)

    def register_opts(self, conf):
        """Register the options of the section [usb]."""
        conf.register_opt(usb.service_option, group="service_available")
        config.register_opt_group(conf, usb.usb_group, usb.UsbGroup)

    def get_opt_lists(self):
        """The options, for `tempest init` and the sample configuration."""
        return [(usb.usb_group.name, usb.UsbGroup), ("service_available", [usb.service_option])]

    def get_service_clients(self):
        """The client, which tests use as `os_primary.usb.UsbClient()`."""
        params = {
            "name": "usb",
            "service_version": "usb",
            "module_path": "virt_usb_tempest_plugin.client",
            "client_names": ["UsbClient"],
        }
        params.update(config.service_client_config("usb"))
        return [params]
