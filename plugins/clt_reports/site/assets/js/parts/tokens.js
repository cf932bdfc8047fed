"use strict";

/* Tokens as elements, and the tip that shows a token's value on hover and on focus. */
(function (CLT) {
  const { html } = CLT;

  /** Bytes as text nodes, with marks for what cannot be seen. */
  CLT.Text = ({ bytes, lines = false, limit }) =>
    CLT.segments(bytes, limit).map((part) =>
      typeof part === "string"
        ? part
        : html`<span class="glyph" title=${part.name}>${part.glyph}</span>${lines && part.line && html`<br />`}`,
    );

  /** One token by itself, in tables: outer spaces are visible. */
  CLT.Word = function ({ vocabulary, word }) {
    if (word < 0) return "–";
    const parts = CLT.segments(CLT.bytesOf(vocabulary, word), 60);
    return html`
      <bdi class="word">${parts.map((part) => (typeof part === "string" ? spaced(part) : html`<span class="glyph" title=${part.name}>${part.glyph}</span>`))}</bdi>
    `;
  };

  function spaced(text) {
    const [, before, middle, after] = text.match(/^( *)(.*?)( *)$/s);
    return html`${before && html`<span class="space">${"␣".repeat(before.length)}</span>`}${middle}${after && html`<span class="space">${"␣".repeat(after.length)}</span>`}`;
  }

  // The tip: one element for the whole page. It stays while the pointer is on it, and Escape takes it away.
  let tip = null;
  let owner = null;
  let timer = null;

  function element() {
    if (tip) return tip;
    tip = document.createElement("div");
    tip.id = "tip";
    tip.setAttribute("role", "tooltip");
    tip.hidden = true;
    tip.addEventListener("pointerenter", () => clearTimeout(timer));
    tip.addEventListener("pointerleave", CLT.hideTip);
    document.body.append(tip);
    window.addEventListener("keydown", (event) => event.key === "Escape" && hide());
    window.addEventListener("scroll", hide, { passive: true });
    return tip;
  }

  function hide() {
    clearTimeout(timer);
    if (owner) owner.removeAttribute("aria-describedby");
    owner = null;
    if (tip) tip.hidden = true;
  }

  /** Show lines of text beside an element. */
  CLT.showTip = function (target, lines) {
    clearTimeout(timer);
    if (owner === target) return;
    hide();
    const box = element();
    box.replaceChildren(
      ...lines.map((line) => {
        const row = document.createElement("div");
        row.textContent = line;
        return row;
      }),
    );
    box.hidden = false;
    owner = target;
    target.setAttribute("aria-describedby", "tip");
    const at = (target.getClientRects()[0]) || target.getBoundingClientRect();
    const { width, height } = box.getBoundingClientRect();
    const left = Math.max(4, Math.min(at.left, document.documentElement.clientWidth - width - 4));
    box.style.left = `${left}px`;
    box.style.top = `${at.top > height + 4 ? at.top - height - 2 : at.bottom + 2}px`;
  };

  CLT.hideTip = function () {
    clearTimeout(timer);
    timer = setTimeout(hide, 120);
  };

  CLT.hideTipNow = hide;
})(window.CLT);
