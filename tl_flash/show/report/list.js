// The list of neurons, drawn by windows.

const LEAST = { neuron: 104, label: 130, others: 160, z: 64, prob: 60, kurtosis: 84, write: 70, other: 90, effect: 104, concept: 84 };
const MOST_PIXELS = 17e6; // a taller element is more than some browsers lay out

/** The columns that there is room for; a phone lays all of them out in two lines. */
function drawHead() {
  const { other } = page.search.side;
  const all = [
    ["neuron", "neuron", null, true], ["label", "token", null, true], ["others", "and", null, true], ["concept", "mean z", null, page.there.concept], ["z", "z", "z", true],
    ["prob", "prob", "prob", page.there.prob], ["kurtosis", "kurtosis", "kurtosis", true],
    ["write", "write z", "write", page.there.write], ["other", other && `in ${other.model}`, null, other],
    ["effect", "clamp, nats", "effect", page.there.effect],
  ].filter(([, , , there]) => there);
  const width = (columns) => columns.reduce((sum, [name]) => sum + LEAST[name] + 18, 38);
  const room = matchMedia("(max-width: 720px)").matches ? Infinity : $("list").clientWidth;
  page.columns = all;
  for (const name of ["others", "kurtosis", "write", "other", "prob"]) {
    if (width(page.columns) > room) page.columns = page.columns.filter(([own]) => own !== name);
  }
  $("list").style.setProperty("--columns", page.columns.map(([name]) => `var(--${name})`).join(" "));
  $("list").setAttribute("aria-colcount", page.columns.length);
  const ranks = ([name, , order]) => (order ?? name) === page.ranked;
  $("head").replaceChildren(...page.columns.map((column) => {
    const [name, title, order] = column;
    const arrow = ranks(column) ? " ↓" : "";
    const label = order ? [el("button", { class: "plain", onclick: () => sortBy(order) }, title, arrow)] : [title, arrow];
    return el("div", { class: `cell ${name}`, role: "columnheader", "aria-sort": arrow ? "descending" : null }, ...label);
  }));
}

const rowHeight = () => parseFloat(getComputedStyle($("list")).getPropertyValue("--row"));

/** Draw the rows in sight, and a few beyond. */
function drawRows() {
  const [list, rows] = [$("list"), $("rows")];
  const height = rowHeight();
  const count = Math.min(page.hits.length, Math.floor(MOST_PIXELS / height));
  rows.style.height = `${count * height}px`;
  list.setAttribute("aria-rowcount", count + 1);
  const first = Math.max(0, Math.floor(list.scrollTop / height) - 4);
  const last = Math.min(count, Math.ceil((list.scrollTop + list.clientHeight) / height) + 4);
  const drawn = [];
  for (let at = first; at < last; at++) drawn.push(rowAt(at, height));
  rows.replaceChildren(...drawn);
  if (page.cursor >= first && page.cursor < last) list.setAttribute("aria-activedescendant", `row-${page.cursor}`);
  else list.removeAttribute("aria-activedescendant");
}

function rowAt(at, height) {
  const hit = page.search.parts(page.hits[at]);
  const node = el("div", {
    id: `row-${at}`, role: "row", "aria-rowindex": at + 2, "aria-selected": String(at === page.cursor),
    class: hit.row === page.open ? "row open" : "row", onclick: () => { page.cursor = at; openNeuron(hit.row); },
  }, ...page.columns.map(([name]) => el("div", { class: `cell ${name}`, role: "gridcell" }, ...[CELLS[name](hit)].flat())));
  node.style.transform = `translateY(${at * height}px)`;
  return node;
}

const CELLS = {
  neuron: ({ row }) => nameOf(page.meta, row),
  label: ({ pole, at }) => [
    el("span", { class: `pole-sign pole${pole}`, title: pole ? "negative pole" : "positive pole" }, pole ? "−" : "+"),
    named(page.search, page.search.side.poles[pole].ids[at]),
  ],
  others: ({ pole, row, at }) => {
    const { ids } = page.search.side.poles[pole];
    const from = row * page.meta.k;
    return [...ids.subarray(from, from + Math.min(page.meta.k, 8))]
      .filter((id) => id !== ids[at]).flatMap((id) => [named(page.search, id), " "]);
  },
  concept: ({ row }) => signed(page.search.conceptZ(row)),
  z: ({ pole, at }) => fixed(page.search.z(pole, at)),
  prob: ({ pole, at }) => percent(page.search.prob(pole, at)),
  kurtosis: ({ row }) => fixed(page.search.side.column.kurtosis[row]),
  write: ({ pole, at }) => signed(page.search.write(pole, at), 1),
  other: ({ row }) => {
    const id = page.search.side.column["other.ids"][row * page.meta.k];
    return page.search.changed(row) ? [el("span", { class: "muted" }, "→ "), named(page.search, id)] : el("span", { class: "muted" }, "same");
  },
  effect: ({ row }) => {
    const record = page.search.side.validated.get(row);
    if (!record) return "";
    return el("span", { class: record.q_value <= 0.05 ? "good" : "muted" }, signed(record.dlogp));
  },
};
