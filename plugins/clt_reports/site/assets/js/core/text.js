"use strict";

/*
 * From bytes of tokens to what a reader sees. Everything ends as text nodes. A character split over tokens is put together;
 * bytes that are no UTF-8, control characters, and marks that would change the direction of the text are made visible.
 */
(function (CLT) {
  const MOST_MERGED = 32; // tokens put together at most: a hostile text could go on for ever
  const LONG = 240; // characters of a token that are shown before it is cut

  /** How many bytes the character that begins with this byte has; 0 where none begins with it. */
  function sequenceLength(byte) {
    if (byte < 0x80) return 1;
    if (byte >= 0xc2 && byte < 0xe0) return 2;
    if (byte >= 0xe0 && byte < 0xf0) return 3;
    return byte >= 0xf0 && byte < 0xf5 ? 4 : 0;
  }

  const continues = (byte) => byte >= 0x80 && byte < 0xc0;

  /** Whether the bytes end inside a character. */
  function endsInside(bytes) {
    for (let back = 1; back <= Math.min(3, bytes.length); back++) {
      const byte = bytes[bytes.length - back];
      if (!continues(byte)) return sequenceLength(byte) > back;
    }
    return false;
  }

  /** The bytes of a word of the vocabulary. */
  CLT.bytesOf = (vocabulary, word) => vocabulary.bytes.subarray(vocabulary.start[word], vocabulary.start[word + 1]);

  function join(parts) {
    if (parts.length === 1) return parts[0];
    const joined = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
    let at = 0;
    for (const part of parts) {
      joined.set(part, at);
      at += part.length;
    }
    return joined;
  }

  /**
   * Neighbouring tokens, those put together that share a character: a list of {from, to, bytes}, `from` and `to` counting
   * in `words`.
   */
  CLT.pieces = function (vocabulary, words) {
    const pieces = [];
    for (let from = 0; from < words.length; ) {
      const parts = [CLT.bytesOf(vocabulary, words[from])];
      let to = from + 1;
      let bytes = parts[0];
      while (to < words.length && to - from < MOST_MERGED && endsInside(bytes)) {
        const next = CLT.bytesOf(vocabulary, words[to]);
        if (!next.length || !continues(next[0])) break;
        parts.push(next);
        bytes = join(parts);
        to++;
      }
      pieces.push({ from, to, bytes });
      from = to;
    }
    return pieces;
  };

  const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

  /** Bytes as a list of strings (text) and numbers (bytes that are no UTF-8). */
  function decode(bytes) {
    try {
      return [strict.decode(bytes)];
    } catch {
      // Character by character: rare, and only the bad bytes become numbers.
    }
    const parts = [];
    let text = "";
    for (let at = 0; at < bytes.length; ) {
      const length = sequenceLength(bytes[at]);
      let character = null;
      if (length && at + length <= bytes.length) {
        try {
          character = strict.decode(bytes.subarray(at, at + length));
        } catch {
          character = null;
        }
      }
      if (character === null) {
        if (text) parts.push(text);
        text = "";
        parts.push(bytes[at++]);
      } else {
        text += character;
        at += length;
      }
    }
    if (text) parts.push(text);
    return parts;
  }

  // Control, format, line and paragraph separators, private, unassigned, and spaces other than the common one.
  const HIDDEN = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cn}]|(?! )\p{Zs}/gu;
  // Joiners are shown as they are where they join: in emoji, and in scripts that need them.
  const JOINS = /[\p{L}\p{M}\p{Extended_Pictographic}\uFE0F\u{1F3FB}-\u{1F3FF}]/u;
  const SPELLED = { "\n": ["⏎", "new line"], "\r": ["␍", "carriage return"], "\t": ["⇥", "tab"], "\u00a0": ["⍽", "no-break space"], "\x7f": ["␡", "delete"] };

  const hex = (number, least) => number.toString(16).toUpperCase().padStart(least, "0");

  function glyphOf(character) {
    const code = character.codePointAt(0);
    if (SPELLED[character]) return { glyph: SPELLED[character][0], name: SPELLED[character][1], line: character === "\n" };
    if (code < 0x20) return { glyph: String.fromCharCode(0x2400 + code), name: `control character ${hex(code, 2)}` };
    return { glyph: `U+${hex(code, 4)}`, name: `character U+${hex(code, 4)}` };
  }

  const characterBefore = (text, at) => (/[\uDC00-\uDFFF]/.test(text[at - 1]) ? text.slice(at - 2, at) : text.slice(at - 1, at));

  /**
   * Bytes as segments: strings to be shown as they are, and {glyph, name, line} for what cannot be seen. `limit` cuts long
   * tokens; null does not.
   */
  CLT.segments = function (bytes, limit = LONG) {
    const segments = [];
    const size = bytes.length;
    const cut = limit !== null && size > 4 * limit;
    if (cut) bytes = bytes.subarray(0, 4 * limit);
    if (!size) segments.push({ glyph: "∅", name: "a token without text" });
    for (const part of decode(bytes)) {
      if (typeof part === "number") {
        segments.push({ glyph: `\\x${hex(part, 2)}`, name: `byte ${hex(part, 2)}, not UTF-8` });
        continue;
      }
      let at = 0;
      for (const match of part.matchAll(HIDDEN)) {
        const end = match.index + match[0].length;
        const joiner = match[0] === "\u200d" || match[0] === "\u200c";
        if (joiner && JOINS.test(characterBefore(part, match.index)) && JOINS.test(part.slice(end, end + 2))) continue;
        if (match.index > at) segments.push(part.slice(at, match.index));
        segments.push(glyphOf(match[0]));
        at = end;
      }
      if (at < part.length) segments.push(part.slice(at));
    }
    // A mark that belongs onto the character before it, which is another token's, gets a circle to stand on.
    if (typeof segments[0] === "string" && /^\p{M}/u.test(segments[0])) segments[0] = `◌${segments[0]}`;
    if (cut) segments.push({ glyph: `… ${CLT.count(size)} bytes`, name: "shortened" });
    return segments;
  };

  /** One string for titles and labels, with outer spaces visible. */
  CLT.spell = function (bytes, limit = 60) {
    const text = CLT.segments(bytes, limit).map((part) => (typeof part === "string" ? part : part.glyph)).join("");
    return text.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
  };

  const RTL = /[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/gu;

  /** "rtl" where most letters of the pieces are written from right to left. */
  CLT.direction = function (pieces) {
    let all = 0;
    let rightToLeft = 0;
    for (const { bytes } of pieces) {
      if (bytes.length > 1000) continue;
      for (const part of decode(bytes)) {
        if (typeof part === "number") continue;
        all += (part.match(/\p{L}/gu) || []).length;
        rightToLeft += (part.match(RTL) || []).length;
      }
    }
    return 2 * rightToLeft > all ? "rtl" : "ltr";
  };
})(window.CLT);
