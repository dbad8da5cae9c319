"""Headless Chromium over its debugging pipe: open a page from disk, look at it in a size and a
colour scheme, hear what it complains of.

The protocol is JSON between NUL bytes on the browser's file descriptors 3 and 4, so no port is
opened and no library is needed.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
WHY_NOT = (
    "no chromium, chromium-browser or google-chrome on the PATH (Debian: apt-get install chromium)"
)
_PATIENCE_S = 60.0


@dataclass
class Page:
    """What one visit has shown."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    image: bytes = b""


class Browser:
    """A context manager; `visit` opens a page in a tab of its own."""

    def __enter__(self) -> Browser:
        assert CHROMIUM, WHY_NOT
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # the shell gives the two ends their numbers, whatever they were
        command = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        flags = [
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile.name}",
            "--no-first-run",
            "--disable-gpu",
        ]
        flags += [
            "--hide-scrollbars",
            "--disable-dev-shm-usage",
            *(["--no-sandbox"] if os.getuid() == 0 else []),
            "about:blank",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *flags],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._held, self._number, self._events = b"", 0, []
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("Browser.close")
            self._process.wait(10)
        except Exception:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def visit(
        self,
        file: Path,
        width: int,
        scheme: str,
        questions: dict[str, str],
        height: int = 900,
        full: bool = True,
    ) -> Page:
        """Open a file; `questions` are expressions that are evaluated in it, promises awaited."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        tab = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{domain}.enable", tab)
        self._call(
            "Emulation.setDeviceMetricsOverride",
            tab,
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self._call(
            "Emulation.setEmulatedMedia",
            tab,
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self._events.clear()
        self._call("Page.navigate", tab, url=file.resolve().as_uri())
        self._wait_for("Page.loadEventFired")
        page = Page()
        for name, expression in questions.items():
            said = self._call(
                "Runtime.evaluate",
                tab,
                expression=expression,
                returnByValue=True,
                awaitPromise=True,
            )
            page.values[name] = said["result"].get("value")
        page.image = base64.b64decode(
            self._call("Page.captureScreenshot", tab, format="png", captureBeyondViewport=full)[
                "data"
            ]
        )
        for method, found in self._events:
            if method == "Network.requestWillBeSent":
                page.requests.append(found["request"]["url"])
            elif method == "Log.entryAdded":
                page.complaints.append(found["entry"]["text"])
            elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                page.complaints.append(json.dumps(found))
        self._call("Target.closeTarget", targetId=target)
        return page

    def _call(self, method: str, tab: str | None = None, **arguments: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments} | (
            {"sessionId": tab} if tab else {}
        )
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _wait_for(self, method: str) -> None:
        while not any(name == method for name, _ in self._events):
            self._next()

    def _next(self) -> dict[str, Any]:
        """The next message; events are kept."""
        deadline = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._read, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError("chromium has ended or does not answer")
            self._held += part
        text, _, self._held = self._held.partition(b"\0")
        message = json.loads(text)
        if "id" not in message:
            self._events.append((message["method"], message["params"]))
        return message
