// In a neuron's panel: put it into the tray, its activations on a text, its dose curve, its window, its validation.

const measured = new Map(); // neuron and token -> what was measured, so that a panel drawn anew shows it
const pasted = { text: "" };

/** The pole to speak of, the token on its top, and the sign of the clamp that raises it. */
function headline(search, row) {
  const at = row * search.k;
  const pole = search.z(1, at) > search.z(0, at) ? 1 : 0;
  const id = search.side.poles[pole].ids[at];
  const writes = search.side.side === "out" ? (pole ? -1 : 1) : Math.sign(search.write(pole, at)) || 1;
  return { id, text: search.names[id], sign: writes };
}

live.head = (search, row) => {
  if (search.meta.n_experts) return [];
  const neuron = nameOf(search.meta, row), label = headline(search, row);
  const steer = (sign) => { showRight(); tray.add(neuron, sign * label.sign, label.text); };
  return [el("section", { class: "steering" },
    el("button", { class: "primary", id: "steer", onclick: () => steer(1) }, "Steer towards ", token(label.text)),
    el("button", { id: "steer-away", onclick: () => steer(-1) }, "away"))];
};

live.panel = (search, row) => {
  if (search.meta.n_experts) return [];
  const neuron = nameOf(search.meta, row), label = headline(search, row);
  const key = `${neuron}#${label.id}`;
  if (!measured.has(key)) measured.set(key, {});
  return [shadeSection(neuron), testSection(neuron, label, measured.get(key))];
};

function shadeSection(neuron) {
  const text = el("textarea", { rows: 2, maxlength: 20000, "aria-label": "A text to see its activations on", placeholder: "Paste a text to see where it is active", id: "pasted" });
  text.value = pasted.text;
  const result = el("div", { class: "shaded", "aria-live": "polite" });
  const shade = () => {
    pasted.text = text.value;
    if (!text.value) return;
    result.textContent = "reading …";
    startJob("activations", { neuron, text: text.value }, {
      waiting: (ahead) => { result.textContent = `${ahead} before it`; },
      progress: (event) => { result.textContent = progressText(event); },
      activations: (event) => drawShaded(result, event),
      failed: ({ why }) => result.replaceChildren(el("p", { class: "complaint" }, why)),
    });
  };
  return el("section", {}, el("h3", {}, "on a text"), text, el("button", { id: "shade", onclick: shade }, "Shade"), result);
}

function drawShaded(result, { tokens, range }) {
  const most = Math.max(range.abs_max, 1e-9);
  const nodes = tokens.map((one) => {
    if (one.special) return el("span", { class: "special" }, token(one.text));
    const share = Math.min(1, Math.abs(one.value) / most);
    const shown = el("span", { class: "shade", title: `${one.value.toPrecision(3)}, ${percent(share)} of its largest on other texts` },
      ...saidToken(one).childNodes);
    shown.style.setProperty("--share", `${Math.round(75 * share)}%`);
    shown.dataset.sign = one.value < 0 ? "minus" : "plus";
    return shown;
  });
  result.replaceChildren(el("p", {}, ...nodes), el("p", { class: "muted" },
    `on the texts measured: ${range.min.toPrecision(3)} to ${range.max.toPrecision(3)}, mean ${range.mean.toPrecision(3)}`.replaceAll("-", "−")));
}

function testSection(neuron, label, kept) {
  const status = el("p", { class: "muted", role: "status", id: "testing" });
  const results = el("div", {});
  const draw = () => results.replaceChildren(...[kept.dose && drawDose(kept.dose), kept.window && drawWindow(kept.window), kept.validated && drawValidated(kept.validated)].filter(Boolean));
  let job = null;
  const cancel = el("button", { class: "quiet", hidden: "", id: "cancel-test", onclick: () => job?.cancel() }, "Cancel");
  const start = async (kind, asked, take) => {
    const over = (text) => { status.textContent = text; cancel.hidden = true; job = null; };
    cancel.hidden = false;
    status.textContent = "starting …";
    status.classList.remove("complaint");
    job = await startJob(kind, { neuron, token: label.id, ...asked }, {
      waiting: (ahead) => { status.textContent = `${ahead} before it`; },
      started: () => { status.textContent = "measuring …"; },
      progress: (event) => { status.textContent = progressText(event); },
      lost: () => { status.textContent = "the connection is lost; trying again …"; },
      dose: (event) => { kept.dose = event; draw(); },
      window: (event) => { kept.window = event; tray.windows.set(neuron, event); tray.draw(); draw(); },
      validated: (event) => { kept.validated = event; draw(); },
      done: () => over(""), cancelled: () => over("cancelled"),
      failed: ({ why }) => { over(why); status.classList.add("complaint"); },
    });
    if (!job) cancel.hidden = true;
  };
  draw();
  return el("section", {}, el("h3", {}, "test it: does it raise ", token(label.text), "?"),
    el("div", { class: "buttons" },
      el("button", { id: "dose", onclick: () => start("dose", { sign: label.sign }) }, "Dose curve"),
      el("button", { id: "window", onclick: () => start("window", { sign: label.sign }) }, "Dose window"),
      el("button", { id: "validate", onclick: () => start("validate", { sign: label.sign }) }, "Against controls"), cancel),
    status, results);
}

function drawDose({ points, unclamped, prompts }) {
  const [width, height] = [320, 90];
  const doses = points.map(({ dose }) => dose), [low, high] = [Math.min(...doses), Math.max(...doses)];
  const x = (dose) => (width * (dose - low)) / (high - low || 1), y = (p) => height - (height - 6) * p;
  const ordered = [...points].sort((a, b) => a.dose - b.dose);
  const line = ordered.map(({ dose, prob }, at) => `${at ? "L" : "M"}${x(dose)},${y(prob)}`).join("");
  const band = `${ordered.map((one, at) => `${at ? "L" : "M"}${x(one.dose)},${y(one.high)}`).join("")}${[...ordered].reverse().map((one) => `L${x(one.dose)},${y(one.low)}`).join("")}Z`;
  return el("figure", { class: "distribution", id: "dose-curve" },
    el("figcaption", {}, "probability by dose", el("span", { class: "muted" }, ` unclamped ${percent(unclamped)}, mean of ${prompts} prompts`)),
    svg("svg", { viewBox: `0 0 ${width} ${height + 14}`, role: "img", "aria-label": "Probability by dose" },
      svg("path", { d: band, class: "density" }), svg("path", { d: line, class: "curve" }),
      svg("line", { x1: 0, x2: width, y1: y(unclamped), y2: y(unclamped), class: "base" }),
      svg("text", { x: 0, y: height + 12 }, `${fixed(low, 0)} max`), svg("text", { x: width, y: height + 12, "text-anchor": "end" }, `${fixed(high, 0)} max`)));
}

function drawWindow({ low, high }) {
  const shows = low === null ? "shows at no dose tried" : `shows from ${fixed(low)} × its max`;
  const reads = high === null ? "the text reads at none" : `the text reads up to ${fixed(high)} ×`;
  return el("p", { id: "dose-window" }, el("span", { class: low !== null && high !== null && low <= high ? "badge on" : "badge warn" }, "dose window"), ` ${shows}, ${reads}`);
}

function drawValidated({ record, controls }) {
  const is = record.q_value <= 0.05;
  return el("div", { id: "validated" },
    el("p", {}, el("span", { class: is ? "badge on" : "badge warn" }, is ? "beyond its controls" : "not beyond its controls"), " ",
      token(record.token), ` ${signed(record.dlogp)} nats`),
    table([
      ["matched controls", `${signed(record.control_dlogp)} nats, ${controls.length} of them`],
      ["p-value", record.p_value === null ? "–" : record.p_value.toPrecision(2)],
      ["rank among next tokens", `${whole(Math.round(record.rank_before))} → ${whole(Math.round(record.rank_after))}`],
      ["KL from the unclamped model", `${fixed(record.kl)} nats`],
    ]));
}
