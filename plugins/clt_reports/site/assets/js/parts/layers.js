"use strict";

/* What a feature writes to each layer: logits, norms and cosines by target layer. */
(function (CLT) {
  const { html } = CLT;
  const { useState } = window.preactHooks;

  /** Numbers of the layers that the feature writes to: its own and later ones, or those with a norm. */
  CLT.targetsOf = function (layer, norms) {
    const targets = [];
    for (let target = 0; target < CLT.site.n_layers; target++) if (norms ? norms[target] > 0 : target >= layer) targets.push(target);
    return targets;
  };

  /** Logits raised and lowered by one decoder row, or by all rows together. */
  CLT.Logits = function ({ layer, arrays, vocabulary }) {
    const all = CLT.site.n_layers;
    const [chosen, choose] = useState(all);
    if (!arrays.logits_up_word) return html`<p class="empty">The store holds no logits: it was made without the language model’s unembedding.</p>`;
    const targets = CLT.targetsOf(layer, arrays.norms);
    const nameOf = (target) => (target === all ? "all layers together" : `layer ${target}`);
    return html`
      <div class="choice" role="group" aria-label="Target layer">
        ${[all, ...targets].map((target) => html`
          <button type="button" aria-pressed=${target === chosen} onClick=${() => choose(target)}>${target === all ? "All" : target}</button>
        `)}
      </div>
      <p class="hint">Direct effect on the logits of what the feature writes to ${nameOf(chosen)}.</p>
      <div class="pair">
        ${[["up", "Raised"], ["down", "Lowered"]].map(([name, title]) => html`
          <${LogitList} title=${title} words=${CLT.row(arrays[`logits_${name}_word`], chosen)} values=${CLT.row(arrays[`logits_${name}_value`], chosen)} vocabulary=${vocabulary} kind=${name} />
        `)}
      </div>
    `;
  };

  function LogitList({ title, words, values, vocabulary, kind }) {
    const shown = [...words.keys()].filter((i) => words[i] >= 0);
    const largest = Math.max(...shown.map((i) => Math.abs(values[i])), 1e-30);
    return html`
      <table class=${`bars ${kind}`}>
        <caption>${title}</caption>
        <tbody>
          ${shown.map((i) => html`
            <tr>
              <th scope="row"><${CLT.Word} vocabulary=${vocabulary} word=${words[i]} /></th>
              <td class="figure">${CLT.number(values[i])}</td>
              <td class="bar" aria-hidden="true"><span style=${{ "--share": (Math.abs(values[i]) / largest).toFixed(3) }}></span></td>
            </tr>
          `)}
        </tbody>
      </table>
    `;
  }

  /** Norms by target layer, the cosines with the encoder, and those between decoder rows. */
  CLT.Decoder = function ({ layer, arrays }) {
    if (!arrays.norms) return html`<p class="empty">The store holds nothing of the decoder.</p>`;
    const targets = CLT.targetsOf(layer, arrays.norms);
    const largest = Math.max(...targets.map((target) => arrays.norms[target]), 1e-30);
    return html`
      <table class="bars up">
        <caption>Decoder norm and cosine with the encoder, by target layer</caption>
        <thead><tr><th scope="col">Layer</th><th scope="col" class="figure">Norm</th><td></td><th scope="col" class="figure">Encoder</th></tr></thead>
        <tbody>
          ${targets.map((target) => html`
            <tr>
              <th scope="row">${target}</th>
              <td class="figure">${CLT.number(arrays.norms[target])}</td>
              <td class="bar" aria-hidden="true"><span style=${{ "--share": (arrays.norms[target] / largest).toFixed(3) }}></span></td>
              <td class="figure">${arrays.encoder_cosine ? CLT.number(arrays.encoder_cosine[target], 2) : "–"}</td>
            </tr>
          `)}
        </tbody>
      </table>
      ${arrays.cosines && targets.length > 1 && html`<${Cosines} targets=${targets} cosines=${arrays.cosines} />`}
    `;
  };

  /** A square of cosines: blue above 0, orange below, and the number in each cell. */
  const Cosines = ({ targets, cosines }) => html`
    <div class="scroll" tabindex="0" role="region" aria-label="Cosines between decoder rows">
      <table class="square">
        <caption>Cosines between its decoder rows</caption>
        <thead><tr><td></td>${targets.map((target) => html`<th scope="col">${target}</th>`)}</tr></thead>
        <tbody>
          ${targets.map((row) => html`
            <tr>
              <th scope="row">${row}</th>
              ${targets.map((column) => {
                const value = CLT.row(cosines, row)[column];
                return html`<td class=${value < 0 ? "minus" : "plus"} style=${{ "--share": Math.min(1, Math.abs(value)).toFixed(3) }}>${Number.isNaN(value) ? "–" : value.toFixed(2).replace("-", "−")}</td>`;
              })}
            </tr>
          `)}
        </tbody>
      </table>
    </div>
  `;
})(window.CLT);
