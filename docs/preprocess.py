#!/usr/bin/python3
"""mdBook's preprocessor for this book: writes the generated parts of pages, and points links that leave the book to the repository.

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
# Files outside of docs/src that are a page of the book.
PAGES = {"SECURITY.md": "security.md"}
MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def command_help(words):
    """What 'virt-usb COMMAND --help' prints, as wide as a page."""
    program = ROOT / "target/release" / words[0]
    environment = {"PATH": "/usr/bin:/bin", "COLUMNS": "96", "LC_ALL": "C.UTF-8"}
    done = subprocess.run([program, *words[1:], "--help"], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.rstrip()


def subcommands(text):
    """The names of the subcommands that a help text lists."""
    listed = re.search(r"^Commands:\n(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    names = re.findall(r"^  ([a-z-]+)(?: |$)", listed[1], re.MULTILINE) if listed else []
    return [name for name in names if name != "help"]


def without_common_options(text):
    """A subcommand's help without the options that every command has; the page shows those once."""
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
    """One section for each program and command."""
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
    return "\n".join(out)


def configuration():
    """One section for each key: its default, and the comment above it in the example."""
    lines = (ROOT / "install/config.toml").read_text().splitlines()
    out, comment, after_keys = [], [], []
    for line in [*lines[2:], ""]:
        key = re.match(r"^(\w+) = (.*)$", line)
        if line.startswith("#"):
            comment.append(line[1:].removeprefix(" "))
        elif key:
            # Keys that follow one another share the comment above them.
            after_keys.append((key[1], key[2]))
        elif not line:
            if after_keys:
                out += [f"### {name}\n" for name, _ in after_keys[:-1]]
                out.append(f"### {after_keys[-1][0]}\n")
                rows = "\n".join(f"{name} = {value}" for name, value in after_keys)
                out.append(f"```toml\n{rows}\n```\n")
            elif comment and (table := re.search(r"^\s*\[(\w+)\]$", "\n".join(comment), re.MULTILINE)):
                out.append(f"### [{table[1]}]\n")
            elif comment and (named := re.findall(r"^  +(api_\w+) = ", "\n".join(comment), re.MULTILINE)):
                out += [f"### {name}\n" for name in named]
            if comment and not comment[0].startswith("---"):
                out.append("```text\n" + "\n".join(comment) + "\n```\n")
            comment, after_keys = [], []
    return "\n".join(out)


def security():
    text = (ROOT / "SECURITY.md").read_text()
    return text.split("\n", 1)[1].strip() + "\n"


GENERATED = {"cli": cli, "configuration": configuration, "security": security}


def point_outside(text, path):
    """The links of a chapter, with those that leave the book pointed to the repository."""

    def link(found):
        target, _, anchor = found[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return found[0]
        # From the repository's root.
        there = posixpath.normpath(posixpath.join("docs/src", posixpath.dirname(path), target))
        if there in PAGES:
            there = "docs/src/" + PAGES[there]
        anchor = f"#{anchor}" if anchor else ""
        if there.startswith("docs/src/"):
            return found[1] + posixpath.relpath(there, posixpath.join("docs/src", posixpath.dirname(path))) + anchor + found[3]
        if target.endswith(".png"):
            return found[0]
        return found[1] + REPOSITORY + there + anchor + found[3]

    out, at = [], 0
    for fence in FENCE.finditer(text):
        out += [LINK.sub(link, text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*out, LINK.sub(link, text[at:])])


def expand(text, path):
    def part(found):
        made = GENERATED[found[1]]()
        # SECURITY.md's links are relative to the root.
        return LINK.sub(lambda l: l[0] if re.match(r"[a-z]+:|#", l[2]) else f"{l[1]}../../{l[2]}{l[3]}", made) if found[1] == "security" else made

    return point_outside(MARK.sub(part, text), path)


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
