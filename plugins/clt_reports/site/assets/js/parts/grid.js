"use strict";

/*
 * A list of any length of which only the rows in view exist. One place takes the focus; arrow keys move the row that is
 * active, and the browser's limit on the height of an element (some 17 million pixels) is kept by scaling the scroll.
 */
(function (CLT) {
  const { html } = CLT;
  const { useEffect, useLayoutEffect, useRef, useState } = window.preactHooks;

  const ROW = 34; // pixels, as in list.css
  const TALLEST = 12e6;
  const MORE = 6; // rows beyond those in view

  /**
   * columns: [{name, title, sortable, figure, cell(number)}]; numbers: the features in order; sort, down, onSort(name);
   * open(number) is called for Enter and a click; `active` is the row that begins as active.
   */
  CLT.Grid = function ({ label, columns, numbers, sort, down, onSort, open, active: begin = 0, onActive }) {
    const box = useRef(null);
    const [top, setTop] = useState(0);
    const [height, setHeight] = useState(600);
    const [active, setActive] = useState(Math.min(begin, Math.max(0, numbers.length - 1)));
    const inner = Math.min(numbers.length * ROW, TALLEST);
    const most = Math.max(0, numbers.length * ROW - height); // of the scroll, in pixels of the rows
    const scrollable = Math.max(0, inner - height); // of the scroll, in pixels of the element
    const scale = scrollable ? most / scrollable : 1;
    const offset = Math.min(most, top * scale); // where the view begins, in pixels of the rows
    const first = Math.max(0, Math.floor(offset / ROW) - MORE);
    const last = Math.min(numbers.length, Math.ceil((offset + height) / ROW) + MORE);

    useLayoutEffect(() => {
      const measure = () => setHeight(box.current.clientHeight - ROW);
      measure();
      const observer = new ResizeObserver(measure);
      observer.observe(box.current);
      return () => observer.disconnect();
    }, []);

    // Another list begins at its top, but for the row that the page asks for.
    useEffect(() => {
      const start = Math.min(begin, Math.max(0, numbers.length - 1));
      setActive(start);
      reveal(start, true);
    }, [numbers]);

    function reveal(row, middle) {
      const from = row * ROW;
      const view = box.current.clientHeight - ROW;
      const now = box.current.scrollTop * scale;
      let to = now;
      if (middle) to = from < view - ROW ? 0 : from - view / 2;
      else if (from < now) to = from;
      else if (from + ROW > now + view) to = from + ROW - view;
      box.current.scrollTop = to / scale;
    }

    const moveTo = (row) => {
      const next = Math.max(0, Math.min(numbers.length - 1, row));
      setActive(next);
      if (onActive) onActive(next);
      reveal(next, false);
    };
    const keys = (event) => {
      if (event.target.closest("button")) return;
      const page = Math.max(1, Math.floor(height / ROW) - 1);
      const to = { ArrowDown: active + 1, ArrowUp: active - 1, PageDown: active + page, PageUp: active - page, Home: 0, End: numbers.length - 1 }[event.key];
      if (to !== undefined) moveTo(to);
      else if (event.key === "Enter" && numbers.length) open(numbers[active], active);
      else return;
      event.preventDefault();
    };

    const rows = [];
    for (let row = first; row < last; row++) rows.push(row);
    return html`
      <div class="grid" role="grid" aria-label=${label} aria-rowcount=${numbers.length + 1} aria-colcount=${columns.length} tabindex="0"
        aria-activedescendant=${numbers.length ? `row-${active}` : undefined} ref=${box} onScroll=${(event) => setTop(event.target.scrollTop)} onKeyDown=${keys}>
        <div class="gridhead" role="row" aria-rowindex="1">
          ${columns.map(({ name, title, hint, sortable, figure }) => html`
            <div role="columnheader" class=${`c-${name}${figure ? " figure" : ""}`} aria-sort=${sort !== name ? undefined : down ? "descending" : "ascending"}>
              ${sortable
                ? html`<button type="button" title=${hint} onClick=${() => onSort(name)}>${title}<span class="arrow" aria-hidden="true">${sort === name ? (down ? "▾" : "▴") : ""}</span></button>`
                : html`<span title=${hint}>${title}</span>`}
            </div>
          `)}
        </div>
        <div class="gridbody" role="rowgroup" style=${{ height: `${inner}px` }}>
          ${rows.map((row) => html`
            <div key=${row} id=${`row-${row}`} role="row" aria-rowindex=${row + 2} aria-selected=${row === active} class="gridrow"
              style=${{ transform: `translateY(${Math.round(row * ROW - offset + Math.min(top, scrollable))}px)` }}
              onClick=${(event) => event.target.closest("a") || (moveTo(row), open(numbers[row], row))}>
              ${columns.map(({ name, figure, cell }) => html`<div role="gridcell" class=${`c-${name}${figure ? " figure" : ""}`}>${cell(numbers[row], row)}</div>`)}
            </div>
          `)}
        </div>
      </div>
    `;
  };
})(window.CLT);
