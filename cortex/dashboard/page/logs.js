// The latest lines of the gateway's log, as it writes them: text or JSON, filtered by level and by words.

import { $, h, shown, text } from "./dom.js";
import { plural } from "./format.js";

const KEPT = 1000;
const SHOWN = 300;
const NEAR_END_PX = 40;
const LEVELS = ["debug", "info", "warning", "error", "critical"];

// {time, level, words} of a line: ISO time, the index of its level, and the rest.
function parse(line) {
  if (line.startsWith("{")) {
    try {
      const { time, level, logger, message, ...fields } = JSON.parse(line);
      const rest = Object.entries(fields).map(([name, value]) => `${name}=${typeof value === "string" ? value : JSON.stringify(value)}`);
      return { time, level: LEVELS.indexOf(level), words: [logger, message, ...rest].join(" ") };
    } catch { return { time: "", level: 1, words: line }; } // it was too long, and was cut
  }
  const [, time, level, words] = /^(\S+) ([A-Z]+) ([^]*)$/.exec(line) ?? [];
  return time ? { time, level: LEVELS.indexOf(level.toLowerCase()), words } : { time: "", level: 1, words: line };
}

const clock = (time) => (time ? new Date(time).toLocaleTimeString([], { hour12: false }) : "");

function row({ time, level, words }) {
  return h("li", { "data-level": LEVELS[level] ?? "info" }, h("time", { datetime: time, title: time }, clock(time)), h("span", {}, words));
}

export class Logs {
  constructor() {
    this.kept = [];
    this.least = 0;
    this.words = "";
    this.list = $("log-rows");
    this.scroll = this.list.parentElement;
    for (const radio of document.querySelectorAll("input[name=level]")) {
      radio.addEventListener("change", () => { this.least = LEVELS.indexOf(radio.value); this.draw(); });
    }
    $("log-filter").addEventListener("input", () => this.filter($("log-filter").value));
  }

  replace(lines) {
    this.kept = [];
    this.add(lines);
  }

  add(lines) {
    const parsed = lines.map(parse);
    this.kept = [...this.kept, ...parsed].slice(-KEPT);
    if (parsed.some((line) => this.fits(line)) || !lines.length) this.draw();
  }

  // Show only lines with these words, such as the id of a request.
  filter(words) {
    this.words = words.trim().toLowerCase();
    this.draw();
  }

  // The lines with the id of a request.
  of(id) { return this.kept.filter(({ words }) => words.includes(id)); }

  // Go to the lines with the id of a request.
  show(id) {
    $("log-filter").value = id;
    this.filter(id);
    $("log").scrollIntoView({ block: "nearest" });
    $("log-filter").focus({ preventScroll: true });
  }

  fits({ level, words }) { return level >= this.least && words.toLowerCase().includes(this.words); }

  draw() {
    const follow = this.scroll.scrollHeight - this.scroll.scrollTop - this.scroll.clientHeight < NEAR_END_PX;
    const fitting = this.kept.filter((line) => this.fits(line));
    this.list.replaceChildren(...fitting.slice(-SHOWN).map(row));
    text($("log-count"), fitting.length ? plural(fitting.length, "line") : "");
    shown($("log-empty"), fitting.length === 0);
    if (follow) this.scroll.scrollTop = this.scroll.scrollHeight;
  }
}
