"use strict";

/*
 * Labels and notes that a reader gives to features: kept in the browser, for each transcoder of its own (all pages that are
 * opened from disk share one storage), and exported and imported as JSON.
 */
(function (CLT) {
  const LONGEST = 20000;
  const listeners = new Set();
  let labels = new Map(); // "layer/feature" -> {label, note}

  const key = () => `clt.labels.${CLT.site.id || CLT.site.title}`;

  function read() {
    try {
      return new Map(Object.entries(JSON.parse(window.localStorage.getItem(key()) || "{}")));
    } catch {
      return new Map();
    }
  }

  function changed() {
    for (const listener of listeners) listener();
  }

  CLT.labels = {
    /** Begin; also follow what other tabs of this site write. */
    open() {
      labels = read();
      window.addEventListener("storage", (event) => {
        if (event.key !== key()) return;
        labels = read();
        changed();
      });
    },

    get: (layer, feature) => labels.get(CLT.nameOf(layer, feature)) || { label: "", note: "" },

    count: () => labels.size,

    /** [[layer, feature, label, note]] of all. */
    all: () => [...labels].map(([name, { label, note }]) => [...name.split("/").map(Number), label, note]),

    /** Keep a label. Throws an Error that says so where the browser does not store it. */
    set(layer, feature, label, note) {
      const name = CLT.nameOf(layer, feature);
      if (label || note) labels.set(name, { label, note });
      else labels.delete(name);
      this.keep();
    },

    keep() {
      changed();
      try {
        window.localStorage.setItem(key(), JSON.stringify(Object.fromEntries(labels)));
      } catch (error) {
        throw new Error(`The browser did not store it (${error.name}): export the labels before you close this page.`);
      }
    },

    onChange(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },

    /** All labels as JSON text. */
    exported() {
      const list = this.all().sort((a, b) => a[0] - b[0] || a[1] - b[1]);
      const features = list.map(([layer, feature, label, note]) => ({ layer, feature, label, note }));
      return JSON.stringify({ format: "clt-plugins labels", version: 1, site: CLT.site.id || null, title: CLT.site.title, features }, null, 1);
    },

    /** Add the labels of a JSON text, which win over those here. Returns how many; throws an Error that says what is wrong. */
    importText(text) {
      let file;
      try {
        file = JSON.parse(text);
      } catch {
        throw new Error("The file is not JSON.");
      }
      if (!file || file.format !== "clt-plugins labels" || !Array.isArray(file.features)) {
        throw new Error('The file holds no labels: its "format" is not "clt-plugins labels".');
      }
      const { n_layers, n_features } = CLT.site;
      const within = (number, end) => Number.isInteger(number) && number >= 0 && number < end;
      const short = (value) => typeof value === "string" && value.length <= LONGEST;
      file.features.forEach((entry, at) => {
        const good = entry && within(entry.layer, n_layers) && within(entry.feature, n_features) && short(entry.label) && short(entry.note);
        if (!good) throw new Error(`Entry ${at + 1} is no label of a feature of this transcoder. Nothing was imported.`);
      });
      for (const { layer, feature, label, note } of file.features) labels.set(CLT.nameOf(layer, feature), { label, note });
      this.keep();
      return file.features.length;
    },
  };
})(window.CLT);
