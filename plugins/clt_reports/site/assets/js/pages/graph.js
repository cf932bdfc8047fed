"use strict";

/* Attribution graphs of circuit-tracer: features by layer and position, links by weight, and the chosen node beside them. */
(function (CLT) {
  const { html } = CLT;
  const { useEffect, useMemo, useRef, useState } = window.preactHooks;

  CLT.GraphsPage = function () {
    const { graphs } = CLT.site;
    return html`
      <h1 tabindex="-1">Graphs</h1>
      ${graphs.length === 0
        ? html`<p>This site has no attribution graph. Add those that circuit-tracer wrote: <code>clt-plugins report RUN --out DIR --graph FILE</code></p>`
        : html`<${CLT.Table} caption="Attribution graphs" head=${["Graph", "Prompt", "Nodes", "Links"]} texts=${[1]} rows=${graphs.map((graph) => [
            html`<a href=${CLT.toGraph(graph.name)}><bdi>${graph.title || graph.name}</bdi></a>`,
            html`<bdi>${CLT.spell(new TextEncoder().encode(graph.prompt || ""), 200)}</bdi>`,
            CLT.count(graph.nodes),
            CLT.count(graph.links),
          ])} />`}
    `;
  };

  CLT.GraphPage = function ({ parts }) {
    const listed = CLT.site.graphs.find((graph) => graph.name === parts[0]);
    if (!listed) return html`<h1 tabindex="-1">No such graph</h1><p><a href="#/graphs">All graphs</a></p>`;
    return html`<${Page} key=${listed.name} listed=${listed} />`;
  };

  function Page({ listed }) {
    const state = CLT.useLoad(() => CLT.graph(listed.name), []);
    return html`
      <h1 tabindex="-1"><bdi>${listed.title || listed.name}</bdi></h1>
      <${CLT.Loaded} state=${state} what="the graph">${(graph) => html`<${Graph} graph=${graph} />`}<//>
    `;
  }

  const START = 300; // links that are shown at first

  function Graph({ graph }) {
    const labels = CLT.useLabels();
    const total = graph.weight.length;
    const [share, setShare] = useState(total > START ? Math.log(START) / Math.log(total) : 1);
    const [chosen, setChosen] = useState(null);
    const count = total ? CLT.kept(graph, share) : 0;
    const rowHeight = Math.max(30, Math.min(64, 560 / (CLT.site.n_layers + 2)));
    const visible = useMemo(() => {
      const nodes = CLT.visible(graph, count);
      if (chosen !== null) nodes[chosen] = 1;
      return nodes;
    }, [count, chosen]);
    const layout = useMemo(() => CLT.layout(graph, visible, rowHeight), [visible]);
    const hidden = graph.nodes.length - visible.reduce((sum, one) => sum + one, 0);
    return html`
      <p class="prompt"><span class="hint">Prompt</span> <bdi><${CLT.Text} bytes=${new TextEncoder().encode(graph.prompt || "")} limit=${500} /></bdi></p>
      <div class="prune">
        <label for="prune">Links shown</label>
        <input id="prune" type="range" min="0" max="1" step="0.005" value=${share} disabled=${total < 2} aria-valuetext=${`${CLT.count(count)} of ${CLT.count(total)} links`} onInput=${(event) => setShare(Number(event.target.value))} />
        <output for="prune">${CLT.count(count)} of ${CLT.count(total)}${count > 0 && `, from a weight of ${CLT.number(Math.abs(graph.weight[Math.min(count, total) - 1]))}`}${hidden > 0 && `; ${CLT.count(hidden)} nodes without a link are hidden`}</output>
        <${Legend} />
      </div>
      <div class="graphview">
        <${Drawing} graph=${graph} count=${count} visible=${visible} layout=${layout} rowHeight=${rowHeight} chosen=${chosen} choose=${setChosen} labels=${labels} />
        <aside aria-label="Chosen node" class="detail">
          ${chosen === null ? html`<p class="empty">Choose a node to see its links, and its contexts if it is a feature.</p>` : html`<${Detail} key=${chosen} graph=${graph} node=${chosen} choose=${setChosen} />`}
        </aside>
      </div>
    `;
  }

  const Legend = () => html`
    <ul class="graphlegend" aria-label="Legend">
      ${[["feature", "feature"], ["embedding", "token"], ["logit", "output"], ["error", "error"]].map(([kind, text]) => html`<li><svg width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true"><${Shape} kind=${kind} /></svg>${text}</li>`)}
      ${[["plus", "raises"], ["minus", "lowers"]].map(([sign, text]) => html`<li><svg width="24" height="8" aria-hidden="true"><path class=${`link ${sign} level-3`} d="M0 4H24" /></svg>${text}</li>`)}
    </ul>
  `;

  function Shape({ kind }) {
    if (kind === "feature") return html`<circle class="feature" r="5" />`;
    if (kind === "error") return html`<path class="error" d="M0 -6L6 0L0 6L-6 0Z" />`;
    return html`<rect class=${kind} x="-5" y="-5" width="10" height="10" rx=${kind === "logit" ? 0 : 2} />`;
  }

  function Drawing({ graph, count, visible, layout, rowHeight, chosen, choose, labels }) {
    const box = useRef(null);
    const first = layout.order.find((row) => row.length)?.[0];
    const [focused, setFocused] = useState(null);
    const stop = focused !== null && visible[focused] ? focused : chosen !== null ? chosen : first;
    const all = useMemo(() => CLT.paths(graph, count, layout), [count, layout]);
    // The outputs are at the end of the prompt: begin there.
    useEffect(() => box.current.scrollTo(layout.width, 0), []);
    const own = useMemo(() => (chosen === null ? [] : CLT.paths(graph, graph.weight.length, withAll(graph, visible, layout), chosen)), [chosen, layout]);
    const nodes = useMemo(() => layout.order.flat(), [layout]);
    const near = useMemo(() => {
      const set = new Set([chosen]);
      if (chosen !== null) for (const [node] of Object.values(CLT.linksOf(graph, chosen)).flat()) set.add(node);
      return set;
    }, [chosen]);

    const show = (event) => {
      const target = event.target.closest("[data-node]");
      if (target) CLT.showTip(target, tipOf(graph, Number(target.dataset.node)));
    };
    const keys = (event) => {
      const target = event.target.closest("[data-node]");
      if (!target) return;
      const node = Number(target.dataset.node);
      const next = { ArrowLeft: () => beside(layout, node, -1), ArrowRight: () => beside(layout, node, 1), ArrowUp: () => above(layout, node, -1), ArrowDown: () => above(layout, node, 1), Home: () => edge(layout, node, 0), End: () => edge(layout, node, -1) }[event.key];
      if (next) box.current.querySelector(`[data-node="${next()}"]`)?.focus();
      else if (event.key === "Enter" || event.key === " ") choose(node);
      else return;
      event.preventDefault();
    };
    const click = (event) => {
      const target = event.target.closest("[data-node]");
      if (target) choose(Number(target.dataset.node));
    };
    return html`
      <div class="drawing" ref=${box} onPointerOver=${show} onPointerOut=${CLT.hideTip} onFocusIn=${(event) => { show(event); const target = event.target.closest("[data-node]"); if (target) setFocused(Number(target.dataset.node)); }} onFocusOut=${CLT.hideTip} onKeyDown=${keys} onClick=${click}>
        <div class="layers" aria-hidden="true">${layout.rows.map((layer) => html`<div style=${{ height: `${rowHeight}px` }}>${layer < 0 ? "token" : layer >= CLT.site.n_layers ? "output" : layer}</div>`)}</div>
        <div class="canvas">
          <svg width=${layout.width} height=${layout.height} role="group" aria-label="Attribution graph: nodes by layer, from below, and by position" class=${chosen === null ? "" : "some"}>
            ${layout.columns.map(({ left, width }, i) => i % 2 === 1 && html`<rect class="stripe" x=${left} y="0" width=${width} height=${layout.height} />`)}
            <g aria-hidden="true" class="links">${all.map((path) => html`<path class=${`link ${path.sign} level-${path.level}`} d=${path.d} />`)}</g>
            <g aria-hidden="true" class="links own">${own.map((path) => html`<path class=${`link ${path.sign} level-${path.level}`} d=${path.d} />`)}</g>
            ${nodes.map((node) => {
              const { kind, pinned } = graph.nodes[node];
              return html`
                <g key=${node} data-node=${node} role="button" tabindex=${node === stop ? 0 : -1} aria-pressed=${node === chosen} aria-label=${CLT.nodeName(graph, node)}
                  class=${`node${near.has(node) ? " near" : ""}${node === chosen ? " chosen" : ""}${pinned ? " pinned" : ""}`} transform=${`translate(${layout.x[node].toFixed(1)} ${layout.y[node].toFixed(1)})`}>
                  <circle class="halo" r="9" /><${Shape} kind=${kind} />
                </g>
              `;
            })}
          </svg>
          <div class="prompttokens" style=${{ width: `${layout.width}px` }}>
            ${layout.columns.map(({ width }, i) => html`<span style=${{ width: `${width}px` }}><bdi>${graph.tokens[i] === undefined ? "" : CLT.spell(new TextEncoder().encode(graph.tokens[i]), 12)}</bdi></span>`)}
          </div>
        </div>
      </div>
    `;
  }

  /** The layout with links only to nodes that are drawn: others have no place. */
  function withAll(graph, visible, layout) {
    return { x: layout.x.map((value, node) => (visible[node] ? value : NaN)), y: layout.y };
  }

  const rowOf = (layout, node) => layout.order.find((row) => row.includes(node));

  function beside(layout, node, step) {
    const row = rowOf(layout, node);
    return row[Math.max(0, Math.min(row.length - 1, row.indexOf(node) + step))];
  }

  function edge(layout, node, place) {
    return rowOf(layout, node).at(place);
  }

  /** The nearest node of the next row that has one. */
  function above(layout, node, step) {
    let row = layout.order.indexOf(rowOf(layout, node)) + step;
    while (layout.order[row] && !layout.order[row].length) row += step;
    if (!layout.order[row]) return node;
    return layout.order[row].reduce((best, other) => (Math.abs(layout.x[other] - layout.x[node]) < Math.abs(layout.x[best] - layout.x[node]) ? other : best));
  }

  function tipOf(graph, node) {
    const { activation, influence, probability } = graph.nodes[node];
    return [
      CLT.nodeName(graph, node),
      ...(activation !== null && activation !== undefined ? [`value ${CLT.number(activation)}`] : []),
      ...(probability ? [`probability ${CLT.percent(probability)}`] : []),
      ...(influence !== null && influence !== undefined ? [`influence ${CLT.number(influence)}`] : []),
    ];
  }

  function Detail({ graph, node, choose }) {
    const { kind, layer, feature, position, activation, influence, probability } = graph.nodes[node];
    const { into, out } = useMemo(() => CLT.linksOf(graph, node), [node]);
    const groups = (graph.supernodes || []).filter(([, ...ids]) => ids.includes(graph.nodes[node].id)).map(([name]) => name);
    const within = kind === "feature" && feature !== null && layer < CLT.site.n_layers && feature < CLT.site.n_features;
    const heading = useRef(null);
    useEffect(() => heading.current.scrollIntoView({ block: "nearest" }), [node]);
    return html`
      <h2 ref=${heading}><bdi>${CLT.nodeName(graph, node)}</bdi></h2>
      <${CLT.Facts} pairs=${[
        ["Position", CLT.count(position)],
        ["Value", activation === null || activation === undefined ? null : CLT.number(activation)],
        ["Influence", influence === null || influence === undefined ? null : CLT.number(influence)],
        ["Probability", probability ? CLT.percent(probability) : null],
        ["Group", groups.join(", ")],
      ]} />
      ${within && html`<p><a href=${CLT.toFeature(layer, feature)}>Open feature ${CLT.nameOf(layer, feature)}</a></p>`}
      ${kind === "feature" && !within && html`<p class="empty">This site has no such feature: the graph may be of another transcoder.</p>`}
      <div class="pair">
        <${Ends} title="From" links=${into} graph=${graph} choose=${choose} />
        <${Ends} title="To" links=${out} graph=${graph} choose=${choose} />
      </div>
      ${within && html`<${Contexts} layer=${layer} feature=${feature} />`}
    `;
  }

  const MOST = 12;

  function Ends({ title, links, graph, choose }) {
    const largest = Math.max(...links.map(([, weight]) => Math.abs(weight)), 1e-30);
    return html`
      <table class="bars ends">
        <caption>${title}${links.length > MOST ? `: ${MOST} strongest of ${CLT.count(links.length)}` : ""}</caption>
        <tbody>
          ${links.slice(0, MOST).map(([other, weight]) => html`
            <tr>
              <th scope="row"><button type="button" class="plain" onClick=${() => choose(other)}><bdi>${CLT.nodeName(graph, other)}</bdi></button></th>
              <td class="figure">${CLT.number(weight)}</td>
              <td class=${weight < 0 ? "bar minus" : "bar"} aria-hidden="true"><span style=${{ "--share": (Math.abs(weight) / largest).toFixed(3) }}></span></td>
            </tr>
          `)}
          ${links.length === 0 && html`<tr><td>none</td></tr>`}
        </tbody>
      </table>
    `;
  }

  function Contexts({ layer, feature }) {
    const state = CLT.useLoad(() => Promise.all([CLT.feature(layer, feature), CLT.vocabulary()]), [layer, feature]);
    return html`
      <section><h3>Strongest contexts</h3>
        <${CLT.Loaded} state=${state} what="the feature">
          ${([arrays, vocabulary]) => html`<${CLT.Examples} arrays=${arrays} vocabulary=${vocabulary} />`}
        <//>
      </section>
    `;
  }
})(window.CLT);
