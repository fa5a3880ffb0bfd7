// One neuron: both poles, its statistics beside the null, the other model, what a clamp did.

const SIDES = { in: "W_in", gate: "W_gate", out: "W_out", direction: "direction" };

function panelOf(search, row, actions) {
  const { meta, side } = search;
  return [
    el("div", { class: "panel-head" },
      el("h2", {}, nameOf(meta, row)),
      el("span", { class: "muted" }, `${SIDES[side.side] ?? side.side}${side.lens ? ", through a lens" : ""}`),
      el("button", { class: "close", "aria-label": "Close (Esc)", title: "Close (Esc)", onclick: actions.close }, "×")),
    verdict(search, row),
    ...live.head(search, row),
    poleOf(search, row, 0, actions),
    poleOf(search, row, 1, actions),
    validationOf(search, row),
    comparisonOf(search, row),
    ...live.panel(search, row),
    statisticsOf(search, row),
  ].filter(Boolean);
}

function verdict(search, row) {
  if (!search.side.bar) return null;
  const top = Math.max(search.z(0, row * search.k), search.z(1, row * search.k));
  const is = search.specialised(row);
  return el("p", { class: "verdict" },
    el("span", { class: is ? "badge on" : "badge" }, is ? "specialised" : "not specialised"),
    ` top z ${fixed(top)}; 99.9% of the layer's shuffled directions stay under ${fixed(search.bar(row))}`);
}

function poleOf(search, row, pole, actions) {
  const { k, side } = search;
  const largest = Math.max(search.z(0, row * k), search.z(1, row * k));
  const rows = Array.from({ length: k }, (_, rank) => {
    const at = row * k + rank;
    const id = side.poles[pole].ids[at];
    const z = search.z(pole, at);
    const width = `${Math.max(0, (100 * z) / largest)}%`;
    const bar = el("span", { class: `bar pole${pole}` });
    bar.style.width = width;
    return el("li", {},
      el("button", { class: "plain", title: `Find the neurons with this token (id ${id})`, onclick: () => actions.find(id) },
        named(search, id)),
      el("span", { class: "track" }, bar),
      el("span", { class: "number" }, fixed(z)),
      el("span", { class: "number muted" }, percent(search.prob(pole, at))),
      el("span", { class: "number muted" }, signed(search.write(pole, at), 1)));
  });
  return el("section", { class: "pole" },
    el("h3", {}, el("span", { class: `pole-sign pole${pole}` }, pole ? "−" : "+"), pole ? "negative pole" : "positive pole",
      el("span", { class: "units" }, "z"), el("span", { class: "units" }, "prob"), el("span", { class: "units" }, "write z")),
    el("ol", {}, ...rows));
}

function comparisonOf(search, row) {
  const { k, side } = search;
  if (!side.other) return null;
  const [own, theirs] = [side.poles[0].ids, side.column["other.ids"]].map((ids) => [...ids.subarray(row * k, (row + 1) * k)]);
  const common = theirs.filter((id) => own.includes(id)).length;
  const same = own[0] === theirs[0];
  return el("section", {},
    el("h3", {}, "in ", token(side.other.model)),
    el("p", {}, el("span", { class: same ? "badge on" : "badge warn" }, same ? "same top token" : "another top token"),
      ` ${common} of ${k} positive top tokens shared; top z ${fixed(side.column["other.top_z"][row])}`),
    el("p", { class: "tokens" }, ...theirs.flatMap((id) => [named(search, id, { class: own.includes(id) ? "" : "new" }), " "])));
}

function validationOf(search, row) {
  const record = search.side.validated.get(row);
  if (!record) return null;
  const lines = [
    ["hook_post set to", fixed(record.value)],
    ["rank among next tokens", `${whole(Math.round(record.rank_before))} → ${whole(Math.round(record.rank_after))}`],
    ["matched controls", `${signed(record.control_dlogp)} nats`],
    ["q-value", record.q_value.toPrecision(2)],
    ["top tokens raised most", percent(record.overlap)],
    ["KL from the unclamped model", `${fixed(record.kl)} nats`],
    ["perplexity", `× ${fixed(record.perplexity_ratio)}`],
  ];
  const is = record.q_value <= 0.05;
  return el("section", {},
    el("h3", {}, "clamped"),
    el("p", {}, el("span", { class: is ? "badge on" : "badge warn" }, is ? "significant" : "not significant"), " ",
      token(record.token), ` ${signed(record.dlogp)} nats (95%: ${signed(record.dlogp_low)} to ${signed(record.dlogp_high)})`),
    table(lines));
}

function statisticsOf(search, row) {
  const { meta, side, k, n } = search;
  const from = Math.floor(row / meta.d_mlp) * meta.d_mlp;
  const tops = new Float32Array(meta.d_mlp);
  for (let i = 0; i < meta.d_mlp; i++) tops[i] = Math.max(search.z(0, (from + i) * k), search.z(1, (from + i) * k));
  const kurtosis = side.column.kurtosis.subarray(from, from + meta.d_mlp);
  const own = Math.max(search.z(0, row * k), search.z(1, row * k));
  return el("section", {},
    el("h3", {}, `beside layer ${layerOf(meta, row)}`),
    distribution("top z", tops, nullOf(search, "z", from), own),
    distribution("excess kurtosis", kurtosis, nullOf(search, "kurtosis", from), side.column.kurtosis[row]),
    table([["length of the direction", side.column.norm[row].toPrecision(3)]]));
}

function nullOf(search, name, from) {
  const points = search.side.column[`null.${name}`];
  if (!points) return null;
  const each = points.length / search.meta.layers.length;
  const at = from / search.meta.d_mlp;
  return points.subarray(at * each, (at + 1) * each);
}

/** Two densities, the layer's neurons and its null, and where the neuron stands. */
function distribution(name, values, nulls, own) {
  const all = Float32Array.from(values).sort();
  const low = Math.min(all[0], nulls ? nulls[0] : Infinity);
  const high = Math.max(all[Math.floor(0.995 * (all.length - 1))], nulls ? nulls.at(-1) : -Infinity, own);
  const [width, height, bins] = [320, 44, 36];
  const x = (value) => (width * (value - low)) / (high - low || 1);
  const path = (sample) => {
    const counts = new Float64Array(bins);
    for (const value of sample) if (value <= high) counts[Math.min(bins - 1, Math.floor((bins * x(value)) / width))]++;
    const most = Math.max(...counts);
    const line = Array.from(counts, (count, bin) => `L${((bin + 0.5) * width) / bins},${height - (height - 4) * (count / most)}`);
    return `M0,${height}${line.join("")}L${width},${height}Z`;
  };
  const under = all.findIndex((value) => value >= own);
  const share = (under < 0 ? all.length : under) / Math.max(1, all.length - 1);
  return el("figure", { class: "distribution" },
    el("figcaption", {}, `${name} ${fixed(own)}`, el("span", { class: "muted" }, ` above ${percent(share)} of the other neurons`)),
    svg("svg", { viewBox: `0 0 ${width} ${height + 14}`, role: "img", "aria-label": `${name} ${fixed(own)}` },
      svg("path", { d: path(all), class: "density" }),
      nulls ? svg("path", { d: path(nulls), class: "density null" }) : null,
      svg("line", { x1: x(own), x2: x(own), y1: 0, y2: height, class: "own" }),
      svg("text", { x: 0, y: height + 12 }, fixed(low, 1)),
      svg("text", { x: width, y: height + 12, "text-anchor": "end" }, fixed(high, 1))));
}

function table(lines) {
  return el("dl", {}, ...lines.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}
