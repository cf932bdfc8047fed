"use strict";

/* The label and the note of a feature, and the export and import of all of them. */
(function (CLT) {
  const { html } = CLT;
  const { useState } = window.preactHooks;

  CLT.LabelForm = function ({ layer, feature }) {
    CLT.useLabels();
    const [fault, setFault] = useState("");
    const { label, note } = CLT.labels.get(layer, feature);
    const keep = (newLabel, newNote) => {
      try {
        CLT.labels.set(layer, feature, newLabel, newNote);
        setFault("");
      } catch (error) {
        setFault(error.message);
      }
    };
    return html`
      <form class="labelform" onSubmit=${(event) => event.preventDefault()}>
        <label>Label<input id="label" type="text" dir="auto" autocomplete="off" maxlength="500" value=${label} onInput=${(event) => keep(event.target.value, note)} /></label>
        <label>Note<textarea dir="auto" rows="2" maxlength="20000" value=${note} onInput=${(event) => keep(label, event.target.value)}></textarea></label>
        <p class="hint">Kept in this browser only. Export labels on the page of all features.</p>
        ${fault && html`<p class="failure" role="alert">${fault}</p>`}
      </form>
    `;
  };

  CLT.LabelFiles = function () {
    CLT.useLabels();
    const [message, setMessage] = useState("");
    const count = CLT.labels.count();
    const save = () => {
      const address = URL.createObjectURL(new Blob([CLT.labels.exported()], { type: "application/json" }));
      const link = document.createElement("a");
      link.href = address;
      link.download = "labels.json";
      link.click();
      setTimeout(() => URL.revokeObjectURL(address), 10000);
      setMessage(`${count} written to labels.json.`);
    };
    const read = async (event) => {
      const [file] = event.target.files;
      if (!file) return;
      try {
        setMessage(`${CLT.labels.importText(await file.text())} imported.`);
      } catch (error) {
        setMessage(error.message);
      }
      event.target.value = "";
    };
    return html`
      <div class="labelfiles">
        <span>${CLT.count(count)} ${count === 1 ? "label" : "labels"} in this browser</span>
        <button type="button" onClick=${save} disabled=${count === 0}>Export</button>
        <label class="button">Import<input type="file" accept="application/json,.json" onChange=${read} /></label>
        <span role="status">${message}</span>
      </div>
    `;
  };
})(window.CLT);
