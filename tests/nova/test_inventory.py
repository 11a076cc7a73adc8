"""Where the filter in Nova learns what the hosts have: a real etcd, a real `virt-usb scheduler`, a file; and who asks it."""

import base64
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import types
import unittest
from pathlib import Path

import requests
from virt_usb_nova import conf, inventory, oracle
from virt_usb_nova.wasm import Refused

import fleet

VIRT_USB = os.environ.get("VIRT_USB", str(Path(__file__).parents[2] / "target/release/virt-usb"))
WANTED = {"flavor": {"usb_devices": [fleet.KEY]}}


def until(what, look, seconds=30):
    end = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.02)
    return found


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Etcd:
    """A real one, on loopback."""

    def __init__(self, folder):
        self.folder, self.port, self.peer = Path(folder), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        peer = f"http://127.0.0.1:{self.peer}"
        with open(self.folder / "etcd.log", "ab") as log:
            self.process = subprocess.Popen(
                ["etcd", "--data-dir", self.folder / "data", "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
                 "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"],
                stdout=log, stderr=log,
            )  # fmt: skip
        until("etcd", lambda: self.run("endpoint", "health", check=False).returncode == 0)

    def stop(self):
        self.process.kill()
        self.process.wait()

    def run(self, *arguments, check=True, text=None):
        environment = {**os.environ, "ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": self.url}
        return subprocess.run(["etcdctl", *arguments], env=environment, check=check, capture_output=True, text=True, input=text)

    def put(self, key, value, *more):
        self.run("put", f"/virt-usb/{key}", value, *more)

    def publish(self, host, node, *devices, **more):
        self.put(f"hosts/{host}", fleet.document(host, node, *devices, **more))

    def publish_all(self, documents):
        """In one transaction."""
        puts = [{"request_put": {"key": encoded(f"/virt-usb/hosts/{host}"), "value": encoded(text)}} for host, text in documents.items()]
        requests.post(f"{self.url}/v3/kv/txn", json={"success": puts}, timeout=30).raise_for_status()


def encoded(text):
    return base64.b64encode(text.encode()).decode()


def options(**said):
    """All options by their defaults, but for what is said."""
    given = {option.dest: option.default for option in conf.OPTIONS}
    given.update(component=fleet.COMPONENT, deadline=10.0, **said)
    return types.SimpleNamespace(**given)


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="virt-usb-nova-")
        self.addCleanup(shutil.rmtree, self.folder)
        oracle.forget()

    def etcd(self):
        etcd = Etcd(self.folder)
        self.addCleanup(etcd.stop)
        return etcd


class FromEtcd(Case):
    def test_what_is_published_counts_and_what_is_gone_does_not(self):
        etcd = self.etcd()
        etcd.publish("a", 2, fleet.device(1_000_001))
        etcd.publish("b", 3, fleet.device(2_000_001, "allocated"))
        who = oracle.make(options(etcd_endpoints=[etcd.url]))
        self.assertEqual({"a"}, who.able(WANTED, ["a", "b", "c"]))
        self.assertEqual({"b": "too-few-free", "c": "unknown-host"}, {h: w["reason"] for h, w in who.reasons(WANTED, ["b", "c"]).items()})
        etcd.publish("b", 3, fleet.device(2_000_001), revision=2)
        until("the change", lambda: who.able(WANTED, ["a", "b"]) == {"a", "b"})
        self.assertEqual({"a", "b"}, who.scores(WANTED, ["a", "b"]).keys())
        self.assertEqual({"a", "b"}, set(who.best(WANTED, 3)))
        self.assertEqual(1, len(who.best(WANTED, 1)))
        # Nobody speaks for another, and what cannot be read is none.
        etcd.put("hosts/b", fleet.document("a", 3, fleet.device(2_000_001)))
        until("b to be out", lambda: who.able(WANTED, ["a", "b"]) == {"a"})
        etcd.put("hosts/a", "{")
        until("a to be out", lambda: who.able(WANTED, ["a", "b"]) == set())
        # A host dies: its lease ends.
        lease = etcd.run("lease", "grant", "60").stdout.split()[1]
        etcd.put("hosts/c", fleet.document("c", 4, fleet.device(3_000_001)), f"--lease={lease}")
        until("c", lambda: who.able(WANTED, ["c"]) == {"c"})
        etcd.run("lease", "revoke", lease)
        until("c to be out", lambda: who.able(WANTED, ["c"]) == set())
        with self.assertRaisesRegex(Refused, "vendor_id"):
            who.able({"flavor": {"usb_devices": [{"vendor_id": "xyz"}]}}, ["a"])
        etcd.put("flavors/erp/big %", '{"usb_devices":[{"vendor_id":"0529"}]}')
        self.assertIn("0529", until("the flavor", lambda: who.flavor("erp/big %")))
        self.assertIsNone(who.flavor("none"))

    def test_etcd_away_is_stale_and_caught_up_afterwards(self):
        etcd = self.etcd()
        for first in range(0, 1200, 100):
            etcd.publish_all({f"h{at}": fleet.document(f"h{at}", at + 2, fleet.device((at + 1) * 1_000_000 + 1)) for at in range(first, first + 100)})
        who = oracle.make(options(etcd_endpoints=["http://127.0.0.1:1", etcd.url], max_age=2))
        names = [f"h{number}" for number in range(1200)]
        self.assertEqual(1200, len(who.able(WANTED, names)))
        etcd.stop()
        stale = until("it to be stale", lambda: self.stale(who), 60)
        self.assertRegex(stale, "nothing was heard of the fleet for [0-9]+ s: http://127.0.0.1")
        etcd.start()
        # While it was not heard, and its history is compacted.
        etcd.run("del", "/virt-usb/hosts/h7")
        etcd.publish("h8", 10, fleet.device(9_000_001, "allocated"))
        revision = json.loads(etcd.run("get", "x", "-w", "json").stdout)["header"]["revision"]
        etcd.run("compact", str(revision))
        until("it to be heard", lambda: self.stale(who) is None, 60)
        until("both to be out", lambda: set(names) - who.able(WANTED, names) == {"h7", "h8"})

    @staticmethod
    def stale(who):
        try:
            who.able(WANTED, ["h1"])
        except oracle.Stale as why:
            return str(why)
        return None

    def test_etcd_wants_to_know_who_asks(self):
        etcd = self.etcd()
        etcd.publish("a", 2, fleet.device(1_000_001))
        password = Path(self.folder) / "password"
        password.write_text("look\n")
        for command in (["user", "add", "root:r"], ["user", "grant-role", "root", "root"], ["user", "add", "scheduler:look"],
                        ["role", "add", "virt-usb-reader"], ["role", "grant-permission", "virt-usb-reader", "read", "/virt-usb/", "--prefix"],
                        ["user", "grant-role", "scheduler", "virt-usb-reader"], ["auth", "enable"]):  # fmt: skip
            etcd.run(*command)
        oracle_of = {"etcd_endpoints": [etcd.url], "etcd_user": "scheduler", "etcd_password_file": str(password)}
        self.assertEqual({"a"}, oracle.make(options(**oracle_of)).able(WANTED, ["a"]))
        nobody = oracle.make(options(etcd_endpoints=[etcd.url]))
        inventory.Etcd.FIRST, first = 1.0, inventory.Etcd.FIRST
        self.addCleanup(setattr, inventory.Etcd, "FIRST", first)
        with self.assertRaisesRegex(oracle.Stale, "the fleet is not known yet: .*user name is empty"):
            nobody.able(WANTED, ["a"])


class FromAScheduler(Case):
    def test_a_scheduler_is_asked_and_its_words_are_kept(self):
        etcd = self.etcd()
        etcd.publish("a", 2, fleet.device(1_000_001))
        etcd.publish("b", 3, fleet.device(2_000_001, "allocated"))
        etcd.put("flavors/erp", '{"usb_devices":[{"vendor_id":"0529"}]}')
        state, socket_path, port = Path(self.folder) / "state", Path(self.folder) / "scheduler.sock", free_port()
        config = Path(self.folder) / "config.toml"
        config.write_text(f'state_dir = "{state}"\n[fleet]\nendpoints = ["{etcd.url}"]\n')
        with open(Path(self.folder) / "scheduler.log", "wb") as log:
            scheduler = subprocess.Popen(
                [VIRT_USB, "--config", config, "scheduler", "--listen", f"127.0.0.1:{port}", "--socket", socket_path, "--max-age", "2"],
                stderr=log,
            )
        self.addCleanup(lambda: (scheduler.kill(), scheduler.wait()))
        who = oracle.make(options(inventory="scheduler", scheduler_url=f"unix:{socket_path}"))
        until("the scheduler", lambda: self.answers(who))
        by_net = oracle.make(options(inventory="scheduler", scheduler_url=f"http://127.0.0.1:{port}"))
        for one in (who, by_net):
            self.assertEqual({"a"}, one.able(WANTED, ["a", "b", "c"]))
            self.assertEqual(["a"], one.best(WANTED, 3))
            reasons = {host: why["reason"] for host, why in one.reasons(WANTED, ["a", "b", "c"]).items()}
            self.assertEqual({"b": "too-few-free", "c": "unknown-host"}, reasons)
        until("the flavor", lambda: self.answers(who, {"flavor": "@erp"}))
        with self.assertRaisesRegex(Refused, "no flavor of the name"):
            who.able({"flavor": "@none"}, ["a"])
        with self.assertRaisesRegex(Refused, "vendor_id"):
            who.able({"flavor": {"usb_devices": [{"vendor_id": "xyz"}]}}, ["a"])
        etcd.stop()
        with self.assertRaisesRegex(oracle.Stale, "nothing was heard of the fleet"):
            until("it to be stale", lambda: not who.able(WANTED, ["a"]))
        scheduler.kill()
        with self.assertRaisesRegex(oracle.Stale, "virt-usb scheduler does not answer"):
            until("it to be away", lambda: not who.able(WANTED, ["a"]))

    @staticmethod
    def answers(who, question=WANTED):
        try:
            return who.able(question, ["a"])
        except (oracle.Stale, Refused):
            return None


class InManyHands(Case):
    def made(self):
        file = os.path.join(self.folder, "hosts")
        fleet.write(file, *(fleet.document(f"h{at}", at + 2, fleet.device((at + 1) * 1_000_000 + 1)) for at in range(200)))
        return file, options(inventory="file", inventory_file=file, max_age=600)

    def test_many_threads_ask_while_it_changes(self):
        file, said = self.made()
        who, names, wrong = oracle.get(said), [f"h{at}" for at in range(200)], []

        def ask():
            for _ in range(30):
                found = len(who.able(WANTED, names))
                if not 100 <= found <= 200:
                    wrong.append(found)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for count in (150, 100, 199):
            fleet.write(file, *(fleet.document(f"h{at}", at + 2, fleet.device((at + 1) * 1_000_000 + 1)) for at in range(count)))
        for thread in threads:
            thread.join()
        self.assertEqual([], wrong)
        self.assertEqual(199, len(who.able(WANTED, names)))

    def test_a_child_has_an_oracle_of_its_own(self):
        _, said = self.made()
        self.assertEqual({"h1"}, oracle.get(said).able(WANTED, ["h1"]))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if oracle.get(said).able(WANTED, ["h1"]) == {"h1"} else 2
            finally:
                os._exit(code)
        self.assertEqual(0, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    def test_an_instance_that_fails_is_not_asked_again(self):
        _, said = self.made()
        who = oracle.make(said)
        self.assertEqual({"h1"}, who.able(WANTED, ["h1"]))
        who._idle[0].filter._store.close()
        with self.assertRaises(Exception):  # noqa: B017  whatever the bindings say of it
            who.able(WANTED, ["h1"])
        self.assertEqual({"h1"}, who.able(WANTED, ["h1"]))


if __name__ == "__main__":
    unittest.main()
