// The choices of this browser, applied before anything is drawn: the theme, and keyboard shortcuts.
"use strict";

(() => {
  const order = ["system", "light", "dark"];
  const stored = (name) => { try { return localStorage.getItem(name); } catch { return null; } };
  const store = (name, value) => { try { localStorage.setItem(name, value); } catch { /* then it lasts as long as the page */ } };
  const apply = (theme) => {
    document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) button.textContent = `Theme: ${theme}`;
  };
  const current = () => { const theme = stored("cortex-theme"); return order.includes(theme) ? theme : "system"; };
  apply(current());
  window.cortexChoices = {
    keys: stored("cortex-keys") !== "off",
    setKeys(are) { this.keys = are; store("cortex-keys", are ? "on" : "off"); },
    nextTheme() {
      const theme = order[(order.indexOf(document.documentElement.dataset.theme) + 1) % order.length];
      store("cortex-theme", theme);
      apply(theme);
    },
    showTheme: () => apply(document.documentElement.dataset.theme),
  };
})();
