"""The API with Keystone: the user of a token, and its lifetime."""

from __future__ import annotations

import json
import tempfile
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from agent import Agent
from cloud import Cloud
from identity import Admin, issue_token, scope
from local import TIMEOUT_SECONDS, session, until

ERP = "11111111-2222-4333-8444-555555555555"
CRM = "99999999-2222-4333-8444-555555555555"
# Seconds for which the API caches Keystone's answer, for reads.
CACHE = 3
SAID = "Keystone tokens are rejected until it can be reached"
DEFAULT = {"id": "default"}


def action(what: str) -> dict[str, Any]:
    """The body of a request to attach or detach device 1."""
    return {f"{what}_usb_devices": {"usb_devices_requests": [{"id": 1}]}}


class Keystone(unittest.TestCase):
    """All tests share a cloud, and each test restores it."""

    cloud: ClassVar[Cloud]
    agent: ClassVar[Agent]
    projects: ClassVar[dict[str, str]]
    users: ClassVar[dict[str, str]]

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory(prefix="keystone-")
        cls.addClassCleanup(folder.cleanup)
        cls.cloud = Cloud(Path(folder.name), cache=CACHE)
        cls.enterClassContext(cls.cloud)
        ids = json.loads((cls.cloud.folder / "keystone/cloud.json").read_text())
        cls.projects, cls.users = ids["projects"], ids["users"]
        guests = [
            {"name": "erp", "uuid": ERP, "project": cls.projects["erp"]},
            {"name": "crm", "uuid": CRM, "project": cls.projects["crm"]},
        ]
        cls.agent = cls.cloud.agent
        cls.agent.write_domains(guests)
        cls.until(lambda: cls.agent.servers() == {"erp": "ACTIVE", "crm": "ACTIVE"})

    @classmethod
    def until(cls, is_so: Callable[[], bool]) -> None:
        """Wait for a condition."""
        until(is_so, cls.agent.log)

    def token(self, user: str, scope: dict[str, Any] | str = "unscoped") -> str:
        """Get a token from Keystone."""
        return issue_token(self.cloud.keystone, user, scope)

    def of(self, user: str, project: str) -> str:
        """A token for a project."""
        return self.token(user, scope(project))

    def attach(self, token: str, server: str = ERP) -> Any:
        """Attach device 1 to that server."""
        return self.agent.ask(token, "POST", f"servers/{server}/action", action("attach"))

    def detach(self, token: str) -> None:
        """Detach device 1."""
        answer = self.agent.ask(token, "POST", f"servers/{ERP}/action", action("detach"))
        self.assertEqual(answer.status, 202, answer)

    def look(self, token: str) -> int:
        """The status of a read."""
        return self.agent.ask(token, "GET", "os-usb-devices").status

    def test_a_member_acts_for_his_project_and_the_audit_names_him(self) -> None:
        member, erp = self.of("erp-member", "erp"), self.projects["erp"]
        for prefix in (f"/v2/{erp}", f"/v2.1/{erp}", "/v2.1", "/v3"):
            self.assertEqual(
                self.agent.ask(member, "GET", f"{prefix}/os-usb-devices").status, 200, prefix
            )
        self.assertEqual(self.attach(member).status, 202)
        events = self.agent.local("GET", "os-usb-events?limit=10")["events"]
        self.assertIn("api keystone erp-member@Default", [event["actor"] for event in events])
        self.detach(member)
        servers = self.agent.ask(member, "GET", "servers").json["servers"]
        self.assertEqual([server["name"] for server in servers], ["erp"])

    def test_roles_are_keystones(self) -> None:
        reader = self.of("erp-reader", "erp")
        self.assertEqual((self.look(reader), self.attach(reader).status), (200, 403))
        admin = self.of("admin", "admin")
        disable = {"disable": {"reason": "lent"}}
        self.assertEqual(
            self.agent.ask(
                self.of("erp-member", "erp"), "POST", "os-usb-devices/2/action", disable
            ).status,
            403,
        )
        self.assertEqual(
            self.agent.ask(admin, "POST", "os-usb-devices/2/action", disable).status, 200
        )
        system = self.token("admin", {"system": {"all": True}})
        self.assertEqual(
            self.agent.ask(system, "POST", "os-usb-devices/2/action", {"enable": None}).status, 200
        )

    def test_another_project_is_not_his(self) -> None:
        crm, erp = self.of("crm-member", "crm"), self.projects["erp"]
        answer = self.agent.ask(crm, "GET", f"/v2.1/{erp}/os-usb-devices")
        self.assertEqual(answer.status, 400, answer)
        answer = self.attach(crm, ERP)
        self.assertEqual(
            (answer.status, answer.fault()), (404, f"Instance {ERP} could not be found.")
        )
        self.assertEqual(self.agent.ask(crm, "GET", f"servers/{ERP}/os-usb-devices").status, 404)

    def test_what_is_good_for_nothing_here_is_told_why(self) -> None:
        for token, why in [
            (self.token("erp-member"), "The token has no project scope."),
            (
                self.of("virt-usb", "service"),
                "The token has none of the required roles: admin, member, reader.",
            ),
        ]:
            answer = self.agent.ask(token, "GET", "os-usb-devices")
            self.assertEqual((answer.status, answer.fault()), (403, why))
        admin = Admin(self.cloud.keystone)
        roles = {role["name"]: role["id"] for role in admin.call("GET", "roles")["roles"]}
        admin.call(
            "PUT", f"domains/default/users/{self.users['erp-reader']}/roles/{roles['reader']}"
        )
        answer = self.agent.ask(
            self.token("erp-reader", {"domain": DEFAULT}), "GET", "os-usb-devices"
        )
        self.assertEqual((answer.status, answer.fault()), (403, "The token has no project scope."))

    def test_what_is_no_token_is_nobodys(self) -> None:
        member = self.of("erp-member", "erp")
        for forged in ["gAAAAABnothing", member[:-4] + "AAAA", "x" * 200]:
            self.assertEqual(self.look(forged), 401, forged)

    def test_an_application_credential_is_its_user_and_one_with_access_rules_is_nobody(
        self,
    ) -> None:
        user = self.users["erp-member"]
        mine = session()
        mine.headers["X-Auth-Token"] = self.of("erp-member", "erp")

        def token(name: str, **more: Any) -> str:
            wanted = {"application_credential": {"name": name, **more}}
            made = mine.post(
                f"{self.cloud.keystone}/users/{user}/application_credentials",
                json=wanted,
                timeout=TIMEOUT_SECONDS,
            )
            made.raise_for_status()
            which = {key: made.json()["application_credential"][key] for key in ("id", "secret")}
            auth: Any = {
                "identity": {"methods": ["application_credential"], "application_credential": which}
            }
            answer = session().post(
                f"{self.cloud.keystone}/auth/tokens", json={"auth": auth}, timeout=TIMEOUT_SECONDS
            )
            answer.raise_for_status()
            return answer.headers["X-Subject-Token"]

        plain = token("plain")
        self.assertEqual(self.attach(plain).status, 202)
        self.detach(plain)
        rules = [{"service": "usb", "method": "GET", "path": "/v3/os-usb-devices"}]
        self.assertEqual(self.look(token("rules", access_rules=rules)), 401)

    def test_what_was_revoked_changes_nothing_from_then_on_and_soon_sees_nothing(self) -> None:
        member = self.of("erp-member", "erp")
        self.assertEqual(self.look(member), 200)
        headers = {"X-Subject-Token": member}
        admin = Admin(self.cloud.keystone)
        admin.session.delete(
            f"{self.cloud.keystone}/auth/tokens", headers=headers, timeout=TIMEOUT_SECONDS
        ).raise_for_status()
        seen = self.look(member)
        self.assertIn(seen, {200, 401}, "reads may still succeed for a while")
        self.assertEqual(self.attach(member).status, 401)
        self.assertEqual(self.look(member), 401, "a change drops the cached answer")
        other = self.of("erp-member", "erp")
        self.assertEqual(self.look(other), 200)
        admin.session.delete(
            f"{self.cloud.keystone}/auth/tokens",
            headers={"X-Subject-Token": other},
            timeout=TIMEOUT_SECONDS,
        ).raise_for_status()
        self.until(lambda: self.look(other) == 401)

    def test_whose_user_is_disabled_changes_nothing_from_then_on(self) -> None:
        member, user = self.of("crm-member", "crm"), self.users["crm-member"]
        self.assertEqual(self.look(member), 200)
        admin = Admin(self.cloud.keystone)
        admin.call("PATCH", f"users/{user}", {"user": {"enabled": False}})
        try:
            self.assertEqual(self.attach(member, CRM).status, 401)
        finally:
            admin.call("PATCH", f"users/{user}", {"user": {"enabled": True}})

    def test_while_it_is_away_nothing_is_changed_with_its_tokens_and_it_is_said_once(self) -> None:
        member, other = self.of("erp-member", "erp"), self.of("crm-member", "crm")
        made = self.agent.virt_usb(
            "--json", "token", "add", "local", "--project", "p", "--role", "admin"
        )
        local = json.loads(made.stdout)["token"]
        asked = time.monotonic()
        self.assertEqual(self.look(member), 200)
        before = self.agent.log().count(SAID)
        self.cloud.stop_keystone()
        try:
            looked = self.look(member)
            # On a slow machine, the cached answer may have expired.
            if time.monotonic() - asked < CACHE:
                self.assertEqual(looked, 200, "the answer is cached")
            for _ in range(3):
                refused = self.attach(member)
                self.assertEqual(
                    (refused.status, refused.headers["Retry-After"]), (503, "5"), refused
                )
                self.assertNotIn("127.0.0.1", refused.fault(), "only the log has the address")
            self.assertEqual(self.look(other), 503)
            self.assertEqual(self.look(local), 200, "the host's own tokens are valid")
            self.until(lambda: self.look(member) == 503)
            self.assertEqual(self.agent.log().count(SAID) - before, 1, self.agent.log())
            found = self.doctor()
            self.assertEqual(
                [(level, "cannot be reached" in what) for level, what in found],
                [("warning", True)],
                found,
            )
            # With tokens that expire soon.
            self.cloud.start_keystone(expiration=15)
            brief = self.of("erp-member", "erp")
            self.assertEqual(self.look(brief), 200)
            self.assertIn("answers again", self.agent.log())
            self.assertEqual(self.look(member), 200, "it holds still")
            self.until(lambda: self.look(brief) == 401)
            self.assertEqual(self.attach(brief).status, 401)
        finally:
            self.cloud.stop_keystone()
            self.cloud.start_keystone()
            self.agent.virt_usb("token", "remove", "local")

    def doctor(self) -> list[tuple[str, str]]:
        """What `virt-usb doctor` reports about Keystone: level and text."""
        findings = json.loads(self.agent.virt_usb("--json", "doctor").stdout)
        return [
            (finding["level"], finding["what"])
            for finding in findings
            if finding["check"] == "keystone"
        ]

    def test_a_service_user_that_may_not_ask_lets_nobody_in_and_the_log_says_why(self) -> None:
        member = self.of("erp-member", "erp")
        for user, project, secret, why in [
            (
                "erp-reader",
                "erp",
                None,
                "does not let the user erp-reader validate tokens: "
                'give it the role "service" in the project erp',
            ),
            (
                "virt-usb",
                "service",
                "wrong",
                "refuses the user virt-usb of the domain Default in the project service of the "
                "domain Default, or its password in FILE",
            ),
            (
                "virt-usb",
                "erp",
                None,
                "refuses the user virt-usb of the domain Default in the project erp of the domain "
                "Default, or its password in FILE",
            ),
        ]:
            file = self.cloud.folder / f"keystone/{user}.password"
            right = file.read_text()
            with tempfile.TemporaryDirectory() as folder:
                other = Agent(Path(folder))
                told = Path(folder) / "password"
                told.write_text(secret or right)
                other.make(
                    {
                        "url": self.cloud.keystone,
                        "user": user,
                        "project": project,
                        "password_file": str(told),
                        "cache": CACHE,
                    }
                )
                other.start()
                try:
                    for _ in range(3):
                        answer = other.ask(member, "GET", "os-usb-devices")
                        self.assertEqual(answer.status, 503, answer)
                    self.assertEqual(
                        other.log().count(
                            f"{why.replace('FILE', str(told))}; Keystone tokens are rejected"
                        ),
                        1,
                        other.log(),
                    )
                finally:
                    other.stop()

    def test_the_doctor_says_how_it_is(self) -> None:
        well = ("ok", f"{self.cloud.keystone} answers")
        self.assertEqual(self.doctor(), [well])
        file = self.cloud.folder / "keystone/virt-usb.password"
        file.chmod(0o644)
        try:
            self.assertEqual(
                self.doctor(),
                [
                    well,
                    (
                        "warning",
                        f"the password in {file}: every user of this host may read it, "
                        "or write to it",
                    ),
                ],
            )
        finally:
            file.chmod(0o600)


if __name__ == "__main__":
    unittest.main()
