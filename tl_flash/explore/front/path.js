// The first use: three clicks that end in a visible effect.

const SEEN = "tl_flash path";
const path = { at: 0, word: "dog", prompt: "" };

function drawPath() {
  $("path").dataset.at = path.at;
  if (path.at === 3) {
    return $("path").replaceChildren(
      el("span", {}, "Left the model as it is, right the same model with one neuron held. Move its slider, put in others, click any token; the address keeps it all."),
      el("button", { class: "close", "aria-label": "No suggestions", onclick: closePath }, "×"));
  }
  const steps = [
    [`Ask “${path.prompt}”`, () => { $("prompt").value = path.prompt; $("chat").checked = !$("chats").hidden; run(); }],
    [`Find the neurons about “${path.word}”`, () => { $("query").value = path.word; if (page.search?.side) ask(); findConcept(path.word); }],
    ["Steer the best of them, and read both answers", steerBest],
  ];
  $("path").replaceChildren(
    el("span", { class: "muted" }, "New here?"),
    ...steps.map(([text, act], at) => el("button", {
      class: at === path.at ? "primary" : "", disabled: at > path.at ? "" : null, "data-step": at + 1,
      onclick: () => { path.at = Math.max(path.at, at + 1); act(); drawPath(); },
    }, el("b", {}, `${at + 1} `), text)),
    el("button", { class: "close", "aria-label": "No suggestions", onclick: closePath }, "×"));
}

function openPath(chats) {
  path.prompt = chats ? "What is your favourite animal?" : "My favourite animal is the";
  let seen = null;
  try { seen = localStorage.getItem(SEEN); } catch { /* a browser that keeps nothing */ }
  $("path").hidden = seen === "yes";
  drawPath();
}

function closePath() {
  $("path").hidden = true;
  try { localStorage.setItem(SEEN, "yes"); } catch { /* a browser that keeps nothing */ }
}

/** Of what was found, the surest that writes the concept. */
function steerBest() {
  if (found.last?.concept !== path.word) {
    path.at = 2;
    return say("the search is not done yet; try again when it is");
  }
  const writes = found.last.hits.filter(({ side }) => side === "out" || side === "lens");
  const [best] = (writes.length ? writes : [...found.last.hits]).sort((a, b) => a.q_value - b.q_value);
  if (!best) return complain("nothing was found to steer");
  showRight();
  tray.add(best.neuron, best.sign, best.token);
}
