"""OpenStack's Keystone on this machine, with SQLite, Fernet tokens, and users for tests.

    python identity.py serve DIR [--expiration SECONDS]

Creates a Keystone in DIR if there is none, serves it on 127.0.0.1, prints its URL when it responds,
and ends with its parent. A Keystone keeps its port.

ASSIGNMENTS lists the users. Their ids are in DIR/cloud.json. The password of a user is its name and
`-secret`, and is in DIR/USER.password.
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

# User, project, role. keystone-manage creates `admin`. The other roles are Keystone's.
ASSIGNMENTS = [
    ("virt-usb", "service", "service"),
    ("erp-member", "erp", "member"),
    ("erp-reader", "erp", "reader"),
    ("crm-member", "crm", "member"),
    ("crm-reader", "crm", "reader"),
]
ADMIN = "admin"
REGION = "RegionOne"

# Four rounds are the minimum of bcrypt.
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
    """The password of a user."""
    return f"{user}-secret"


def tool(name: str) -> str:
    """The path of a program of this Python environment."""
    return str(Path(sys.executable).parent / name)


def scope(project: str) -> dict[str, Any]:
    """The scope of a token for that project."""
    return {"project": {"name": project, "domain": {"id": "default"}}}


def issue_token(url: str, user: str, scope: dict[str, Any] | str) -> str:
    """Create a token. `scope` is in Keystone's format, such as `"unscoped"`."""
    who = {"name": user, "domain": {"id": "default"}, "password": password(user)}
    auth: Any = {"identity": {"methods": ["password"], "password": {"user": who}}, "scope": scope}
    answer = session().post(f"{url}/auth/tokens", json={"auth": auth}, timeout=TIMEOUT_SECONDS)
    answer.raise_for_status()
    return answer.headers["X-Subject-Token"]


class Admin:
    """Keystone's API for its administrator."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.session = session()
        self.session.headers["X-Auth-Token"] = issue_token(url, ADMIN, scope(ADMIN))

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Call Keystone's API and return the response."""
        answer = self.session.request(
            method, f"{self.url}/{path}", json=body, timeout=TIMEOUT_SECONDS
        )
        if not answer.ok:
            raise SystemExit(f"identity.py: {method} {path}: {answer.status_code}: {answer.text}")
        return answer.json() if answer.content else None

    def named(self, kind: str, name: str, more: dict[str, Any]) -> str:
        """The id of a user, project, role or service, which is created if it does not exist."""
        found = self.call("GET", f"{kind}s?name={name}")[f"{kind}s"]
        if not found:
            found = [self.call("POST", f"{kind}s", {kind: {"name": name, **more}})[kind]]
        return str(found[0]["id"])

    def people(self) -> dict[str, dict[str, str]]:
        """Create the users and projects, and return their ids."""
        domain = {"domain_id": "default"}
        ids: dict[str, dict[str, str]] = {"users": {}, "projects": {}, "roles": {}}
        ids["users"][ADMIN] = self.named("user", ADMIN, domain)
        ids["projects"][ADMIN] = self.named("project", ADMIN, domain)
        for user, project, role in ASSIGNMENTS:
            ids["users"][user] = self.named("user", user, {**domain, "password": password(user)})
            ids["projects"][project] = self.named("project", project, domain)
            ids["roles"][role] = self.named("role", role, {})
            of_project = f"projects/{ids['projects'][project]}/users/{ids['users'][user]}"
            self.call("PUT", f"{of_project}/roles/{ids['roles'][role]}")
        return ids

    def no_service(self, kind: str) -> None:
        """Remove a service from the catalogue."""
        for old in self.call("GET", f"services?type={kind}")["services"]:
            self.call("DELETE", f"services/{old['id']}")

    def service(self, kind: str, url: str) -> None:
        """Add a service with its public endpoint to the catalogue, or replace it."""
        self.no_service(kind)
        service = self.named("service", kind, {"type": kind})
        endpoint = {"service_id": service, "interface": "public", "region_id": REGION, "url": url}
        self.call("POST", "endpoints", {"endpoint": endpoint})


def manage(folder: Path, *arguments: str) -> None:
    """Run keystone-manage."""
    command = [tool("keystone-manage"), "--config-file", str(folder / "keystone.conf"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"identity.py: keystone-manage {arguments[0]}: {done.stdout}{done.stderr}")


def make(folder: Path, url: str) -> None:
    """Create the database, the keys, the administrator and the catalogue's first entry."""
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
    """Serve until this process or its parent ends."""
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
    """Run Keystone with the configuration of `serve`."""
    # Keystone reads the command line when it is imported.
    sys.argv = ["keystone"]
    application = importlib.import_module("keystone.wsgi.api").application
    importlib.import_module("waitress").serve(application, host="127.0.0.1", port=port, threads=8)
    return 0


def main() -> int:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description="Keystone on this machine, for tests")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "serve", help="serve Keystone, and create it if it does not exist"
    )
    command.add_argument("folder", type=Path)
    command.add_argument(
        "--expiration", type=int, default=3600, help="lifetime of a token, in seconds"
    )
    commands.add_parser("answer").add_argument("port", type=int)
    asked = parser.parse_args()
    if asked.command == "answer":
        return answer(asked.port)
    return serve(asked.folder.resolve(), asked.expiration)


if __name__ == "__main__":
    sys.exit(main())
