"""USB devices for Nova: who has what a flavor asks for, asked of the filter that every other scheduler can load.

================  =============================================================================
`filter`          UsbDevicesFilter: the hosts that can serve
`weigher`         UsbDevicesWeigher: the better ones first
`validator`       what `usb:devices` and `usb:redirection_devices` may be in a flavor's extra specs
`asked`           what a request asks for
`oracle`          who is asked: the filter in this process, or `virt-usb scheduler`
`inventory`       what the hosts have: from etcd, or from a file
`wasm`            the filter itself
`conf`            the options, in the group `[virt_usb]` of nova.conf
================  =============================================================================
"""
