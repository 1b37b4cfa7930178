"""The page at `/`: a chat that shows which tokens MTP had drafted, tokens per second, and the live load of the experts.

One string, no files beside it, nothing to build. `__MODEL__` is replaced by the model's name, as JSON.
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>deepseek-jax</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --line: #8884; --yes: #2a9d5c44; --no: #d9822b55; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.2rem; margin: 0 0 .8rem } h1 small { font-weight: normal; opacity: .7 }
#talk { border: 1px solid var(--line); border-radius: 6px; padding: .8rem; min-height: 14rem; max-height: 55vh;
  overflow: auto; white-space: pre-wrap; font: 14px/1.5 ui-monospace, monospace; overflow-wrap: anywhere }
#talk .me { opacity: .65 } .accepted { background: var(--yes) } .rejected { background: var(--no) }
.error { color: #c33 }
form { display: flex; gap: .5rem; margin: .6rem 0; align-items: end; flex-wrap: wrap }
textarea { flex: 1 1 24rem; font: inherit; min-height: 3.2rem; padding: .4rem } label { font-size: .85rem }
label input { display: block; width: 5.5rem; font: inherit } button { font: inherit; padding: .45rem 1rem }
#facts { display: flex; gap: 1.6rem; flex-wrap: wrap; font-variant-numeric: tabular-nums }
#facts b { display: block; font-size: 1.25rem } .key span { padding: 0 .35rem; margin-right: .8rem }
canvas { width: 100%; image-rendering: pixelated; border: 1px solid var(--line); border-radius: 4px }
</style></head><body>
<h1>deepseek-jax <small id="model"></small></h1>
<div id="talk" aria-live="polite"></div>
<form id="ask">
<textarea id="prompt" placeholder="def " aria-label="Prompt">def </textarea>
<label>temperature<input id="temperature" type="number" value="0.8" min="0" max="2" step="0.1"></label>
<label>new tokens<input id="tokens" type="number" value="128" min="1"></label>
<label>API key<input id="key" type="password" autocomplete="off"></label>
<button id="send">Send</button><button id="stop" type="button" disabled>Stop</button>
</form>
<p class="key"><span class="accepted">drafted by MTP, accepted</span><span class="rejected">another was drafted</span>
<span>not drafted</span></p>
<div id="facts">
<div><b id="speed">-</b>tokens per second</div><div><b id="accepted">-</b>of drafts accepted</div>
<div><b id="steps">-</b>tokens per step</div></div>
<p>Load of every expert (rows: MoE layers; darker: busier; <span id="vio">no tokens yet</span>)</p>
<canvas id="loads" height="1" width="1"></canvas>
<script>
"use strict";
const MODEL = __MODEL__, $ = id => document.getElementById(id);
$("model").textContent = MODEL;
const headers = () => ({"Content-Type": "application/json",
  ...($("key").value && {Authorization: "Bearer " + $("key").value})});
let before = null, running = null;

async function drawLoads() {
  const answer = await fetch("/loads", {headers: headers()}).catch(() => null);
  if (!answer || !answer.ok) return;
  const now = (await answer.json()).loads;
  const old = before || now.map(row => row.map(() => 0));
  const fresh = now.map((row, i) => row.map((n, e) => n - old[i][e]));
  if (!now.length || !fresh.some(row => row.some(n => n))) return;
  before = now;
  const canvas = $("loads"), rows = fresh.length, columns = fresh[0].length;
  canvas.width = columns; canvas.height = rows; canvas.style.height = rows * 22 + "px";
  const paint = canvas.getContext("2d");
  let worst = 0;
  fresh.forEach((row, i) => {
    const mean = row.reduce((a, b) => a + b, 0) / columns || 1;
    row.forEach((n, e) => {
      worst = Math.max(worst, n / mean);
      paint.fillStyle = `hsl(212 70% ${Math.max(20, 96 - 30 * n / mean)}%)`;
      paint.fillRect(e, i, 1, 1);
    });
  });
  $("vio").textContent = `the busiest has ${worst.toFixed(1)} times the mean of its layer`;
}
setInterval(drawLoads, 1000);

function say(kind, text) {
  const span = document.createElement("span");
  span.className = kind; span.textContent = text;
  $("talk").append(span); $("talk").scrollTop = 1e9;
}

async function ask() {
  running = new AbortController();
  $("send").disabled = true; $("stop").disabled = false;
  const prompt = $("prompt").value;
  say("me", ($("talk").textContent ? "\\n\\n" : "") + prompt);
  let first = 0, tokens = 0, accepted = 0, rejected = 0;
  try {
    const answer = await fetch("/v1/completions", {method: "POST", headers: headers(), signal: running.signal,
      body: JSON.stringify({model: MODEL, prompt, stream: true, return_drafts: true,
        temperature: +$("temperature").value, max_tokens: +$("tokens").value})});
    if (!answer.ok) throw Error((await answer.json()).error.message);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let text = "";;) {
      const {value, done} = await reader.read();
      if (done) break;
      const events = (text + value).split("\\n\\n");
      text = events.pop();
      for (const event of events) {
        if (event === "data: [DONE]") continue;
        const data = JSON.parse(event.slice(6));
        if (data.error) throw Error(data.error.message);
        for (const [piece, draft] of data.choices[0].drafts) {
          first ||= performance.now(); tokens++;
          accepted += draft === "accepted"; rejected += draft === "rejected";
          say(draft, piece);
        }
        const shown = data.choices[0].drafts.map(d => d[0]).join("");
        const rest = data.choices[0].text.slice(shown.length);
        if (rest) say("none", rest);
      }
      const seconds = (performance.now() - first) / 1000;
      if (tokens > 1) $("speed").textContent = ((tokens - 1) / seconds).toFixed(0);
      const drafted = accepted + rejected;
      $("accepted").textContent = drafted ? (100 * accepted / drafted).toFixed(0) + " %" : "-";
      $("steps").textContent = tokens ? (tokens / (tokens - accepted)).toFixed(2) : "-";
    }
  } catch (error) { if (error.name !== "AbortError") say("error", "\\n" + error.message); }
  running = null; $("send").disabled = false; $("stop").disabled = true;
  drawLoads();
}
$("ask").onsubmit = event => { event.preventDefault(); if (!running) ask(); };
$("stop").onclick = () => running && running.abort();
$("prompt").onkeydown = event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("ask").requestSubmit(); }
};
</script></body></html>
"""
