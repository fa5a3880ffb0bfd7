// The live page: opens at once, and the list when the first side of the map is decoded.

const started = { wanted: null };

const isNarrow = () => matchMedia("(max-width: 900px)").matches;

/** On a phone one half is seen at a time. */
function showHalf(half) {
  document.body.dataset.half = half;
  $("switch-half").textContent = half === "left" ? "Ask" : "Neurons";
}
const showLeft = () => showHalf("left"), showRight = () => showHalf("right");

async function open() {
  document.body.classList.add("live");
  document.querySelector("h1").textContent = document.title;
  $("open-figures").before(el("button", {
    id: "switch-half", onclick: () => showHalf(document.body.dataset.half === "left" ? "right" : "left"),
  }));
  showHalf("right");
  const answer = await fetch("/api/session");
  const told = await answer.json();
  $("chats").hidden = !told.chats;
  $("chat").checked = told.chats;
  listenLive();
  $("read").open = !isNarrow();
  openPath(told.chats);
  started.wanted = new URLSearchParams(location.hash.slice(1)).get("side");
  if (takeAddress()) run();
  document.body.dataset.open = "yes";
  await sidesFrom(told);
}

/** Take what is decoded, and look again until all of it is. */
async function sidesFrom(told) {
  if (!page.meta && told.sides.length) await start({ ...JSON.parse(await textOf("meta")), sides: [...told.sides] });
  tray.draw();
  for (const side of told.sides) {
    if (!page.meta.sides.some((one) => one.side === side.side)) await addSide(side);
  }
  const { decoding, trouble } = told;
  const done = decoding?.total ? ` ${Math.round((100 * decoding.done) / decoding.total)}%` : "";
  const text = trouble ? `decoding failed: ${trouble}` : decoding ? `decoding ${SIDES[decoding.side] ?? decoding.side}${done} …` : "";
  if (!page.meta) $("status").textContent = text;
  $("decoding").textContent = page.meta ? text : "";
  if (!decoding) document.body.dataset.decoded = "yes";
  else setTimeout(async () => {
    try {
      const answer = await fetch("/api/session");
      await sidesFrom(await answer.json());
    } catch {
      $("decoding").textContent = "the server does not answer";
    }
  }, 700);
}

async function addSide(side) {
  page.meta.sides.push(side);
  $("sides").hidden = false;
  drawSides(page.search.side.side);
  if (started.wanted === side.side) await openSide(side.side, page.open);
  remember();
}

function listenLive() {
  $("about-map").after(el("p", { id: "decoding", class: "muted" }));
  $("run").addEventListener("click", run);
  $("stop").addEventListener("click", stop);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    run();
  });
  $("query").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || page.cursor >= 0 || event.isComposing) return;
    event.preventDefault();
    event.stopPropagation();
    const query = $("query").value.trim();
    if (NEURON.test(query) && page.search?.side) openNamed(query.toUpperCase());
    else findConcept(query.replace(/^"|"$/g, ""));
  });
  $("query").addEventListener("input", () => found.close());
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (!$("alternatives").hidden) closeAlternatives();
    else if (found.node && !found.node.hidden) found.close();
    else return;
    event.stopImmediatePropagation();
  }, true);
  document.addEventListener("click", (event) => {
    if (!event.target.closest("#alternatives, .said-token")) closeAlternatives();
  });
  addEventListener("hashchange", () => location.reload());
  KEYS.a = ["ask: to the prompt", () => { showRight(); $("prompt").focus(); }];
  KEYS.Enter[0] = "open the neuron; in the search: find among all neurons";
  $("query").placeholder = "A word, a neuron (L3N17) or a layer (L3); Enter asks all neurons";
}

open();
