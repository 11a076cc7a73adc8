"""USB devices in the openstack command."""
