"use strict";

/* The run: what it is, how it was trained, how good it is, and its features in numbers. */
(function (CLT) {
  const { html } = CLT;
  const { useMemo, useState } = window.preactHooks;

  CLT.RunPage = function () {
    const { site } = CLT;
    const run = site.run || {};
    const evaluation = run.evaluation || lastOfTraining(run);
    return html`
      <h1 tabindex="-1"><bdi>${site.title}</bdi></h1>
      <p class="lead">
        A cross-layer transcoder with ${CLT.count(site.n_layers)} layers of ${CLT.count(site.n_features)} features, seen on${" "}
        ${CLT.count(site.tokens)} tokens of ${{ held_out: "held-out text", training: "training text" }[site.examples.text] || "text"}.${" "}
        <a href="#/features">Browse its features</a>
      </p>
      <${Tiles} evaluation=${evaluation} circuits=${run.circuits} />
      <${Notes} title="Missing here" notes=${run.notes} />
      <${Facts} run=${run} />
      ${evaluation && evaluation.model && html`<${InModel} inModel=${evaluation.model} />`}
      <${Layers} evaluation=${evaluation} />
      <${Curves} curves=${run.curves || {}} byLayer=${run.curves_by_layer || {}} />
      <${Densities} />
      <${Thresholds} />
      <${Recipe} run=${run} />
    `;
  };

  /** What the last evaluation during training said of held-out tokens, where none was made after it. */
  function lastOfTraining(run) {
    const last = (curve) => (curve ? curve.value.at(-1) : null);
    const [curves, byLayer] = [run.curves || {}, run.curves_by_layer || {}];
    if (!curves["eval/nmse"]) return null;
    const names = ["nmse", "l0", "explained_variance"];
    const layers = names.map((name) => [name, last(byLayer[`eval/${name}_by_layer`])]).filter(([, values]) => values);
    return { nmse: last(curves["eval/nmse"]), l0: last(curves["eval/l0"]), by_layer: Object.fromEntries(layers) };
  }

  function Tiles({ evaluation, circuits }) {
    const { layers, n_features } = CLT.site;
    const dead = layers.reduce((sum, layer) => sum + layer.dead, 0) / (layers.length * n_features);
    const dense = layers.reduce((sum, layer) => sum + layer.dense, 0);
    const inModel = (evaluation && evaluation.model) || {};
    const tiles = [
      ["NMSE", evaluation && CLT.number(evaluation.nmse), "squared error over variance, mean of the layers; 0 is exact"],
      ["L0", CLT.number(evaluation && evaluation.l0 !== null ? evaluation.l0 : layers.reduce((sum, layer) => sum + layer.l0, 0)), "active features per token, all layers together"],
      ["CE recovered", evaluation && evaluation.model && CLT.percent(inModel.ce_recovered), "of the cross-entropy lost by zero-ablation of the MLPs"],
      ["KL", inModel.kl && CLT.number(inModel.kl.transcoder), "nats per token, from the unchanged model’s predictions"],
      ["Replacement", circuits && CLT.number(circuits.replacement), `of the influence on predictions comes through features, mean of ${circuits && circuits.graphs.length} prompts`],
      ["Completeness", circuits && CLT.number(circuits.completeness), "of what nodes read comes from features and tokens, by influence"],
      ["Dead", CLT.percent(dead), "of the features were active at no token read here"],
      ["Over-dense", CLT.count(dense), `features active at more than ${CLT.percent(CLT.site.dense_above)} of the tokens`],
    ];
    return html`
      <dl class="tiles">
        ${tiles.filter(([, value]) => value).map(([name, value, hint]) => html`<div><dt>${name}</dt><dd>${value}</dd><dd class="hint">${hint}</dd></div>`)}
      </dl>
    `;
  }

  const Notes = ({ title, notes }) => notes && notes.length > 0 && html`
    <section class="notes" aria-label=${title}><h2>${title}</h2><ul>${notes.map((note) => html`<li><bdi>${note}</bdi></li>`)}</ul></section>
  `;

  /** A setting as text. */
  const text = (value) => (value === null || value === undefined ? null : typeof value === "object" ? JSON.stringify(value) : String(value));

  const table = (name, settings) => settings && [name, Object.entries(settings).filter(([, value]) => value !== "").map(([key, value]) => `${key} = ${text(value)}`).join(", ")];

  function Facts({ run }) {
    const { site } = CLT;
    const transcoder = run.transcoder || {};
    const versions = run.versions || {};
    return html`
      <section>
        <h2>What it is</h2>
        <${CLT.Facts} wide pairs=${[
          ["Run", run.name],
          table("Language model", run.model || site.language_model) || ["", null],
          ["Activation", site.activation],
          table("Data", run.source) || ["", null],
          ["Trained for", transcoder.step && `${CLT.count(transcoder.step)} steps${transcoder.tokens ? `, ${CLT.count(transcoder.tokens)} tokens` : ""}`],
          ["Converted from", text(transcoder.converted_from)],
          ["Width of activations", CLT.count(site.d_model)],
          ["Text read here", `${CLT.count(site.tokens)} tokens, ${CLT.count(site.contexts)} contexts`],
          ["SHA-256", transcoder.sha256 && html`<code class="long">${transcoder.sha256}</code>`],
          ["Versions", versions.clt_plugins && `clt-plugins ${versions.clt_plugins}, Python ${versions.python}`],
        ]} />
      </section>
    `;
  }

  const VARIANTS = [["model", "the MLPs (unchanged model)"], ["transcoder", "the transcoder"], ["mean", "their mean outputs (mean-ablation)"], ["zero", "zeros (zero-ablation)"], ["with_errors", "the transcoder plus its errors"]];

  function InModel({ inModel }) {
    const variants = VARIANTS.filter(([name]) => inModel.cross_entropy && inModel.cross_entropy[name] !== undefined);
    return html`
      <section>
        <h2>Inside the language model</h2>
        <p class="hint">In the place of all MLPs at once, on ${CLT.count(inModel.tokens)} held-out positions. The transcoder plus its errors must be as good as the unchanged model: it tests the measurement.</p>
        ${inModel.ce_recovered !== null && inModel.ce_recovered !== undefined && html`<${Scale} inModel=${inModel} />`}
        <${CLT.Table} caption="Predictions of the next token" head=${["MLPs replaced by", "Cross-entropy (nats)", "KL (nats)", "Same likeliest token"]}
          rows=${variants.map(([name, title]) => [title, CLT.number(inModel.cross_entropy[name], 4), inModel.kl ? CLT.number(inModel.kl[name]) : "–", inModel.top1 ? CLT.percent(inModel.top1[name]) : "–"])} />
      </section>
    `;
  }

  /** Where the transcoder stands between the unchanged model and ablation, by cross-entropy. */
  function Scale({ inModel }) {
    const { model, transcoder, mean, zero } = inModel.cross_entropy;
    const marks = [["Model", model], ["Transcoder", transcoder], ["Mean", mean], ["Zero", zero]].filter(([, value]) => Number.isFinite(value));
    const low = Math.min(...marks.map(([, value]) => value));
    const high = Math.max(...marks.map(([, value]) => value));
    return html`
      <div class="scale" role="img" aria-label=${`Cross-entropy: ${marks.map(([name, value]) => `${name} ${CLT.number(value)}`).join(", ")}`}>
        ${marks.map(([name, value], i) => html`
          <span class=${`m${i % 2} ${name.toLowerCase()}`} style=${{ "--at": ((value - low) / (high - low || 1)).toFixed(4) }}><span class="tick"></span><span>${name} ${CLT.number(value)}</span></span>
        `)}
      </div>
    `;
  }

  function Layers({ evaluation }) {
    const { layers, n_features } = CLT.site;
    const by = (evaluation && evaluation.by_layer) || {};
    const columns = [
      ["NMSE", by.nmse && ((layer, i) => CLT.number(by.nmse[i]))],
      ["L0", (layer, i) => CLT.number(by.l0 ? by.l0[i] : layer.l0)],
      ["Explained variance", by.explained_variance && ((layer, i) => CLT.percent(by.explained_variance[i]))],
      ["Dead features", (layer) => CLT.count(layer.dead)],
      ["Share dead", (layer) => CLT.percent(layer.dead / n_features)],
      ["Over-dense features", (layer) => CLT.count(layer.dense)],
    ].filter(([, cell]) => cell);
    const x = useMemo(() => layers.map((_, i) => i), []);
    const nmse = useMemo(() => by.nmse && [{ name: "NMSE", values: by.nmse, bars: true }], []);
    const l0 = useMemo(() => [{ name: "L0", values: by.l0 || layers.map((layer) => layer.l0), bars: true }], []);
    return html`
      <section>
        <h2>Layers</h2>
        <div class="charts">
          ${nmse && html`<${CLT.Chart} title="NMSE by layer" x=${x} series=${nmse} xName="Layer" yName="NMSE" xText=${String} xSplits=${x} />`}
          <${CLT.Chart} title="L0 by layer" x=${x} series=${l0} xName="Layer" yName="Active features per token" xText=${String} xSplits=${x} />
        </div>
        <${CLT.Table} caption="By layer" head=${["Layer", ...columns.map(([title]) => title)]}
          rows=${layers.map((layer, i) => [html`<a href=${CLT.toList({ layer: i })}>Layer ${i}</a>`, ...columns.map(([, cell]) => cell(layer, i))])} />
      </section>
    `;
  }

  const FIRST = ["eval/nmse", "eval/l0", "loss/total", "train/nmse"];

  /** "NMSE" of "eval/nmse". */
  function Curves({ curves, byLayer }) {
    const names = [...Object.keys(curves), ...Object.keys(byLayer)].sort();
    const start = FIRST.filter((name) => names.includes(name)).slice(0, 4);
    const [shown, setShown] = useState(start.length ? start : names.slice(0, 2));
    if (!names.length) return null;
    const toggle = (name) => setShown(shown.includes(name) ? shown.filter((other) => other !== name) : [...shown, name]);
    const groups = [...new Set(names.map((name) => name.split("/")[0]))];
    return html`
      <section>
        <h2>Training curves</h2>
        <details>
          <summary>Choose curves</summary>
          <div class="chooser">
            ${groups.map((group) => html`
              <fieldset><legend>${group}</legend>
                ${names.filter((name) => name.split("/")[0] === group).map((name) => html`<label><input type="checkbox" checked=${shown.includes(name)} onChange=${() => toggle(name)} />${name.split("/").slice(1).join("/") || name}</label>`)}
              </fieldset>
            `)}
          </div>
        </details>
        <div class="charts">${shown.map((name) => html`<${Curve} key=${name} name=${name} curve=${curves[name] || byLayer[name]} />`)}</div>
      </section>
    `;
  }

  function Curve({ name, curve }) {
    const series = useMemo(() => {
      if (!Array.isArray(curve.value[0])) return [{ name, values: curve.value }];
      return curve.value[0].map((_, layer) => ({ name: `layer ${layer}`, values: curve.value.map((values) => values[layer]) }));
    }, []);
    return html`<${CLT.Chart} title=${name} x=${curve.step} series=${series} xName="Step" xText=${CLT.count} />`;
  }

  function Densities() {
    const { layers, density_edges } = CLT.site;
    if (!density_edges) return null;
    const edges = density_edges.map((power) => 10 ** power);
    return html`
      <section>
        <h2>Density of features</h2>
        <p class="hint">Features by the share of tokens at which they are active; dead ones are not drawn.</p>
        <div class="charts small">
          ${layers.map((layer, i) => html`<${CLT.LogHistogram} title=${`Layer ${i}: ${CLT.count(layer.dead)} dead, ${CLT.count(layer.dense)} over-dense`} edges=${edges} counts=${layer.density} xName="Density" yName="Features" height=${140} />`)}
        </div>
      </section>
    `;
  }

  function Thresholds() {
    const shown = CLT.site.layers.map((layer, i) => [i, layer.threshold]).filter(([, threshold]) => threshold);
    if (!shown.length) return null;
    return html`
      <section>
        <h2>Thresholds</h2>
        <p class="hint">Features by the threshold of their activation.</p>
        <div class="charts small">${shown.map(([i, threshold]) => html`<${Threshold} layer=${i} threshold=${threshold} />`)}</div>
      </section>
    `;
  }

  function Threshold({ layer, threshold: { edges, counts } }) {
    const x = useMemo(() => counts.map((_, i) => (edges[i] + edges[i + 1]) / 2), []);
    const series = useMemo(() => [{ name: "Features", values: counts, bars: true }], []);
    return html`<${CLT.Chart} title=${`Layer ${layer}`} x=${x} series=${series} xName="Threshold" yName="Features" xTick=${CLT.tick} yText=${CLT.count} height=${140} pointText=${(i) => `Threshold ${CLT.number(edges[i])} to ${CLT.number(edges[i + 1])}`} />`;
  }

  function Recipe({ run }) {
    const versions = run.versions || {};
    const listed = (object) => Object.entries(object || {}).map(([name, value]) => [name, text(value)]);
    return html`
      ${run.recipe && html`<section><h2>Recipe</h2><details><summary>The recipe with all its settings</summary><pre class="code" tabindex="0" aria-label="Recipe">${run.recipe}</pre></details></section>`}
      ${versions.libraries && html`
        <section><h2>Versions</h2><details><summary>Libraries and plugins</summary>
          ${versions.command && html`<p>Command: <code>${versions.command.join(" ")}</code></p>`}
          <${CLT.Facts} wide pairs=${[...listed(versions.libraries), ...listed(versions.plugins)]} />
        </details></section>
      `}
      ${run.history && run.history.length > 0 && html`
        <section><h2>Starts</h2><${CLT.Table} caption="Each start of the run" head=${["Time", "From step"]} rows=${run.history.map((start) => [text(start.time) || "–", CLT.count(start.step)])} /></section>
      `}
    `;
  }
})(window.CLT);
