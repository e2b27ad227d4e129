"""Open a page in headless Chromium, look for what is wrong with it there, and take pictures.

python -m tests.support.browser PAGE.html FOLDER

Exit code 1: the page asked for something besides itself, an error was said on the console, a chart
is not drawn, or the page is wider than its window.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
VIEWS = {"light": (1280, "light"), "dark": (1280, "dark"), "narrow": (400, "light")}
_WIDTHS = "[document.scrollingElement.scrollWidth, innerWidth]"
_PATIENCE_S = 60.0
"""How long one answer may take: a busy machine starts Chromium in ten seconds."""
_UNDRAWN = """[...document.querySelectorAll('figure.chart')].filter((f) => {
const closed = f.closest('details:not([open])'), s = f.querySelector('svg');
const b = s.getBoundingClientRect(); return !closed && !(b.width > 100 && b.height > 50
&& ([...s.querySelectorAll('.line')].some((l) => l.getTotalLength() > 0
&& getComputedStyle(l).stroke !== 'none') || s.querySelector('.dot, .lost'))); }).length"""
_POINT = """(() => { const s = document.querySelector('figure.chart > svg'); s.scrollIntoView();
const b = s.getBoundingClientRect(); s.dispatchEvent(new PointerEvent('pointermove',
{clientX: b.left + b.width * .6, clientY: b.top + 40, bubbles: true}));
return document.querySelector('.tip').innerText; })()"""


class Tab:
    """One page, spoken to by Chromium's DevTools protocol over a pair of pipes."""

    def __init__(self, to: Any, fro: int) -> None:
        self._to, self._fro, self._number, self._read = to, fro, 0, b""
        self._ready = selectors.DefaultSelector()
        self._ready.register(fro, selectors.EVENT_READ)
        self._session: dict[str, str] = {}
        self.heard: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        words = {"id": self._number, "method": method, "params": params, **self._session}
        self._to.write(json.dumps(words).encode() + b"\0")
        self._to.flush()
        while (answer := self._next()).get("id") != self._number:
            self.heard.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def wait_for(self, event: str) -> None:
        while not any(each.get("method") == event for each in self.heard):
            self.heard.append(self._next())

    def value(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._read:
            assert self._ready.select(max(0.0, end - time.monotonic())), "chromium says nothing"
            more = os.read(self._fro, 2**16)
            assert more, "chromium has ended"
            self._read += more
        words, _, self._read = self._read.partition(b"\0")
        return json.loads(words)


def executable() -> str | None:
    """Chromium as it is called here; None: there is none."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


@contextlib.contextmanager
def chromium() -> Iterator[Tab]:
    """
    Raises:
        FileNotFoundError: No Chromium is on PATH.
    """
    if (name := executable()) is None:
        raise FileNotFoundError(f"none of {', '.join(_NAMES)} is on PATH")
    (their_in, to), (fro, their_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            name, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
            "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        # It reads from file 3 and writes to file 4.
        shell = f"exec {shlex.join(command)} 3<&{their_in} 4>&{their_out}"
        browser = subprocess.Popen(
            ["bash", "-c", shell], pass_fds=(their_in, their_out), stderr=subprocess.DEVNULL
        )
        os.close(their_in)
        os.close(their_out)
        try:
            with open(to, "wb") as writing:
                yield Tab(writing, fro)
        finally:
            os.close(fro)
            browser.terminate()
            try:
                browser.wait(10)
            except subprocess.TimeoutExpired:
                browser.kill()
                browser.wait()


def look(page: Path, folder: Path) -> list[str]:
    """Pictures of ``page`` in ``folder``; what is wrong with it."""
    folder.mkdir(parents=True, exist_ok=True)
    with chromium() as tab:
        return [bad for view in VIEWS for bad in _view(tab, page, view, folder / f"{view}.png")]


def _view(tab: Tab, page: Path, view: str, picture: Path) -> Iterator[str]:
    width, scheme = VIEWS[view]
    size = {"width": width, "deviceScaleFactor": 1, "mobile": False}
    tab.call("Emulation.setDeviceMetricsOverride", height=900, **size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    tab.call("Emulation.setEmulatedMedia", features=[feature])
    tab.heard.clear()
    tab.call("Page.navigate", url=page.as_uri())
    tab.wait_for("Page.loadEventFired")
    inside, window = tab.value(_WIDTHS)
    charts, undrawn = (
        tab.value("document.querySelectorAll('figure.chart').length"),
        tab.value(_UNDRAWN),
    )
    height = tab.value("document.scrollingElement.scrollHeight")
    tab.call("Emulation.setDeviceMetricsOverride", height=height, **size)
    shot = tab.call("Page.captureScreenshot", format="png")
    picture.write_bytes(base64.b64decode(shot["data"]))
    said = tab.value(_POINT)
    print(
        f"{view}: {inside} of {window} pixels wide, {height} high, {charts} charts; "
        f"pointed at: {said!r}"
    )
    if not charts or undrawn:
        yield f"{view}: {undrawn} of {charts} charts are not drawn"
    if inside > window:
        yield f"{view}: {inside} pixels wide in a window of {window}"
    if not said or "step" not in said:
        yield f"{view}: nothing is said under the pointer"
    for event in tab.heard:
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent" and params["request"]["url"] != page.as_uri():
            yield f"{view}: asks for {params['request']['url'][:200]}"
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            yield f"{view}: {json.dumps(params)[:300]}"


if __name__ == "__main__":
    problems = look(Path(sys.argv[1]).resolve(strict=True), Path(sys.argv[2]))
    print("\n".join(problems) or "nothing wrong")
    sys.exit(bool(problems))
