// A panel that is fetched now and then, since the feed does not have its data.

import { ask } from "./session.js";

export class Polled {
  // `show(answer)` is the subclass's; null is no permission to see it.
  constructor(intervalMs) {
    this.intervalMs = intervalMs;
    this.timer = null;
    document.addEventListener("visibilitychange", () => this.lookAgain());
  }

  path() { throw new Error("a subclass names what it fetches"); }

  // Begin to look, or stop and forget.
  watch(is) {
    clearInterval(this.timer);
    this.timer = is ? setInterval(() => this.lookAgain(), this.intervalMs) : null;
    this.drawn = "";
    if (is) this.look(); else this.show(null);
  }

  // A page that nobody sees asks for nothing.
  lookAgain() {
    if (this.timer !== null && !document.hidden) this.look();
  }

  async look() {
    const path = this.path();
    try {
      const reply = await ask(path);
      if (!reply.ok) return; // the feed says why
      const answer = await reply.text();
      // Another answer may be asked for by now, and one that is drawn keeps the focus that is in it.
      if (this.timer === null || path !== this.path() || answer === this.drawn) return;
      this.drawn = answer;
      this.show(JSON.parse(answer));
    } catch { /* likewise */ }
  }
}
