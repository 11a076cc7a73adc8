"""A cloud on this machine: Keystone, the agent with simulated devices and guests, and a Nova stub.

    python cloud.py FOLDER COMMAND...

Starts the cloud in FOLDER, runs COMMAND there, and ends the cloud. COMMAND has the environment for
`openstack` and a `tempest.conf`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import ports

from agent import Agent
from identity import REGION, Admin, password
from local import end_with_parent, wait_for

HERE = Path(__file__).resolve().parent
TEMPEST = """\
[DEFAULT]
log_file = {folder}/tempest.log
[oslo_concurrency]
lock_path = {folder}/locks
[auth]
use_dynamic_credentials = true
create_isolated_networks = false
admin_username = admin
admin_password = {password}
admin_project_name = admin
admin_domain_name = Default
[identity]
uri_v3 = {keystone}
region = {region}
v3_endpoint_type = public
[compute]
region = {region}
image_ref = none
build_interval = 1
build_timeout = 60
[service_available]
cinder = false
glance = false
neutron = false
nova = true
swift = false
horizon = false
"""


class Cloud:
    """The parts of the cloud and their processes."""

    def __init__(self, folder: Path, *, cache: int = 60) -> None:
        self.folder = folder
        self.agent = Agent(folder / "agent")
        self.cache = cache
        self.keystone = ""
        self._identity: subprocess.Popen[str] | None = None
        self._compute: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cloud:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start_keystone()
        self.agent.make(
            {
                "url": self.keystone,
                "password_file": f"{self.folder}/keystone/virt-usb.password",
                "cache": self.cache,
            }
        )
        self.agent.start()
        Admin(self.keystone).service("usb", self.agent.url)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop_compute()
        self.agent.stop()
        self.stop_keystone()

    def start_keystone(self, expiration: int = 3600) -> None:
        """Start Keystone. Its tokens expire after this number of seconds."""
        command = [
            sys.executable,
            str(HERE / "identity.py"),
            "serve",
            str(self.folder / "keystone"),
            "--expiration",
            str(expiration),
        ]
        self._identity = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent
        )
        assert self._identity.stdout is not None
        self.keystone = self._identity.stdout.readline().strip()
        if not self.keystone:
            raise SystemExit("Keystone does not start")

    def stop_keystone(self) -> None:
        """End Keystone."""
        if self._identity is not None:
            self._identity.terminate()
            self._identity.wait()
            assert self._identity.stdout is not None
            self._identity.stdout.close()
            self._identity = None

    def start_compute(self) -> None:
        """Start the stub of Nova's API."""
        port = ports.reserve()
        told = {"keystone": self.keystone, "password": password("virt-usb")}
        (self.folder / "services.json").write_text(json.dumps(told))
        with (self.folder / "compute.log").open("ab") as log:
            command = [sys.executable, str(HERE / "compute.py"), str(port), str(self.folder)]
            self._compute = subprocess.Popen(
                command, stdout=log, stderr=log, preexec_fn=end_with_parent
            )
        url = f"http://127.0.0.1:{port}/v2.1"
        wait_for(self._compute, f"{url}/", {200, 401}, f"{self.folder}/compute.log")
        Admin(self.keystone).service("compute", url)

    def stop_compute(self) -> None:
        """End the stub, as in a cloud without Nova."""
        if self._compute is not None:
            self._compute.terminate()
            self._compute.wait()
            self._compute = None
            Admin(self.keystone).no_service("compute")

    def environment(self, user: str, project: str) -> dict[str, str]:
        """The environment of `openstack` for that user in that project."""
        mine = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("OS_")
            and key.lower() not in {"http_proxy", "https_proxy", "all_proxy"}
        }
        return {
            **mine,
            "OS_AUTH_URL": self.keystone,
            "OS_USERNAME": user,
            "OS_PASSWORD": password(user),
            "OS_PROJECT_NAME": project,
            "OS_USER_DOMAIN_NAME": "Default",
            "OS_PROJECT_DOMAIN_NAME": "Default",
            "OS_IDENTITY_API_VERSION": "3",
            "OS_REGION_NAME": REGION,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            # No settings of the user who runs the tests.
            "HOME": str(self.folder),
            "XDG_CONFIG_HOME": str(self.folder),
            "XDG_CACHE_HOME": str(self.folder),
        }

    def configure_tempest(self) -> None:
        """Write `tempest.conf`: the services, and the account that creates projects and users."""
        (self.folder / "tempest.conf").write_text(
            TEMPEST.format(
                folder=self.folder,
                keystone=self.keystone,
                password=password("admin"),
                region=REGION,
            )
        )


def main() -> int:
    """Run a command in a cloud."""
    with Cloud(Path(sys.argv[1]).resolve()) as cloud:
        cloud.start_compute()
        cloud.configure_tempest()
        return subprocess.run(
            sys.argv[2:], cwd=cloud.folder, env=cloud.environment("admin", "admin"), check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
