"use strict";

/*
 * All features as columns, for the list: filters are scans, and a sort is one of numbers. A million features are some
 * columns of a million numbers, not a million objects.
 */
(function (CLT) {
  let table = null;

  /** {name: Float32Array or Int32Array of all features, layer after layer}. Calls `progress(share)` while it loads. */
  CLT.table = function (progress) {
    table = table || load(progress);
    table.catch(() => {
      table = null;
    });
    return table;
  };

  async function load(progress) {
    const { n_layers, n_features, columns } = CLT.site;
    const all = {};
    for (const name of columns) all[name] = name === "word" ? new Int32Array(n_layers * n_features) : new Float32Array(n_layers * n_features);
    for (let layer = 0; layer < n_layers; layer++) {
      const arrays = await CLT.columns(layer);
      for (const name of columns) all[name].set(arrays[name], layer * n_features);
      if (progress) progress((layer + 1) / n_layers);
    }
    return all;
  }

  /**
   * Numbers of the features that pass, in the order asked for.
   *
   * query: layer; density_min, density_max (shares), norm_min, norm_max; label (text that label or note must hold);
   * features (a Map from number to place, of a search, or null); sort (a column, "number" or "found"), down.
   */
  CLT.select = function (columns, query) {
    const { n_layers, n_features } = CLT.site;
    const passes = [];
    const between = (name, low, high) => {
      const column = columns[name];
      if (!column || (low === null && high === null)) return;
      // Columns have 32 bits: so must bounds, or 0.1 would not be at least 0.1.
      const [from, to] = [low === null ? -Infinity : Math.fround(low), high === null ? Infinity : Math.fround(high)];
      passes.push((i) => column[i] >= from && column[i] <= to);
    };
    between("density", query.density_min, query.density_max);
    between("norm", query.norm_min, query.norm_max);
    if (query.label) {
      const wanted = query.label.toLowerCase();
      const labelled = new Set();
      for (const [layer, feature, label, note] of CLT.labels.all()) {
        if (`${label}\n${note}`.toLowerCase().includes(wanted)) labelled.add(layer * n_features + feature);
      }
      passes.push((i) => labelled.has(i));
    }
    const first = query.layer === null ? 0 : query.layer * n_features;
    const end = query.layer === null ? n_layers * n_features : first + n_features;
    const numbers = new Uint32Array(end - first);
    let count = 0;
    const add = (i) => {
      for (const pass of passes) if (!pass(i)) return;
      numbers[count++] = i;
    };
    if (query.features) {
      for (const i of query.features.keys()) if (i >= first && i < end) add(i);
    } else {
      for (let i = first; i < end; i++) add(i);
    }
    return sorted(numbers.slice(0, count), columns, query);
  };

  function sorted(numbers, columns, { sort, down, features }) {
    if (sort === "found" && features) return numbers; // the index gives the best first
    if (sort === "number" || !columns[sort]) {
      numbers.sort();
      return down ? numbers.reverse() : numbers;
    }
    return byColumn(numbers, columns[sort], down);
  }

  /**
   * Numbers by a column, ties by number, what is not known (NaN) last. Order-preserving 32 bits of the value and 21 bits
   * of the number fit into one float64, so the sort needs no comparisons in JavaScript.
   */
  function byColumn(numbers, column, down) {
    const bits = new Uint32Array(new Float32Array(column).buffer);
    const keys = new Float64Array(numbers.length);
    const PLACES = 2 ** 21;
    if (column.length > PLACES) return bySlowSort(numbers, column, down);
    for (let at = 0; at < numbers.length; at++) {
      const i = numbers[at];
      let order = bits[i];
      order = order >>> 31 ? ~order >>> 0 : (order | 0x80000000) >>> 0;
      if (down) order = ~order >>> 0;
      if (Number.isNaN(column[i])) order = 0xffffffff;
      keys[at] = order * PLACES + i;
    }
    keys.sort();
    return Uint32Array.from(keys, (key) => key % PLACES);
  }

  function bySlowSort(numbers, column, down) {
    const sign = down ? -1 : 1;
    const value = (i) => (Number.isNaN(column[i]) ? sign * Infinity : column[i]);
    return numbers.sort((a, b) => sign * (value(a) - value(b)) || a - b);
  }

  /** A query as the index spells its keys. */
  CLT.keyOf = function (text) {
    const stripped = text.toLowerCase().trim();
    if (stripped || !text) return stripped.slice(0, 64);
    return [...text].map((space) => ({ "\n": "\\n", "\t": "\\t", "\r": "\\r", " ": "\\s" })[space] || space).join("").slice(0, 64);
  };

  /**
   * What the index knows of tokens that begin with `text`: a list of {key, active: {count, features, share}, promotes},
   * at most `limit` of them.
   */
  CLT.search = async function (text, limit = 12) {
    const prefix = CLT.keyOf(text);
    const { first } = CLT.site.search;
    const found = [];
    if (!prefix || !first.length) return found;
    for (let shard = Math.max(0, CLT.after(first, prefix) - 1); shard < first.length && found.length < limit; shard++) {
      const index = await CLT.searchShard(shard);
      let at = CLT.after(index.keys, prefix);
      if (at && index.keys[at - 1] === prefix) at--;
      for (; at < index.keys.length && found.length < limit; at++) {
        if (!index.keys[at].startsWith(prefix)) return found;
        found.push({ key: index.keys[at], active: list(index, "active", at), promotes: list(index, "promotes", at) });
      }
    }
    return found;
  };

  function list(index, name, at) {
    const start = index[`${name}_start`];
    if (!start) return null;
    const [from, to] = [start[at], start[at + 1]];
    return {
      count: index[`${name}_count`][at],
      features: index[`${name}_feature`].subarray(from, to),
      share: index[`${name}_share`].subarray(from, to),
    };
  }
})(window.CLT);
