"""Tempest tests of virt-usb: USB devices for servers."""
