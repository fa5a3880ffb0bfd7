// The page: what is asked, the open neuron, keys.

const $ = (id) => document.getElementById(id);
const ORDERS = {
  z: "z-score", prob: "probability", kurtosis: "kurtosis", coherence: "coherence",
  write: "write z", effect: "effect of a clamp",
};
const FILTERS = {
  specialised: "beyond the null", changed: "changed top token", validated: "clamped",
};

/** What a live explorer adds to the head and the end of a neuron's panel, and to the address. */
const live = { head: () => [], panel: () => [], address: () => ({}) };
const page = { sides: new Map(), order: "z", ranked: "z", filters: new Set(), hits: new Uint32Array(0), cursor: -1, open: -1 };

async function start(given) {
  const meta = given ?? JSON.parse(await textOf("meta"));
  const names = JSON.parse(await textOf("vocab"));
  page.meta = meta;
  page.names = names;
  page.search = new Search(meta, names);
  document.querySelector("h1").textContent = meta.title;
  $("about-map").textContent = `${whole(rowCount(meta))} neurons in ${meta.layers.length} layers · `
    + `top ${meta.k} of ${whole(meta.d_vocab)} tokens at both poles`;
  $("open-figures").hidden = !meta.figures;
  $("open-prompts").hidden = !meta.explanations.length;
  $("sides").hidden = meta.sides.length < 2;
  const asked = new URLSearchParams(location.hash.slice(1));
  const side = meta.sides.find((one) => one.side === asked.get("side")) ?? meta.sides[0];
  listen();
  $("query").value = asked.get("q") ?? "";
  await openSide(side.side, (asked.get("neuron") ?? "").match(/^L\d+N\d+$/) ? rowOf(meta, asked.get("neuron")) : -1);
  document.body.dataset.ready = "yes";
}

async function openSide(name, row = page.open) {
  const { meta, search } = page;
  if (!page.sides.has(name)) page.sides.set(name, await readSide(meta, meta.sides.find((one) => one.side === name)));
  search.open(page.sides.get(name));
  drawSides(name);
  drawFilters();
  drawOrders();
  ask();
  openNeuron(row);
}

function drawSides(name) {
  $("sides").replaceChildren(...page.meta.sides.map(({ side }) => el("button", {
    role: "radio", "aria-checked": String(side === name), onclick: () => openSide(side),
  }, SIDES[side] ?? side)));
}

function drawFilters() {
  const { side } = page.search;
  const there = { specialised: side.bar, changed: side.other, validated: side.validated.size };
  for (const name of page.filters) if (!there[name]) page.filters.delete(name);
  $("filters").replaceChildren(...Object.keys(FILTERS).filter((name) => there[name]).map((name) => el("button", {
    "aria-pressed": String(page.filters.has(name)),
    onclick: () => { page.filters[page.filters.has(name) ? "delete" : "add"](name); drawFilters(); ask(); },
  }, FILTERS[name])));
}

function drawOrders() {
  const { side } = page.search;
  const there = { prob: side.column.scale, coherence: side.poles[0].write, write: side.poles[0].write, effect: side.validated.size };
  const offered = Object.keys(ORDERS).filter((order) => !(order in there) || there[order]);
  if (!offered.includes(page.order)) page.order = "z";
  $("sort").replaceChildren(...offered.map((order) => el("option", { value: order }, ORDERS[order])));
  $("sort").value = page.order;
  page.there = there;
  drawHead();
}

function sortBy(order) {
  page.order = order;
  drawOrders();
  ask();
}

/** Answer the query as it stands. */
function ask() {
  const { search } = page;
  const query = $("query").value;
  if (query !== page.asked) search.off.clear();
  page.asked = query;
  const question = search.parse(query);
  const passes = {
    specialised: (row) => search.specialised(row),
    changed: (row) => search.changed(row),
    validated: (row) => search.side.validated.has(row),
  };
  const tests = [...page.filters].map((name) => passes[name]);
  const ranked = question.kind === "concept" && page.order === "z" ? "concept" : page.order;
  page.hits = search.hits(question, ranked, (row) => tests.every((test) => test(row)));
  page.wanted = question.kind === "token";
  if (ranked !== page.ranked || Boolean(page.there.concept) !== (question.kind === "concept")) {
    page.ranked = ranked;
    page.there.concept = question.kind === "concept";
    drawHead();
  }
  page.cursor = -1;
  $("list").scrollTop = 0;
  $("status").replaceChildren(...told(question));
  drawTokens(question);
  drawRows();
  remember();
}

function told(question) {
  const count = page.hits.length;
  if (question.kind === "nothing") return [`nothing: ${question.why}`];
  if (question.kind === "concept") return [`${whole(count)} neurons by their mean z over the tokens of this concept`];
  if (question.kind === "neuron") return count ? [] : ["the neuron is not among those shown"];
  if (question.kind !== "token") {
    const shown = page.filters.size ? `${whole(count)} neurons` : `all ${whole(count)} neurons`;
    return [`${shown}${question.kind === "layer" ? ` of layer ${page.meta.layers[question.at]}` : ""}`];
  }
  if (!question.ids.length) return ["no token of it is switched on"];
  const few = question.ids.slice(0, 3).flatMap((id, at) => [at ? ", " : "", named(page.search, id)]);
  const more = question.ids.length > 3 ? ` and ${whole(question.ids.length - 3)} more` : "";
  const bare = question.bare?.length ? [" (", named(page.search, question.bare[0]), " itself has none)"] : [];
  return [`${whole(count)} found with `, ...few, more, ` among their top ${page.meta.k}`, ...bare];
}

/** Chips of the tokens that match; a word's own are switched off and on. */
function drawTokens({ ids = [], also = [], word = null }) {
  if (word) {
    const counts = page.search.countsOf();
    $("tokens").replaceChildren(...word.map((id) => el("button", {
      class: "chip", "aria-pressed": String(!page.search.off.has(id)), onclick: () => switchToken(id),
    }, named(page.search, id), el("span", { class: "muted" }, whole(counts[id])))));
    return;
  }
  const counts = ids.length ? page.search.countsOf() : [];
  const chips = (ids.length > 1 ? [...ids, ...also] : also).slice(0, 12);
  $("tokens").replaceChildren(...chips.map((id) => el("button", { class: "chip", onclick: () => find(id) },
    named(page.search, id), el("span", { class: "muted" }, whole(counts[id])))));
}

function switchToken(id) {
  const { off } = page.search;
  if (!off.delete(id)) off.add(id);
  ask();
}

/** Ask for one token, by its string where that names it alone. */
function find(id) {
  const { ids } = page.search.parse(page.names[id]);
  $("query").value = ids?.length === 1 && ids[0] === id ? page.names[id] : `#${id}`;
  showNeurons();
  ask();
}

function openNeuron(row) {
  page.open = row;
  const panel = $("panel");
  panel.hidden = row < 0;
  if (row >= 0) {
    panel.setAttribute("aria-label", `Neuron ${nameOf(page.meta, row)}`);
    panel.replaceChildren(...panelOf(page.search, row, { close: () => openNeuron(-1), find }));
    panel.scrollTop = 0;
  }
  drawHead();
  drawRows();
  remember();
}

/** Keep the view in the address, so that it can be shared. */
function remember() {
  const parts = { q: $("query").value, side: page.search.side.side, neuron: page.open < 0 ? "" : nameOf(page.meta, page.open), ...live.address() };
  const kept = Object.entries(parts).filter(([name, value]) => value && !(name === "side" && page.meta.sides.length < 2));
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
}

function move(by) {
  const { hits } = page;
  if (!hits.length) return;
  page.cursor = Math.max(0, Math.min(hits.length - 1, page.cursor + by));
  const [list, height] = [$("list"), rowHeight()];
  const [top, head] = [page.cursor * height, $("head").offsetHeight];
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + height + head > list.scrollTop + list.clientHeight) list.scrollTop = top + height + head - list.clientHeight;
  if (page.open >= 0) openNeuron(page.search.parts(hits[page.cursor]).row);
  else drawRows();
}

function openCursor() {
  if (page.cursor < 0) page.cursor = 0;
  if (page.hits.length) openNeuron(page.search.parts(page.hits[page.cursor]).row);
}

function back() {
  if ($("neurons").hidden) showNeurons();
  else if (page.open >= 0) openNeuron(-1);
  else if ($("query").value) { $("query").value = ""; ask(); }
}

function nextSide(by) {
  const sides = page.meta.sides.map(({ side }) => side);
  const at = sides.indexOf(page.search.side.side);
  if (sides.length > 1) openSide(sides[(at + by + sides.length) % sides.length]);
}

const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

function switchTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  if (!$("figures").hidden) page.figures.show(isDark());
}

async function showFigures() {
  if (!page.meta.figures) return;
  if (!$("figures").hidden) return showNeurons();
  showNeurons();
  $("neurons").hidden = true;
  $("figures").hidden = false;
  $("open-figures").textContent = "Neurons";
  page.figures ??= new Figures($("figures"));
  await page.figures.show(isDark());
  document.body.dataset.figures = "yes";
}

function showNeurons() {
  $("neurons").hidden = false;
  $("figures").hidden = $("prompts").hidden = true;
  $("open-figures").textContent = "Figures";
  $("open-prompts").textContent = "Prompts";
  drawRows();
}

const KEYS = {
  "/": ["search", () => { showNeurons(); $("query").focus(); $("query").select(); }],
  ArrowDown: ["next row", () => move(1)],
  ArrowUp: ["row before", () => move(-1)],
  PageDown: ["ten rows on", () => move(10)],
  PageUp: ["ten rows back", () => move(-10)],
  Enter: ["open the neuron", openCursor],
  Escape: ["close, then clear", back],
  "[": ["side before", () => nextSide(-1)],
  "]": ["next side", () => nextSide(1)],
  f: ["figures", showFigures],
  p: ["prompts", showPrompts],
  t: ["light or dark", switchTheme],
  "?": ["this help", showHelp],
};

function showHelp() {
  const { meta, search } = page;
  const terms = [
    ["z", "the token's score over the standard deviation of the neuron's scores in the vocabulary"],
    ["prob", "softmax of the scores after the final norm, without bias"],
    ["kurtosis", "excess kurtosis of the scores; high for a neuron with one coherent meaning"],
    ["write z", "the token's z-score in what the neuron writes; its sign is that of the activation that raises it"],
    ["coherence", "the smaller of z and |write z|: the neuron reads the token and writes it"],
    ["beyond the null", "a pole's top z exceeds 99.9% of the layer's shuffled directions"],
  ];
  const searches = [
    ["dog", "a word: its tokens in every case, with a space or without, and its plural; switch off what is not meant"],
    [token(" dog"), "a token by its exact string, leading space included; else those that begin so"],
    ['"L3"', "in quotes, never a neuron or layer"], ["#1234", "a token by its id"],
    ["L3N17", "a neuron"], ["L3", "the neurons of a layer"],
  ];
  $("help").replaceChildren(
    el("button", { class: "close", "aria-label": "Close", onclick: () => $("help").close() }, "×"),
    el("h2", {}, "Search"), table(searches),
    el("h2", {}, "Keys"), table(Object.entries(KEYS).map(([key, [what]]) => [key.replace("Arrow", ""), what])),
    el("h2", {}, "What the numbers say"), table(terms),
    el("h2", {}, "This map"), table([...Object.entries(meta.source), ["weights", search.side.fingerprint]]),
    el("p", { class: "muted" }, "Reading W_in says which direction drives a neuron, not that it promotes the token; "
      + "only a clamp shows what a neuron does."));
  $("help").showModal();
}

function listen() {
  $("query").addEventListener("input", () => { showNeurons(); ask(); });
  $("sort").addEventListener("change", () => sortBy($("sort").value));
  $("list").addEventListener("scroll", () => requestAnimationFrame(drawRows));
  addEventListener("resize", () => { drawHead(); drawRows(); });
  $("open-figures").addEventListener("click", showFigures);
  $("open-prompts").addEventListener("click", showPrompts);
  $("open-help").addEventListener("click", showHelp);
  $("switch-theme").addEventListener("click", switchTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    if (page.figures && !$("figures").hidden) page.figures.show(isDark());
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open || !KEYS[event.key]) return;
    const typing = event.target.matches("input, select, textarea");
    if (typing && !["ArrowDown", "ArrowUp", "PageDown", "PageUp", "Enter", "Escape"].includes(event.key)) return;
    if (typing && event.target !== $("query") && event.key !== "Escape") return;
    if (event.key === "Enter" && event.target.matches("button")) return;
    event.preventDefault();
    KEYS[event.key][1]();
  });
}
