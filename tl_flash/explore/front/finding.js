// A word through all neurons: a table over the list, with the tokens that were looked for.

const found = { node: null, job: null, last: null, off: new Set(), chips: [] };

found.close = () => {
  found.job?.leave();
  found.job = null;
  if (found.node) found.node.hidden = true;
};

/** Search all neurons; `ids` are the tokens left on, of a search that was made. */
async function findConcept(concept, ids) {
  if (!concept) return;
  concept = concept.slice(0, 80);
  found.job?.leave();
  if (!ids) found.off.clear();
  found.node ??= $("neurons").appendChild(el("section", { id: "found", "aria-label": "Found among all neurons" }));
  found.node.hidden = false;
  showLeft();
  const head = (text, ...more) => el("div", { class: "panel-head" }, el("h2", {}, "“", el("bdi", {}, concept), "”"),
    el("span", { class: "muted", role: "status" }, text), ...more,
    el("button", { class: "close", "aria-label": "Close (Esc)", onclick: found.close }, "×"));
  const kept = ids ? [...found.node.children].slice(1) : [];
  const told = (text) => found.node.replaceChildren(head(text), ...kept);
  told("searching all neurons …");
  const token_ids = ids ? { tokens: ids } : {};
  found.job = await startJob("find", { concept, ...token_ids }, {
    waiting: (ahead) => told(`waiting for ${ahead} before it`),
    progress: (event) => told(`${progressText(event)} blocks of neurons`),
    found: (event) => {
      if (!ids) found.chips = event.tokens;
      found.last = event;
      found.node.replaceChildren(head("of all neurons, by mean z over"), chipsOf(concept), tableOf(event));
      document.body.dataset.found = concept;
    },
    cancelled: () => told("stopped"),
    failed: ({ why }) => found.node.replaceChildren(head(""), el("p", { class: "complaint" }, why)),
    done: () => { found.job = null; },
  });
}

function chipsOf(concept) {
  return el("div", { class: "chips", role: "group", "aria-label": "Tokens looked for" }, ...found.chips.map(({ id, text }) => el("button", {
    class: "chip", "aria-pressed": String(!found.off.has(id)), onclick: () => {
      if (!found.off.delete(id)) found.off.add(id);
      const on = found.chips.map((one) => one.id).filter((one) => !found.off.has(one));
      if (on.length) findConcept(concept, on);
      else found.off.delete(id);
    },
  }, token(text))));
}

function tableOf({ hits }) {
  const columns = ["neuron", "side", "most by", "z", "write z", "q", ""];
  return el("table", {}, el("thead", {}, el("tr", {}, ...columns.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, ...hits.map((hit) => el("tr", {},
      el("td", {}, el("button", { class: "plain name", onclick: () => openHit(hit) }, hit.neuron)),
      el("td", {}, SIDES[hit.side] ?? hit.side), el("td", {}, token(hit.token)),
      el("td", { class: "number" }, signed(hit.z)), el("td", { class: "number" }, signed(hit.write_z)),
      el("td", { class: `number ${hit.q_value <= 0.05 ? "good" : "muted"}` }, hit.q_value === null ? "–" : hit.q_value.toPrecision(2)),
      el("td", {}, hit.neuron.includes("E") ? null : el("button", {
        class: "steer", title: "Clamp it so that the concept is raised",
        onclick: () => { showRight(); tray.add(hit.neuron, hit.sign, hit.token); },
      }, "Steer"))))));
}

async function openHit(hit) {
  const there = page.meta?.sides.some(({ side }) => side === hit.side);
  if (there && page.search.side.side !== hit.side) await openSide(hit.side);
  openNamed(hit.neuron);
}
