#!/usr/bin/python3
"""mdBook's preprocessor for this book.

It writes the generated parts of pages, and points links that leave the book to the repository.

A page asks for a generated part with a comment: <!-- generated: NAME -->. The parts are:

    cli             the help of each command, from target/release/virt-usb
    configuration   each key with its default, from install/config.toml
    security        SECURITY.md without its title

'preprocess.py NAME' prints one of them.
"""

import json
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/virt-usb/virt-usb/blob/main/"
# Files outside docs/src that are pages of the book.
PAGES = {"SECURITY.md": "security.md"}
MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def command_help(words):
    """The output of 'virt-usb COMMAND --help', with the width of a page."""
    program = ROOT / "target/release" / words[0]
    environment = {"PATH": "/usr/bin:/bin", "COLUMNS": "96", "LC_ALL": "C.UTF-8"}
    command = [program, *words[1:], "--help"]
    return subprocess.check_output(command, env=environment, text=True).rstrip()


def subcommands(text):
    """The names of the subcommands that a help text lists."""
    listed = re.search(r"^Commands:\n(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    names = re.findall(r"^  ([a-z-]+)(?: |$)", listed[1], re.MULTILINE) if listed else []
    return [name for name in names if name != "help"]


def without_common_options(text):
    """The help of a subcommand without the common options, which the page shows once."""
    common = ("--config", "--json", "--url", "--token-file", "--cacert", "-h, --help")
    head, found, options = text.partition("\nOptions:\n")
    if not found:
        return text
    kept = []
    for entry in re.split(r"\n(?=\s{2,6}(?:-\w, )?--|\s{2}-h)", "\n" + options):
        if entry.strip() and not entry.strip().startswith(common):
            kept.append(entry.rstrip("\n"))
    return head + (found + "\n".join(kept) if kept else "").rstrip()


def cli():
    """The page with a section for each program and command."""
    out = []

    def add(words, depth):
        text = command_help(words)
        shown = text if depth == 2 else without_common_options(text)
        out.append(f"{'#' * depth} {' '.join(words)}\n\n```text\n{shown.rstrip()}\n```\n")
        for name in subcommands(text):
            add([*words, name], 3)

    add(["virt-usb"], 2)
    add(["virt-usbd"], 2)
    add(["virt-usb-hook"], 2)
    add(["virt-usb-scheduler"], 2)
    return "\n".join(out)


def explanation(text):
    """A comment of the configuration: as a paragraph, or unchanged if it has a layout."""
    if re.search(r"^ ", text, re.MULTILINE):
        return f"```text\n{text}\n```\n"
    text = re.sub(r"([<*\[\]])", r"\\\1", text)
    return re.sub(r"'((?:virt-usb|systemctl|journalctl) [^'\n]*)'", r"`\1`", text) + "\n"


def configuration():
    """The page with a section for each key: its default and its comment in the example."""
    lines = (ROOT / "install/config.toml").read_text().splitlines()
    out, comment, after_keys = [], [], []
    for line in [*lines[2:], ""]:
        key = re.match(r"^(\w+) = (.*)$", line)
        if line.startswith("#"):
            comment.append(line[1:].removeprefix(" "))
        elif key:
            # Adjacent keys share the comment above them.
            after_keys.append((key[1], key[2]))
        elif not line:
            if after_keys:
                out += [f"### {name}\n" for name, _ in after_keys[:-1]]
                out.append(f"### {after_keys[-1][0]}\n")
                rows = "\n".join(f"{name} = {value}" for name, value in after_keys)
                out.append(f"```toml\n{rows}\n```\n")
            text = "\n".join(comment)
            if table := re.search(r"^\s*\[(\w+)\]$", text, re.MULTILINE):
                out.append(f"### [{table[1]}]\n")
            elif not after_keys:
                named = re.findall(r"^  +(api_\w+) = ", text, re.MULTILINE)
                out += [f"### {name}\n" for name in named]
            if text and not text.startswith("---"):
                out.append(explanation(text))
            comment, after_keys = [], []
    return "\n".join(out)


def security():
    """SECURITY.md without its title. Its links are relative to the repository's root."""

    def link(found):
        is_elsewhere = re.match(r"[a-z]+:|#", found[2])
        return found[0] if is_elsewhere else f"{found[1]}../../{found[2]}{found[3]}"

    text = (ROOT / "SECURITY.md").read_text()
    return LINK.sub(link, text.split("\n", 1)[1].strip()) + "\n"


GENERATED = {"cli": cli, "configuration": configuration, "security": security}


def point_outside(text, path):
    """A chapter with its links out of the book replaced by links to the repository."""

    def link(found):
        target, _, anchor = found[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return found[0]
        # Relative to the repository's root.
        there = posixpath.normpath(posixpath.join("docs/src", posixpath.dirname(path), target))
        if there in PAGES:
            there = "docs/src/" + PAGES[there]
        anchor = f"#{anchor}" if anchor else ""
        if there.startswith("docs/src/"):
            folder = posixpath.join("docs/src", posixpath.dirname(path))
            return found[1] + posixpath.relpath(there, folder) + anchor + found[3]
        if target.endswith(".png"):
            return found[0]
        return found[1] + REPOSITORY + there + anchor + found[3]

    out, at = [], 0
    for fence in FENCE.finditer(text):
        out += [LINK.sub(link, text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*out, LINK.sub(link, text[at:])])


def expand(text, path):
    return point_outside(MARK.sub(lambda found: GENERATED[found[1]](), text), path)


def visit(items):
    for item in items:
        chapter = item.get("Chapter") if isinstance(item, dict) else None
        if chapter:
            if chapter["path"]:
                chapter["content"] = expand(chapter["content"], chapter["path"])
            visit(chapter["sub_items"])


def main():
    if sys.argv[1:2] == ["supports"]:
        return
    if sys.argv[1:]:
        print(GENERATED[sys.argv[1]]())
        return
    _, book = json.load(sys.stdin)
    visit(book["items"] if "items" in book else book["sections"])
    json.dump(book, sys.stdout)


if __name__ == "__main__":
    os.environ.pop("VIRT_USB_FILTER", None)
    main()
