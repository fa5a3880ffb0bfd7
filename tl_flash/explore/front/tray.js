// The tray: neurons that are clamped, each with a slider in units of its largest activation.

const MODES = { set: "set to", add: "add", multiply: "multiply by", floor: "at least", ceil: "at most" };
const PLACES = { all: "everywhere", prompt: "in the prompt", generated: "in what is generated", last: "where a token is chosen" };
const LEAST_SPAN = 10; // doses that a slider reaches at least, on both sides

const tray = {
  clamps: new Map(), // neuron -> { dose, label }
  units: new Map(), // neuron -> { unit, first }: its largest activation, and the first dose to try
  windows: new Map(), // neuron -> { sign, low, high }
  mode: "set",
  positions: "all",

  doses() {
    return Object.fromEntries([...this.clamps].map(([neuron, { dose }]) => [neuron, dose]));
  },

  /** Put a neuron in, at the first dose to try with this sign. */
  async add(neuron, sign, label = "") {
    say(`measuring the range of ${neuron} …`);
    if (!await this.learn(neuron)) return;
    const { first } = this.units.get(neuron);
    this.clamps.set(neuron, { dose: sign * Math.max(0.25, Math.round(4 * first) / 4), label });
    this.changed();
  },

  /** What dose 1 of a neuron is; whether that could be measured. */
  async learn(neuron) {
    if (this.units.has(neuron)) return true;
    return new Promise((resolve) => startJob("unit", { neuron }, {
      waiting: (ahead) => say(`${ahead} before it`),
      progress: (event) => say(progressText(event)),
      unit: (event) => { this.units.set(neuron, event); this.draw(); },
      done: () => resolve(true),
      cancelled: () => resolve(false),
      failed: ({ why }) => { complain(why); resolve(false); },
    }));
  },

  remove(neuron) {
    this.clamps.delete(neuron);
    this.changed();
  },

  /** Draw it anew, and answer anew where there is a prompt. */
  changed() {
    this.draw();
    keepAddress();
    if ($("prompt").value) run();
    else if (this.clamps.size) { say("write a prompt to see what this changes"); $("prompt").focus(); }
  },

  take(asked) {
    this.mode = Object.hasOwn(MODES, asked.get("mode")) ? asked.get("mode") : "set";
    this.positions = Object.hasOwn(PLACES, asked.get("at")) ? asked.get("at") : "all";
    for (const one of (asked.get("clamp") ?? "").split(",").slice(0, 32)) {
      const [, neuron, dose] = one.match(/^(L\d{1,4}N\d{1,7}):(-?\d{1,4}(?:\.\d{1,6})?)$/) ?? [];
      if (neuron) this.clamps.set(neuron, { dose: Number(dose), label: "" });
    }
    for (const neuron of this.clamps.keys()) this.learn(neuron);
    this.draw();
  },

  draw() {
    $("tray").hidden = !this.clamps.size;
    const choice = (name, names, what) => el("label", {}, what, " ", fillSelect(el("select", {
      id: `tray-${name}`, onchange: (event) => { this[name] = event.target.value; this.changed(); },
    }), names, this[name]));
    $("tray").replaceChildren(
      el("div", { class: "tray-head" }, el("h3", {}, "clamped"), choice("mode", MODES, ""), choice("positions", PLACES, ""),
        el("button", { class: "quiet", onclick: copyLink }, "Copy link"),
        el("button", { class: "quiet", onclick: () => { this.clamps.clear(); this.changed(); } }, "Clear")),
      el("ol", {}, ...[...this.clamps].map(([neuron, clamp]) => this.row(neuron, clamp))));
  },

  /** How far a neuron's slider goes. */
  span(neuron) {
    const { dose } = this.clamps.get(neuron);
    return Math.max(LEAST_SPAN, Math.ceil(Math.abs(dose)), Math.ceil(8 * (this.units.get(neuron)?.first ?? 0)));
  },

  row(neuron, clamp) {
    const label = clamp.label || labelOf(neuron);
    const told = el("span", { class: "number" }, this.told(neuron, clamp.dose));
    const slider = el("input", {
      type: "range", min: -this.span(neuron), max: this.span(neuron), step: 0.25, value: clamp.dose, "aria-label": `Dose of ${neuron}`,
      oninput: () => { clamp.dose = Number(slider.value); told.textContent = this.told(neuron, clamp.dose); },
      onchange: () => this.changed(),
    });
    const node = el("li", { "data-neuron": neuron },
      el("button", { class: "plain name", title: "Open the neuron", onclick: () => openNamed(neuron) }, neuron),
      label ? token(label) : el("span", {}),
      el("span", { class: "slider" }, this.mark(neuron), slider), told,
      el("button", { class: "close", "aria-label": `Take ${neuron} out`, onclick: () => this.remove(neuron) }, "×"));
    return node;
  },

  told(neuron, dose) {
    if (this.mode === "multiply") return `× ${fixed(dose)}`;
    const known = this.units.get(neuron);
    return `${fixed(dose)} × max${known ? ` = ${(dose * known.unit).toPrecision(3)}` : ""}`.replace("-", "−");
  },

  /** Where on the slider the clamp shows and the text still reads. */
  mark(neuron) {
    const window = this.windows.get(neuron);
    if (!window || window.low === null || window.high === null || window.low > window.high) return null;
    const most = this.span(neuron);
    const place = (dose) => (100 * (Math.max(-most, Math.min(most, dose)) + most)) / (2 * most);
    const [from, to] = [window.sign * window.low, window.sign * window.high].sort((a, b) => a - b).map(place);
    const node = el("span", { class: "window", title: `dose window: ${fixed(window.low)} to ${fixed(window.high)}` });
    node.style.left = `${from}%`;
    node.style.width = `${Math.max(1, to - from)}%`;
    return node;
  },
};

/** What the map says that a neuron stands for; nothing while there is none. */
function labelOf(neuron) {
  const row = page.search?.side ? rowOf(page.meta, neuron) : -1;
  return row < 0 ? "" : headline(page.search, row).text;
}

function fillSelect(select, names, value) {
  select.replaceChildren(...Object.entries(names).map(([name, text]) => el("option", { value: name }, text)));
  select.value = value;
  return select;
}

async function copyLink() {
  keepAddress();
  try {
    await navigator.clipboard.writeText(location.href);
    say("link copied");
  } catch {
    say("the link is in the address bar");
  }
}

function openNamed(neuron) {
  if (!page.search?.side || !NEURON.test(neuron)) return say("its map is not decoded yet");
  const row = rowOf(page.meta, neuron);
  if (row < 0) return say(`this map has no neuron ${neuron}`);
  found.close();
  showLeft();
  openNeuron(row);
}
