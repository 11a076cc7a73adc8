"""The openstack command with install/openstackclient, with Keystone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import requests
from keystoneauth1 import session as keystoneauth
from keystoneauth1.identity import v3
from openstackclient import shell
from virt_usb_openstackclient.client import UsbClient

from cloud import Cloud
from identity import REGION, Admin, issue_token, password, scope
from local import TIMEOUT_SECONDS, session, until

ERP = "11111111-2222-4333-8444-555555555555"
OFF = "77777777-2222-4333-8444-555555555555"
CRM = "99999999-2222-4333-8444-555555555555"


def run(command: list[str], environment: dict[str, str]) -> tuple[str, str, int]:
    """Run the command in a fork of this process.

    Its modules are already loaded, which takes most of the time of a command.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
                os.environ.clear()
                os.environ.update(environment)
                sys.argv = command
                code = shell.main(command[1:])
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return out.read(), err.read(), os.waitstatus_to_exitcode(status)


class OpenStack(unittest.TestCase):
    """All tests share a cloud, and each test restores it."""

    cloud: ClassVar[Cloud]

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory(prefix="openstack-")
        cls.addClassCleanup(folder.cleanup)
        cls.cloud = Cloud(Path(folder.name))
        cls.enterClassContext(cls.cloud)
        cls.write_domains()

    @classmethod
    def write_domains(cls) -> None:
        """Create the guests that each test begins with."""
        projects = json.loads((cls.cloud.folder / "keystone/cloud.json").read_text())["projects"]
        guest = {"name": "erp", "uuid": ERP, "project": projects["erp"]}
        off = {"name": "off", "uuid": OFF, "project": projects["erp"], "running": False}
        cls.cloud.agent.write_domains(
            [guest, off, {"name": "crm", "uuid": CRM, "project": projects["crm"]}]
        )
        runs = {"erp": "ACTIVE", "off": "SHUTOFF", "crm": "ACTIVE"}
        until(lambda: cls.cloud.agent.servers() == runs, cls.cloud.agent.log)

    def openstack(
        self,
        command: str,
        *more: str,
        user: str = "erp-member",
        project: str = "erp",
        **environment: str,
    ) -> tuple[str, str, int]:
        """The output, the errors and the exit status of a command."""
        return run(
            ["openstack", *command.split(), *more],
            {**self.cloud.environment(user, project), **environment},
        )

    def said(self, command: str, *more: str, **who: str) -> Any:
        """The JSON output of a command that succeeds."""
        out, err, code = self.openstack(command, *more, "-f", "json", **who)
        self.assertEqual(code, 0, err)
        return json.loads(out)

    def refused(self, command: str, why: str, *more: str, **who: str) -> None:
        """Check that a command fails with this message and without a traceback."""
        out, err, code = self.openstack(command, *more, **who)
        self.assertEqual((code, out), (1, ""), err)
        self.assertIn(why, err)
        self.assertNotIn("Traceback", err)

    def test_devices_are_listed_and_shown(self) -> None:
        listed = self.said("usb device list")
        self.assertEqual(
            [(one["ID"], one["Vendor ID"], one["Serial"], one["Status"]) for one in listed],
            [(1, "0529", "S1", "available"), (2, "096e", "S2", "available")],
        )
        self.assertEqual(
            [
                one["ID"]
                for one in self.said("usb device list --vendor-id 096e --status available --long")
            ],
            [2],
        )
        self.assertEqual(self.said("usb device list --host nowhere"), [])
        self.assertEqual(self.said("usb device list", "--serial", "S 1&status=x"), [])
        shown = self.said("usb device show 1")
        self.assertEqual(
            (shown["id"], shown["product_name"], shown["port_path"]), (1, "HASP HL", "1-1")
        )
        table, _, _ = self.openstack("usb device list", user="erp-reader")
        self.assertIn("| HASP HL ", table)
        self.refused("usb device show 9", "USB device 9 could not be found. (HTTP 404, req-")
        self.refused("usb device show", "USB device ../servers could not be found.", "../servers")
        self.refused("usb device list --vendor-id 12345", "(HTTP 400, req-")
        out, err, code = self.openstack("usb device list --status free")
        self.assertEqual((code, out), (2, ""), err)
        self.assertIn("invalid choice: 'free'", err)
        self.refused("usb device list --deleted", "(HTTP 403, req-")

    def test_it_is_a_command_of_openstacks(self) -> None:
        environment = self.cloud.environment("erp-reader", "erp")
        done = subprocess.run(
            ["openstack", "usb", "device", "show", "2", "-f", "json"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        self.assertEqual(json.loads(done.stdout)["serial"], "S2")
        told = subprocess.run(
            ["openstack", "help", "server", "add", "usb", "device"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        self.assertIn("Attach a USB device to a server", told.stdout)

    def test_a_list_of_many_pages_is_whole(self) -> None:
        auth = v3.Password(
            self.cloud.keystone,
            username="erp-member",
            password=password("erp-member"),
            project_name="erp",
            user_domain_name="Default",
            project_domain_name="Default",
        )
        usb = UsbClient(
            keystoneauth.Session(auth),
            region_name=REGION,
            interface="public",
            endpoint_override=None,
        )
        self.assertEqual(
            [
                one["serial"]
                for one in usb.devices({"limit": 1, "sort_key": "id", "sort_dir": "desc"})
            ],
            ["S2", "S1"],
        )

    def test_devices_are_disabled_and_enabled_by_administrators(self) -> None:
        self.refused("usb device disable 2", "(HTTP 403, req-")
        admin = {"user": "admin", "project": "admin"}
        disabled = self.said("usb device disable 2 --reason lent", **admin)
        self.assertEqual(
            (disabled["status"], disabled["status_reason"], disabled["disabled"]),
            ("unavailable", "disabled", "lent"),
        )
        self.refused("server add usb device erp 2", "USB device 2 is unavailable (disabled)")
        enabled = self.said("usb device enable 2", **admin)
        self.assertEqual(enabled["status"], "available")
        self.assertNotIn("disabled", enabled)

    def test_a_device_goes_to_a_server_and_back(self) -> None:
        added = self.said("server add usb device erp 1")
        self.assertEqual(
            added,
            {
                "server_id": ERP,
                "live": True,
                "device_ids": [1],
                "already": [],
                "requested": ['{"id": 1}'],
            },
        )
        self.assertEqual(self.said("server add usb device", ERP, "1")["already"], [1])
        for server in (ERP, "erp"):
            self.assertEqual(
                [one["ID"] for one in self.said("usb device list --server", server)], [1]
            )
        crm = {"user": "crm-member", "project": "crm"}
        self.refused("server add usb device crm 0529:0001", "USB device 1 is in use", **crm)
        self.refused(
            "server add usb device",
            f"Instance {ERP} could not be found. (HTTP 404, req-",
            ERP,
            "2",
            **crm,
        )
        self.refused("server add usb device erp 2", "No server with the name 'erp'", **crm)
        self.refused("server add usb device erp 1", "(HTTP 403, req-", user="erp-reader")
        removed = self.said("server remove usb device erp 0529:0001")
        self.assertEqual((removed["device_ids"], removed["live"]), ([1], True))
        nothing = "has no such USB device and no such assignment"
        self.refused("server remove usb device erp 1", nothing)
        by_serial = self.said("server add usb device", "crm", '{"serial":"S2"}', **crm)
        self.assertEqual(by_serial["device_ids"], [2])
        self.said("server remove usb device crm 2", **crm)

    def test_a_server_that_does_not_run_gets_it_at_its_next_start(self) -> None:
        out, err, code = self.openstack("server add usb device off 1 -f json")
        added = json.loads(out)
        self.assertEqual((code, added["live"], added["requested"]), (0, False, ['{"id": 1}']))
        self.assertIn("off is not running: it claims the device at its start", err)
        self.said("server remove usb device off 1")

    def test_what_is_asked_wrongly_is_said(self) -> None:
        self.refused(
            "server add usb device erp stick",
            "wanted the id of a device, VENDOR:PRODUCT such as 0529:0001, or JSON "
            'such as {"serial":"HL-0001"}',
        )
        self.refused("server add usb device erp", "no JSON", "{serial}")
        self.refused("server add usb device erp", "colour", '{"colour":"red"}')

    def test_where_there_is_no_such_service_it_is_said(self) -> None:
        admin = Admin(self.cloud.keystone)
        admin.no_service("usb")
        try:
            self.refused(
                "usb device list",
                "The catalogue has no public endpoint of the type usb in the region RegionOne",
            )
            self.assertEqual(
                len(self.said("usb device list", OS_USB_ENDPOINT=self.cloud.agent.url + "/")), 2
            )
        finally:
            admin.service("usb", self.cloud.agent.url)
        self.refused(
            "usb device list",
            "The catalogue has no internal endpoint of the type usb",
            OS_INTERFACE="internal",
        )
        agent = f"http://127.0.0.1:{self.cloud.agent.port}"
        for wrong in ("/portal/sign-in?x=", "/openapi.json?x="):
            self.refused(
                "usb device list", f"The server at {agent}{wrong}", OS_USB_ENDPOINT=agent + wrong
            )
        self.refused(
            "usb device list",
            f"The USB device API has no {agent}/os-usb-devices: its endpoint ends with /v2.1",
            OS_USB_ENDPOINT=agent,
        )

    def test_where_there_is_nova_its_names_count_and_flavors_ask(self) -> None:
        self.cloud.start_compute()
        try:
            key = self.boot("key", {"usb:devices": '[{"vendor_id":"0529"}]'})
            self.until(
                lambda: [one["ID"] for one in self.said("usb device list --server", key)] == [1]
            )
            # libvirt has another name for the server.
            self.refused("server add usb device erp 2", "No Server found for erp")
            self.assertEqual(self.said("server add usb device key 2")["server_id"], key)
            # Nova's API does not show a redirection. The agent shows it.
            self.boot("far", {"usb:redirection_devices": '[{"bus":"usb","type":"spicevmc"}]'})
            self.until(
                lambda: (
                    re.search(r"instance-\S+: redirection 0 attached", self.cloud.agent.log())
                    is not None
                )
            )
            for server in ("key", "far"):
                out, err, code = self.openstack("server delete --wait", server)
                self.assertEqual((code, out), (0, ""), err)
            self.until(lambda: self.cloud.agent.local("GET", "os-usb-claims")["usb_claims"] == [])
        finally:
            self.cloud.stop_compute()
            # The stub of Nova has replaced the guests.
            self.write_domains()

    def boot(self, name: str, specs: dict[str, str]) -> str:
        """Create a server with that name and a flavor with these extra specs, and return its id."""
        compute = self.said("catalog show compute", user="admin", project="admin")["endpoints"][0][
            "url"
        ]
        admin, member = session(), session()
        admin.headers["X-Auth-Token"] = issue_token(self.cloud.keystone, "admin", scope("admin"))
        member.headers["X-Auth-Token"] = issue_token(
            self.cloud.keystone, "erp-member", scope("erp")
        )

        def post(who: requests.Session, path: str, body: dict[str, Any]) -> Any:
            answer = who.post(f"{compute}/{path}", json=body, timeout=TIMEOUT_SECONDS)
            answer.raise_for_status()
            return answer.json()

        flavor = post(
            admin, "flavors", {"flavor": {"name": name, "ram": 64, "vcpus": 1, "disk": 1}}
        )["flavor"]["id"]
        post(admin, f"flavors/{flavor}/os-extra_specs", {"extra_specs": specs})
        server = str(
            post(member, "servers", {"server": {"name": name, "flavorRef": flavor}})["server"]["id"]
        )
        shown = f"{compute}/servers/{server}"
        self.until(
            lambda: bool(
                member.get(shown, timeout=TIMEOUT_SECONDS).json()["server"]["status"] == "ACTIVE"
            )
        )
        return server

    def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for a condition."""
        until(is_so, self.cloud.agent.log)


if __name__ == "__main__":
    unittest.main()
