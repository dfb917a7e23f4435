// Before anything is drawn: the theme that was chosen here, or the system's.
"use strict";

(() => {
  const order = ["system", "light", "dark"];
  const stored = () => { try { return localStorage.getItem("cortex-theme"); } catch { return null; } };
  const apply = (theme) => {
    document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) button.textContent = `Theme: ${theme}`;
  };
  const current = () => { const theme = stored(); return order.includes(theme) ? theme : "system"; };
  apply(current());
  window.cortexTheme = {
    next() {
      const theme = order[(order.indexOf(document.documentElement.dataset.theme) + 1) % order.length];
      try { localStorage.setItem("cortex-theme", theme); } catch { /* then it lasts as long as the page */ }
      apply(theme);
    },
    show: () => apply(document.documentElement.dataset.theme),
  };
})();
