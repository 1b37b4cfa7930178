"""Draws docs/chat.png: the page of a running server, after questions whose answers can be checked by eye.

    python -m tests.serving.openai.chat_picture http://127.0.0.1:8000/ docs/chat.png

docs/serving.md has the commands of the model that answers. Needs chromium and chromedriver.
"""

import base64
import pathlib
import sys
import tempfile

from tests import browser

QUESTIONS = ("add 1 2 8 + 3 8 5 =", "sort mi bo ka to re du =", "reverse p l a n e t s =")
WIDTH, HEIGHT = 1100, 760
SETTINGS = {"mode": "text", "temperature": "0", "seed": "", "max_tokens": "64"}


def ask(window: browser.Browser, url: str) -> list[str]:
    """Opens the page, asks all questions, and points at a token in the middle of the last answer. Returns the answers.
    """
    window.open(url)
    window.until("document.querySelector('#context').textContent")
    for field, value in SETTINGS.items():
        window.js("document.getElementById(arguments[0]).value = arguments[1]", field, value)
    for question in QUESTIONS:
        window.type("#prompt", question + browser.ENTER)
        window.answered()
    window.js("""const tokens = [...document.querySelector('.turn:last-child .answer .text').children];
        tokens[Math.floor(tokens.length / 2)].dispatchEvent(new Event('pointerover', {bubbles: true}))""")
    return list(window.texts(".answer .text"))


def picture(window: browser.Browser, file: str) -> None:
    """Writes a screenshot of the window as a PNG."""
    data = window.devtools("Page.captureScreenshot", format="png")["data"]
    pathlib.Path(file).write_bytes(base64.b64decode(data))


if __name__ == "__main__":
    url, file = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, browser.window(folder) as opened:
        opened.devtools("Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1,
                        mobile=False)
        print("\n".join(f"{question}{answer}" for question, answer in zip(QUESTIONS, ask(opened, url), strict=True)))
        picture(opened, file)
