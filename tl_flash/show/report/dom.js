// Building blocks of the page. Everything enters as text; nothing is ever parsed as markup.

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  return fill(node, attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const SIGNS = { " ": "·", "\n": "↵", "\t": "⇥", "\r": "␍" };
const HIDDEN = /[ \p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}|^\p{M}/u;

/** A token with every space, control, format and unassigned character made visible, kept apart from its neighbours. */
function token(text, attributes = {}) {
  const node = el("bdi", { ...attributes, class: `token ${attributes.class ?? ""}` });
  let plain = "";
  const flush = () => { if (plain) node.append(plain); plain = ""; };
  for (const letter of text) {
    if (!HIDDEN.test(letter)) { plain += letter; continue; }
    flush();
    const code = letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    node.append(el("span", { class: SIGNS[letter] ? "sign" : "sign code" }, SIGNS[letter] ?? `U+${code}`));
  }
  flush();
  if (!text) node.append(el("span", { class: "sign code" }, "empty"));
  return node;
}

/** The token of an id, with the id beside it where others are written the same. */
function named(search, id, attributes) {
  const node = token(search.names[id], attributes);
  if (search.twins[id]) node.append(el("span", { class: "sign code" }, `#${id}`));
  return node;
}

const fixed = (value, digits = 2) => (Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–");
const signed = (value, digits = 2) => (value >= 0 ? `+${fixed(value, digits)}` : fixed(value, digits));
const whole = (value) => value.toLocaleString("en-US");

function percent(value) {
  if (!Number.isFinite(value)) return "–";
  if (value > 0.9995 && value < 1) return ">99.9%";
  if (value > 0.9895 && value < 1) return `${(100 * value).toFixed(1)}%`;
  if (value >= 0.0995) return `${(100 * value).toFixed(0)}%`;
  return value >= 0.00095 ? `${(100 * value).toFixed(1)}%` : "<0.1%";
}
