"use strict";
// Shared by the scripts that follow: reading packed data, making elements, writing numbers.

const byId = (id) => document.getElementById(id);

/** Data of a script element, which `pack.py` made. */
async function unpack(id) {
  const element = byId(id);
  if (!element) return null;
  const bytes = Uint8Array.from(atob(element.textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

/** An element with attributes and children; text is only ever text, never markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  const present = children.flat().filter((child) => child != null && child !== false);
  element.append(...present.map((child) => (child instanceof Node ? child : readable(child))));
  return element;
}

function makeSvg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** Marks that would turn or hide the text around them, by their numbers instead. */
const CONTROLS =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const readable = (text) =>
  String(text).replace(CONTROLS, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** Three significant digits: 0.0123, 45.6, 1,234, 1.2e-7. */
function short(value, digits = 3) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(digits - 1);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

function say(words) {
  byId("announce").textContent = words;
}

function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// Theme: as the system's, light, dark.
const themes = { "": ["◐", "as the system's"], light: ["☀", "light"], dark: ["☾", "dark"] };
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = themes[name][0];
  byId("theme").setAttribute("aria-label", `Theme: ${themes[name][1]}`);
}
byId("theme").addEventListener("click", () => {
  const order = Object.keys(themes);
  const now = document.documentElement.dataset.theme || "";
  setTheme(order[(order.indexOf(now) + 1) % order.length]);
});

// The section in view is the current one of the navigation.
const links = new Map(
  [...document.querySelectorAll(".top nav a")].map((a) => [a.getAttribute("href").slice(1), a]),
);
const watcher = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const link = links.get(target.id);
      if (!link || !isIntersecting) continue;
      links.forEach((other) => other.removeAttribute("aria-current"));
      link.setAttribute("aria-current", "true");
    }
  },
  { rootMargin: "-20% 0px -70% 0px" },
);
document.querySelectorAll("main > section").forEach((section) => watcher.observe(section));
