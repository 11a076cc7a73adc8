"""A stub of Nova's API for Tempest and `openstack`: flavors, and servers of the agent's simulation.

    python compute.py PORT CLOUD

CLOUD is the folder of `cloud.py`. A server is a `[[domain]]` of the agent's `--sim FILE`, with the
request of the flavor's extra specs. The agent starts it with the hook. keystonemiddleware
authenticates callers.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flask
import waitress
from keystonemiddleware import auth_token
from werkzeug.exceptions import HTTPException

from agent import Agent

# Names of Nova's extra specs, and the keys in a flavor's JSON.
EXTRA_SPECS = {"usb:devices": "usb_devices", "usb:redirection_devices": "usb_redirection_devices"}
# Nova's names of errors.
FAULTS = {400: "badRequest", 403: "forbidden", 404: "itemNotFound", 409: "conflictingRequest"}

app = flask.Flask(__name__)


class Compute:
    """The flavors and servers, by their ids."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.lock = threading.Lock()
        self.flavors: dict[str, dict[str, Any]] = {}
        self.servers: dict[str, dict[str, Any]] = {}

    def write(self) -> None:
        """Write the servers as domains of the simulation."""
        self.agent.write_domains([server["domain"] for server in self.servers.values()])

    def state(self, server: dict[str, Any]) -> tuple[str, str | None]:
        """The status of a server, and the hook's message if it refused the start."""
        domain = server["domain"]
        refused = re.search(rf"does not start: {domain['name']}: (.*)", self.agent.log())
        if refused:
            return "ERROR", refused[1]
        found = {one["id"]: one["status"] for one in self.agent.local("GET", "servers")["servers"]}
        status = found.get(domain["uuid"])
        if domain["running"]:
            return ("ACTIVE" if status == "ACTIVE" else "BUILD"), None
        return ("ACTIVE" if status == "ACTIVE" else "SHUTOFF"), None


compute: Compute


def roles() -> list[str]:
    """The roles of the caller."""
    return flask.request.headers.get("X-Roles", "").split(",")


def caller(role: str = "reader") -> str:
    """The project of the caller, who must have the role."""
    if role not in roles():
        flask.abort(403)
    return str(flask.request.headers["X-Project-Id"])


def body(name: str) -> dict[str, Any]:
    """The object under that name in the request."""
    return dict(flask.request.get_json()[name])


def links(kind: str, one: str) -> list[dict[str, str]]:
    """Links to a resource."""
    return [{"rel": "self", "href": f"{flask.request.host_url}v2.1/{kind}/{one}"}]


def one_of(all_of_them: dict[str, dict[str, Any]], one: str) -> dict[str, Any]:
    """The resource with this id, which the caller must own."""
    found = all_of_them.get(one)
    is_mine = found is not None and (
        "project" not in found or found["project"] == caller() or "admin" in roles()
    )
    if found is None or not is_mine:
        flask.abort(404)
    return found


@app.errorhandler(HTTPException)
def fault(e: HTTPException) -> tuple[dict[str, Any], int]:
    """An error response in Nova's format."""
    code = e.code or 500
    return {FAULTS.get(code, "computeFault"): {"code": code, "message": e.description}}, code


@app.get("/v2.1/")
def version() -> dict[str, Any]:
    """The version of the API, for discovery."""
    return {
        "version": {
            "id": "v2.1",
            "status": "CURRENT",
            "version": "2.1",
            "min_version": "2.1",
            "updated": "2013-07-23T11:33:21Z",
            "links": [{"rel": "self", "href": f"{flask.request.host_url}v2.1/"}],
        }
    }


def flavor_shown(flavor: dict[str, Any]) -> dict[str, Any]:
    """A flavor in Nova's format."""
    return {**flavor["shown"], "links": links("flavors", flavor["shown"]["id"])}


@app.post("/v2.1/flavors")
def create_flavor() -> dict[str, Any]:
    """Create a flavor without extra specs."""
    caller("admin")
    asked = body("flavor")
    asked.setdefault("swap", "")
    asked["id"] = asked.get("id") or str(uuid.uuid4())
    shown = {key: asked[key] for key in ("id", "name", "ram", "vcpus", "disk", "swap")}
    compute.flavors[asked["id"]] = {"shown": shown, "extra_specs": {}}
    return {"flavor": flavor_shown(compute.flavors[asked["id"]])}


@app.get("/v2.1/flavors/<one>")
def show_flavor(one: str) -> dict[str, Any]:
    """Show a flavor."""
    return {"flavor": flavor_shown(one_of(compute.flavors, one))}


@app.delete("/v2.1/flavors/<one>")
def delete_flavor(one: str) -> tuple[str, int]:
    """Delete a flavor. Servers keep the flavor that they were created with."""
    caller("admin")
    one_of(compute.flavors, one)
    del compute.flavors[one]
    return "", 202


@app.post("/v2.1/flavors/<one>/os-extra_specs")
def set_extra_specs(one: str) -> dict[str, Any]:
    """Set the extra specs of a flavor."""
    caller("admin")
    specs = one_of(compute.flavors, one)["extra_specs"]
    specs.update(body("extra_specs"))
    return {"extra_specs": specs}


def wanted(flavor: dict[str, Any]) -> str | None:
    """The request for the hook, as in the metadata that Nova writes."""
    asked = {
        EXTRA_SPECS[key]: json.loads(value)
        for key, value in flavor["extra_specs"].items()
        if key in EXTRA_SPECS
    }
    return json.dumps(asked) if asked else None


@app.post("/v2.1/servers")
def create_server() -> tuple[dict[str, Any], int]:
    """Create a server, which the agent starts."""
    project = caller("member")
    asked = body("server")
    flavor = one_of(compute.flavors, str(asked["flavorRef"]))
    one = str(uuid.uuid4())
    with compute.lock:
        name = f"instance-{len(compute.servers) + 1:08x}-{one[:8]}"
        domain = {
            "name": name,
            "uuid": one,
            "project": project,
            "running": True,
            "spice": True,
            "flavor": wanted(flavor),
        }
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        user = flask.request.headers["X-User-Id"]
        compute.servers[one] = {
            "project": project,
            "user": user,
            "asked": asked,
            "created": created,
            "flavor": flavor["shown"]["id"],
            "domain": domain,
        }
        compute.write()
    return {
        "server": {
            "id": one,
            "links": links("servers", one),
            "OS-DCF:diskConfig": "MANUAL",
            "adminPass": "none",
            "security_groups": [],
        }
    }, 202


def server_shown(one: str, server: dict[str, Any]) -> dict[str, Any]:
    """A server in Nova's format."""
    status, why = compute.state(server)
    shown = {
        "id": one,
        "name": server["asked"]["name"],
        "status": status,
        "image": "",
        "flavor": {"id": server["flavor"], "links": links("flavors", server["flavor"])},
        "user_id": server["user"],
        "tenant_id": server["project"],
        "created": server["created"],
        "updated": server["created"],
        "metadata": {},
        "links": links("servers", one),
        "addresses": {},
        "hostId": "",
        "OS-EXT-STS:task_state": None,
        "OS-EXT-STS:vm_state": status.lower(),
    }
    if why is not None:
        shown["fault"] = {"code": 500, "created": server["created"], "message": why}
    return shown


def servers_of_caller() -> list[tuple[str, dict[str, Any]]]:
    """The servers with the requested name."""
    project, name = caller(), flask.request.args.get("name")
    mine = [
        (one, server) for one, server in compute.servers.items() if server["project"] == project
    ]
    return [
        (one, server)
        for one, server in mine
        if name is None or re.search(name, server["asked"]["name"])
    ]


@app.get("/v2.1/servers")
def list_servers() -> dict[str, Any]:
    """List the servers of the project."""
    return {
        "servers": [
            {"id": one, "name": server["asked"]["name"], "links": links("servers", one)}
            for one, server in servers_of_caller()
        ]
    }


@app.get("/v2.1/servers/detail")
def list_servers_detailed() -> dict[str, Any]:
    """The servers of the project with all fields."""
    return {"servers": [server_shown(one, server) for one, server in servers_of_caller()]}


@app.get("/v2.1/servers/<one>")
def show_server(one: str) -> dict[str, Any]:
    """Show a server."""
    return {"server": server_shown(one, one_of(compute.servers, one))}


@app.delete("/v2.1/servers/<one>")
def delete_server(one: str) -> tuple[str, int]:
    """Delete a server: stop and undefine its domain."""
    caller("member")
    with compute.lock:
        one_of(compute.servers, one)
        del compute.servers[one]
        compute.write()
    return "", 204


@app.post("/v2.1/servers/<one>/action")
def act(one: str) -> tuple[str, int]:
    """Start or stop a server."""
    caller("member")
    actions: dict[str, Callable[[], bool]] = {"os-start": lambda: True, "os-stop": lambda: False}
    with compute.lock:
        server = one_of(compute.servers, one)
        for action in flask.request.get_json():
            if action not in actions:
                flask.abort(400, f"Unknown action: {action}")
            server["domain"]["running"] = actions[action]()
        compute.write()
    return "", 202


def main() -> int:
    """Serve until the process ends."""
    global compute  # noqa: PLW0603
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    cloud = json.loads((folder / "services.json").read_text())
    compute = Compute(Agent(folder / "agent"))
    guarded = auth_token.AuthProtocol(
        app.wsgi_app,
        {
            "auth_type": "password",
            "auth_url": cloud["keystone"],
            "username": "virt-usb",
            "password": cloud["password"],
            "project_name": "service",
            "user_domain_name": "Default",
            "project_domain_name": "Default",
            "www_authenticate_uri": cloud["keystone"],
            "interface": "public",
            "token_cache_time": -1,
            "include_service_catalog": False,
        },
    )
    waitress.serve(guarded, host="127.0.0.1", port=port, threads=8)
    return 0


if __name__ == "__main__":
    sys.exit(main())
