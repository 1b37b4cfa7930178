"""A headless Chromium for tests of pages, controlled over the WebDriver protocol; None if it is not installed."""

import contextlib
import json
import shutil
import socket
import subprocess
import time

import httpx

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
IS_HERE = bool(CHROMIUM and shutil.which("chromedriver"))
ENTER, SHIFT, RELEASE, TAB, RIGHT, SPACE = "\ue007", "\ue008", "\ue000", "\ue004", "\ue014", " "


def port():
    """A TCP port that is currently free."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Browser:
    """One window."""

    def __init__(self, driver, folder):
        self.http = httpx.Client(base_url=driver, timeout=120)
        args = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--window-size=1000,700", f"--user-data-dir={folder}"]
        options = {"goog:chromeOptions": {"binary": CHROMIUM, "args": args}, "goog:loggingPrefs": {"browser": "ALL"}}
        started = self.call("POST", "/session", capabilities={"alwaysMatch": options})
        self.session = f"/session/{started['sessionId']}"

    def call(self, method, path, **body):
        answer = self.http.request(method, path, **({"json": body} if method == "POST" else {})).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url):
        self.call("POST", self.session + "/url", url=url)

    def js(self, script, *arguments):
        """The return value of a JavaScript function with this body, called with `arguments`."""
        return self.call("POST", self.session + "/execute/sync", script=script, args=list(arguments))

    def devtools(self, command, **parameters):
        return self.call("POST", self.session + "/goog/cdp/execute", cmd=command, params=parameters)

    def width(self, pixels):
        self.devtools("Emulation.setDeviceMetricsOverride", width=pixels, height=700, deviceScaleFactor=1, mobile=False)

    def complaints(self):
        """Messages on the console since the last call."""
        return [entry["message"] for entry in self.call("POST", self.session + "/se/log", type="browser")]

    def press(self, keys):
        """Sends keys to the focused element."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", self.session + "/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def type(self, field, keys):
        [element] = self.call("POST", self.session + "/element", using="css selector", value=field).values()
        self.call("POST", f"{self.session}/element/{element}/value", text=keys)

    def click(self, selector):
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def until(self, script):
        """Waits for a true value of an expression and returns it."""
        for _ in range(300):
            if found := self.js(f"return {script}"):
                return found
            time.sleep(0.05)
        raise AssertionError(f"never true: {script}; the page: {self.js('return document.body.innerText')}")

    def texts(self, selector):
        return self.js(f"return [...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")

    def answered(self):
        self.until("!document.body.matches('.running')")


@contextlib.contextmanager
def window(folder):
    """A Browser, closed afterwards. folder: for its profile."""
    process = subprocess.Popen(["chromedriver", f"--port={(number := port())}"], stdout=subprocess.DEVNULL)
    driver, browser = f"http://127.0.0.1:{number}", None
    try:
        for _ in range(200):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(driver + "/status").json()["value"]["ready"]:
                    break
            time.sleep(0.1)
        browser = Browser(driver, folder)
        yield browser
    finally:
        if browser:
            browser.call("DELETE", browser.session)
            browser.http.close()
        process.kill()
        process.wait()
