"""The validator accepts the requests that the filter and the model's table of keys accept."""

import itertools
import json
import unittest
from pathlib import Path

import nova.tests.functional  # noqa: F401  must be Nova's first import
from nova import exception
from virt_usb_nova import device_requests, validator, wasm

import fleet

KEYS = {one.name: one for one in validator.register()}
VALUES = [
    None, True, 0, 1, 2, -1, 127, 128, 255, 256, 65535, 65536, 1 << 53, 1.0, 1.5,
    99999999999999999999999, "", " ", "0", "1", "01", "127", "128",
    "0x529", "0529", "5290x", "12345", "zzz", "a b", "hid", "HID", "mass storage", "mass_storage",
    "hub", "ff", "0xff", "fff", "0x", "08",
    "1-1", "1-1.4", "0-1", "1-0", "1-256", "256-1", "1-1.1.1.1.1.1.1", "1-1.1.1.1.1.1.1.1", "1-",
    "1-01", "-1",
    "x" * 64, "x" * 65, "x" * 126, "x" * 127, "a/b", "a,b", "\u00fc", "\u00b2", "\u0000", "\u0085",
    "\u200b", "\U0001f511",
    # Digits outside of ASCII.
    "\u0663", "\u0661-\u0662",
    [], [[]], ["a"], ["a", "b c"], [1], {}, {"a": 1},
]  # fmt: skip


class AsTheFilter(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.program = wasm.Program(fleet.COMPONENT, 30.0)
        cls.addClassCleanup(cls.program.close)
        cls.filter = wasm.Filter(cls.program)

    def takes(self, entries):
        try:
            self.filter.select_names({"flavor": {"usb_devices": entries}})
        except wasm.Refused:
            return False
        return True

    @staticmethod
    def valid(text, key="usb:devices"):
        try:
            KEYS[key].validate(key, text)
        except exception.ValidationError:
            return False
        return True

    def same(self, entries):
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":"))
        if len(text) <= 255:
            self.assertEqual(self.takes(entries), self.valid(text), text)

    def test_each_key_with_each_value(self):
        for key in (*device_requests.KEYS, "vendor"):
            for value in VALUES:
                self.same([{key: value}])
                self.same([{"vendor_id": "0529", **{key: value}}])
                self.same([{"class": "hid", **{key: value}}])

    def test_the_values_of_the_table(self):
        """Generated from virt-usb's model, as the package's own table of keys is."""
        for row in json.loads(
            Path(__file__).with_name("request_values.json").read_text(encoding="utf-8")
        ):
            beside = {"vendor_id": "0529"} if row["key"] in ("product_id", "count") else {}
            text = json.dumps([{**beside, row["key"]: row["value"]}])
            self.assertEqual(row["is_accepted"], self.valid(text), text)

    def test_pairs_and_lists(self):
        some = [
            {},
            {"id": 1},
            {"id": 1, "count": 2},
            {"id": "1", "count": "1"},
            {"product_id": 1},
            {"class": "hid", "count": 127},
            {"port": "1-1"},
            1,
            "x",
            None,
            [],
        ]
        for pair in itertools.product(some, some):
            self.same(list(pair))
        for one in some:
            self.same([one])

    def test_the_three_shapes(self):
        for text, is_right in [
            ('{"vendor_id":1}', True),
            ('[{"vendor_id":1}]', True),
            ('{"usb_devices":[{"vendor_id":1}]}', True),
            ('{"usb_devices":{"vendor_id":1}}', True),
            ('{"usb_devices":[{}]}', False),
            ('{"usb_devices":[],"usb_redirection_devices":[]}', False),
            ("[" * 200, False),
            ("@erp", True),
            ("@", False),
        ]:
            self.assertEqual(is_right, self.valid(text), text)
        self.assertTrue(
            self.valid(
                '{"usb_redirection_devices":{"bus":"usb","type":"spicevmc"}}',
                "usb:redirection_devices",
            )
        )


if __name__ == "__main__":
    unittest.main()
