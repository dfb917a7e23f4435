// The page's connection to the gateway: opened, watched, and opened again. It reports its state and its SSE events.

import { sseEvents } from "./events.js";
import { ask, complaint } from "./session.js";

const SILENCE_MS = 12000; // an SSE event comes every second, and a comment where the gateway has nothing to say
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10000;

export class Feed {
  // on: {state(name, detail), whole(data), tick(data)}. States: connecting, live, lost, refused.
  constructor(on) {
    this.on = on;
    this.pause = FIRST_PAUSE_MS;
    this.abort = null;
    this.wake = () => {};
    addEventListener("online", () => this.wake());
    // A browser keeps a page that was left, for its way back, with its connections: one of the six that a host gets.
    addEventListener("pagehide", () => this.abort?.abort());
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.wake(); });
  }

  // Begin, or begin again with another key.
  open() {
    this.run = (this.run ?? 0) + 1;
    this.abort?.abort();
    this.wake();
    this.pause = FIRST_PAUSE_MS;
    this.live(this.run);
  }

  async live(run) {
    this.on.state("connecting", "");
    while (this.run === run) {
      const detail = await this.follow(run);
      if (this.run !== run || detail === null) return;
      this.on.state("lost", detail);
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, this.pause * (0.75 + Math.random() / 2));
        this.wake = () => { clearTimeout(timer); resolve(); };
      });
      this.pause = Math.min(LONGEST_PAUSE_MS, this.pause * 2);
    }
  }

  // Read one connection to its end. Returns the reason, or null if a reconnect will not help.
  async follow(run) {
    const abort = (this.abort = new AbortController());
    let receivedAt = performance.now();
    const watch = setInterval(() => { if (performance.now() - receivedAt > SILENCE_MS) abort.abort(); }, 1000);
    try {
      const reply = await ask("admin/events", { signal: abort.signal, headers: { accept: "text/event-stream" } });
      if (reply.status === 401 || reply.status === 403) {
        const why = await complaint(reply);
        if (this.run === run) this.on.state("refused", why);
        return null;
      }
      if (!reply.ok) return await complaint(reply);
      for await (const event of sseEvents(reply, { onBytes: () => { receivedAt = performance.now(); } })) {
        if (this.run !== run) return null;
        const data = JSON.parse(event.data);
        if (event.event === "whole") { this.pause = FIRST_PAUSE_MS; this.on.whole(data); this.on.state("live", data.version); }
        else if (event.event === "tick") this.on.tick(data);
        else if (event.event === "bye") return "The gateway is stopping.";
        else if (event.event === "refused") {
          if (data.status === 401 || data.status === 403) { this.on.state("refused", data.message); return null; }
          return data.message;
        }
      }
      return "The connection was lost.";
    } catch {
      return abort.signal.aborted ? "The gateway has gone silent." : "The gateway does not answer.";
    } finally {
      clearInterval(watch);
      abort.abort();
    }
  }
}
