"""What the nested compute host boots: Debian's kernel and udev, fetched from the machine's own apt sources, and an initramfs.

Fetched and unpacked, not installed: a kernel's and udev's maintainer scripts have no business on the machine.
"""

import os
import shutil
import subprocess
from pathlib import Path

# Debian's cloud kernel has no USB at all: the usual one it is.
KERNEL = "linux-image-amd64"
# Of its 400 MB of modules these folders can be needed.
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
    "virtio_pci", "9p", "9pnet_virtio", "overlay", "virtio_console",  # the machine's files
    "xhci_pci", "usbhid", "hid_generic", "usb_storage", "sd_mod", "cdc_acm",  # USB on the host's side
    "dummy_hcd", "usb_f_mass_storage", "usb_f_acm", "usb_f_hid",  # and on the devices' side
]  # fmt: skip


class Trouble(Exception):
    """It cannot be fetched or made; the text says what to do."""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise Trouble(
            f"{' '.join(map(str, command))} failed: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


def merge_usr(tree):
    """Debian 13 packages say /usr/lib/modules, Debian 12's say /lib/modules: afterwards both paths lead to the same folder."""
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
        """Makes what is missing; does nothing when all is there."""
        # What it was unpacked for.
        folders, wanted = self.unpacked / "folders", "\n".join(FOLDERS)
        if not folders.exists() or folders.read_text() != wanted:
            shutil.rmtree(self.unpacked, ignore_errors=True)
            self._unpack(self._newest(), self.unpacked, self._wanted)
            folders.write_text(wanted)
        if not (self.cache / "udev").exists():
            self._unpack("udev", self.cache / "udev", lambda name: True)
        # The list of modules above is a source of it, too.
        changed = max(source.stat().st_mtime for source in (self.init, Path(__file__)))
        if not self.initramfs.exists() or self.initramfs.stat().st_mtime < changed:
            self._make_initramfs()

    @staticmethod
    def _newest():
        """The package that linux-image-amd64 stands for: Debian's own metapackage names it with its version."""
        for line in run("apt-cache", "depends", KERNEL).splitlines():
            word, _, name = line.strip().partition(" ")
            if word == "Depends:" and name.startswith("linux-image"):
                return name
        raise Trouble(f"apt knows no {KERNEL}: run 'apt-get update' first")

    @staticmethod
    def _wanted(name):
        folder = name.split("/kernel/", 1)[-1]
        return (
            name.startswith("./boot/vmlinuz")
            or "/modules." in name
            or ("/kernel/" in name and folder.startswith(tuple(f"{f}/" for f in FOLDERS)))
        )

    def _unpack(self, package, target, wanted):
        """Fetches a package and keeps of it what is wanted; all or nothing."""
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
        """Their files, each behind those that it needs."""
        files = {}
        for module in MODULES:
            for line in run(
                "modprobe", "-d", self.unpacked, "-S", self.version, "--show-depends", module
            ).splitlines():
                verb, _, path = line.partition(" ")
                if verb == "insmod":
                    files[Path(path.strip().split(" ")[0])] = None
        return list(files)
