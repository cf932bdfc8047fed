"use strict";

/* The list of all features, and how to find some: by layer, density, norm, the text of a token, a label. */
(function (CLT) {
  const { html } = CLT;
  const { useEffect, useMemo, useRef, useState } = window.preactHooks;

  /** The features as they were last listed, for the keys j and k of a feature's page. */
  CLT.listed = { numbers: null, at: 0, hash: "" };

  const number = (text) => (text === undefined || text === "" || !Number.isFinite(Number(text)) ? null : Number(text));

  CLT.FeaturesPage = function ({ query }) {
    const [share, setShare] = useState(0);
    const state = CLT.useLoad(() => Promise.all([CLT.table(setShare), CLT.vocabulary()]), []);
    return html`
      <h1 tabindex="-1">Features</h1>
      <${CLT.Loaded} state=${state} what=${`${CLT.count(CLT.site.n_layers * CLT.site.n_features)} features (${CLT.percent(Math.round(100 * share) / 100)})`}>
        ${([columns, vocabulary]) => html`<${Finder} columns=${columns} vocabulary=${vocabulary} query=${query} />`}
      <//>
    `;
  };

  /** Numbers of features for each token found, and which of them are used. */
  function useTokens(text) {
    const [settled, settle] = useState(text);
    useEffect(() => {
      const timer = setTimeout(() => settle(text), 120); // not for each letter while one types
      return () => clearTimeout(timer);
    }, [text]);
    return CLT.useLoad(() => (settled ? CLT.search(settled) : Promise.resolve([])).then((found) => ({ text: settled, found })), [settled]);
  }

  function Finder({ columns, vocabulary, query }) {
    const labels = CLT.useLabels();
    const [chosen, setChosen] = useState(query);
    const last = useRef(query);
    // Another address (a link, the browser's back) is another query.
    useEffect(() => {
      if (JSON.stringify(query) !== JSON.stringify(last.current)) setChosen(query);
    }, [query]);
    const change = (more) => {
      const next = Object.fromEntries(Object.entries({ ...chosen, ...more }).filter(([, value]) => value !== ""));
      last.current = next;
      setChosen(next);
      CLT.replace(CLT.toList(next));
    };
    const by = chosen.by === "promotes" ? "promotes" : "active";
    const tokens = useTokens(chosen.token || "");
    const found = chosen.token && tokens.value ? tokens.value.found : null;
    const keys = found && found.filter((entry) => entry[by] && entry[by].count);
    const exact = chosen.key === undefined ? null : chosen.key;
    const features = useMemo(() => {
      if (!chosen.token) return null;
      const map = new Map();
      for (const entry of keys || []) {
        if (exact !== null && entry.key !== exact) continue;
        for (const feature of entry[by].features) if (!map.has(feature)) map.set(feature, map.size);
      }
      return map;
    }, [found, by, exact, chosen.token]);

    const sort = chosen.sort || (features ? "found" : "number");
    const down = chosen.down === undefined ? sort !== "number" && sort !== "found" : chosen.down === "1";
    const numbers = useMemo(() => CLT.select(columns, {
      layer: number(chosen.layer),
      density_min: percent(chosen.density_min),
      density_max: percent(chosen.density_max),
      norm_min: number(chosen.norm_min),
      norm_max: number(chosen.norm_max),
      label: chosen.label || "",
      features,
      sort,
      down,
    }), [columns, chosen, features, chosen.label ? labels : 0]);

    const begin = CLT.listed.numbers && CLT.listed.hash === CLT.toList(chosen) ? CLT.listed.at : 0;
    const keep = (at) => {
      CLT.listed = { numbers, at, hash: CLT.toList(chosen) };
    };
    const onSort = (name) => change(sort === name ? { sort: name, down: down ? "0" : "1" } : { sort: name, down: name === "number" ? "0" : "1" });
    useEffect(() => keep(begin), [numbers]);

    return html`
      <form class="filters" role="search" aria-label="Find features" onSubmit=${(event) => event.preventDefault()}>
        <label class="wide">Token
          <input id="token" type="search" autocomplete="off" spellcheck=${false} placeholder="text of a token, or its beginning" value=${chosen.token || ""} onInput=${(event) => change({ token: event.target.value, key: "" })} />
        </label>
        <label>Features that
          <select value=${by} onChange=${(event) => change({ by: event.target.value === "active" ? "" : event.target.value })}>
            <option value="active">are active at it</option>
            <option value="promotes">raise its logit</option>
          </select>
        </label>
        <label>Layer
          <select value=${chosen.layer || ""} onChange=${(event) => change({ layer: event.target.value })}>
            <option value="">all</option>
            ${CLT.site.layers.map((_, layer) => html`<option value=${String(layer)}>${layer}</option>`)}
          </select>
        </label>
        <${Range} title="Density (%)" name="density" chosen=${chosen} change=${change} />
        ${columns.norm && html`<${Range} title="Decoder norm" name="norm" chosen=${chosen} change=${change} />`}
        <label>Label or note<input type="search" autocomplete="off" value=${chosen.label || ""} onInput=${(event) => change({ label: event.target.value })} /></label>
      </form>
      ${tokens.error && html`<${CLT.Failure} error=${tokens.error} retry=${tokens.retry} />`}
      ${chosen.token && html`<${Keys} keys=${keys} by=${by} exact=${exact} change=${change} />`}
      <p class="count" role="status">
        ${CLT.count(numbers.length)} ${numbers.length === 1 ? "feature" : "features"}
        ${Object.keys(chosen).length > 0 && html` · <a href="#/features">Show all</a>`}
      </p>
      <${CLT.Grid} label="Features" columns=${gridColumns(columns, vocabulary, features)} numbers=${numbers} sort=${sort} down=${down} onSort=${onSort} active=${begin} onActive=${keep}
        open=${(feature, at) => {
          keep(at);
          CLT.go(CLT.toFeature(...CLT.place(feature)));
        }} />
      <${CLT.LabelFiles} />
    `;
  }

  const percent = (text) => (number(text) === null ? null : number(text) / 100);

  const Range = ({ title, name, chosen, change }) => html`
    <fieldset class="range"><legend>${title}</legend>
      <input type="number" min="0" step="any" aria-label=${`${title}, at least`} placeholder="from" value=${chosen[`${name}_min`] || ""} onInput=${(event) => change({ [`${name}_min`]: event.target.value })} />
      <span aria-hidden="true">–</span>
      <input type="number" min="0" step="any" aria-label=${`${title}, at most`} placeholder="to" value=${chosen[`${name}_max`] || ""} onInput=${(event) => change({ [`${name}_max`]: event.target.value })} />
    </fieldset>
  `;

  /** The tokens that were found: one can be chosen. */
  function Keys({ keys, by, exact, change }) {
    if (!keys) return html`<p class="keys" role="status">Searching …</p>`;
    if (!keys.length) return html`<p class="keys" role="status">No feature’s ${by === "active" ? "examples have" : "logits raise"} a token that begins so.</p>`;
    const shown = keys.reduce((sum, entry) => sum + entry[by].features.length, 0);
    const all = keys.reduce((sum, entry) => sum + entry[by].count, 0);
    return html`
      <div class="keys" role="group" aria-label="Tokens found">
        <button type="button" aria-pressed=${exact === null} onClick=${() => change({ key: "" })}>All of them</button>
        ${keys.map((entry) => html`<button type="button" aria-pressed=${exact === entry.key} onClick=${() => change({ key: entry.key })}><bdi>${CLT.spell(new TextEncoder().encode(entry.key), 24)}</bdi> <span class="figure">${CLT.count(entry[by].count)}</span></button>`)}
        ${shown < all && html`<p class="hint">Of frequent tokens, the ${CLT.count(CLT.site.search.limit)} best features each are listed.</p>`}
      </div>
    `;
  }

  function gridColumns(columns, vocabulary, features) {
    const shown = [
      { name: "number", title: "Feature", hint: "layer / feature", sortable: true, cell: (i) => html`<a tabindex="-1" href=${CLT.toFeature(...CLT.place(i))}>${CLT.nameOf(...CLT.place(i))}</a>` },
      { name: "word", title: "Strongest token", hint: "the token of its strongest example", cell: (i) => html`<${CLT.Word} vocabulary=${vocabulary} word=${columns.word ? columns.word[i] : -1} />` },
      { name: "label", title: "Label", cell: (i) => html`<bdi>${CLT.labels.get(...CLT.place(i)).label}</bdi>` },
      { name: "density", title: "Density", hint: "share of tokens at which it is active", sortable: true, figure: true, cell: (i) => (columns.density[i] ? CLT.percent(columns.density[i]) : "dead") },
      { name: "maximum", title: "Maximum", hint: "its highest value", sortable: true, figure: true, cell: (i) => CLT.number(columns.maximum[i]) },
    ];
    if (columns.norm) shown.push({ name: "norm", title: "Norm", hint: "of all its decoder rows together", sortable: true, figure: true, cell: (i) => CLT.number(columns.norm[i]) });
    if (columns.threshold) shown.push({ name: "threshold", title: "Threshold", sortable: true, figure: true, cell: (i) => CLT.number(columns.threshold[i]) });
    if (columns.similar_cosine) shown.push({ name: "similar_cosine", title: "Nearest", hint: "highest cosine of its decoder with another feature’s", sortable: true, figure: true, cell: (i) => CLT.number(columns.similar_cosine[i]) });
    if (features) shown.push({ name: "found", title: "Rank", hint: "its place in the index of this token, the best first", sortable: true, figure: true, cell: (i) => (features.has(i) ? CLT.count(features.get(i) + 1) : "–") });
    return shown;
  }
})(window.CLT);
