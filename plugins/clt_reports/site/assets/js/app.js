"use strict";

/* The frame around all pages: heading, navigation, theme, help; and which page is shown. */
(function (CLT) {
  const { html } = CLT;
  const { useEffect, useRef, useState } = window.preactHooks;

  const PAGES = {
    run: { show: CLT.RunPage, title: () => "Run" },
    features: { show: CLT.FeaturesPage, title: () => "Features" },
    feature: { show: CLT.FeaturePage, title: (route) => `Feature ${route.parts.join("/")}` },
    graphs: { show: CLT.GraphsPage, title: () => "Graphs" },
    graph: { show: CLT.GraphPage, title: (route) => `Graph ${route.parts[0] || ""}` },
  };

  function Missing() {
    return html`<h1 tabindex="-1">No such page</h1><p><a href="#/">To the run page</a></p>`;
  }

  function useRoute() {
    const [route, setRoute] = useState(() => CLT.route(window.location.hash));
    useEffect(() => {
      const change = () => setRoute(CLT.route(window.location.hash));
      window.addEventListener("hashchange", change);
      return () => window.removeEventListener("hashchange", change);
    }, []);
    return route;
  }

  function App() {
    const route = useRoute();
    const [help, setHelp] = useState(false);
    const main = useRef(null);
    const started = useRef(false);
    const page = Object.hasOwn(PAGES, route.page) ? PAGES[route.page] : { show: Missing, title: () => "No such page" };
    const name = `${route.page}/${route.parts.join("/")}`;

    // A new page begins at its heading, for readers of the screen and for the keyboard.
    useEffect(() => {
      document.title = `${page.title(route)} · ${CLT.site.title}`;
      CLT.hideTipNow();
      if (started.current) {
        window.scrollTo(0, 0);
        main.current.querySelector("h1")?.focus({ preventScroll: true });
      }
      started.current = true;
    }, [name]);

    const find = () => {
      if (route.page !== "features") CLT.go("#/features");
      const focus = (tries) => {
        const field = document.getElementById("token");
        if (field) field.focus();
        else if (tries) setTimeout(() => focus(tries - 1), 50);
      };
      focus(100);
    };
    CLT.useKeys({
      "?": () => setHelp((open) => !open),
      "/": find,
      r: () => CLT.go("#/"),
      f: () => CLT.go(CLT.listed.hash || "#/features"),
      g: () => CLT.go("#/graphs"),
      t: CLT.switchTheme,
    }, [route.page]);

    return html`
      <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); main.current.focus(); }}>Skip to the content</a>
      <header>
        <a class="brand" href="#/"><bdi>${CLT.site.title}</bdi></a>
        <nav aria-label="Pages">
          ${[["#/", "Run", ["run"]], ["#/features", "Features", ["features", "feature"]], ["#/graphs", "Graphs", ["graphs", "graph"]]].map(([to, text, pages]) => html`
            <a href=${to} aria-current=${pages.includes(route.page) ? "page" : undefined}>${text}</a>
          `)}
        </nav>
        <${Theme} />
        <button type="button" class="quiet" aria-haspopup="dialog" onClick=${() => setHelp(true)}><span aria-hidden="true">?</span><span class="unseen">Help and keys</span></button>
      </header>
      <main id="main" tabindex="-1" ref=${main} class=${`page-${route.page}`}>
        <${CLT.Guard} key=${name}><${page.show} ...${route} /><//>
      </main>
      <footer>Written by ${CLT.site.made_by}. This site needs no network.</footer>
      ${help && html`<${Help} close=${() => setHelp(false)} />`}
    `;
  }

  function Theme() {
    CLT.useSettings();
    return html`
      <label class="theme"><span class="unseen">Theme</span>
        <select value=${CLT.settings.theme} onChange=${(event) => CLT.setTheme(event.target.value)}>
          <option value="auto">System</option><option value="light">Light</option><option value="dark">Dark</option>
        </select>
      </label>
    `;
  }

  function Help({ close }) {
    CLT.useSettings();
    const dialog = useRef(null);
    useEffect(() => {
      const before = document.activeElement;
      dialog.current.showModal();
      return () => before?.focus?.();
    }, []);
    return html`
      <dialog ref=${dialog} aria-labelledby="help-title" onClose=${close}>
        <h2 id="help-title">Keys</h2>
        <table class="keylist">
          <caption class="unseen">Keys and what they do</caption>
          <thead class="unseen"><tr><th scope="col">Key</th><th scope="col">What it does</th></tr></thead>
          <tbody>${CLT.SHORTCUTS.map(([key, what]) => html`<tr><th scope="row"><kbd>${key}</kbd></th><td>${what}</td></tr>`)}</tbody>
        </table>
        <label class="check"><input type="checkbox" checked=${CLT.settings.shortcuts} onChange=${(event) => CLT.setShortcuts(event.target.checked)} />Single letters are shortcuts</label>
        <form method="dialog"><button>Close</button></form>
      </dialog>
    `;
  }

  function start() {
    const root = document.getElementById("app");
    root.replaceChildren();
    CLT.site = CLT.take("site");
    if (!CLT.site || CLT.site.format !== 1) {
      const error = new Error(CLT.site ? "The data have another format than this page reads. Write the site again." : "data/site.js could not be loaded. Is the folder complete?");
      window.preact.render(html`<main><h1>Features</h1><${CLT.Failure} error=${error} /></main>`, root);
      return;
    }
    CLT.labels.open();
    window.preact.render(html`<${App} />`, root);
  }
  start();
})(window.CLT);
