"use strict";

/* Features that are near another one: similar, active together, before it and after it. */
(function (CLT) {
  const { html } = CLT;

  /** A list of features with a number each. `columns` gives the word of a feature's strongest example once it is loaded. */
  CLT.Related = function ({ title, hint, numbers, values, vocabulary }) {
    const shown = numbers ? [...numbers.keys()].filter((i) => numbers[i] >= 0) : [];
    const largest = Math.max(...shown.map((i) => Math.abs(values[i])), 1e-30);
    const layers = [...new Set(shown.map((i) => CLT.place(numbers[i])[0]))];
    const words = CLT.useLoad(() => wordsOf(layers), [numbers]);
    if (!numbers) return null;
    return html`
      <section class="related">
        <h3>${title}</h3>
        <p class="hint">${hint}</p>
        ${shown.length === 0 ? html`<p class="empty">None.</p>` : html`
          <table class="bars up">
            <caption class="unseen">${title}</caption>
            <thead class="unseen"><tr><th scope="col">Feature</th><th scope="col">Strongest token</th><th scope="col">Value</th></tr></thead>
            <tbody>
              ${shown.map((i) => {
                const [layer, feature] = CLT.place(numbers[i]);
                const word = words.value && words.value.has(layer) ? words.value.get(layer)[feature] : -1;
                return html`
                  <tr>
                    <th scope="row"><${CLT.FeatureLink} layer=${layer} feature=${feature} /></th>
                    <td class="strongest">${word >= 0 ? html`<${CLT.Word} vocabulary=${vocabulary} word=${word} />` : ""}</td>
                    <td class="figure">${CLT.number(values[i])}</td>
                    <td class=${values[i] < 0 ? "bar minus" : "bar"} aria-hidden="true"><span style=${{ "--share": (Math.abs(values[i]) / largest).toFixed(3) }}></span></td>
                  </tr>
                `;
              })}
            </tbody>
          </table>
          ${words.error && html`<${CLT.Failure} error=${words.error} retry=${words.retry} />`}
        `}
      </section>
    `;
  };

  async function wordsOf(layers) {
    const words = new Map();
    for (const layer of layers) {
      const columns = await CLT.columns(layer);
      if (columns.word) words.set(layer, columns.word);
    }
    return words;
  }
})(window.CLT);
