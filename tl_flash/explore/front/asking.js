// A prompt, and the job that continues it, with what the tray holds clamped.

const asking = { job: null, number: 0 };

async function run() {
  const prompt = $("prompt").value;
  asking.job?.leave();
  asking.job = null;
  if (!prompt) return say("write a prompt first");
  const number = ++asking.number, current = (handle) => (event) => { if (number === asking.number) handle(event); };
  const steers = tray.clamps.size > 0;
  keepAddress();
  answers.begin(steers);
  $("stop").hidden = false;
  say("waiting for the model …");
  const end = (text) => { $("stop").hidden = true; asking.job = null; say(text); };
  const job = await startJob("write", {
    prompt, chat: $("chat").checked, n_tokens: Number($("n-tokens").value), doses: tray.doses(), mode: tray.mode, positions: tray.positions,
  }, {
    waiting: current((ahead) => say(`${ahead} before it`)),
    started: current(() => say("reading the prompt …")),
    progress: current((event) => say(progressText(event))),
    lost: current(() => say("the connection is lost; trying again …")),
    next: current((event) => answers.next(event)),
    tokens: current((event) => { say("writing …"); answers.add(event); }),
    measures: current((event) => answers.measure(event)),
    done: current(() => { end(""); document.body.dataset.written = String(number); }),
    cancelled: current(() => end("stopped")),
    failed: current(({ why }) => { end(""); complain(why); }),
  });
  if (number === asking.number && job && !$("stop").hidden) asking.job = job;
}

const stop = () => asking.job?.cancel();

function say(text) {
  $("work").classList.remove("complaint");
  $("work").textContent = text;
}

function complain(why) {
  $("work").classList.add("complaint");
  $("work").textContent = why;
}

/** What the address says of the prompt and the tray. */
live.address = () => ({
  ask: $("prompt").value,
  chat: $("chat").checked ? "1" : "",
  n: $("prompt").value ? $("n-tokens").value : "",
  clamp: [...tray.clamps].map(([neuron, { dose }]) => `${neuron}:${dose}`).join(","),
  mode: tray.clamps.size ? tray.mode : "",
  at: tray.clamps.size ? tray.positions : "",
});

function keepAddress() {
  if (page.search?.side) return remember();
  const parts = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of Object.entries(live.address())) {
    if (value) parts.set(name, value);
    else parts.delete(name);
  }
  history.replaceState(null, "", `#${parts}`);
}

/** Take what the address asks for; whether that is anything. */
function takeAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  $("prompt").value = (asked.get("ask") ?? "").slice(0, 4000);
  if (asked.has("ask")) $("chat").checked = asked.get("chat") === "1" && !$("chats").hidden;
  const n = Number(asked.get("n"));
  if (Number.isInteger(n) && n >= 1 && n <= 128) $("n-tokens").value = n;
  tray.take(asked);
  return Boolean($("prompt").value);
}
