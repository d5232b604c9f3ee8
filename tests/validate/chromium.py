"""Headless Chromium, driven by its own command line: how a page looks, what it says and asks for."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HEIGHT = 3000

# Our page stands in a frame of the width of a phone (a window has a least width of its own), and this page, unlike
# ours, may run a script that measures it.
FRAME = """<!doctype html><title>?</title><body style="margin:0">
<iframe width="{width}" height="{height}" style="border:0" srcdoc="{page}"></iframe>
<script>onload = () => document.title = frames[0].document.documentElement.scrollWidth</script>
"""


def chromium() -> str | None:
    """The browser's program, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass(frozen=True)
class Visit:
    """What happened while a page was open."""

    console: tuple[str, ...]  # what it said to the console
    requests: tuple[str, ...]  # addresses that were asked for
    screenshot: Path
    overflow: int  # pixels that the page is wider than its window
    brightness: float  # of the screenshot's top left corner, 0..255


def visit(page: Path, into: Path, *, width: int = 1280, dark: bool = False) -> Visit:
    """Open `page` in a window of `width` pixels and look at it; everything is written to the folder `into`."""
    log, shot = into / "net.json", into / f"{page.stem}-{width}{'-dark' if dark else ''}.png"
    frame = into / "frame.html"
    frame.write_text(FRAME.format(width=width, height=HEIGHT, page=html.escape(page.read_text())))
    alone = _browse(page, into, dark, "--dump-dom", f"--log-net-log={log}")
    assert "</html>" in alone.stdout, alone.stderr[-2000:]
    framed = _browse(frame, into, dark, "--dump-dom", f"--screenshot={shot}", f"--window-size={width},{HEIGHT}")
    title = re.search(r"<title>(\d+)</title>", framed.stdout)
    assert title, framed.stderr[-2000:]
    console = tuple(line for line in alone.stderr.splitlines() if ":CONSOLE" in line)
    corner = float(np.asarray(Image.open(shot).convert("L"))[:8, :8].mean())
    return Visit(console, _requests(log), shot, int(title[1]) - width, corner)


def _browse(page: Path, into: Path, dark: bool, *words: str) -> subprocess.CompletedProcess[str]:
    program = chromium()
    assert program is not None
    usual = [
        program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-extensions",
        "--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync",
        "--enable-logging=stderr", "--force-device-scale-factor=1", f"--user-data-dir={into / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]  # fmt: skip
    return subprocess.run([*usual, *words, page.as_uri()], capture_output=True, text=True, timeout=120, cwd=into)


def _requests(log: Path) -> tuple[str, ...]:
    """Addresses that the page asked for, from a network log: the browser's own requests have no origin."""
    text = log.read_text()
    try:
        events: Any = json.loads(text)["events"]
    except ValueError:  # it was still being written when the browser went
        events = json.loads(text[: text.rindex("},")] + "}]}")["events"]
    begun = [event["params"] for event in events if "initiator" in event.get("params", {})]
    return tuple(dict.fromkeys(each["url"] for each in begun if each["initiator"] != "not an origin"))
