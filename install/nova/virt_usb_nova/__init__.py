"""USB devices for Nova's scheduler, by the filter that every other scheduler can load.

=================  ============================================================================
`filter`           UsbDevicesFilter: passes the hosts that can serve a request
`weigher`          UsbDevicesWeigher: prefers the better ones of these hosts
`validator`        checks the extra specs `usb:devices` and `usb:redirection_devices`
`device_requests`  does the same without Nova, from `request_keys.json`
`asked`            reads the devices that a request asks for
`oracle`           answers questions: by the filter in this process, or by `virt-usb scheduler`
`inventory`        reads the host documents: from etcd, or from a file
`wasm`             runs the filter
`conf`             defines the options, in the group `[virt_usb]` of nova.conf
=================  ============================================================================
"""
