"use strict";

/* An attribution graph as numbers: which links and nodes stay when it is pruned, and where each node is drawn. */
(function (CLT) {
  const GAP = 15; // pixels between neighbours
  const MARGIN = 14; // beside the nodes of a position
  const LEAST = 64; // of a position, for its token

  /** How many links stay at a place of the slider, 0 to 1: all at 1, and ever fewer by a constant factor. */
  CLT.kept = (graph, share) => Math.max(1, Math.round(graph.weight.length ** share));

  /** Nodes that stay with the strongest `count` links: their ends, and all tokens and outputs. */
  CLT.visible = function (graph, count) {
    const visible = new Uint8Array(graph.nodes.length);
    graph.nodes.forEach((node, i) => {
      if (node.kind === "embedding" || node.kind === "logit" || node.pinned) visible[i] = 1;
    });
    for (let link = 0; link < count && link < graph.weight.length; link++) visible[graph.source[link]] = visible[graph.target[link]] = 1;
    return visible;
  };

  /**
   * Where nodes are drawn: layers from below, positions from the left, nodes of the same place beside each other, the most
   * influential first. Returns {x, y, width, height, columns: [{left, width}], rows: [layer, the highest first], order}:
   * `order` holds the visible nodes of each row by their x.
   */
  CLT.layout = function (graph, visible, rowHeight) {
    const positions = 1 + Math.max(graph.tokens.length - 1, ...graph.nodes.map((node) => node.position));
    const highest = Math.max(CLT.site.n_layers, ...graph.nodes.map((node) => node.layer));
    const rows = Array.from({ length: highest + 2 }, (_, i) => highest - i);
    const cells = new Map();
    graph.nodes.forEach((node, i) => {
      if (!visible[i]) return;
      const key = node.layer * positions + node.position;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(i);
    });
    const most = new Array(positions).fill(0);
    for (const cell of cells.values()) most[graph.nodes[cell[0]].position] = Math.max(most[graph.nodes[cell[0]].position], cell.length);
    let left = 0;
    const columns = most.map((count) => {
      const column = { left, width: Math.max(LEAST, count * GAP + 2 * MARGIN) };
      left += column.width;
      return column;
    });
    const x = new Float32Array(graph.nodes.length);
    const y = new Float32Array(graph.nodes.length);
    const order = rows.map(() => []);
    for (const cell of cells.values()) {
      cell.sort((a, b) => (graph.nodes[b].influence || 0) - (graph.nodes[a].influence || 0) || a - b);
      const { layer, position } = graph.nodes[cell[0]];
      const column = columns[position];
      const start = column.left + (column.width - (cell.length - 1) * GAP) / 2;
      cell.forEach((node, place) => {
        x[node] = start + place * GAP;
        y[node] = (highest - layer + 0.5) * rowHeight;
        order[highest - layer].push(node);
      });
    }
    for (const row of order) row.sort((a, b) => x[a] - x[b]);
    return { x, y, width: left, height: rows.length * rowHeight, columns, rows, order };
  };

  const CLASSES = 4; // of line widths

  /** Links as a few paths, by sign and by class of weight: [{d, sign, level}]. `only`: a node whose links alone are meant. */
  CLT.paths = function (graph, count, { x, y }, only = null) {
    const paths = new Map();
    const largest = Math.abs(graph.weight[0]) || 1;
    for (let link = 0; link < count && link < graph.weight.length; link++) {
      const [from, to, weight] = [graph.source[link], graph.target[link], graph.weight[link]];
      if (only !== null && from !== only && to !== only) continue;
      if (Number.isNaN(x[from] + x[to])) continue; // an end that is not drawn
      const level = Math.min(CLASSES - 1, Math.floor(CLASSES * Math.sqrt(Math.abs(weight) / largest)));
      const key = (weight < 0 ? -1 : 1) * (level + 1);
      if (!paths.has(key)) paths.set(key, []);
      const bend = (y[from] - y[to]) / 3;
      paths.get(key).push(`M${x[from].toFixed(1)} ${y[from].toFixed(1)}C${x[from].toFixed(1)} ${(y[from] - bend).toFixed(1)} ${x[to].toFixed(1)} ${(y[to] + bend).toFixed(1)} ${x[to].toFixed(1)} ${y[to].toFixed(1)}`);
    }
    return [...paths].sort(([a], [b]) => Math.abs(a) - Math.abs(b)).map(([key, parts]) => ({ d: parts.join(""), sign: key < 0 ? "minus" : "plus", level: Math.abs(key) }));
  };

  /** The links into and out of a node, the strongest first: {into: [[node, weight]], out: ...}. */
  CLT.linksOf = function (graph, node) {
    const into = [];
    const out = [];
    for (let link = 0; link < graph.weight.length; link++) {
      if (graph.target[link] === node) into.push([graph.source[link], graph.weight[link]]);
      if (graph.source[link] === node) out.push([graph.target[link], graph.weight[link]]);
    }
    return { into, out };
  };

  /** A node's name in words. */
  CLT.nodeName = function (graph, node) {
    const { kind, layer, feature, position, label } = graph.nodes[node];
    const token = graph.tokens[position] === undefined ? "" : ` at “${CLT.spell(new TextEncoder().encode(graph.tokens[position]), 20)}”`;
    const text = label ? CLT.spell(new TextEncoder().encode(label), 80) : "";
    if (kind === "feature") {
      const own = feature !== null && layer < CLT.site.n_layers ? CLT.labels.get(layer, feature).label : "";
      return `${CLT.nameOf(layer, feature)}${own || text ? ` ${own || text}` : ""}${token}`;
    }
    if (kind === "embedding") return `token${token}`;
    if (kind === "error") return `error of layer ${layer}${token}`;
    return text || `output${token}`;
  };
})(window.CLT);
