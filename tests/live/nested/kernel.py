"""Debian's kernel and udev, and an initramfs, for the nested compute host.

The packages come from the machine's apt sources. They are unpacked and not installed, because the
maintainer scripts of a kernel and of udev must not run on the machine.
"""

import os
import shutil
import subprocess
from pathlib import Path

# Debian's cloud kernel has no USB support.
KERNEL = "linux-image-amd64"
# The folders that may be needed of 400 MB of modules.
FOLDERS = [
    "arch",
    "block",
    "crypto",
    "drivers/char",
    "drivers/hid",
    "drivers/input",
    "drivers/scsi",
    "drivers/usb",
    "drivers/virtio",
    "fs",
    "lib",
    "net/9p",
]
MODULES = [
    # The machine's files.
    "virtio_pci", "9p", "9pnet_virtio", "overlay", "virtio_console",
    # USB hosts.
    "xhci_pci", "usbhid", "hid_generic", "usb_storage", "sd_mod", "cdc_acm",
    # USB gadgets.
    "dummy_hcd", "usb_f_mass_storage", "usb_f_acm", "usb_f_hid",
]  # fmt: skip


class Trouble(Exception):
    """The kernel cannot be fetched or built. The text says what to do."""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise Trouble(
            f"{' '.join(map(str, command))} failed: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


def merge_usr(tree):
    """Let /lib/modules (Debian 12) and /usr/lib/modules (Debian 13) be the same folder."""
    if (tree / "usr/lib/modules").exists():
        (tree / "usr/lib/modules").rename(tree / "modules")
        shutil.rmtree(tree / "usr/lib")
        (tree / "lib").mkdir(exist_ok=True)
        (tree / "modules").rename(tree / "lib/modules")
        os.symlink("../lib", tree / "usr/lib")


class Kernel:
    def __init__(self, cache, init):
        self.cache, self.init = Path(cache), Path(init)
        self.unpacked = self.cache / "kernel"
        self.initramfs = self.cache / "initramfs"

    @property
    def version(self):
        return next((self.unpacked / "lib/modules").iterdir()).name

    @property
    def image(self):
        return self.unpacked / f"boot/vmlinuz-{self.version}"

    def prepare(self):
        """Make what is missing."""
        # The versions of the unpacked packages.
        folders, wanted = self.unpacked / "folders", "\n".join(FOLDERS)
        if not folders.exists() or folders.read_text() != wanted:
            shutil.rmtree(self.unpacked, ignore_errors=True)
            self._unpack(self._newest(), self.unpacked, self._wanted)
            folders.write_text(wanted)
        if not (self.cache / "udev").exists():
            self._unpack("udev", self.cache / "udev", lambda name: True)
        # The initramfs also depends on the list of modules in this file.
        changed = max(source.stat().st_mtime for source in (self.init, Path(__file__)))
        if not self.initramfs.exists() or self.initramfs.stat().st_mtime < changed:
            self._make_initramfs()

    @staticmethod
    def _newest():
        """The package that the metapackage linux-image-amd64 depends on."""
        for line in run("apt-cache", "depends", KERNEL).splitlines():
            word, _, name = line.strip().partition(" ")
            if word == "Depends:" and name.startswith("linux-image"):
                return name
        raise Trouble(f"apt does not know {KERNEL}: run 'apt-get update' first")

    @staticmethod
    def _wanted(name):
        folder = name.split("/kernel/", 1)[-1]
        return (
            name.startswith("./boot/vmlinuz")
            or "/modules." in name
            or ("/kernel/" in name and folder.startswith(tuple(f"{f}/" for f in FOLDERS)))
        )

    def _unpack(self, package, target, wanted):
        """Fetch a package and keep the wanted files: all or none."""
        work = self.cache / f"{target.name}.new"
        shutil.rmtree(work, ignore_errors=True)
        (work / "tree").mkdir(parents=True)
        run("apt-get", "download", package, cwd=work)
        archive = work / "data.tar"
        with open(archive, "wb") as file:
            subprocess.run(
                ["dpkg-deb", "--fsys-tarfile", next(work.glob("*.deb"))], stdout=file, check=True
            )
        names = [
            name
            for name in run("tar", "-tf", archive).splitlines()
            if wanted(name) and not name.endswith("/")
        ]
        run(
            "tar",
            "-xf",
            archive,
            "-C",
            work / "tree",
            "--no-recursion",
            "-T",
            "-",
            input="\n".join(names),
        )
        merge_usr(work / "tree")
        (work / "tree").rename(target)
        shutil.rmtree(work)

    def _make_initramfs(self):
        run("depmod", "-b", self.unpacked, self.version)
        tree = self.cache / "initramfs.new"
        shutil.rmtree(tree, ignore_errors=True)
        for folder in ("bin", "dev", "proc", "sys", "lower", "layer", "newroot", "lib/modules"):
            (tree / folder).mkdir(parents=True)
        shutil.copy(shutil.which("busybox"), tree / "bin/busybox")
        os.symlink("busybox", tree / "bin/sh")
        shutil.copy(self.init, tree / "init")
        modules = self._modules()
        for module in modules:
            shutil.copy(module, tree / "lib/modules")
        (tree / "modlist").write_text("".join(f"{m.name}\n" for m in modules))
        names = run("find", ".", cwd=tree)
        with open(self.initramfs, "wb") as file:
            subprocess.run(
                ["cpio", "-o", "-H", "newc", "--quiet"],
                cwd=tree,
                input=names.encode(),
                stdout=file,
                check=True,
            )
        shutil.rmtree(tree)

    def _modules(self):
        """The files of these modules, each after those that it needs."""
        files = {}
        for module in MODULES:
            for line in run(
                "modprobe", "-d", self.unpacked, "-S", self.version, "--show-depends", module
            ).splitlines():
                verb, _, path = line.partition(" ")
                if verb == "insmod":
                    files[Path(path.strip().split(" ")[0])] = None
        return list(files)
