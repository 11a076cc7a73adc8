"""Clean Debians: debootstrap creates them once, and a run uses them below a layer in memory."""

import os
import shutil
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CACHE = REPO / ".cache/packages"
SUITES = {"12": "bookworm", "13": "trixie"}
# Packages in addition to the base system: systemd checks units and creates users, man formats
# pages, umockdev simulates a recorded host.
BASE = ["systemd", "man-db", "umockdev", "python3-minimal"]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Failure(Exception):
    """The failure of a case. The text is the reason."""


def mirror():
    """The mirror of Debian that this machine's apt uses."""
    if os.environ.get("VIRT_USB_MIRROR"):
        return os.environ["VIRT_USB_MIRROR"]
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for line in listed.splitlines():
        label, _, uri = line.partition(" ")
        if label == "Debian":
            return uri
    raise Failure(
        "this machine's apt has no mirror of Debian: run 'apt-get update', or set VIRT_USB_MIRROR"
    )


def proxies():
    """The proxy of this machine's apt."""
    dumped = subprocess.run(
        ["apt-config", "dump"], capture_output=True, text=True, check=True
    ).stdout
    return "".join(
        f"{line}\n"
        for line in dumped.splitlines()
        if line.lower().startswith(("acquire::http::proxy ", "acquire::https::proxy "))
    )


def clean(debian):
    return CACHE / f"debian{debian}"


def prepare(debian):
    """Create the clean root if it does not exist."""
    root, mark = clean(debian), CACHE / f"debian{debian}.made-of"
    made_of = " ".join(BASE) + "\n"
    if mark.exists() and mark.read_text() == made_of:
        return
    print(f"== making a clean Debian {debian} in {root.relative_to(REPO)} (once)", flush=True)
    mark.unlink(missing_ok=True)
    shutil.rmtree(root, ignore_errors=True)
    (CACHE / f"archives{debian}/partial").mkdir(parents=True, exist_ok=True)
    log = CACHE / "debootstrap.log"
    command = [
        "debootstrap",
        "--variant=minbase",
        f"--include={','.join(BASE)}",
        SUITES[debian],
        root,
        mirror(),
    ]
    with log.open("w") as out:
        if subprocess.run(command, stdout=out, stderr=out).returncode:
            raise SystemExit(
                f"packages: debootstrap failed: see {log}\n"
                f"{''.join(log.read_text().splitlines(True)[-5:])}"
            )
    (root / "etc/apt/sources.list").write_text(f"deb {mirror()} {SUITES[debian]} main\n")
    (root / "etc/apt/apt.conf.d/90tests").write_text(
        f'{proxies()}APT::Sandbox::User "root";\n'
        'Binary::apt::APT::Keep-Downloaded-Packages "true";\n'
    )
    # No service starts, because systemd does not run.
    (root / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
    (root / "usr/sbin/policy-rc.d").chmod(0o755)
    for archive in (root / "var/cache/apt/archives").glob("*.deb"):
        archive.unlink()
    mark.write_text(made_of)


def repack(package, to, version, edit=None):
    """Build a copy of a package with another version and the changes of `edit`."""
    tree = to.with_suffix(".tree")
    subprocess.run(["dpkg-deb", "-R", package, tree], check=True)
    control = tree / "DEBIAN/control"
    lines = [
        f"Version: {version}" if line.startswith("Version: ") else line
        for line in control.read_text().splitlines()
    ]
    control.write_text("\n".join(lines) + "\n")
    if edit:
        edit(tree)
    subprocess.run(
        ["dpkg-deb", "-Znone", "--root-owner-group", "-b", tree, to],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    shutil.rmtree(tree)


class Answer:
    """The result of a command in a root."""

    def __init__(self, words, done):
        self.words, self.status, self.out, self.err = (
            words,
            done.returncode,
            done.stdout,
            done.stderr,
        )

    @property
    def all(self):
        return self.out + self.err

    def __str__(self):
        return f"$ {' '.join(map(str, self.words))}\n{self.all}[{self.status}]\n"


class Root:
    """A clean Debian below a layer in memory, in the namespaces of this process."""

    def __init__(self, debian):
        self.debian = debian
        self.said = []
        work = CACHE / f"layer{debian}"
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        work.mkdir(exist_ok=True)
        self._mount("-t", "tmpfs", "tmpfs", work)
        for name in ("upper", "work", "root"):
            (work / name).mkdir()
        self.path = work / "root"
        self._mount(
            "-t",
            "overlay",
            "overlay",
            "-o",
            f"lowerdir={clean(debian)},upperdir={work}/upper,workdir={work}/work",
            self.path,
        )
        for words in (
            ["-t", "proc", "proc", "proc"],
            ["-t", "sysfs", "-o", "ro", "sysfs", "sys"],
            ["-t", "tmpfs", "-o", "mode=755", "tmpfs", "dev"],
            ["-t", "tmpfs", "-o", "mode=755", "tmpfs", "run"],
        ):
            self._mount(*words[:-1], self.path / words[-1])
        for node in ("null", "zero", "full", "random", "urandom", "tty"):
            (self.path / "dev" / node).touch()
            self._mount("--bind", f"/dev/{node}", self.path / "dev" / node)
        (self.path / "dev/fd").symlink_to("/proc/self/fd")
        (self.path / "dev/shm").mkdir(mode=0o1777)
        (self.path / "run/lock").mkdir(mode=0o1777)
        shutil.copy("/etc/resolv.conf", self.path / "etc/resolv.conf")
        self._mount("--bind", CACHE / f"archives{debian}", self.path / "var/cache/apt/archives")
        self.packages = self.path / "packages"
        self.packages.mkdir()
        (self.package,) = (REPO / "target/deb").glob("virt-usb_*.deb")
        shutil.copy(self.package, self.packages / "virt-usb.deb")
        (self.path / "etc/dpkg/dpkg.cfg.d/90tests").write_text("force-unsafe-io\n")

    @staticmethod
    def _mount(*words):
        subprocess.run(["mount", *words], check=True)

    def run(self, *words, stdin="", env=None, timeout=300):
        """Run a command and return its result. Its status is not checked."""
        environment = {
            "PATH": PATH,
            "HOME": "/root",
            "LC_ALL": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
            "COLUMNS": "120",
        } | (env or {})
        done = subprocess.run(
            ["chroot", self.path, *words],
            input=stdin,
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout,
        )
        answer = Answer(words, done)
        self.said.append(answer)
        return answer

    def must(self, *words, **how):
        answer = self.run(*words, **how)
        if answer.status:
            raise Failure("the command should have succeeded:\n" + str(answer))
        return answer

    def refused(self, *words, **how):
        answer = self.run(*words, **how)
        if not answer.status:
            raise Failure("the command should have failed:\n" + str(answer))
        return answer

    def apt(self, *words):
        return self.must(
            "apt-get", "-qq", "-y", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0", *words
        )

    def file(self, path):
        return self.path / path.lstrip("/")

    def told(self):
        """The last commands, for the report of a failure."""
        return "".join(str(answer) for answer in self.said[-4:])

    def shell(self):
        return subprocess.run(
            ["chroot", self.path, "/bin/bash"],
            env={"PATH": PATH, "HOME": "/root", "TERM": os.environ.get("TERM", "dumb")},
        ).returncode


def check(holds, what):
    if not holds:
        raise Failure(what)
