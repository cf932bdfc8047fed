"use strict";

/* One feature: when it is active, what it writes, and which features are near it. */
(function (CLT) {
  const { html } = CLT;

  /** {layer, feature} of an address' parts, or null where there is no such feature. */
  function parse([layer, feature]) {
    const { n_layers, n_features } = CLT.site;
    const digits = (text) => /^\d{1,9}$/.test(text || "");
    if (!digits(layer) || !digits(feature) || Number(layer) >= n_layers || Number(feature) >= n_features) return null;
    return { layer: Number(layer), feature: Number(feature) };
  }

  CLT.FeaturePage = function ({ parts }) {
    const at = parse(parts);
    if (!at) {
      return html`<h1 tabindex="-1">No such feature</h1><p>There are ${CLT.count(CLT.site.n_layers)} layers of ${CLT.count(CLT.site.n_features)} features, counted from 0. An address is <code>#/feature/LAYER/FEATURE</code>.</p>`;
    }
    return html`<${Page} key=${`${at.layer}/${at.feature}`} ...${at} />`;
  };

  /** Number of the feature `step` places on: in the list as it was last shown if this feature is in it, else by number. */
  function neighbour(layer, feature, step) {
    const { n_layers, n_features } = CLT.site;
    const number = layer * n_features + feature;
    const { numbers, at } = CLT.listed;
    if (numbers && numbers[at] === number) {
      const next = at + step;
      return next < 0 || next >= numbers.length ? null : numbers[next];
    }
    const next = number + step;
    return next < 0 || next >= n_layers * n_features ? null : next;
  }

  function Page({ layer, feature }) {
    CLT.useLabels();
    const state = CLT.useLoad(() => Promise.all([CLT.feature(layer, feature), CLT.vocabulary()]), []);
    const move = (step) => {
      const next = neighbour(layer, feature, step);
      if (next === null) return;
      const { numbers, at } = CLT.listed;
      if (numbers && numbers[at + step] === next) CLT.listed.at = at + step;
      CLT.go(CLT.toFeature(...CLT.place(next)));
    };
    CLT.useKeys({ j: () => move(1), k: () => move(-1), l: () => document.getElementById("label")?.focus() }, []);
    const link = (step, text) => {
      const next = neighbour(layer, feature, step);
      return next === null ? html`<span></span>` : html`<a href=${CLT.toFeature(...CLT.place(next))} onClick=${(event) => { event.preventDefault(); move(step); }}>${text}</a>`;
    };
    const { label } = CLT.labels.get(layer, feature);
    return html`
      <nav class="steps" aria-label="Neighbouring features">${link(-1, "← Previous")}<a href=${CLT.listed.hash || "#/features"}>List</a>${link(1, "Next →")}</nav>
      <h1 tabindex="-1">Feature <span class="figure">${CLT.nameOf(layer, feature)}</span>${label && html` <bdi class="label">${label}</bdi>`}</h1>
      <${CLT.Loaded} state=${state} what="the feature">
        ${([arrays, vocabulary]) => html`<${CLT.FeatureDetail} layer=${layer} feature=${feature} arrays=${arrays} vocabulary=${vocabulary} />`}
      <//>
    `;
  }

  CLT.FeatureDetail = function ({ layer, feature, arrays, vocabulary }) {
    const one = (name) => (arrays[name] ? arrays[name][0] : null);
    const { tokens, dense_above, histogram_edges } = CLT.site;
    const density = one("active") / Math.max(1, tokens);
    const threshold = one("threshold");
    const drawn = threshold > 0 && Number.isFinite(threshold) ? [{ x: threshold, name: `threshold ${CLT.number(threshold)}` }] : [];
    return html`
      <div class="columns">
        <div class="main">
          <${CLT.Facts} pairs=${[
            ["Density", html`${CLT.percent(density)}${density === 0 ? html` <span class="flag">dead</span>` : density > dense_above ? html` <span class="flag">over-dense</span>` : ""}`],
            ["Active at", `${CLT.count(one("active"))} of ${CLT.count(tokens)} tokens`],
            ["Maximum", CLT.number(one("maximum"))],
            ["Mean when active", CLT.number(one("mean"))],
            ["Minimum when active", CLT.number(one("minimum"))],
            ["Threshold", threshold === null ? null : CLT.number(threshold)],
          ]} />
          <section>
            <h2>Strongest contexts</h2>
            ${density === 0 ? html`<p class="empty">It was active at no token of the text that was read.</p>` : html`<${Examples} arrays=${arrays} vocabulary=${vocabulary} />`}
          </section>
          ${density > 0 && html`<${Groups} arrays=${arrays} vocabulary=${vocabulary} />`}
        </div>
        <div class="side">
          <section><h2>Label</h2><${CLT.LabelForm} layer=${layer} feature=${feature} /></section>
          <section>
            <h2>Values</h2>
            <${CLT.LogHistogram} title="Values when active" edges=${histogram_edges} counts=${Array.from(arrays.histogram)} marks=${drawn} xName="Value" yName="Tokens" height=${170} />
          </section>
          <section><h2>Logits</h2><${CLT.Logits} layer=${layer} arrays=${arrays} vocabulary=${vocabulary} /></section>
          <section><h2>Decoder</h2><${CLT.Decoder} layer=${layer} arrays=${arrays} /></section>
        </div>
      </div>
      <section>
        <h2>Related features</h2>
        <div class="relations">
          <${CLT.Related} title="Similar" hint="Cosine of the decoders." numbers=${arrays.similar} values=${arrays.similar_cosine} vocabulary=${vocabulary} />
          <${CLT.Related} title="Active together" hint="Correlation over tokens." numbers=${arrays.coactive} values=${arrays.coactive_score} vocabulary=${vocabulary} />
          <${CLT.Related} title="Upstream" hint="Virtual weight from an earlier feature’s decoder to this encoder." numbers=${arrays.upstream} values=${arrays.upstream_weight} vocabulary=${vocabulary} />
          <${CLT.Related} title="Downstream" hint="Virtual weight from this decoder to a later feature’s encoder." numbers=${arrays.downstream} values=${arrays.downstream_weight} vocabulary=${vocabulary} />
        </div>
      </section>
    `;
  };

  const Examples = ({ arrays, vocabulary }) => html`
    <p class="hint">Shaded by the feature’s value. Hover over a token, or move along with the arrow keys, to read it.</p>
    <${CLT.Contexts} rows=${arrays.top_row} values=${arrays.top_value} windows=${arrays.windows} maximum=${arrays.maximum[0]} vocabulary=${vocabulary} />
  `;
  CLT.Examples = Examples;

  function Groups({ arrays, vocabulary }) {
    if (!arrays.group_row) return null;
    const [groups, each] = arrays.group_row.shape;
    const top = arrays.top_row.length;
    return html`
      <section>
        <h2>Contexts by value</h2>
        <p class="hint">Its active values in ${groups} groups of equal size, and some contexts drawn from each, down to the smallest value.</p>
        ${Array.from({ length: groups }, (_, i) => {
          const rows = CLT.row(arrays.group_row, i);
          if (rows.every((row) => row < 0)) return null;
          return html`
            <section class="group">
              <h3>${groupTitle(i, groups)}<span class="figure">${arrays.group_edge ? ` ${CLT.number(arrays.group_edge[i])} to ${CLT.number(arrays.group_edge[i + 1])}` : ""}</span></h3>
              <${CLT.Contexts} rows=${rows} values=${CLT.row(arrays.group_value, i)} windows=${arrays.windows.slice(top + i * each, top + (i + 1) * each)} maximum=${arrays.maximum[0]} vocabulary=${vocabulary} />
            </section>
          `;
        })}
      </section>
    `;
  }

  const groupTitle = (i, groups) => (i === 0 ? `Highest ${CLT.percent(1 / groups)}` : i === groups - 1 ? `Lowest ${CLT.percent(1 / groups)}` : `${CLT.percent(i / groups)} to ${CLT.percent((i + 1) / groups)} from the top`);
})(window.CLT);
