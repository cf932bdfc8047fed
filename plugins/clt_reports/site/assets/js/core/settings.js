"use strict";

/* What a reader chose, kept in the browser: the theme, and whether single keys are shortcuts. */
(function (CLT) {
  const listeners = new Set();

  function read(key) {
    try {
      return window.localStorage.getItem(key);
    } catch {
      return null; // storage is switched off: settings last as long as the page
    }
  }

  CLT.settings = {
    theme: read("clt.theme") || "auto", // "auto", "light", "dark"
    shortcuts: read("clt.shortcuts") !== "off",
  };

  function keep(key, value) {
    try {
      window.localStorage.setItem(key, value);
    } catch {
      // As above.
    }
    for (const listener of listeners) listener();
  }

  function apply() {
    const { theme } = CLT.settings;
    const dark = theme === "dark" || (theme === "auto" && window.matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
  }

  CLT.setTheme = function (theme) {
    CLT.settings.theme = theme;
    apply();
    keep("clt.theme", theme);
  };

  /** From light to dark and back. */
  CLT.switchTheme = () => CLT.setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

  CLT.setShortcuts = function (on) {
    CLT.settings.shortcuts = on;
    keep("clt.shortcuts", on ? "on" : "off");
  };

  /** Call `listener` after each change; returns what ends that. */
  CLT.onSettings = function (listener) {
    listeners.add(listener);
    return () => listeners.delete(listener);
  };

  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    apply();
    for (const listener of listeners) listener();
  });
  apply();

  /** A colour of the theme, for canvases. */
  CLT.colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
})(window.CLT);
