"use strict";

/* Curves and histograms by uPlot, in the theme's colours. The values under the cursor are text; arrow keys move it. */
(function (CLT) {
  const { html } = CLT;
  const { useEffect, useRef, useState } = window.preactHooks;

  const COLOURS = ["line-1", "line-2", "line-3", "line-4", "line-5", "line-6", "line-7"];
  const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];

  /** Colour and dash of a series: dashes tell series apart where colours do not. */
  const styleOf = (i) => ({ colour: COLOURS[i % COLOURS.length], dash: DASHES[Math.floor(i / COLOURS.length + i) % DASHES.length] });

  /**
   * A chart. x: numbers; series: [{name, values, bars}]; title; xName, yName; xText and yText: numbers to text; xTick: the same for the axis; xSplits: places of ticks; logY: counts on a logarithmic axis that begins at 0; marks: [{x, name}], vertical lines.
   */
  CLT.Chart = function ({ title, x, series, xName, yName, xText = CLT.number, xTick = xText, yText = CLT.number, xSplits, logY, marks = [], height = 200, pointText }) {
    const theme = CLT.useSettings();
    const box = useRef(null);
    const plot = useRef(null);
    const [at, setAt] = useState(null);

    useEffect(() => {
      const colour = (name) => CLT.colour(name);
      const axis = { stroke: colour("muted"), grid: { stroke: colour("rule"), width: 1 }, ticks: { stroke: colour("rule"), width: 1, size: 4 }, font: "12px system-ui, sans-serif" };
      const up = (value) => (value === null || value === undefined || !Number.isFinite(value) ? null : logY ? Math.log10(1 + value) : value);
      const data = [Array.from(x), ...series.map(({ values }) => Array.from(values, up))];
      const options = {
        width: Math.max(200, box.current.clientWidth),
        height,
        legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
        scales: { x: { time: false, range: series.some((one) => one.bars) ? padded : undefined }, y: { range: (u, low, high) => range(low, high, logY || series.some((one) => one.bars)) } },
        axes: [
          { ...axis, size: 28, values: (u, splits) => splits.map((split) => xTick(split)), ...(xSplits ? { splits: () => xSplits } : {}) },
          { ...axis, size: 58, ...(logY ? { splits: logSplits, values: (u, splits) => splits.map((split) => CLT.count(Math.round(10 ** split - 1))) } : { values: (u, splits) => splits.map((split) => CLT.tick(split)) }) },
        ],
        series: [{}, ...series.map((one, i) => ({
          label: one.name,
          stroke: colour(styleOf(i).colour),
          width: one.bars ? 0 : 1.75,
          dash: one.bars ? [] : styleOf(i).dash,
          fill: one.bars ? colour(styleOf(i).colour) : undefined,
          points: { show: !one.bars && x.length < 40, size: 5 },
          ...(one.bars ? { paths: window.uPlot.paths.bars({ size: [0.92, 100], align: 0 }) } : {}),
        }))],
        hooks: {
          setCursor: [(u) => setAt(u.cursor.idx ?? null)],
          draw: [(u) => marks.forEach((mark) => drawMark(u, mark, colour("mark")))],
        },
      };
      plot.current = new window.uPlot(options, data, box.current);
      // The canvas is described by the figure around it.
      box.current.firstChild.setAttribute("aria-hidden", "true");
      const observer = new ResizeObserver(() => {
        const width = Math.max(200, box.current.clientWidth);
        if (plot.current.width !== width) plot.current.setSize({ width, height });
      });
      observer.observe(box.current);
      return () => {
        observer.disconnect();
        plot.current.destroy();
      };
    }, [x, series, theme]);

    const step = (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (!move) return;
      event.preventDefault();
      const next = Math.max(0, Math.min(x.length - 1, at === null ? (move < 0 ? x.length - 1 : 0) : at + move));
      plot.current.setCursor({ left: plot.current.valToPos(x[next], "x"), top: 0 });
      setAt(next);
    };
    const many = series.length > 1;
    return html`
      <figure class="chart" role="group" aria-label=${title}>
        <figcaption>
          <span class="title">${title}</span>
          ${many && html`<span class="legend">${series.map((one, i) => html`<span><${Key} ...${styleOf(i)} />${one.name}</span>`)}</span>`}
          ${marks.map((mark) => html`<span class="legend"><span><span class="markkey" aria-hidden="true"></span>${mark.name}</span></span>`)}
        </figcaption>
        <div class="plot" ref=${box} tabindex="0" role="img" aria-label=${`${title}. ${yName || ""} by ${xName}. Arrow keys read the values.`} onKeyDown=${step}></div>
        <p class="readout" aria-live="polite">
          ${at === null
            ? html`<span class="axisname">${yName ? `${yName} by ${xName}` : xName}</span>`
            : html`${pointText ? pointText(at) : `${xName} ${xText(x[at])}`}: ${series.map((one, i) => `${i ? ", " : ""}${many ? `${one.name} ` : ""}${yText(one.values[at])}`)}`}
        </p>
      </figure>
    `;
  };

  const Key = ({ colour, dash }) => html`
    <svg class="key" width="22" height="8" aria-hidden="true"><line x1="0" y1="4" x2="22" y2="4" style=${{ stroke: `var(--${colour})`, strokeWidth: 2.5, strokeDasharray: dash.join(" ") }} /></svg>
  `;

  /** Half a bar more on each side. */
  function padded(u, low, high) {
    const half = u.data[0].length > 1 ? (u.data[0][1] - u.data[0][0]) / 2 : 0.5;
    return [low - half, high + half];
  }

  function range(low, high, fromZero) {
    if (low === null || high === null) return [0, 1];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [fromZero || (low >= 0 && low < 0.5 * high) ? 0 : low - room, high + room];
  }

  function logSplits(u, axis, low, high) {
    const splits = [0];
    for (let power = 0; Math.log10(1 + 10 ** power) <= high; power++) splits.push(Math.log10(1 + 10 ** power));
    const every = Math.ceil(splits.length / 6);
    return splits.filter((_, i) => i === 0 || (i - 1) % every === 0);
  }

  function drawMark(u, mark, colour) {
    const x = Math.round(u.valToPos(mark.x, "x", true));
    if (!(x >= u.bbox.left && x <= u.bbox.left + u.bbox.width)) return;
    const { ctx } = u;
    ctx.save();
    ctx.strokeStyle = colour;
    ctx.lineWidth = 2 * devicePixelRatio;
    ctx.setLineDash([5 * devicePixelRatio, 3 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(x, u.bbox.top);
    ctx.lineTo(x, u.bbox.top + u.bbox.height);
    ctx.stroke();
    ctx.restore();
  }

  /**
   * A histogram with logarithmic edges: bars by log10 of the value, counts on a logarithmic axis too. Bins outside of the
   * first and the last that are not empty are left out.
   */
  CLT.LogHistogram = function ({ title, edges, counts, marks, xName, yName, height }) {
    let first = counts.findIndex((count) => count > 0);
    let last = counts.length - 1;
    if (first < 0) return html`<p class="empty">${title}: nothing to count.</p>`;
    while (!counts[last]) last--;
    for (const mark of marks || []) {
      const bin = CLT.after(edges, mark.x) - 1;
      if (bin >= 0 && bin < counts.length) [first, last] = [Math.min(first, bin), Math.max(last, bin)];
    }
    const log = (value) => Math.log10(value);
    const bins = Array.from({ length: last - first + 1 }, (_, i) => first + i);
    const center = bins.map((bin) => (log(edges[bin]) + log(edges[bin + 1])) / 2);
    const values = bins.map((bin) => counts[bin]);
    return html`<${HistogramPlot} key=${`${first} ${last} ${values.join(" ")}`} title=${title} x=${center} values=${values} edges=${bins.map((bin) => [edges[bin], edges[bin + 1]])} marks=${(marks || []).map((mark) => ({ ...mark, x: log(mark.x) }))} xName=${xName} yName=${yName} height=${height} />`;
  };

  function HistogramPlot({ title, x, values, edges, marks, xName, yName, height }) {
    const [data] = useState({ x, series: [{ name: yName, values, bars: true }] }); // the same arrays at each render
    return html`
      <${CLT.Chart} title=${title} x=${data.x} series=${data.series} xName=${xName} yName=${yName} logY marks=${marks} height=${height}
        xTick=${(power) => CLT.tick(Number((10 ** power).toPrecision(2)))} yText=${CLT.count} pointText=${(i) => `${xName} ${CLT.number(edges[i][0])} to ${CLT.number(edges[i][1])}`} />
    `;
  }
})(window.CLT);
