"""OpenStack's Keystone on this machine alone: SQLite, Fernet tokens, users and projects to test with.

    python identity.py serve DIR [--expiration SECONDS]

It makes a Keystone in DIR unless there is one, serves it on 127.0.0.1, prints its URL when it answers, and ends with its parent. It has the port that
it had before.

Who there is stands below; ids are in DIR/cloud.json, and each user's password in DIR/USER.password: the user's name and `-secret`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ports

from local import TIMEOUT_SECONDS, end_with_parent, session, wait_for

# User, project, role. `admin` is made by keystone-manage; `service`, `member` and `reader` are Keystone's own roles.
ASSIGNMENTS = [
    ("virt-usb", "service", "service"),
    ("erp-member", "erp", "member"),
    ("erp-reader", "erp", "reader"),
    ("crm-member", "crm", "member"),
    ("crm-reader", "crm", "reader"),
]
ADMIN = "admin"
REGION = "RegionOne"

# bcrypt's four rounds are its fewest.
CONFIGURATION = """\
[DEFAULT]
use_stderr = false
log_file = {folder}/keystone.log
[database]
connection = sqlite:///{folder}/keystone.sqlite
[token]
provider = fernet
expiration = {expiration}
[fernet_tokens]
key_repository = {folder}/fernet-keys
[fernet_receipts]
key_repository = {folder}/fernet-keys
[identity]
password_hash_rounds = 4
[oslo_policy]
enforce_scope = true
"""


def password(user: str) -> str:
    """What a user logs in with."""
    return f"{user}-secret"


def tool(name: str) -> str:
    """A program of this Python environment."""
    return str(Path(sys.executable).parent / name)


def scope(project: str) -> dict[str, Any]:
    """Of a token for that project."""
    return {"project": {"name": project, "domain": {"id": "default"}}}


def issue_token(url: str, user: str, scope: dict[str, Any] | str) -> str:
    """What Keystone gives out; `scope` is in its own words, `"unscoped"` one of them."""
    who = {"name": user, "domain": {"id": "default"}, "password": password(user)}
    auth: Any = {"identity": {"methods": ["password"], "password": {"user": who}}, "scope": scope}
    answer = session().post(f"{url}/auth/tokens", json={"auth": auth}, timeout=TIMEOUT_SECONDS)
    answer.raise_for_status()
    return answer.headers["X-Subject-Token"]


class Admin:
    """Keystone's API, for its administrator."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.session = session()
        self.session.headers["X-Auth-Token"] = issue_token(url, ADMIN, scope(ADMIN))

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """What Keystone answers."""
        answer = self.session.request(
            method, f"{self.url}/{path}", json=body, timeout=TIMEOUT_SECONDS
        )
        if not answer.ok:
            raise SystemExit(f"identity.py: {method} {path}: {answer.status_code}: {answer.text}")
        return answer.json() if answer.content else None

    def named(self, kind: str, name: str, more: dict[str, Any]) -> str:
        """The id of a user, project, role or service; made unless it is there."""
        found = self.call("GET", f"{kind}s?name={name}")[f"{kind}s"]
        if not found:
            found = [self.call("POST", f"{kind}s", {kind: {"name": name, **more}})[kind]]
        return str(found[0]["id"])

    def people(self) -> dict[str, dict[str, str]]:
        """Makes the users and projects, and returns the ids of all."""
        domain = {"domain_id": "default"}
        ids: dict[str, dict[str, str]] = {"users": {}, "projects": {}, "roles": {}}
        ids["users"][ADMIN] = self.named("user", ADMIN, domain)
        ids["projects"][ADMIN] = self.named("project", ADMIN, domain)
        for user, project, role in ASSIGNMENTS:
            ids["users"][user] = self.named("user", user, {**domain, "password": password(user)})
            ids["projects"][project] = self.named("project", project, domain)
            ids["roles"][role] = self.named("role", role, {})
            self.call(
                "PUT",
                f"projects/{ids['projects'][project]}/users/{ids['users'][user]}/roles/{ids['roles'][role]}",
            )
        return ids

    def no_service(self, kind: str) -> None:
        """Takes a service out of the catalogue."""
        for old in self.call("GET", f"services?type={kind}")["services"]:
            self.call("DELETE", f"services/{old['id']}")

    def service(self, kind: str, url: str) -> None:
        """Puts a service and its public endpoint into the catalogue, in the place of the one that was there."""
        self.no_service(kind)
        service = self.named("service", kind, {"type": kind})
        endpoint = {"service_id": service, "interface": "public", "region_id": REGION, "url": url}
        self.call("POST", "endpoints", {"endpoint": endpoint})


def manage(folder: Path, *arguments: str) -> None:
    """Runs keystone-manage."""
    command = [tool("keystone-manage"), "--config-file", str(folder / "keystone.conf"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"identity.py: keystone-manage {arguments[0]}: {done.stdout}{done.stderr}")


def make(folder: Path, url: str) -> None:
    """Makes the database, the keys, the administrator and the catalogue's first entry."""
    manage(folder, "db_sync")
    keys = folder / "fernet-keys"
    keys.mkdir(mode=0o700, exist_ok=True)
    owner = ["--keystone-user", str(os.getuid()), "--keystone-group", str(os.getgid())]
    manage(folder, "fernet_setup", *owner)
    manage(
        folder,
        "bootstrap",
        "--bootstrap-password",
        password(ADMIN),
        "--bootstrap-public-url",
        url,
        "--bootstrap-region-id",
        REGION,
    )
    for user in [ADMIN, *(user for user, _, _ in ASSIGNMENTS)]:
        file = folder / f"{user}.password"
        file.touch(mode=0o600)
        file.write_text(f"{password(user)}\n")


def serve(folder: Path, expiration: int) -> int:
    """Serves until this process is ended or its parent is gone."""
    parent = os.getppid()
    folder.mkdir(parents=True, exist_ok=True)
    had = folder / "port"
    is_new = not had.exists()
    port = ports.reserve() if is_new else int(had.read_text())
    url = f"http://127.0.0.1:{port}/v3"
    (folder / "keystone.conf").write_text(
        CONFIGURATION.format(folder=folder, expiration=expiration)
    )
    if is_new:
        make(folder, url)

    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "answer", str(port)],
            env={**os.environ, "OS_KEYSTONE_CONFIG_DIR": str(folder)},
            stdout=log,
            stderr=log,
            preexec_fn=end_with_parent,
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        wait_for(server, url, {200}, f"{folder}/server.log and {folder}/keystone.log")
        if is_new:
            (folder / "cloud.json").write_text(json.dumps(Admin(url).people(), indent=1))
            had.write_text(str(port))
        print(url, flush=True)
        while server.poll() is None and os.getppid() == parent:
            time.sleep(0.2)
        return server.poll() or 0
    finally:
        server.terminate()
        server.wait()


def answer(port: int) -> int:
    """Is Keystone, as `serve` has configured it."""
    # It reads the command line itself, as soon as it is imported.
    sys.argv = ["keystone"]
    application = importlib.import_module("keystone.wsgi.api").application
    importlib.import_module("waitress").serve(application, host="127.0.0.1", port=port, threads=8)
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Keystone on this machine alone")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "serve", help="serve it, and make it before where it is not there"
    )
    command.add_argument("folder", type=Path)
    command.add_argument(
        "--expiration", type=int, default=3600, help="how long a token holds, in seconds"
    )
    commands.add_parser("answer").add_argument("port", type=int)
    asked = parser.parse_args()
    if asked.command == "answer":
        return answer(asked.port)
    return serve(asked.folder.resolve(), asked.expiration)


if __name__ == "__main__":
    sys.exit(main())
