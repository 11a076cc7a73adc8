"""The second host of a migration, in the same VM.

It has its own libvirtd, hooks, configuration and inventory.
"""

import json
import subprocess
from pathlib import Path

from lib import product
from lib.daemons import Libvirtd
from lib.product import Agent
from lib.shell import expect, must
from lib.virsh import Virsh

URI = "qemu+unix:///system?socket=/run/second/libvirt-sock"


class SecondHost:
    def __init__(self):
        script = Path(__file__).with_name("second-host")
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "--uts", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        expect(self.holder.stdout.readline() == "ready\n", "the second host to be made")
        self.prefix = ["nsenter", "--target", str(self.holder.pid), "--mount", "--uts", "--"]
        self.virsh = Virsh(self.prefix, URI)
        self.agent = Agent(self.prefix)
        self.libvirtd = Libvirtd(
            self.prefix,
            socket="/run/second/libvirt-sock",
            options=["--pid-file", "/run/second/libvirtd.pid"],
        )

    def start(self):
        own_uuid = 'host_uuid = "5f7c3f0a-64b8-4f3c-9d7f-0d5b0a2f9b11"\n'
        must(*self.prefix, "sh", "-c", "cat >> /etc/libvirt/libvirtd.conf", stdin=own_uuid)
        self.libvirtd.start()

    def configure(self, **keys):
        keys = {"log": str(product.HOOK_LOG)} | keys
        text = "".join(f"{key} = {product.toml(value)}\n" for key, value in keys.items())
        must(*self.prefix, "sh", "-c", f"cat > {product.CONFIG}", stdin=text)

    def virt_usb(self, *words):
        return must(*self.prefix, "virt-usb", *words)

    def claims(self):
        return json.loads(self.virt_usb("claims", "--json").out)

    def stop(self):
        for name in self.virsh.running():
            self.virsh("destroy", name)
        self.agent.stop()
        self.libvirtd.kill()
        self.holder.kill()
        self.holder.wait()
