"use strict";

/* Which page the address asks for: #/, #/features?..., #/feature/L/F, #/graphs, #/graph/NAME. */
(function (CLT) {
  /** {page, parts, query} of a hash. */
  CLT.route = function (hash) {
    const [path, query] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
    let parts;
    try {
      parts = path.split("/").filter(Boolean).map(decodeURIComponent);
    } catch {
      parts = [path];
    }
    return { page: parts[0] || "run", parts: parts.slice(1), query: Object.fromEntries(new URLSearchParams(query || "")) };
  };

  CLT.toFeature = (layer, feature) => `#/feature/${layer}/${feature}`;

  CLT.toGraph = (name) => `#/graph/${encodeURIComponent(name)}`;

  /** The address of the list with these filters; empty ones are left out. */
  CLT.toList = function (query) {
    const kept = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
    const text = new URLSearchParams(kept).toString();
    return text ? `#/features?${text}` : "#/features";
  };

  CLT.go = function (hash) {
    window.location.hash = hash;
  };

  /** Change the address without a new step in the browser's history: for filters that change with each letter. */
  CLT.replace = function (hash) {
    window.history.replaceState(null, "", hash);
  };
})(window.CLT);
