// Queries and orders. A hit is one number: (pole * neurons + row) * k + rank.

const folded = (text) => text.normalize("NFKC").trim().toLowerCase();

/** A word and, of an English one, its plural. */
function formsOf(word) {
  if (!/^[a-z]+$/.test(word)) return [word];
  if (/[^aeiou]y$/.test(word)) return [word, `${word.slice(0, -1)}ies`];
  if (/(s|x|z|ch|sh)$/.test(word)) return [word, `${word}es`];
  return [word, `${word}s`, ...(/o$/.test(word) ? [`${word}es`] : []), ...(/(lf|af|ife)$/.test(word) ? [word.replace(/fe?$/, "ves")] : [])];
}

class Search {
  constructor(meta, names) {
    this.meta = meta;
    this.names = names;
    this.lower = names.map((name) => name.toLowerCase());
    const firsts = new Map();
    this.twins = new Uint8Array(names.length);
    names.forEach((name, id) => {
      if (firsts.has(name)) this.twins[id] = this.twins[firsts.get(name)] = 1;
      else firsts.set(name, id);
    });
    this.n = rowCount(meta);
    this.k = meta.k;
    this.off = new Set(); // tokens of a word that are switched off
  }

  open(side) {
    this.side = side;
    this.counts = null;
  }

  parts(hit) {
    const rank = hit % this.k;
    const row = Math.floor(hit / this.k) % this.n;
    const pole = hit >= this.n * this.k ? 1 : 0;
    return { pole, row, rank, at: row * this.k + rank };
  }

  tokenOf(hit) {
    const { pole, at } = this.parts(hit);
    return this.side.poles[pole].ids[at];
  }

  z(pole, at) {
    return this.side.poles[pole].z[at];
  }

  prob(pole, at) {
    const { scale } = this.side.column;
    const row = Math.floor(at / this.k);
    return scale ? Math.exp(scale[row] * this.z(pole, at) - this.side.poles[pole].logZ[row]) : NaN;
  }

  write(pole, at) {
    const { write } = this.side.poles[pole];
    return write ? write[at] : NaN;
  }

  specialised(row) {
    return Math.max(this.z(0, row * this.k), this.z(1, row * this.k)) > this.bar(row);
  }

  bar(row) {
    return this.side.bar ? this.side.bar[Math.floor(row / this.meta.d_mlp)] : -Infinity;
  }

  changed(row) {
    return this.side.column["other.ids"][row * this.k] !== this.side.poles[0].ids[row * this.k];
  }

  /** What an order ranks by. */
  key(order) {
    const { kurtosis } = this.side.column;
    return {
      z: (pole, at) => this.z(pole, at),
      prob: (pole, at) => this.prob(pole, at),
      write: (pole, at) => Math.abs(this.write(pole, at)),
      coherence: (pole, at) => Math.min(this.z(pole, at), Math.abs(this.write(pole, at))),
      kurtosis: (pole, at) => kurtosis[Math.floor(at / this.k)],
      concept: (pole, at) => Math.abs(this.conceptZ(Math.floor(at / this.k))),
      effect: (pole, at) => this.side.validated.get(Math.floor(at / this.k))?.dlogp ?? -Infinity,
    }[order];
  }

  /** A neuron's mean z over the tokens of the concept that was asked for; it is 0 of a zero direction. */
  conceptZ(row) {
    return this.concept[row];
  }

  /** How many places among all top tokens each token has, on this side. */
  countsOf() {
    if (!this.counts) {
      this.counts = new Uint32Array(this.meta.d_vocab);
      for (const { ids } of this.side.poles) for (let i = 0; i < ids.length; i++) this.counts[ids[i]]++;
    }
    return this.counts;
  }

  /** What a query asks for: {kind: "all" | "layer" | "neuron" | "token" | "nothing", ...}. */
  parse(query) {
    const text = query.trim();
    if (NEURON.test(text)) {
      const row = rowOf(this.meta, text);
      return row < 0 ? { kind: "nothing", why: `this map has no neuron ${text}` } : { kind: "neuron", row };
    }
    const layer = text.match(/^(?:L|layer ?)(\d+)N?$/i);
    if (layer) {
      const at = this.meta.layers.indexOf(Number(layer[1]));
      return at < 0 ? { kind: "nothing", why: `this map has no layer ${layer[1]}` } : { kind: "layer", at };
    }
    const id = text.match(/^#(\d+)$/);
    if (id && Number(id[1]) < this.meta.d_vocab) return this.tokens([Number(id[1])], []);
    if (query === "") return { kind: "all" };
    const quoted = query.match(/^"([^]*)"$/);
    return (quoted ? null : this.word(query)) ?? this.matching(quoted ? quoted[1] : query);
  }

  /** A concept that the page was written with, in full; else a word, by the tokens that spell it and its plural. */
  word(query) {
    const number = this.meta.concepts.findIndex(({ name }) => name.toLowerCase() === query.trim().toLowerCase());
    const own = number < 0 ? null : this.meta.concepts[number].ids;
    if (own && !this.off.size && this.side.column[`concept.${number}`]) {
      this.concept = this.side.column[`concept.${number}`];
      return { kind: "concept", ids: own, also: [], word: own };
    }
    const counts = this.countsOf();
    const all = own ?? this.spelling(query);
    const word = all.filter((id) => counts[id]);
    return word.length ? { ...this.tokens(word.filter((id) => !this.off.has(id)), []), word } : null;
  }

  spelling(query) {
    if (!/^\p{L}[\p{L}\p{M}'’-]*$/u.test(query)) return [];
    if (!this.spelled) {
      this.spelled = new Map();
      this.names.forEach((name, id) => {
        const text = folded(name);
        if (text) this.spelled.set(text, [...(this.spelled.get(text) ?? []), id]);
      });
    }
    return formsOf(folded(query)).flatMap((form) => this.spelled.get(form) ?? []);
  }

  /** The tokens written exactly so; where they have no neuron, those that begin so; else those that hold it. */
  matching(text) {
    const counts = this.countsOf();
    const needle = text.toLowerCase();
    const exact = [];
    const begins = [];
    const holds = [];
    for (let id = 0; id < this.lower.length; id++) {
      const at = this.lower[id].indexOf(needle);
      if (at < 0) continue;
      if (this.names[id] === text) exact.push(id);
      else if (counts[id]) (at === 0 || (at === 1 && this.lower[id][0] === " ") ? begins : holds).push(id);
    }
    const byCount = (a, b) => counts[b] - counts[a];
    begins.sort(byCount);
    holds.sort(byCount);
    if (exact.some((id) => counts[id])) return this.tokens(exact, [...begins, ...holds]);
    const others = begins.length ? begins : holds;
    if (others.length) return this.tokens(others, begins.length ? holds : [], exact);
    const why = exact.length ? "no neuron has it among its top tokens" : "no token of the vocabulary holds it";
    return { kind: "nothing", why };
  }

  tokens(ids, also, bare = []) {
    return { kind: "token", ids, also, bare };
  }

  /** All hits of a question, best first. */
  hits(question, order, keep) {
    const found = this[`of_${question.kind}`](question, this.key(order), keep);
    return this.sorted(found, this.key(order));
  }

  of_nothing() {
    return new Uint32Array(0);
  }

  of_neuron({ row }, key, keep) {
    return this.best(row, row + 1, key, keep);
  }

  of_layer({ at }, key, keep) {
    return this.best(at * this.meta.d_mlp, (at + 1) * this.meta.d_mlp, key, keep);
  }

  of_all(question, key, keep) {
    return this.best(0, this.n, key, keep);
  }

  /** Every neuron, at the pole that its mean z points to. */
  of_concept(question, key, keep) {
    const found = [];
    for (let row = 0; row < this.n; row++) {
      const z = this.conceptZ(row);
      if (z && keep(row)) found.push((z < 0 ? this.n * this.k : 0) + row * this.k);
    }
    return Uint32Array.from(found);
  }

  /** Each place of these tokens; of a word's, the best at each pole of a neuron. */
  of_token({ ids, word }, key, keep) {
    const wanted = new Uint8Array(this.meta.d_vocab);
    for (const id of ids) wanted[id] = 1;
    const found = [];
    this.side.poles.forEach((pole, sign) => {
      const offset = sign * this.n * this.k;
      for (let at = 0; at < pole.ids.length; at++) {
        const row = Math.floor(at / this.k);
        if (!wanted[pole.ids[at]] || !keep(row)) continue;
        found.push(offset + at);
        if (word) at = (row + 1) * this.k - 1;
      }
    });
    return Uint32Array.from(found);
  }

  /** Each neuron of some rows by the top token of its better pole. */
  best(from, to, key, keep) {
    const found = new Uint32Array(to - from);
    let count = 0;
    for (let row = from; row < to; row++) {
      if (!keep(row)) continue;
      const at = row * this.k;
      const bar = this.bar(row);
      const [plus, minus] = [this.z(0, at), this.z(1, at)];
      let negative = key(1, at) > key(0, at) || (key(1, at) === key(0, at) && minus > plus);
      if (plus > bar !== minus > bar) negative = minus > bar;
      found[count++] = (negative ? this.n * this.k : 0) + at;
    }
    return found.slice(0, count);
  }

  /** By falling key, equal ones in the order given: a radix sort of the keys' bits, 11 at a time. */
  sorted(hits, key) {
    const floats = new Float32Array(hits.length);
    const negative = this.n * this.k;
    for (let i = 0; i < hits.length; i++) floats[i] = hits[i] < negative ? key(0, hits[i]) : key(1, hits[i] - negative);
    const bits = new Uint32Array(floats.buffer);
    for (let i = 0; i < bits.length; i++) bits[i] = bits[i] >>> 31 ? bits[i] : ~bits[i] & 0x7fffffff;
    let [order, next] = [Uint32Array.from(hits.keys()), new Uint32Array(hits.length)];
    for (const shift of [0, 11, 22]) {
      const starts = new Uint32Array(2049);
      for (let i = 0; i < bits.length; i++) starts[((bits[i] >>> shift) & 2047) + 1]++;
      for (let bucket = 1; bucket < 2048; bucket++) starts[bucket] += starts[bucket - 1];
      for (let i = 0; i < order.length; i++) next[starts[(bits[order[i]] >>> shift) & 2047]++] = order[i];
      [order, next] = [next, order];
    }
    return order.map((at) => hits[at]);
  }
}
