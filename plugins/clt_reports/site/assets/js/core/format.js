"use strict";

/* Numbers and names as text: three significant digits, a true minus sign, thousands set apart. */
(function (CLT) {
  const minus = (text) => text.replace(/-/g, "−");

  /** A measured number: three digits. "–" where it is not known. */
  CLT.number = function (value, digits = 3) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) {
      const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
      return minus(`${mantissa}e${Number(exponent)}`);
    }
    if (size >= 10 ** digits) return CLT.count(Math.round(value));
    return minus(value.toPrecision(digits));
  };

  /** A number of an axis: no zeros that say nothing. */
  CLT.tick = (value) => (Math.abs(value) >= 1e6 || (value !== 0 && Math.abs(value) < 1e-3) ? CLT.number(value, 2).replace(/\.0+(?=e)/, "") : minus(Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 })));

  /** A count of things. */
  CLT.count = (value) => (value === null || value === undefined || Number.isNaN(value) ? "–" : minus(value.toLocaleString("en")));

  /** A share of one as a percentage. */
  CLT.percent = function (value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const percent = 100 * value;
    if (percent === 0) return "0 %";
    if (percent < 0.001) return `${CLT.number(percent, 2)} %`;
    return `${minus(String(Number(percent.toPrecision(3))))} %`;
  };

  /** A whole value, as exact as it was stored in 32 bits. */
  CLT.exact = (value) => minus(String(Number(Math.fround(value).toPrecision(9).replace(/0+$/, ""))));

  CLT.nameOf = (layer, feature) => `${layer}/${feature}`;

  /** [layer, feature] of a global number. */
  CLT.place = (number) => [Math.floor(number / CLT.site.n_features), number % CLT.site.n_features];
})(window.CLT);
