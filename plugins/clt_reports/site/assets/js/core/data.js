"use strict";

/*
 * Loads the files of data/. Nothing can be fetched from file://, so each file is a script that calls CLT.put(key, value).
 * The format is described in data.md, beside the Python that writes it.
 */
window.CLT = {};

(function (CLT) {
  const KEPT = 48; // files that stay in memory after they were read; the list's columns are kept elsewhere
  const values = new Map(); // what scripts have put and nobody has collected yet
  const loads = new Map(); // key -> promise of the value, the most recent last

  CLT.put = function (key, value) {
    values.set(key, value);
  };

  /** What `CLT.put(key, value)` gave, once. For files that index.html loads itself. */
  CLT.take = function (key) {
    const value = values.get(key);
    values.delete(key);
    return value;
  };

  /** A file's value, read by `read(value)`, which may be asynchronous. A file that failed is tried anew when asked again. */
  CLT.load = function (key, read) {
    let load = loads.get(key);
    if (load) {
      loads.delete(key);
    } else {
      load = script(key).then(read || ((value) => value));
      load.catch(() => loads.delete(key));
    }
    loads.set(key, load);
    for (const oldest of loads.keys()) {
      if (loads.size <= KEPT) break;
      loads.delete(oldest);
    }
    return load;
  };

  function script(key) {
    return new Promise((resolve, reject) => {
      const element = document.createElement("script");
      const fail = (why) => reject(new Error(`data/${key}.js ${why}`));
      element.src = `data/${key.split("/").map(encodeURIComponent).join("/")}.js`;
      element.onload = () => {
        element.remove();
        if (values.has(key)) resolve(CLT.take(key));
        else fail("is damaged: it does not hold what its name says. Write the site again.");
      };
      element.onerror = () => {
        element.remove();
        fail("could not be loaded. Is the folder complete?");
      };
      document.head.append(element);
    });
  }

  const TYPES = {
    u1: Uint8Array,
    u2: Uint16Array,
    u4: Uint32Array,
    i1: Int8Array,
    i2: Int16Array,
    i4: Int32Array,
    f4: Float32Array,
    f8: Float64Array,
  };

  /** The arrays of a packed value: {name: typed array}, each with a property `shape`. */
  CLT.unpack = async function (packed) {
    const buffer = await gunzip(fromBase64(packed.data), packed.bytes);
    const arrays = {};
    for (const [name, [type, shape, offset]] of Object.entries(packed.arrays)) {
      const length = shape.reduce((product, size) => product * size, 1);
      arrays[name] = new TYPES[type](buffer, offset, length);
      arrays[name].shape = shape;
    }
    return arrays;
  };

  function fromBase64(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const binary = atob(text);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return bytes;
  }

  async function gunzip(bytes, length) {
    if (!window.DecompressionStream) throw new Error("this browser is too old: it has no DecompressionStream");
    const out = new Uint8Array(length);
    let at = 0;
    const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (at + value.length > length) throw new Error("packed data are damaged: longer than they say");
      out.set(value, at);
      at += value.length;
    }
    if (at !== length) throw new Error("packed data are damaged: shorter than they say");
    return out.buffer;
  }

  /** Row `i` of an array whose first axis is `shape[0]` long: a view, with the rest of the shape. */
  CLT.row = function (array, i) {
    const shape = array.shape.slice(1);
    const size = shape.reduce((product, length) => product * length, 1);
    const row = array.subarray(i * size, (i + 1) * size);
    row.shape = shape;
    return row;
  };

  const digits = (number, least) => String(number).padStart(least, "0");

  /**
   * Everything of one feature: {name: its row of each array of the shard}, and `windows`: for each example, a Map from the
   * offset of an active token near it to the value there.
   */
  CLT.feature = async function (layer, feature) {
    const shard = Math.floor(feature / CLT.site.shard);
    const arrays = await CLT.load(`features/${digits(layer, 2)}/${digits(shard, 4)}`, CLT.unpack);
    const at = feature - shard * CLT.site.shard;
    const rows = {};
    for (const [name, array] of Object.entries(arrays)) if (!name.startsWith("window_")) rows[name] = CLT.row(array, at);
    let entry = arrays.window_start[at];
    rows.windows = Array.from(CLT.row(arrays.window_count, at), (count) => {
      const window = new Map();
      for (const end = entry + count; entry < end; entry++) window.set(arrays.window_offset[entry], arrays.window_value[entry]);
      return window;
    });
    return rows;
  };

  /** The columns of a layer's features. */
  CLT.columns = (layer) => CLT.load(`list/${digits(layer, 2)}`, CLT.unpack);

  /** Keys, counts and features of one file of the index of tokens. */
  CLT.searchShard = (shard) =>
    CLT.load(`search/${digits(shard, 4)}`, async (value) => ({ keys: value.keys, ...(await CLT.unpack(value.packed)) }));

  CLT.vocabulary = () => CLT.load("vocabulary", CLT.unpack);

  /** The file of the text that holds a row: {first, word, context, position}; `first` is the row of its first token. */
  CLT.textAt = async function (row) {
    const rows = CLT.site.text.rows;
    const file = CLT.after(rows, row) - 1;
    const arrays = await CLT.load(`text/${digits(file, 4)}`, CLT.unpack);
    return { first: rows[file], ...arrays };
  };

  CLT.graph = (name) =>
    CLT.load(`graphs/${name}`, async (value) => ({ ...value, ...(await CLT.unpack(value.packed)) }));

  /** The first place in an ascending list whose item is greater than `item`: its length where there is none. */
  CLT.after = function (list, item) {
    let low = 0;
    let high = list.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle] > item) high = middle;
      else low = middle + 1;
    }
    return low;
  };
})(window.CLT);
