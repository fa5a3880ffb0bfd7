// What a model predicted after prompts: their tokens, and the neurons that made it; a neuron leads to its own place.

class Prompts {
  constructor(root, sent, open) {
    Object.assign(this, { root, sent, open });
    this.at = sent.map(() => -1);
    this.draw();
  }

  draw() {
    this.root.replaceChildren(...this.sent.map((one, at) => el("article", { class: "prompt" },
      el("h2", {}, token(one.token), one.against === null ? "" : " and not ", one.against === null ? "" : token(one.against),
        el("span", { class: "muted" }, ` ${percent(one.prob)} · logit ${signed(one.logit)} · rule ${one.rule}, against ${one.reference}`)),
      el("div", { class: "prompt-tokens", role: "group", "aria-label": "Tokens of the prompt" },
        ...one.prompt.map((text, position) => this.chip(one, at, text, position))),
      this.table(one, this.at[at]))));
  }

  chip(one, at, text, position) {
    const count = one.neurons.filter((neuron) => neuron.position === position).length;
    return el("button", {
      class: "chip", disabled: count ? null : "", "aria-pressed": String(this.at[at] === position),
      onclick: () => { this.at[at] = this.at[at] === position ? -1 : position; this.draw(); },
    }, token(text), el("span", { class: "muted" }, count || ""));
  }

  table(one, position) {
    const shown = one.neurons.filter((neuron) => position < 0 || neuron.position === position);
    const heads = ["neuron", "at", "activation", "attribution", "removed", "like ones", "reads", "writes", "write z"];
    const number = (value, digits) => el("td", { class: "number" }, value === null ? "–" : signed(value, digits));
    return el("table", {},
      el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", {}, head)))),
      el("tbody", {}, ...shown.map((neuron) => el("tr", {},
        el("td", {}, el("button", { class: "plain", title: "Go to this neuron", onclick: () => this.open(neuron.neuron) }, neuron.neuron)),
        el("td", {}, token(neuron.at)),
        number(neuron.activation), number(neuron.attribution, 3), number(neuron.effect, 3), number(neuron.control_effect, 3),
        el("td", {}, token(neuron.label_in)), el("td", {}, token(neuron.label_out)), number(neuron.write_z, 1)))));
  }
}

function showPrompts() {
  if (!page.meta.explanations.length) return;
  if (!$("prompts").hidden) return showNeurons();
  showNeurons();
  $("neurons").hidden = true;
  $("prompts").hidden = false;
  $("open-prompts").textContent = "Neurons";
  page.prompts ??= new Prompts($("prompts"), page.meta.explanations, (name) => {
    showNeurons();
    $("query").value = name;
    ask();
    openNeuron(rowOf(page.meta, name));
  });
}
