"""A headless Chromium, driven over its DevTools pipe (chromedevtools.github.io)."""

import base64
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
    *("--hide-scrollbars", "--remote-debugging-pipe", "--window-size=1100,760", "about:blank"),
]


class Page:
    def __init__(self, commands, answers):
        self.commands, self.answers = commands, answers
        self.number, self.session, self.problems = 0, None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.requests = []

    def message(self):
        raw = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "the browser ended"
            raw += byte
        found = json.loads(raw)
        method = found.get("method")
        level = found.get("params", {}).get("entry", {}).get("level")
        if method == "Runtime.exceptionThrown" or level == "error":
            self.problems.append(json.dumps(found["params"])[:500])
        if method == "Network.requestWillBeSent":
            self.requests.append(found["params"]["request"]["url"])
        return found

    def send(self, method, **params):
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        self.commands.write(json.dumps(command).encode() + b"\0")
        self.commands.flush()
        while True:
            found = self.message()
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]

    def open(self, path):
        self.send("Page.navigate", url=Path(path).as_uri())
        while self.message().get("method") != "Page.loadEventFired":
            pass

    def js(self, expression):
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def screenshot(self, path):
        shot = self.send("Page.captureScreenshot")["data"]
        Path(path).write_bytes(base64.b64decode(shot))


@contextmanager
def browser(profile):
    """A Page of a fresh browser. The browser reads commands on descriptor 3, answers on 4."""
    to_browser, from_browser = os.pipe(), os.pipe()
    program = f'exec "$0" "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
    process = subprocess.Popen(
        ["bash", "-c", program, BROWSER, f"--user-data-dir={profile}", *OPTIONS],
        pass_fds=(to_browser[0], from_browser[1]),
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        with open(to_browser[1], "wb") as commands, open(from_browser[0], "rb") as answers:
            yield Page(commands, answers)
    finally:
        process.terminate()
        process.wait(timeout=20)
