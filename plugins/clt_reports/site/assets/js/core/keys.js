"use strict";

/* Shortcuts of one key. They can be switched off in the help dialog, since some readers' tools type letters. */
(function (CLT) {
  const stack = []; // handlers of the pages that are open, the innermost last

  /** All shortcuts, as the help dialog and the guide list them. */
  CLT.SHORTCUTS = [
    ["?", "show or close this help"],
    ["r", "run page"],
    ["f", "list of features"],
    ["g", "graphs"],
    ["/", "find features by the text of a token"],
    ["t", "switch between light and dark"],
    ["j, k", "feature page: next and previous feature of the list as it was last shown"],
    ["l", "feature page: edit the label"],
    ["↑ ↓ Page Up, Page Down, Home, End", "list, graph: move; Enter opens"],
    ["← →", "contexts: from token to token, with its value; Enter shows the whole context. Graph: from position to position"],
    ["Esc", "close a dialog; leave a field"],
  ];

  /** Take keys while a page is open: {key: function}. Returns what ends that. */
  CLT.takeKeys = function (handlers) {
    stack.push(handlers);
    return () => stack.splice(stack.indexOf(handlers), 1);
  };

  const typing = (element) => element && (element.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(element.tagName));

  window.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (event.key === "Escape" && typing(event.target)) {
      event.target.blur();
      return;
    }
    if (typing(event.target) || !CLT.settings.shortcuts) return;
    for (const handlers of [...stack].reverse()) {
      if (Object.hasOwn(handlers, event.key)) {
        event.preventDefault();
        handlers[event.key](event);
        return;
      }
    }
  });
})(window.CLT);
