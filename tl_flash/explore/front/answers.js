// What the model writes: tokens as they come, each a button; the first token's probabilities; measures.

const COMPACT = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 2 });

const answers = {
  begin(steers) {
    $("answers").hidden = false;
    document.body.dataset.steers = steers ? "yes" : "no";
    $("steered").hidden = !steers;
    for (const id of ["plain", "steered", "read"]) $(id).querySelector(".said").replaceChildren();
    for (const id of ["plain", "steered"]) $(id).querySelector(".measures").replaceChildren();
    $("next").replaceChildren();
    $("explained").replaceChildren();
    closeAlternatives();
  },

  add({ stream, tokens }) {
    const said = $(stream === "prompt" ? "read" : stream).querySelector(".said");
    said.append(...tokens.map((one, at) => saidToken(one, stream !== "prompt" && !at && !said.firstChild)));
    if (stream === "prompt") $("read").querySelector("summary").textContent = `the prompt, ${tokens.length} tokens`;
  },

  next({ tokens }) {
    const most = Math.max(...tokens.flatMap(({ plain, steered }) => [plain, steered ?? 0]));
    const bar = (kind, p) => {
      const node = el("span", { class: `p ${kind}` });
      node.style.width = `${(100 * p) / most}%`;
      return el("span", { class: "track", title: `${kind === "plain" ? "as it is" : "clamped"}: ${percent(p)}` }, node);
    };
    $("next").replaceChildren(
      el("h3", {}, "first token"),
      el("ol", {}, ...tokens.map((one) => el("li", {},
        token(one.text), el("span", { class: "bars" }, bar("plain", one.plain), one.steered === undefined ? null : bar("steered", one.steered)),
        el("span", { class: "number" }, percent(one.plain),
          one.steered === undefined ? null : el("span", { class: "after" }, ` → ${percent(one.steered)}`))))));
  },

  measure({ plain, steered, kl }) {
    const before = new Set([...document.querySelectorAll("#plain .said-token")].map((node) => node.dataset.id));
    for (const node of document.querySelectorAll("#steered .said-token")) node.classList.toggle("new", !before.has(node.dataset.id));
    const text = ({ perplexity, distinct }) => `perplexity ${perplexity === null ? "–" : COMPACT.format(perplexity)} · ${percent(distinct)} of bigrams new`;
    $("plain").querySelector(".measures").textContent = text(plain);
    $("steered").querySelector(".measures").textContent = `${text(steered)} · KL ${kl === null ? "–" : fixed(kl)} nats a token`;
    $("steered").querySelector(".measures").title = "perplexity by the model as it is; KL of the clamped model from it, after the same text";
  },
};

/** A token to read and to click; a line break is seen and breaks the line. */
function saidToken(one, first = false) {
  const odd = [...one.text].some((letter) => letter !== " " && letter !== "\n" && HIDDEN.test(letter));
  const text = first ? one.text.trimStart() || one.text : one.text;
  const node = el("span", {
    class: `said-token${one.special ? " special" : ""}`, role: "button", tabindex: 0, "data-id": one.id, "aria-haspopup": "dialog",
    onclick: () => openAlternatives(node, one), onkeydown: (event) => onToken(event, node),
  }, odd || !text ? token(one.text) : el("bdi", {}, text.replaceAll("\n", "↵\n")));
  return node;
}

function onToken(event, node) {
  const act = {
    ArrowLeft: () => node.previousSibling?.focus(), ArrowRight: () => node.nextSibling?.focus(),
    Enter: () => node.click(), " ": () => node.click(),
  }[event.key];
  if (!act) return;
  event.preventDefault();
  event.stopPropagation();
  act();
}

function openAlternatives(node, one) {
  const box = $("alternatives");
  for (const other of document.querySelectorAll(".said-token.open")) other.classList.remove("open");
  node.classList.add("open");
  const most = one.others?.[0]?.p ?? 1;
  box.replaceChildren(
    el("div", { class: "panel-head" }, el("h3", {}, token(one.text)), el("span", { class: "muted" }, one.p === undefined ? "the first token" : percent(one.p)),
      el("button", { class: "close", "aria-label": "Close", onclick: closeAlternatives }, "×")),
    el("ol", {}, ...(one.others ?? []).map((other) => {
      const bar = el("span", { class: "p plain" });
      bar.style.width = `${(100 * other.p) / most}%`;
      return el("li", { class: other.id === one.id ? "own" : "" }, token(other.text), el("span", { class: "track" }, bar), el("span", { class: "number" }, percent(other.p)));
    })),
    el("div", { class: "buttons" },
      !one.text.trim() || one.special ? null : el("button", { class: "quiet", onclick: () => { closeAlternatives(); findConcept(one.text.trim()); } }, "Find its neurons"),
      one.p === undefined || node.closest("#steered") ? null : el("button", { class: "quiet", id: "explain", onclick: () => { closeAlternatives(); explainToken(node, one); } }, "Which neurons made it?")));
  box.hidden = false;
  const place = node.getBoundingClientRect();
  box.style.left = `${Math.max(8, Math.min(place.left, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${place.bottom + 6 + box.offsetHeight > innerHeight ? Math.max(8, place.top - box.offsetHeight - 6) : place.bottom + 6}px`;
}

function closeAlternatives() {
  $("alternatives").hidden = true;
  for (const other of document.querySelectorAll(".said-token.open")) other.classList.remove("open");
}

/** The neurons that made the model, as it is, predict a token of the prompt or of its answer. */
function explainToken(node, one) {
  const all = [...document.querySelectorAll("#read .said-token, #plain .said-token")];
  const before = all.slice(0, all.indexOf(node)).map((each) => Number(each.dataset.id));
  const box = $("explained");
  const status = el("p", { class: "muted", role: "status" }, "explaining …");
  box.replaceChildren(status);
  startJob("explain", { before, token: one.id }, {
    waiting: (ahead) => { status.textContent = `${ahead} before it`; },
    explained: ({ explanation }) => new Prompts(box, [explanation], openNamed),
    failed: ({ why }) => box.replaceChildren(el("p", { class: "complaint" }, why)),
  });
}
