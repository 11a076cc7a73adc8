"""The sources of the filter in Nova: etcd, `virt-usb scheduler` and a file."""

import base64
import http.server
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
import types
import unittest
from pathlib import Path

import ports
import requests
from virt_usb_nova import asked, conf, inventory, oracle
from virt_usb_nova.wasm import Refused

import fleet

VIRT_USB = os.environ.get("VIRT_USB", str(Path(__file__).parents[2] / "target/release/virt-usb"))
WANTED = {"flavor": {"usb_devices": [fleet.KEY]}}


def until(what, look, seconds=300):
    end = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.02)
    return found


def able(who, hosts):
    """The hosts that can serve; None while the fleet is unknown. A probe for `until`."""
    try:
        return who.able(WANTED, hosts)
    except oracle.Stale:
        return None


class Etcd:
    """An etcd on the loopback address."""

    def __init__(self, folder):
        self.folder, self.port, self.peer = Path(folder), ports.reserve(), ports.reserve()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        peer = f"http://127.0.0.1:{self.peer}"
        with open(self.folder / "etcd.log", "ab") as log:
            self.process = subprocess.Popen(
                ["etcd", "--data-dir", self.folder / "data",
                "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
                "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                "--initial-cluster", f"default={peer}"],
                stdout=log, stderr=log,
            )  # fmt: skip
        until("etcd", lambda: self.run("endpoint", "health", check=False).returncode == 0)

    def stop(self):
        self.process.kill()
        self.process.wait()

    def run(self, *arguments, check=True, text=None):
        environment = {**os.environ, "ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": self.url}
        return subprocess.run(
            ["etcdctl", *arguments],
            env=environment,
            check=check,
            capture_output=True,
            text=True,
            input=text,
        )

    def put(self, key, value, *more):
        self.run("put", f"/virt-usb/{key}", value, *more)

    def publish(self, host, node, *devices, **more):
        self.put(f"hosts/{host}", fleet.document(host, node, *devices, **more))

    def publish_all(self, documents):
        """Publish all documents in one transaction."""
        puts = [
            {"request_put": {"key": encoded(f"/virt-usb/hosts/{host}"), "value": encoded(text)}}
            for host, text in documents.items()
        ]
        requests.post(
            f"{self.url}/v3/kv/txn", json={"success": puts}, timeout=300
        ).raise_for_status()


class Answers:
    """A server that gives all callers the same answer, and is neither etcd nor a scheduler."""

    def __init__(self, case, body, status=200):
        outer, self.count = self, 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                outer.count += 1
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        case.addCleanup(lambda: (server.shutdown(), server.server_close()))
        self.url = f"http://127.0.0.1:{server.server_address[1]}"


def encoded(text):
    return base64.b64encode(text.encode()).decode()


def options(**said):
    """The options' defaults, with these changes."""
    given = {option.dest: option.default for option in conf.OPTIONS}
    given.update({"component": fleet.COMPONENT, "deadline": 10.0, **said})
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
        self.assertEqual(
            {"b": "too-few-free", "c": "unknown-host"},
            {h: w["reason"] for h, w in who.reasons(WANTED, ["b", "c"]).items()},
        )
        etcd.publish("b", 3, fleet.device(2_000_001), revision=2)
        until("the change", lambda: able(who, ["a", "b"]) == {"a", "b"})
        self.assertEqual({"a", "b"}, who.scores(WANTED, ["a", "b"]).keys())
        self.assertEqual({"a", "b"}, set(who.best(WANTED, 3)))
        self.assertEqual(1, len(who.best(WANTED, 1)))
        # A document that names another host, or cannot be read, is ignored.
        etcd.put("hosts/b", fleet.document("a", 3, fleet.device(2_000_001)))
        until("b to be out", lambda: able(who, ["a", "b"]) == {"a"})
        etcd.put("hosts/a", "{")
        until("a to be out", lambda: able(who, ["a", "b"]) == set())
        # A host fails: its lease ends.
        lease = etcd.run("lease", "grant", "60").stdout.split()[1]
        etcd.put("hosts/c", fleet.document("c", 4, fleet.device(3_000_001)), f"--lease={lease}")
        until("c", lambda: able(who, ["c"]) == {"c"})
        etcd.run("lease", "revoke", lease)
        until("c to be out", lambda: able(who, ["c"]) == set())
        with self.assertRaisesRegex(Refused, "vendor_id"):
            who.able({"flavor": {"usb_devices": [{"vendor_id": "xyz"}]}}, ["a"])
        etcd.put("flavors/erp/big %", '{"usb_devices":[{"vendor_id":"0529"}]}')
        self.assertEqual(
            {"usb_devices": [{"vendor_id": "0529"}]},
            until("the flavor", lambda: who.flavor("erp/big %")),
        )
        self.assertIsNone(who.flavor("none"))

    def test_etcd_away_is_stale_and_caught_up_afterwards(self):
        etcd = self.etcd()
        for first in range(0, 1200, 100):
            etcd.publish_all(
                {
                    f"h{at}": fleet.document(
                        f"h{at}", at + 2, fleet.device((at + 1) * 1_000_000 + 1)
                    )
                    for at in range(first, first + 100)
                }
            )
        who = oracle.make(options(etcd_endpoints=["http://127.0.0.1:1", etcd.url], max_age=2))
        names = [f"h{number}" for number in range(1200)]
        self.assertEqual(1200, len(who.able(WANTED, names)))
        etcd.stop()
        # The inventory may be stale by age before the follower knows why.
        stale = until(
            "it to be stale", lambda: (why := self.stale(who)) and "http" in why and why, 60
        )
        self.assertRegex(stale, "no update from the fleet for [0-9]+ s: http://127.0.0.1")
        etcd.start()
        # Changes before the follower reconnects, with a compacted history.
        etcd.run("del", "/virt-usb/hosts/h7")
        etcd.publish("h8", 10, fleet.device(9_000_001, "allocated"))
        revision = json.loads(etcd.run("get", "x", "-w", "json").stdout)["header"]["revision"]
        etcd.run("compact", str(revision))
        until("an update", lambda: self.stale(who) is None, 60)
        until("both to be out", lambda: set(names) - (able(who, names) or set()) == {"h7", "h8"})

    def test_a_host_speaks_for_itself_alone_and_silences_nobody(self):
        etcd = self.etcd()
        etcd.publish("victim", 3, fleet.device(2_000_001, "allocated"))
        free = fleet.document("victim", 3, fleet.device(2_000_001), revision=9)
        etcd.put("hosts/liar", f'{{"host":"liar","x":\n{free}\n}}')
        etcd.run(
            "put",
            "/virt-usb/hosts/deep",
            text='{"host":"deep","x":' + "[" * 100_000 + "]" * 100_000 + "}",
        )
        etcd.put(
            "hosts/pretty",
            json.dumps(json.loads(fleet.document("pretty", 4, fleet.device(3_000_001))), indent=1),
        )
        etcd.put("flavors/deep", "[" * 90_000)
        who = oracle.make(options(etcd_endpoints=[etcd.url]))
        everybody = ["victim", "liar", "deep", "pretty", "late"]
        self.assertEqual({"pretty"}, who.able(WANTED, everybody))
        etcd.publish("late", 5, fleet.device(4_000_001))
        until("what came afterwards", lambda: able(who, everybody) == {"pretty", "late"})
        with self.assertRaisesRegex(
            asked.Wrong, "the stored flavor 'deep': it is nested too deeply"
        ):
            who.flavor("deep")

    def test_what_answers_need_be_no_etcd(self):
        answers = Answers(self, b"[]")
        inventory.Etcd.FIRST, first = 5.0, inventory.Etcd.FIRST
        self.addCleanup(setattr, inventory.Etcd, "FIRST", first)
        who = oracle.make(options(etcd_endpoints=[answers.url]))
        for _ in range(2):
            with self.assertRaisesRegex(oracle.Stale, "the fleet is not known yet: .*TypeError"):
                who.able(WANTED, ["a"])
        with self.assertRaisesRegex(oracle.Stale, "the fleet's flavors are not known yet"):
            who.flavor("erp")
        asked_before = answers.count
        until("another request", lambda: answers.count > asked_before)

    def test_another_etcd_is_believed_from_its_beginning(self):
        etcd = self.etcd()
        etcd.publish("a", 2, fleet.device(1_000_001))
        etcd.publish("b", 3, fleet.device(2_000_001, "allocated"))
        who = oracle.make(options(etcd_endpoints=[etcd.url]))
        self.assertEqual({"a"}, who.able(WANTED, ["a", "b"]))
        etcd.stop()
        shutil.rmtree(etcd.folder / "data")
        etcd.start()
        # The revisions have the same numbers as before.
        etcd.publish("a", 2, fleet.device(1_000_001, "allocated"))
        etcd.publish("b", 3, fleet.device(2_000_001))
        until("the other", lambda: able(who, ["a", "b"]) == {"b"})

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
        role = "virt-usb-reader"
        for command in (
            ["user", "add", "root:r"],
            ["user", "grant-role", "root", "root"],
            ["user", "add", "scheduler:look"],
            ["role", "add", role],
            ["role", "grant-permission", role, "read", "/virt-usb/", "--prefix"],
            ["user", "grant-role", "scheduler", role],
            ["auth", "enable"],
        ):
            etcd.run(*command)
        oracle_of = {
            "etcd_endpoints": [etcd.url],
            "etcd_user": "scheduler",
            "etcd_password_file": str(password),
        }
        self.assertEqual({"a"}, oracle.make(options(**oracle_of)).able(WANTED, ["a"]))
        nobody = oracle.make(options(etcd_endpoints=[etcd.url]))
        inventory.Etcd.FIRST, first = 5.0, inventory.Etcd.FIRST
        self.addCleanup(setattr, inventory.Etcd, "FIRST", first)
        with self.assertRaisesRegex(
            oracle.Stale, "the fleet is not known yet: .*user name is empty"
        ):
            nobody.able(WANTED, ["a"])


class FromAScheduler(Case):
    def test_a_scheduler_is_asked_and_its_words_are_kept(self):
        etcd = self.etcd()
        etcd.publish("a", 2, fleet.device(1_000_001))
        etcd.publish("b", 3, fleet.device(2_000_001, "allocated"))
        etcd.put("flavors/erp", '{"usb_devices":[{"vendor_id":"0529"}]}')
        state, socket_path, port = (
            Path(self.folder) / "state",
            Path(self.folder) / "scheduler.sock",
            ports.reserve(),
        )
        config = Path(self.folder) / "config.toml"
        config.write_text(f'state_dir = "{state}"\n[fleet]\nendpoints = ["{etcd.url}"]\n')
        with open(Path(self.folder) / "scheduler.log", "wb") as log:
            scheduler = subprocess.Popen(
                [
                    VIRT_USB,
                    "--config",
                    config,
                    "scheduler",
                    "--listen",
                    f"127.0.0.1:{port}",
                    "--socket",
                    socket_path,
                    "--max-age",
                    "2",
                ],
                stderr=log,
            )
        self.addCleanup(lambda: (scheduler.kill(), scheduler.wait()))
        who = oracle.make(options(inventory="scheduler", scheduler_url=f"unix:{socket_path}"))
        until("the scheduler", lambda: self.answers(who))
        by_net = oracle.make(
            options(inventory="scheduler", scheduler_url=f"http://127.0.0.1:{port}")
        )
        for one in (who, by_net):
            self.assertEqual({"a"}, one.able(WANTED, ["a", "b", "c"]))
            self.assertEqual(["a"], one.best(WANTED, 3))
            reasons = {host: why["reason"] for host, why in one.reasons(WANTED, ["b", "c"]).items()}
            self.assertEqual({"b": "too-few-free", "c": "unknown-host"}, reasons)
        until("the flavor", lambda: self.answers(who, {"flavor": "@erp"}))
        self.assertEqual(("@erp", None), (who.flavor("erp"), who.flavor("none")))
        with self.assertRaisesRegex(Refused, "no flavor named"):
            who.able({"flavor": "@none"}, ["a"])
        with self.assertRaisesRegex(Refused, "vendor_id"):
            who.able({"flavor": {"usb_devices": [{"vendor_id": "xyz"}]}}, ["a"])
        etcd.stop()
        with self.assertRaisesRegex(oracle.Stale, "fleet"):
            until("it to be stale", lambda: not who.able(WANTED, ["a"]))
        scheduler.kill()
        with self.assertRaisesRegex(oracle.Stale, "virt-usb scheduler at unix:.* does not respond"):
            until("it to stop", lambda: not who.able(WANTED, ["a"]))

    @staticmethod
    def answers(who, question=WANTED):
        try:
            return who.able(question, ["a"])
        except (oracle.Stale, Refused):
            return None


class WhatIsWrong(Case):
    def test_options(self):
        for said, why in [
            ({"inventory": "file"}, "inventory = file needs inventory_file"),
            ({"etcd_endpoints": []}, "etcd_endpoints: found "),
            ({"etcd_endpoints": ["etcd1:2379"]}, "wanted URLs with http://"),
            ({"etcd_prefix": "/virt-usb"}, "etcd_prefix: found '/virt-usb'"),
            ({"etcd_user": "scheduler"}, "etcd_user needs etcd_password_file"),
            (
                {"inventory": "scheduler", "scheduler_url": "sched1:9000"},
                "scheduler_url: found 'sched1:9000'",
            ),
            (
                {"inventory": "scheduler", "scheduler_url": "https://sched1"},
                "wanted http://HOST:PORT",
            ),
            (
                {"inventory": "scheduler", "scheduler_url": "http://127.0.0.1:99999"},
                "scheduler_url: ",
            ),
            ({"inventory": "scheduler", "scheduler_url": "http://[::1"}, "scheduler_url: "),
        ]:
            with self.assertRaisesRegex(inventory.Misconfigured, re.escape(why), msg=said):
                oracle.make(options(**said))

    def test_the_filter_is_none(self):
        for text, why in [
            (None, "none.wasm: .*No such file"),
            ("(component)", "found no inventory"),
            ("root:x:0:0", "expected `\\(`"),
        ]:
            component = Path(self.folder) / "none.wasm"
            if text is not None:
                component.write_text(text)
            file = Path(self.folder) / "hosts"
            file.write_text("")
            threads = threading.active_count()
            with self.assertRaisesRegex(oracle.Broken, why):
                oracle.make(
                    options(component=str(component), inventory="file", inventory_file=str(file))
                ).able(WANTED, ["a"])
            self.assertLessEqual(
                threading.active_count(), threads + 1, "the clock of a valid filter"
            )
        before = threading.active_count()
        for _ in range(3):
            with self.assertRaises(oracle.Broken):
                oracle.make(options(component="/nowhere.wasm"))
        self.assertEqual(before, threading.active_count(), "nothing follows etcd")

    def test_what_answers_is_no_scheduler(self):
        for body in (
            b"{}",
            b"[]",
            b"null",
            b'{"age":null}',
            b'{"age":1,"placements":[1]}',
            b"<html>",
            b"[" * 100_000,
        ):
            for status in (200, 404):
                answers = Answers(self, body, status)
                who = oracle.make(options(inventory="scheduler", scheduler_url=answers.url))
                with self.assertRaisesRegex(
                    oracle.Broken, f"the server at {answers.url} is not a virt-usb scheduler"
                ):
                    who.able(WANTED, ["a"])

    def test_a_file_of_another_time(self):
        file = os.path.join(self.folder, "hosts")
        who = oracle.make(
            options(inventory="file", inventory_file=file, flavors_file=f"{file}.flavors")
        )
        for age, why in [
            (500, "was written 5[0-9]{2} s ago"),
            (-500, "was written (4[0-9]|50)[0-9] s in the future"),
        ]:
            fleet.write(file, fleet.document("a", 2, fleet.device(1_000_001)), age=age)
            with self.assertRaisesRegex(oracle.Stale, why):
                who.able(WANTED, ["a"])
        with self.assertRaisesRegex(oracle.Stale, "No such file"):
            who.flavor("erp")


class InManyHands(Case):
    def made(self):
        file = os.path.join(self.folder, "hosts")
        fleet.write(
            file,
            *(
                fleet.document(f"h{at}", at + 2, fleet.device((at + 1) * 1_000_000 + 1))
                for at in range(200)
            ),
        )
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
            fleet.write(
                file,
                *(
                    fleet.document(f"h{at}", at + 2, fleet.device((at + 1) * 1_000_000 + 1))
                    for at in range(count)
                ),
            )
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
        with self.assertRaises(Exception):  # noqa: B017  the bindings define the error
            who.able(WANTED, ["h1"])
        self.assertEqual({"h1"}, who.able(WANTED, ["h1"]))


if __name__ == "__main__":
    unittest.main()
