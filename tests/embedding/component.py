"""The filter in a scheduler written in Python: the component, with `wasmtime` from PyPI.

    component.py [virt-usb-filter.wasm]

It uses the class of the Nova package, install/nova/virt_usb_nova/wasm.py, which does not need Nova.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "target/release/virt-usb-filter.wasm"
sys.path.insert(0, str(ROOT / "install/nova"))

from virt_usb_nova import wasm  # noqa: E402
from virt_usb_nova.wasm import Broken, Refused  # noqa: E402, F401


class Filter(wasm.Filter):
    """A filter with its own program."""

    def __init__(self, file=FILE, feed=tuple, memory=1 << 30, deadline=0.25):
        super().__init__(wasm.Program(file, deadline), feed, memory)

    def close(self):
        self._program.close()
        self._functions = {}


if __name__ == "__main__":
    import story

    story.tell(Filter, Refused, Broken, *sys.argv[1:])
