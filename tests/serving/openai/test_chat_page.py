"""The chat page in a browser: under a path prefix and the server's Content-Security-Policy, against a scripted API."""

import asyncio
import json
import threading
import time

import pytest

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from starlette.applications import Starlette  # noqa: E402
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse  # noqa: E402
from starlette.routing import Mount, Route  # noqa: E402

from deepseek_jax.serving.openai.server import chat_page  # noqa: E402
from tests import browser  # noqa: E402
from tests.browser import ENTER, RELEASE, SHIFT, port  # noqa: E402
from tests.serving.openai.test_server import running  # noqa: E402

pytestmark = pytest.mark.skipif(not browser.IS_HERE, reason="needs chromium and chromedriver")

PREFIX = "/models/tiny"
POLICY = ("default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
          "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Api:
    """The server's paths below a prefix. Each test sets the answers, and sees the requests."""

    def __init__(self):
        self.reset()
        self.url = f"http://127.0.0.1:{(number := port())}{PREFIX}/"
        app = Starlette(routes=[Mount(PREFIX, routes=[
            Route("/", self.page), Route("/v1/models", self.models), Route("/loads", self.loads),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.complete, methods=["POST"])])])
        self.server = uvicorn.Server(uvicorn.Config(app, port=number, log_level="error", timeout_graceful_shutdown=1))

    def reset(self):
        self.asked = []  # (path, body) of every completion
        self.polls = 0  # requests of /loads
        self.pieces = ["One", " two."]  # an answer; None: the pieces before it, repeated endlessly
        self.comments = ""  # sent before it
        self.refusal = None  # or an HTTP response in place of it
        self.key = None
        self.loading = 0  # how many requests find it still loading the model
        self.left = threading.Event()  # a client disconnected in the middle of an answer

    async def page(self, request):
        return HTMLResponse(chat_page("tiny"), headers={"Content-Security-Policy": POLICY})

    def allowed(self, request):
        return self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"

    async def models(self, request):
        if not self.allowed(request):
            return JSONResponse({"error": {"message": "the API key is missing."}}, 401)
        if self.loading > 0:
            self.loading -= 1
            return JSONResponse({"error": {"message": f"{self.loading} programs to go."}}, 503)
        return JSONResponse({"data": [{"id": "tiny", "max_model_len": 2048}]})

    async def loads(self, request):
        self.polls += 1
        return JSONResponse({"loads": [[self.polls, 3 * self.polls], [2 * self.polls, 0]]})

    async def complete(self, request):
        if not self.allowed(request):
            return JSONResponse({"error": {"message": "the API key is wrong."}}, 401)
        self.asked.append((request.url.path.removeprefix(PREFIX), body := await request.json()))
        return self.refusal or StreamingResponse(self.events(body), media_type="text/event-stream")

    async def events(self, body):
        try:
            yield self.comments
            await asyncio.sleep(0.3 if self.comments else 0)
            if "messages" in body:
                opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield f"data: {json.dumps({'choices': [opening]})}\n\n"
            pieces = iter(self.pieces)
            while (piece := next(pieces, "")) != "":
                if piece is None:
                    pieces = iter(self.pieces)
                    continue
                yield f"data: {json.dumps({'choices': [choice(piece, 'messages' in body)]})}\n\n"
                await asyncio.sleep(0.01)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left.set()
            raise


def choice(piece, chat):
    best = {"token": piece, "logprob": -0.5}
    return {"finish_reason": None, "drafts": [[piece, "accepted"]],
            **({"delta": {"content": piece}, "logprobs": {"content": [{**best, "top_logprobs": [best]}]}} if chat else
               {"text": piece, "logprobs": {"token_logprobs": [-0.5], "top_logprobs": [{piece: -0.5}]}})}


@pytest.fixture(scope="module")
def served():
    api = Api()
    thread = threading.Thread(target=api.server.run, daemon=True)
    thread.start()
    yield api
    api.server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser.window(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def api(served):
    served.reset()
    return served


@pytest.fixture
def page(api, window):
    window.open(api.url + "nothing")  # of the same origin, but without a page that saves when it is left
    window.js("sessionStorage.clear()")
    window.open(api.url)
    window.until("document.querySelector('#context').textContent")  # its own request comes before the changes of a test
    return window


def test_enter_sends_and_shift_enter_starts_a_new_line(api, page):
    page.type("#prompt", f"first{SHIFT}{ENTER}{RELEASE}second{ENTER}")
    page.answered()

    [(path, body)] = api.asked
    assert path == "/v1/chat/completions" and body["messages"] == [{"role": "user", "content": "first\nsecond"}]
    assert page.texts(".answer .text") == ["One two."]
    assert page.js("return document.querySelector('#hint').textContent").startswith("Enter sends, Shift+Enter")


def test_the_second_turn_sends_the_first_and_the_system_prompt(api, page):
    page.type("#system", "Be brief.")
    for text in ("a", "b"):
        page.type("#prompt", text + ENTER)
        page.answered()

    assert [(m["role"], m["content"]) for m in api.asked[1][1]["messages"]] == [
        ("system", "Be brief."), ("user", "a"), ("assistant", "One two."), ("user", "b")]


def test_plain_text_continues_the_last_message_alone(api, page):
    page.js("document.querySelector('#mode').value = 'text'")
    for text in ("a", "b"):
        page.type("#prompt", text + ENTER)
        page.answered()

    assert [(path, body["prompt"]) for path, body in api.asked] == [("/v1/completions", "a"), ("/v1/completions", "b")]
    assert page.texts(".answer .text") == ["One two."] * 2


def test_settings_are_sent_as_the_api_names_them_and_take_any_fraction(api, page):
    for field, value in {"temperature": "0.85", "top_p": "0.333", "max_tokens": "7", "seed": "5",
                         "stops": "\\n\\n\nEND"}.items():
        page.js(f"document.querySelector('#{field}').value = {json.dumps(value)}")
    page.type("#prompt", f"a{ENTER}")
    page.answered()

    wanted = {"temperature": 0.85, "top_p": 0.333, "max_tokens": 7, "seed": 5, "stop": ["\n\n", "END"]}
    assert wanted.items() <= api.asked[0][1].items()


def test_stop_ends_the_request_and_keeps_what_came(api, page):
    api.pieces = ["la ", None]
    page.type("#prompt", f"sing{ENTER}")
    page.until("document.querySelectorAll('.answer .text span').length > 3")
    page.click("#stop")
    page.answered()

    assert api.left.wait(10)
    assert page.texts(".answer .text")[0].startswith("la la la")
    assert page.texts(".error") == [] and page.texts("#state") == ["Stopped."]


@pytest.mark.parametrize("refusal, shown", [
    (JSONResponse({"error": {"message": "top_p=7 must lie in (0, 1]."}}, 400), "top_p=7 must lie in (0, 1]."),
    (PlainTextResponse("<b>upstream</b> is down", 502), "502 Bad Gateway <b>upstream</b> is down"),
    (StreamingResponse(iter(["data: " + json.dumps({"error": {"message": "the engine has failed."}}) + "\n\n"])),
     "the engine has failed."),
    (StreamingResponse(iter([": nothing\n\n"])), "The connection ended before the answer did.")])
def test_an_error_is_shown_in_its_own_words(api, page, refusal, shown):
    api.refusal = refusal
    page.type("#prompt", f"a{ENTER}")
    page.answered()

    assert page.texts(".error") == [shown]


def test_a_reload_keeps_the_conversation_the_settings_and_the_draft(api, page):
    page.js("document.querySelector('#seed').value = 5")
    page.type("#prompt", f"a{ENTER}")
    page.answered()
    page.type("#prompt", "unsent")
    page.open(api.url)

    assert page.texts(".user .text") == ["a"] and page.texts(".answer .text") == ["One two."]
    assert page.js("return [document.querySelector('#seed').value, document.querySelector('#prompt').value]") == [
        "5", "unsent"]


def test_the_page_works_below_a_prefix_with_and_without_its_slash(api, page):
    page.until("document.querySelector('#context').textContent === 'context of 2,048 tokens'")
    page.js("history.replaceState(null, '', location.pathname.slice(0, -1))")
    page.type("#prompt", f"a{ENTER}")
    page.answered()

    assert page.texts(".answer .text") == ["One two."] and len(api.asked) == 1


def test_the_text_is_followed_only_while_the_reader_is_at_the_end(api, page):
    at = "(log => log.scrollHeight - log.scrollTop - log.clientHeight)(document.querySelector('#log'))"
    api.pieces = ["line\n", None]
    page.type("#prompt", f"a{ENTER}")
    page.until("document.querySelectorAll('.answer .text span').length > 60")
    assert page.js(f"return {at}") < 40

    page.js("document.querySelector('#log').scrollTop = 0")
    page.until("document.querySelectorAll('.answer .text span').length > 90")
    assert page.js("return document.querySelector('#log').scrollTop") == 0
    page.click("#stop")
    page.answered()


def test_the_place_in_the_queue_is_shown_and_other_comments_are_not(api, page):
    api.comments = ": keep-alive\n\n: waiting 3\n\n"
    page.type("#prompt", f"a{ENTER}")
    page.until("document.querySelector('#state').textContent === '3rd in the queue'")
    page.answered()

    assert page.texts(".answer .text") == ["One two."]


def test_an_edited_message_replaces_the_last_and_escape_keeps_it(api, page):
    page.type("#prompt", f"a{ENTER}")
    page.answered()
    page.click(".user .last")
    page.type("#prompt", "\ue00c")
    assert page.texts(".user .text") == ["a"] and page.js("return document.querySelector('#prompt').value") == ""

    page.click(".user .last")
    page.type("#prompt", f"b{ENTER}")
    page.answered()
    page.click(".answer .last")
    page.answered()

    assert page.texts(".user .text") == ["ab"]
    assert [body["messages"][-1]["content"] for _, body in api.asked] == ["a", "ab", "ab"]


def test_a_key_is_asked_for_after_401_and_the_message_is_sent_again(api, page):
    api.key = "secret"
    assert page.js("return document.querySelector('#unlock').hidden")
    page.type("#prompt", f"a{ENTER}")
    page.answered()
    assert page.texts(".error") == ["the API key is wrong."]

    page.type("#key", f"secret{ENTER}")
    page.until("document.querySelector('.answer .text').textContent === 'One two.'")
    assert page.js("return document.querySelector('#unlock').hidden") and page.texts(".error") == []


def test_a_page_that_is_opened_too_early_waits_for_the_model(api, page):
    api.loading = 3
    page.open(api.url)
    page.until("document.querySelector('#state').textContent === '1 programs to go.'")
    page.until("document.querySelector('#context').textContent === 'context of 2,048 tokens'")
    assert page.texts("#state") == [""] and api.loading == 0


def test_logprobs_are_shown_by_pointer_and_by_arrow_keys(api, page):
    page.type("#prompt", f"a{ENTER}")
    page.answered()
    page.js("document.querySelector('.answer .text span').dispatchEvent(new Event('pointerover', {bubbles: true}))")
    assert page.texts("#tip")[0].startswith('"One" drafted by MTP, accepted\nlogprob -0.500')

    page.type(".answer .text", "\ue014\ue014")
    assert page.texts("#tip")[0].startswith('" two." ')


def test_text_of_people_and_models_is_never_markup(api, page):
    api.pieces = ["<img src=x onerror=alert(1)>"]
    page.type("#prompt", f"<b>bold</b>{ENTER}")
    page.answered()

    assert page.texts(".text") == ["<b>bold</b>", *api.pieces] and page.texts("#log b, #log img") == []


def test_loads_are_asked_for_only_while_an_answer_comes(api, page):
    api.pieces = ["word "] * 150
    page.type("#prompt", f"a{ENTER}")
    page.answered()
    page.until("!document.querySelector('#load').hidden")
    assert 2 <= (polls := api.polls) and page.js("return document.querySelector('#loads').clientHeight") == 44

    time.sleep(1.5)
    assert api.polls == polls


def test_the_live_region_is_told_of_an_answer_once(api, page):
    page.js("window.told = []; new MutationObserver(() => told.push(1)).observe(document.querySelector('#status'), "
            "{subtree: true, childList: true, characterData: true})")
    api.pieces = ["word "] * 100
    page.type("#prompt", f"a{ENTER}")
    page.answered()

    assert page.js("return told.length") < 6
    assert page.texts("#spoken") == ["word " * 100]
    assert len(page.texts("[aria-live], [role=status], [role=log], [role=alert]")) == 1


def test_nothing_sticks_out_of_a_narrow_screen(api, page):
    page.width(360)
    try:
        api.pieces = ["x" * 400]
        page.type("#prompt", f"{'y' * 400}{ENTER}")
        page.answered()
        assert page.js("return innerWidth") == 360
        assert page.js("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    finally:
        page.width(1000)


@pytest.mark.slow
def test_the_server_itself_answers_the_page_in_both_modes(window):
    with running() as (_, url):
        window.open(url)
        window.until("!document.querySelector('#unlock').hidden")  # the page detects that the server has a key
        window.js("document.querySelector('#max_tokens').value = 9")
        window.js("document.querySelector('#temperature').value = 0")  # a sampled token may be the end of the text
        window.type("#key", f"secret{ENTER}")
        window.until("document.querySelector('#unlock').hidden")
        for mode in ("chat", "text"):
            window.js(f"document.querySelector('#mode').value = '{mode}'")
            window.type("#prompt", f"hello{ENTER}")
            window.answered()
            assert window.texts(".error") == [] and window.texts("#state") == ["Ended at max tokens."]
            tokens = ".turn:last-child .answer .text span:is(.none, .accepted, .rejected)"
            assert len(window.texts(tokens)) == 9
