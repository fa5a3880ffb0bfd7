// Plotly's figures: its code and theirs are unpacked when first looked at, and recoloured with the page's theme.

class Figures {
  constructor(root) {
    this.root = root;
  }

  async show(dark) {
    if (!this.sent) {
      this.root.replaceChildren(el("p", { class: "muted" }, "drawing …"));
      const script = el("script");
      script.textContent = await textOf("plotly");
      document.head.append(script);
      this.sent = JSON.parse(await textOf("figures"));
      this.cards = this.sent.figures.map(() => el("div", { class: "card" }));
      this.root.replaceChildren(...this.cards);
    }
    const look = dark ? "dark" : "light";
    const swap = new Map(this.sent.colours.map((pair) => (dark ? pair : [...pair].reverse())));
    const recoloured = (text) => text.replace(/"(#[0-9A-F]{6})([0-9A-F]{2})?"/g, (all, colour, opacity = "") =>
      swap.has(colour) ? `"${swap.get(colour)}${opacity}"` : all);
    this.cards.forEach((card, at) => {
      const { data, layout } = JSON.parse(recoloured(JSON.stringify(this.sent.figures[at])));
      const own = { ...layout, template: this.sent.templates[look], autosize: true };
      Plotly.react(card, data, own, { responsive: true, displaylogo: false, displayModeBar: false });
    });
  }
}
