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
    const number = (value, digits) => el("td", { class: "number" }, signed(value, digits));
    const effect = (value) => (value === null ? el("td", { class: "number" }, "–") : number(value, 3));
    const columns = [
      ["neuron", (neuron) => el("td", {}, el("button", { class: "plain", title: "Go to this neuron", onclick: () => this.open(neuron.neuron) }, neuron.neuron))],
      ["at", (neuron) => el("td", {}, token(neuron.at))],
      ["activation", (neuron) => number(neuron.activation)],
      ["attribution", (neuron) => number(neuron.attribution, 3)],
      ["removed", (neuron) => effect(neuron.effect), one.neurons.some((neuron) => neuron.effect !== null)],
      ["like ones", (neuron) => effect(neuron.control_effect), one.neurons.some((neuron) => neuron.control_effect !== null)],
      ["reads", (neuron) => el("td", {}, token(neuron.label_in))],
      ["writes", (neuron) => el("td", {}, token(neuron.label_out))],
      ["write z", (neuron) => number(neuron.write_z, 1)],
    ].filter(([, , shows = true]) => shows);
    return el("table", {},
      el("thead", {}, el("tr", {}, ...columns.map(([head]) => el("th", {}, head)))),
      el("tbody", {}, ...shown.map((neuron) => el("tr", {}, ...columns.map(([, cell]) => cell(neuron))))));
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
