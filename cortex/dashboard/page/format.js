// Formatting of numbers. Pure.

export function bytes(count) {
  if (!count) return "0";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = Math.min(units.length - 1, Math.floor(Math.log2(count) / 10));
  let value = count / 1024 ** power;
  if (value >= 999.5 && power < units.length - 1) { value /= 1024; power += 1; }
  return `${value >= 100 || power === 0 ? value.toFixed(0) : value.toFixed(1)} ${units[power]}`;
}

export function count(value) {
  const short = (size, letter) => `${(value / size).toFixed(value < 99.95 * size ? 1 : 0)}${letter}`;
  if (value >= 999.5e6) return short(1e9, "G");
  if (value >= 999.5e3) return short(1e6, "M");
  if (value >= 9999.5) return short(1e3, "k");
  return value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1);
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.9995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 59.95) return `${value.toFixed(value < 9.995 ? 2 : 1)} s`;
  const minutes = Math.floor(Math.round(value) / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(value) % 60} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// The time since a moment, in Unix seconds.
export function ago(at) {
  const minutes = Math.floor((Date.now() / 1000 - at) / 60);
  if (minutes < 1) return "just now";
  if (minutes < 60) return `${minutes} min ago`;
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ago`;
  return `${Math.floor(minutes / 1440)} days ago`;
}

export function percent(part, whole) {
  return whole ? `${((100 * part) / whole).toFixed(part && part / whole < 0.0995 ? 1 : 0)} %` : "0 %";
}

export function clock(at) {
  return new Date(at * 1000).toLocaleTimeString([], { hour12: false });
}

export function plural(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}

// The dollars of an answer by a model's `pricing`, which has those of one token; null without prices or use.
export function cost(pricing, { input, cached, output }) {
  if (!pricing || input === undefined || output === undefined) return null;
  const again = pricing.input_cache_read ?? pricing.prompt;
  return (input - cached) * pricing.prompt + cached * again + output * pricing.completion;
}

export function dollars(value) {
  return `$${value.toLocaleString("en", { maximumSignificantDigits: 2 })}`;
}

// Dollars as on a bill; below a cent two figures.
export function money(value) {
  return value < 0.01 ? dollars(value) : `$${value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
}
