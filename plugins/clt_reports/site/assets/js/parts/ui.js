"use strict";

/* What all pages share: components from preact, waiting for data, failures that are shown, tables. */
(function (CLT) {
  const { h, Component } = window.preact;
  const { useEffect, useState, useCallback } = window.preactHooks;

  /** Templates: html`<p>${text}</p>`. A value becomes a text node or an attribute, never markup. */
  const html = window.htm.bind(h);
  CLT.html = html;

  /** {value} once `load()` has given it, {error} if it failed, else neither; `retry()` asks again. */
  CLT.useLoad = function (load, inputs) {
    const [state, setState] = useState({});
    const [attempt, setAttempt] = useState(0);
    useEffect(() => {
      let current = true;
      setState((old) => (old.value === undefined && !old.error ? old : {}));
      load().then(
        (value) => current && setState({ value }),
        (error) => current && setState({ error }),
      );
      return () => {
        current = false;
      };
    }, [...inputs, attempt]);
    return { ...state, retry: useCallback(() => setAttempt((n) => n + 1), []) };
  };

  /** What could not be shown, and why. */
  CLT.Failure = ({ error, retry }) => html`
    <div class="failure" role="alert">
      <p><strong>This part cannot be shown.</strong> ${error.message}</p>
      ${retry && html`<button type="button" onClick=${retry}>Try again</button>`}
    </div>
  `;

  /** Shows the loaded value by its only child, a function; else that it is loading, or why it failed. */
  CLT.Loaded = function ({ state, what, children }) {
    if (state.error) return html`<${CLT.Failure} error=${state.error} retry=${state.retry} />`;
    if (state.value === undefined) return html`<p class="loading" role="status">Loading ${what} …</p>`;
    return children(state.value);
  };

  /** A fault of a page is shown in its place: the rest of the site goes on. */
  CLT.Guard = class extends Component {
    constructor() {
      super();
      this.state = { error: null };
    }

    static getDerivedStateFromError(error) {
      return { error };
    }

    componentDidCatch(error) {
      console.error(error);
    }

    render({ children }, { error }) {
      return error ? html`<${CLT.Failure} error=${error} />` : children;
    }
  };

  /** Renders anew after each change of the settings (theme). Returns how often. */
  CLT.useSettings = function () {
    const [count, setCount] = useState(0);
    useEffect(() => CLT.onSettings(() => setCount((n) => n + 1)), []);
    return count;
  };

  /** Renders anew after each change of a label. Returns how often. */
  CLT.useLabels = function () {
    const [count, setCount] = useState(0);
    useEffect(() => CLT.labels.onChange(() => setCount((n) => n + 1)), []);
    return count;
  };

  /** Shortcuts while a component is on the page. */
  CLT.useKeys = function (handlers, inputs) {
    useEffect(() => CLT.takeKeys(handlers), inputs);
  };

  /**
   * A table: `head` is a list of column titles, `rows` a list of lists. The first cell of a row is its heading; other cells
   * are numbers, set to the right, unless `texts` holds their column.
   */
  CLT.Table = ({ caption, head, rows, texts = [] }) => html`
    <div class="scroll" tabindex="0" role="region" aria-label=${caption}>
      <table>
        <caption>${caption}</caption>
        <thead>
          <tr>${head.map((title, i) => html`<th scope="col" class=${i && !texts.includes(i) ? "figure" : ""}>${title}</th>`)}</tr>
        </thead>
        <tbody>
          ${rows.map((cells) => html`
            <tr>
              ${cells.map((cell, i) => i === 0
                ? html`<th scope="row">${cell}</th>`
                : html`<td class=${texts.includes(i) ? "" : "figure"}>${cell}</td>`)}
            </tr>
          `)}
        </tbody>
      </table>
    </div>
  `;

  /** Pairs of a name and a value; those without a value are left out. */
  CLT.Facts = ({ pairs, wide = false }) => html`
    <dl class=${wide ? "facts wide" : "facts"}>
      ${pairs.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => html`
        <div><dt>${name}</dt><dd>${value}</dd></div>
      `)}
    </dl>
  `;

  /** A link to a feature, with its label where it has one. */
  CLT.FeatureLink = function ({ layer, feature, labelled = true }) {
    const { label } = CLT.labels.get(layer, feature);
    return html`<a class="feature" href=${CLT.toFeature(layer, feature)}>${CLT.nameOf(layer, feature)}${labelled && label && html`<bdi class="label"> ${label}</bdi>`}</a>`;
  };
})(window.CLT);
