"use strict";

/* Contexts of a feature: its example with the tokens around it, shaded by the feature's value. */
(function (CLT) {
  const { html } = CLT;
  const { useState, useMemo, useRef } = window.preactHooks;

  /**
   * The tokens of a context that are shown. `slot` is {file, row, window}. Returns {words, first, values, positions}: `first`
   * is the row of the first word; a value is NaN outside of the stored window.
   */
  function span({ file, row, window }, whole) {
    const width = CLT.site.examples.window;
    const at = row - file.first;
    const same = (i) => i >= 0 && i < file.word.length && file.context[i] === file.context[at];
    let from = at;
    let to = at + 1;
    while (same(from - 1) && (whole || at - from < width)) from--;
    while (same(to) && (whole || to - at <= width)) to++;
    const values = Float32Array.from({ length: to - from }, (_, i) => {
      const offset = from + i - at;
      return Math.abs(offset) > width ? NaN : window.get(offset) || 0;
    });
    return { words: file.word.subarray(from, to), first: file.first + from, values, positions: file.position.subarray(from, to) };
  }

  /** The highest value among the tokens of a piece; NaN where none is known. */
  function highest(values, { from, to }) {
    let top = NaN;
    for (let i = from; i < to; i++) if (!(values[i] <= top)) top = values[i];
    return top;
  }

  function describe(shown, piece) {
    const lines = [];
    for (let i = piece.from; i < piece.to; i++) {
      const value = shown.values[i];
      const text = Number.isNaN(value) ? "value outside of the stored window" : value === 0 ? "not active" : `value ${CLT.exact(value)}`;
      lines.push(piece.to - piece.from > 1 ? `part ${i - piece.from + 1} of ${piece.to - piece.from}: ${text}` : text);
    }
    lines.push(`position ${CLT.count(shown.positions[piece.from])}, row ${CLT.count(shown.first + piece.from)} of the text`);
    return lines;
  }

  function Context({ slot, maximum, vocabulary }) {
    const [whole, setWhole] = useState(false);
    const box = useRef(null);
    const shown = useMemo(() => span(slot, whole), [slot, whole]);
    const pieces = useMemo(() => CLT.pieces(vocabulary, shown.words), [shown]);
    const peak = pieces.findIndex(({ from, to }) => slot.row - shown.first >= from && slot.row - shown.first < to);
    const pieceOf = (target) => {
      const token = target.closest("[data-piece]");
      return token && [token, pieces[Number(token.dataset.piece)]];
    };
    const show = (event) => {
      const found = pieceOf(event.target);
      if (found) CLT.showTip(found[0], describe(shown, found[1]));
    };
    const toggle = () => {
      CLT.hideTipNow();
      setWhole(!whole);
    };
    // A finger cannot hover: a tap shows the value, and the button the whole.
    const click = (event) => (event.pointerType === "touch" ? show(event) : toggle());
    const move = (event) => {
      const tokens = [...box.current.children].filter((child) => child.dataset.piece);
      const at = tokens.indexOf(event.target);
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Enter") toggle();
      else if (step) (tokens[at + step * (box.current.dir === "rtl" ? -1 : 1)] || event.target).focus();
      else if (event.key === "Home") tokens[0].focus();
      else if (event.key === "End") tokens.at(-1).focus();
      else return;
      event.preventDefault();
    };
    return html`
      <li class=${whole ? "context whole" : "context"}>
        <div class="value">${CLT.number(slot.value)}</div>
        <p ref=${box} class="tokens" dir=${CLT.direction(pieces)} onClick=${click} onPointerOver=${show} onPointerOut=${CLT.hideTip} onFocusIn=${show} onFocusOut=${CLT.hideTip} onKeyDown=${move}>
          ${pieces.map((piece, i) => {
            const value = highest(shown.values, piece);
            const share = value > 0 && maximum > 0 ? Math.min(1, value / maximum) : 0;
            return html`<bdi
              class=${`token${share ? " on" : ""}${i === peak ? " peak" : ""}`}
              data-piece=${i}
              tabindex=${i === peak ? 0 : -1}
              style=${share ? { "--share": share.toFixed(3) } : undefined}
            ><${CLT.Text} bytes=${piece.bytes} lines=${whole} limit=${whole ? null : undefined} /></bdi>`;
          })}
        </p>
        <button type="button" class="quiet" aria-expanded=${whole} onClick=${toggle}>${whole ? "Less" : "Whole context"}</button>
      </li>
    `;
  }

  /** Contexts of rows with their values. A file of text that fails is told; the others show. */
  CLT.Contexts = function ({ rows, values, windows, maximum, vocabulary }) {
    const state = CLT.useLoad(() => gather(rows, values, windows), [rows]);
    return html`
      <${CLT.Loaded} state=${state} what="contexts">
        ${({ slots, failures }) => html`
          ${failures.map((error) => html`<${CLT.Failure} error=${error} retry=${state.retry} />`)}
          <ol class="contexts">
            ${slots.map((slot) => html`<${Context} key=${slot.row} slot=${slot} maximum=${maximum} vocabulary=${vocabulary} />`)}
          </ol>
        `}
      <//>
    `;
  };

  async function gather(rows, values, windows) {
    const used = [...rows.keys()].filter((i) => rows[i] >= 0);
    const files = await Promise.allSettled(used.map((i) => CLT.textAt(rows[i])));
    const failures = new Map();
    const slots = [];
    files.forEach(({ value: file, reason }, at) => {
      const i = used[at];
      if (reason) failures.set(reason.message, reason);
      else slots.push({ file, row: rows[i], value: values[i], window: windows[i] });
    });
    return { slots, failures: [...failures.values()] };
  }
})(window.CLT);
