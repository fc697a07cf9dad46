"""Open pages in a headless Chromium, controlled by the DevTools protocol over two pipes."""

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Browser:
    """One tab of a running Chromium.

    `problems` collects errors and warnings in the console, and uncaught errors of scripts. `requests` collects every
    requested URL.

    Args:
        commands: file descriptor to write commands to.
        answers: file descriptor to read answers and events from.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers = commands, answers
        self.buffer, self.number, self.session = b"", 0, ""
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, url: str, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Open a page in a window of this size, and wait until it has loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.loaded = False
        self.call("Page.navigate", url=url)
        while not self.loaded:
            self.note(self.receive())

    def evaluate(self, script: str) -> Any:
        """Return the JSON value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def move_to(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self, seconds: float = 60) -> dict[str, Any]:
        """Return the next answer or event; fail if none arrives in time."""
        deadline = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no message from Chromium for {seconds} s"
            part = os.read(self.answers, 1 << 16)
            assert part, "Chromium has exited"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def note(self, event: dict[str, Any]) -> None:
        """Record a loaded page, a request, an error or a warning. All other events are ignored."""
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(parameters["exceptionDetails"]))
        elif (method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert")) or (
            method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning")
        ):
            self.problems.append(str(parameters))


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start Chromium with the profile folder `profile`, and yield a tab. Chromium ends with the `with` block."""
    (commands_in, commands), (answers, answers_out) = os.pipe(), os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    # Chromium expects the protocol's pipes as descriptors 3 and 4
    command = [f'exec "$@" 3<&{commands_in} 4>&{answers_out}', "bash", "chromium", *flags, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        ["bash", "-c", *command],
        pass_fds=(commands_in, answers_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_in)
    os.close(answers_out)
    try:
        yield Browser(commands, answers)
    finally:
        os.close(commands)  # Chromium exits when this pipe is closed
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(answers)
