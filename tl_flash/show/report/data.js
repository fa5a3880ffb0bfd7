"use strict";
// The page's data: blobs of gzipped, base64-coded arrays, decoded when first asked for.

const blobs = new Map([...document.querySelectorAll("script[data-blob]")].map((node) => [node.dataset.blob, node]));

/** Where the blobs come from: the page itself, unless a server has them. */
const source = {
  async coded(name) {
    const node = blobs.get(name);
    node.remove();
    blobs.delete(name);
    return node.textContent;
  },
};

async function bytesOf(name) {
  const coded = await source.coded(name);
  const packed = coded.startsWith("gzip:");
  const bytes = unbased(packed ? coded.slice(5) : coded);
  if (!packed) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function unbased(coded) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(coded);
  const letters = atob(coded);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

async function textOf(name) {
  return new TextDecoder().decode(await bytesOf(name));
}

const ARRAYS = { u2: Uint16Array, i2: Int16Array, u4: Uint32Array, f4: Float32Array };

/** An array from its byte planes: every value's lowest byte, then every value's second, ... */
async function columnOf(side, name, { type, step }) {
  const size = ARRAYS[type].BYTES_PER_ELEMENT;
  const planes = await Promise.all(Array.from({ length: size }, (_, at) => bytesOf(`${side}.${name}.${at}`)));
  const bytes = new Uint8Array(size * planes[0].length);
  planes.forEach((plane, at) => {
    for (let i = 0; i < plane.length; i++) bytes[size * i + at] = plane[i];
  });
  const values = new ARRAYS[type](bytes.buffer);
  if (step === 1) return values;
  const scaled = new Float32Array(values.length);
  for (let i = 0; i < values.length; i++) scaled[i] = values[i] * step;
  return scaled;
}

/** One side of the map: typed arrays [neuron] or [neuron * k + rank], at both poles. */
async function readSide(meta, described) {
  const names = Object.keys(described.columns);
  const arrays = await Promise.all(names.map((name) => columnOf(described.side, name, described.columns[name])));
  const column = Object.fromEntries(names.map((name, at) => [name, arrays[at]]));
  const poles = ["pos", "neg"].map((pole) => {
    const z = column[`${pole}.z`];
    column[`${pole}.top_z`].forEach((top, row) => { z[row * meta.k] = top; });
    return { ids: column[`${pole}.ids`], z, write: column[`${pole}.write_z`], logZ: column[`${pole}.log_z`] };
  });
  const validated = new Map(described.validated.map((record) => [rowOf(meta, record.neuron), record]));
  return { ...described, column, poles, validated };
}

const NEURON = /^L(\d+)(?:E(\d+))?N(\d+)$/i;
const rowCount = (meta) => meta.layers.length * meta.d_mlp;
const layerOf = (meta, row) => meta.layers[Math.floor(row / meta.d_mlp)];
/** Neurons of one expert, or of a dense layer. */
const widthOf = (meta) => meta.d_mlp / (meta.n_experts || 1);

function nameOf(meta, row) {
  const column = row % meta.d_mlp, width = widthOf(meta);
  const expert = meta.n_experts ? `E${Math.floor(column / width)}` : "";
  return `L${layerOf(meta, row)}${expert}N${column % width}`;
}

/** The row of a neuron's name; -1 where the map does not hold it. */
function rowOf(meta, name) {
  const [, layer, expert, index] = name.match(NEURON);
  const at = meta.layers.indexOf(Number(layer)), width = widthOf(meta);
  const known = (expert === undefined) === !meta.n_experts && Number(expert || 0) < (meta.n_experts || 1);
  return at < 0 || !known || index >= width ? -1 : at * meta.d_mlp + (expert || 0) * width + Number(index);
}
