/* The toolkit of every interactive figure. It is inlined ahead of each view, which uses the one name `lm`.

   A view keeps its state in `model` (get, set, save_changes, on("change:key", f), on("change", f), off): on a still page
   a small shim, in a notebook the widget's traits. So: read with model.get, write with lm.bind or lm.put, redraw on change.

     export default { render({ model, el }) {
       const ui = lm.panel(el, { title: "Softmax", note: "Raise the temperature." });
       const t = lm.slider({ label: "temperature", min: 0.1, max: 10, log: true });
       lm.bind(model, "temperature", t);                     // two ways; the model's value wins at the start
       const chart = lm.chart({
         label: () => "Softmax weights", height: 220,        // the figure's text for a screen reader
         x: { domain: [0, 8], label: "key" }, y: { domain: [0, 1], label: "weight" },     // objects or functions
         draw(p) { p.line(points(model.get("temperature")), { color: "blue", width: 2 }); },
       });
       ui.controls.append(t.el); ui.body.append(chart.el);
       return lm.live(model, ui, () => { chart.redraw(); ui.say("The largest weight is …"); });
     } };

   lm.panel(el, {title, note})   → {controls (a grid), body, foot, say(text), root, dispose}; a shadow root with the book's look
   lm.live(model, ui, update)    runs update now and after every change, at most once a frame; returns the clean-up function
   lm.slider({label, min, max, step, log, value, format, parse, hint, unit})  range + typed number (70B, 1.4T, 5.76e23, 10^23)
   lm.select({label, options: [[value, text], …]})   lm.segmented({label, options})   lm.toggle({label})
   lm.text({label, rows, placeholder})   lm.button(text, f)   lm.fold(title, ...children)   lm.row(...children)
                                 every control: {el, value (get and set), oninput}
   lm.bind(model, key, control)  lm.put(model, {key: value, …})
   lm.chart({label, height, x, y, margin, draw, readout})   → {el, redraw}; drawn again at each width, so text never shrinks
     axis: {domain: [a, b], log, label, ticks: [..], format, grid}
     in draw(p): p.x(v) p.y(v) scales, p.x.invert(px); p.width, p.height;
       p.line(points, style) p.area(points, style) p.dots(points, style) p.text(x, y, string, style) p.vline(x, style) p.hline(y, style)
       p.cells(matrix, {color(value) → css, title(i, j)})  a heat map over the axes' domains, row 0 on top
       p.handle(key, {x, y, label, text, color, move(x, y), nudge(dx, dy, big)})  a point or, with only x or only y, a line that
         is dragged and moved by the arrow keys; it survives redraws, so it keeps its focus
       style: {color: palette name or css, width, dash, opacity, fill, r, anchor, size, weight, title, dx, dy}
     readout(x, y) → text or null: shown under the pointer
   lm.h(tag, attributes, ...children)   lm.s(…) the same in SVG; attributes that start with "on" are listeners
   lm.color(name)  css for a palette name; lm.shade(t, name) a sequential scale over [0, 1]; lm.palette
   lm.si(70e9) "70B"  lm.sci(5.76e23) "5.76 × 10²³"  lm.num(x, digits)  lm.parse("1.4T")  lm.clamp  lm.range(a, b, n)  lm.logrange
   Colours of text: "ink", "soft". In css: var(--ink) var(--soft) var(--line) var(--surface) var(--raise) and var(--blue) … */
const lm = (() => {
  const palette = PALETTE;
  const LIGHT = "--ink:#1d2430; --soft:#566070; --line:#d5dae1; --surface:#fff; --raise:#f4f6f9; --accent:#1f5f99; color-scheme:light;";
  const CSS = `
:host { all: initial; display: block; font: inherit; color: inherit; }
.lm { ${Object.entries(palette).map(([k, v]) => `--${k}:${v}`).join(";")};
  ${LIGHT} box-sizing:border-box; background:var(--surface); color:var(--ink); border:1px solid var(--line);
  border-radius:12px; padding:clamp(12px,2.2vw,22px); font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; text-align:left; }
.lm.dark { --ink:#e6eaf0; --soft:#a5afbc; --line:#38414d; --surface:#14181e; --raise:#1e242c; --accent:#7db7ea; color-scheme: dark; }
.lm *, .lm *::before { box-sizing:border-box; }
.lm .title { font-size:1.15em; line-height:1.25; margin:0 0 .25em; font-weight:650; }
.lm p { margin:.3em 0; } .lm .note { color:var(--soft); max-width:66ch; }
.lm .say { margin:.7em 0; font-size:1.02em; max-width:76ch; } .lm .say:empty { display:none; }
.lm .controls { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,225px),1fr)); gap:10px 22px; margin:.7em 0; align-items:end; }
.lm .controls:empty { display:none; }
.lm .row { display:flex; flex-wrap:wrap; gap:10px 18px; align-items:end; } .lm .row > * { flex:0 1 auto; } .lm .row > .chart { flex:1 1 300px; min-width:0; }
.lm .field { min-width:0; border:0; margin:0; padding:0; } .lm .field > label, .lm legend, .lm .top { display:flex; justify-content:space-between; align-items:baseline; gap:8px; padding:0; font-size:.93em; }
.lm .top label { flex:1; } .lm .hint { color:var(--soft); font-size:.86em; }
.lm input, .lm select, .lm textarea, .lm button { font:inherit; color:var(--ink); accent-color:var(--accent); margin:0; }
.lm input[type=text], .lm select, .lm textarea { background:var(--raise); border:1px solid color-mix(in srgb,var(--soft) 75%,var(--surface)); border-radius:6px; padding:3px 7px; min-height:28px; }
.lm input[type=text] { width:6.6em; text-align:right; font-variant-numeric:tabular-nums; } .lm select { max-width:100%; width:100%; } .lm textarea { width:100%; font:13px/1.4 ui-monospace,Menlo,Consolas,monospace; }
.lm input[aria-invalid=true] { border-color:var(--red); box-shadow:0 0 0 2px var(--red); }
.lm input[type=range] { width:100%; height:26px; cursor:pointer; display:block; }
.lm input[type=checkbox], .lm input[type=radio] { width:18px; height:18px; flex:none; } .lm .check { display:flex; gap:8px; align-items:center; min-height:28px; cursor:pointer; }
.lm .segments { display:flex; flex-wrap:wrap; gap:4px; margin-top:4px; } .lm .segments label { position:relative; cursor:pointer; }
.lm .segments input { position:absolute; inset:0; width:100%; height:100%; opacity:0; cursor:pointer; }
.lm .segments span { display:block; padding:4px 11px; border:1px solid color-mix(in srgb,var(--soft) 55%,var(--surface)); border-radius:99px; background:var(--raise); }
.lm .segments input:checked + span { background:var(--accent); border-color:var(--accent); color:var(--surface); font-weight:600; }
.lm button { background:var(--raise); border:1px solid color-mix(in srgb,var(--soft) 75%,var(--surface)); border-radius:7px; padding:4px 12px; min-height:30px; cursor:pointer; }
.lm button:hover { border-color:var(--ink); } .lm button:disabled { opacity:.5; cursor:default; }
.lm :focus-visible, .lm .segments input:focus-visible + span { outline:3px solid var(--accent); outline-offset:2px; }
.lm details { border-top:1px solid var(--line); } .lm details:last-of-type { border-bottom:1px solid var(--line); }
.lm summary { cursor:pointer; padding:8px 2px; font-weight:600; } .lm details > .inside { padding:2px 2px 14px; }
.lm table { border-collapse:collapse; width:100%; font-size:.93em; font-variant-numeric:tabular-nums; } .lm th, .lm td { text-align:right; padding:4px 8px; border-bottom:1px solid var(--line); font-weight:400; }
.lm th:first-child, .lm td:first-child { text-align:left; } .lm thead th { color:var(--soft); } .lm .scroll { overflow-x:auto; }
.lm .chart { position:relative; min-width:0; } .lm svg { display:block; width:100%; overflow:visible; font-size:12px; }
.lm svg text { fill:var(--ink); } .lm .axis text { fill:var(--soft); font-variant-numeric:tabular-nums; } .lm .axis line, .lm .axis path { stroke:var(--line); fill:none; }
.lm .handle { cursor:grab; } .lm .handle:active { cursor:grabbing; } .lm .handle:focus { outline:none; } .lm .handle:focus-visible .halo { stroke:var(--accent); stroke-width:3; }
.lm .tip { position:absolute; pointer-events:none; z-index:3; background:var(--ink); color:var(--surface); border-radius:6px; padding:4px 8px; font-size:12.5px; line-height:1.35; max-width:260px; white-space:pre-line; transition:opacity .12s; }
.lm .halo-text { paint-order:stroke; stroke:var(--surface); stroke-width:3.5px; stroke-linejoin:round; }
@media (max-width:560px) { .lm input[type=text], .lm select, .lm textarea { font-size:16px; } }
@media (prefers-reduced-motion:reduce) { .lm * { transition:none !important; animation:none !important; } }
@media print { .lm.dark { ${LIGHT} } .lm { border:0; padding:0; break-inside:avoid; } .lm button, .lm input[type=range], .lm details:not([open]) { display:none; } }`;

  let ids = 0;
  const id = () => `lm${++ids}`;
  const build = (make) => (tag, attributes = {}, ...children) => {
    const node = make(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value === true) node.setAttribute(key, "");
      else if (value !== false && value != null) node.setAttribute(key, value);
    }
    node.append(...children.flat().filter((child) => child != null && child !== false));
    return node;
  };
  const h = build((tag) => document.createElement(tag));
  const s = build((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));

  const color = (name) => (name in palette || ["ink", "soft", "line", "surface", "raise", "accent"].includes(name) ? `var(--${name})` : name);
  const shade = (t, name = "blue") => `color-mix(in srgb, ${color(name)} ${Math.round(clamp(t, 0, 1) * 1000) / 10}%, var(--surface))`;
  const clamp = (x, a, b) => Math.min(b, Math.max(a, x));
  const range = (a, b, n) => Array.from({ length: n }, (_, i) => a + ((b - a) * i) / (n - 1));
  const logrange = (a, b, n) => range(Math.log10(a), Math.log10(b), n).map((e) => 10 ** e);

  // numbers
  const num = (x, digits = 3) => (Number.isFinite(x) ? String(+x.toPrecision(digits)).replace("-", "−") : "–");
  const superscript = (n) => String(n).replace(/./g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
  const sci = (x, digits = 3) => {
    if (!Number.isFinite(x) || x === 0) return x === 0 ? "0" : "–";
    const [mantissa, power] = x.toExponential(digits - 1).split("e");
    return `${+mantissa === 1 ? "" : `${+mantissa} × `}10${superscript(+power)}`;
  };
  const si = (x, digits = 3) => {
    const r = +x.toPrecision(digits), steps = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];
    if (!Number.isFinite(x)) return "–";
    if (Math.abs(r) >= 1e15 || (r !== 0 && Math.abs(r) < 1e-3)) return sci(x, digits);
    const step = steps.find(([size]) => Math.abs(r) >= size);
    return step ? num(x / step[0], digits) + step[1] : num(x, digits);
  };
  const parse = (text) => {
    const units = { "": 1, "%": 0.01, k: 1e3, K: 1e3, m: 1e6, M: 1e6, b: 1e9, B: 1e9, g: 1e9, G: 1e9, bn: 1e9, t: 1e12, T: 1e12 };
    const clean = String(text).trim().replace(/[\s,_]/g, "").replace("−", "-").replace(/[×x*·]?10\^?([-+]?\d+|[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)$/, (all, power, at, whole) => {
      if (!/[\^×x*·⁻⁰¹²³⁴⁵⁶⁷⁸⁹]/.test(all)) return all;
      const digits = power.replace(/[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]/g, (c) => "-0123456789"["⁻⁰¹²³⁴⁵⁶⁷⁸⁹".indexOf(c)]);
      return `${at === 0 ? "1" : ""}e${digits}`;
    });
    const match = /^([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(%|[kKmMbBgGtT]|bn)?$/i.exec(clean);
    return match ? Number(match[1]) * units[match[2] || ""] : NaN;
  };

  // state
  const put = (model, values) => { for (const [key, value] of Object.entries(values)) model.set(key, value); model.save_changes(); };
  const bind = (model, key, control) => {
    if (model.get(key) !== undefined) control.value = model.get(key);
    control.oninput = (value) => put(model, { [key]: value });
    model.on(`change:${key}`, () => { if (control.value !== model.get(key)) control.value = model.get(key); });
    return control;
  };
  const shim = (data) => {
    const listeners = {}, values = { ...data };
    const fire = (event) => (listeners[event] || []).slice().forEach((f) => f());
    return {
      get: (key) => values[key],
      set(key, value) {
        if (values[key] === value || JSON.stringify(values[key]) === JSON.stringify(value)) return;
        values[key] = value; fire(`change:${key}`); fire("change");
      },
      save_changes() {},
      on(event, f) { (listeners[event] ||= []).push(f); },
      off(event, f) { listeners[event] = f ? (listeners[event] || []).filter((g) => g !== f) : []; },
    };
  };
  const live = (model, ui, update) => {
    let frame = 0;
    const run = () => { frame = 0; update(); };
    const soon = () => { frame ||= requestAnimationFrame(run); };
    model.on("change", soon); update();
    return () => { model.off("change", soon); cancelAnimationFrame(frame); ui.dispose(); };
  };
  const mount = (name, view) => {
    for (const el of document.querySelectorAll(`.lm-interactive[data-lm="${name}"]:not([data-lm-ready])`)) {
      el.setAttribute("data-lm-ready", "");
      const data = JSON.parse(el.querySelector('script[type="application/json"]').textContent);
      el.replaceChildren(); el.lmModel = shim(data);
      view.render({ model: el.lmModel, el });
    }
  };

  // the frame: a shadow root keeps the page's style out; JupyterLab's shortcuts are told to stay away
  const isDark = () => {
    const { documentElement: html, body } = document;
    const theme = html.dataset.theme || html.getAttribute("theme");
    if (theme === "dark" || theme === "light") return theme === "dark";
    if (body.dataset.jpThemeLight) return body.dataset.jpThemeLight === "false";
    if (body.dataset.vscodeThemeKind) return /dark|high-contrast$/.test(body.dataset.vscodeThemeKind);
    return matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const panel = (el, { title, note } = {}) => {
    const host = h("div", { "data-lm-suppress-shortcuts": "true" });
    const shadow = host.attachShadow({ mode: "open" });
    const controls = h("div", { class: "controls" }), body = h("div", { class: "body" }), foot = h("div", { class: "foot" });
    const said = h("p", { class: "say", role: "status", "aria-live": "polite" });
    const root = h("section", { class: "lm", "aria-label": title || "interactive figure" }, title && h("p", { class: "title" }, title), note && h("p", { class: "note" }, note), controls, said, body, foot);
    const dress = () => root.classList.toggle("dark", isDark());
    const media = matchMedia("(prefers-color-scheme: dark)"), watch = new MutationObserver(dress);
    for (const node of [document.documentElement, document.body]) watch.observe(node, { attributes: true, attributeFilter: ["data-theme", "theme", "data-jp-theme-light", "data-vscode-theme-kind"] });
    media.addEventListener("change", dress); dress();
    shadow.append(h("style", {}, CSS), root); el.append(host);
    const say = (text) => { if (typeof text !== "string") said.replaceChildren(...[text].flat()); else if (said.textContent !== text) said.textContent = text; };
    return { root, controls, body, foot, say, dispose() { watch.disconnect(); media.removeEventListener("change", dress); } };
  };

  // controls
  const row = (...children) => h("div", { class: "row" }, ...children);
  const fold = (title, ...children) => h("details", {}, h("summary", {}, title), h("div", { class: "inside" }, ...children));
  const button = (text, f, attributes = {}) => h("button", { type: "button", onclick: f, ...attributes }, text);
  const slider = ({ label, min, max, step, log = false, value = min, format = log ? si : num, parse: read = parse, hint, unit = "" }) => {
    const to = log ? Math.log10 : (v) => v, from = log ? (v) => 10 ** v : (v) => v, name = id();
    const knob = h("input", { type: "range", min: to(min), max: to(max), step: step ?? (log ? 0.01 : (max - min) / 200), id: `${name}r`, "aria-label": label });
    const box = h("input", { type: "text", inputmode: "text", id: name, autocomplete: "off", spellcheck: "false" });
    const self = {
      el: h("div", { class: "field" }, h("div", { class: "top" }, h("label", { for: name }, label, hint && h("span", { class: "hint" }, ` ${hint}`)), box), knob),
      knob, box, oninput() {},
      get value() { return value; },
      set value(v) { value = +v; show(); },
    };
    const show = (typing) => {
      knob.value = to(clamp(value, min, max)); knob.setAttribute("aria-valuetext", `${format(value)}${unit && ` ${unit}`}`);
      if (!typing) box.value = format(value);
      box.removeAttribute("aria-invalid");
    };
    knob.addEventListener("input", () => { value = from(+knob.value); show(); self.oninput(value); });
    const typed = (done) => {
      const v = read(box.value);
      if (v >= min && v <= max) { if (v !== value) { value = v; show(!done); self.oninput(v); } else if (done) show(); }
      else if (done) { show(); } else box.setAttribute("aria-invalid", "true");
    };
    box.addEventListener("input", () => typed(false)); box.addEventListener("change", () => typed(true)); box.addEventListener("blur", () => show());
    box.title = `from ${format(min)} to ${format(max)}`;
    show(); return self;
  };
  const select = ({ label, options, value = options[0][0] }) => {
    const name = id(), list = h("select", { id: name }, options.map(([key, text]) => h("option", { value: key }, text)));
    const self = { el: h("div", { class: "field" }, h("label", { for: name }, label), list), oninput() {}, get value() { return list.value; }, set value(v) { list.value = v; } };
    list.addEventListener("change", () => self.oninput(list.value)); self.value = value; return self;
  };
  const segmented = ({ label, options, value = options[0][0] }) => {
    const name = id(), inputs = options.map(([key]) => h("input", { type: "radio", name, value: key }));
    const self = {
      el: h("fieldset", { class: "field" }, h("legend", {}, label), h("div", { class: "segments" }, options.map(([, text], i) => h("label", {}, inputs[i], h("span", {}, text))))),
      oninput() {}, get value() { return value; }, set value(v) { value = v; inputs.forEach((input) => { input.checked = input.value === v; }); },
    };
    inputs.forEach((input) => input.addEventListener("change", () => { value = input.value; self.oninput(value); }));
    self.value = value; return self;
  };
  const toggle = ({ label, value = false }) => {
    const box = h("input", { type: "checkbox" });
    const self = { el: h("label", { class: "check" }, box, h("span", {}, label)), oninput() {}, get value() { return box.checked; }, set value(v) { box.checked = Boolean(v); } };
    box.addEventListener("change", () => self.oninput(box.checked)); self.value = value; return self;
  };
  const text = ({ label, rows = 4, placeholder = "", value = "" }) => {
    const name = id(), area = h("textarea", { id: name, rows, placeholder, spellcheck: "false" });
    const self = { el: h("div", { class: "field" }, h("label", { for: name }, label), area), area, oninput() {}, get value() { return area.value; }, set value(v) { area.value = v; } };
    area.addEventListener("input", () => self.oninput(area.value)); self.value = value; return self;
  };

  // charts
  const scale = ([a, b], [p, q], log) => {
    const t = log ? Math.log10 : (v) => v, back = log ? (v) => 10 ** v : (v) => v, k = (q - p) / (t(b) - t(a));
    return Object.assign((v) => p + (t(v) - t(a)) * k, { invert: (px) => back(t(a) + (px - p) / k), domain: [a, b], log });
  };
  const ticks = (axis, room) => {
    const [a, b] = axis.domain;
    if (axis.ticks) return axis.ticks.filter((v) => v >= Math.min(a, b) && v <= Math.max(a, b));
    if (axis.log) {
      const low = Math.ceil(Math.log10(a) - 1e-9), high = Math.floor(Math.log10(b) + 1e-9), every = Math.max(1, Math.ceil((high - low + 1) / room));
      if (high - low >= 1) return range(0, Math.floor((high - low) / every), Math.floor((high - low) / every) + 1 || 1).map((i) => 10 ** (low + i * every)).filter(Number.isFinite);
      return [1, 2, 3, 5, 7].flatMap((m) => [m * 10 ** (low - 1), m * 10 ** low]).filter((v) => v >= a && v <= b).sort((u, v) => u - v);
    }
    const raw = Math.abs(b - a) / room, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 2.5, 5, 10].find((m) => m * power >= raw) * power;
    const low = Math.ceil(Math.min(a, b) / step - 1e-9), high = Math.floor(Math.max(a, b) / step + 1e-9);
    return Array.from({ length: high - low + 1 }, (_, i) => +((low + i) * step).toPrecision(12));
  };
  const chart = ({ label, height = 240, x, y, margin = {}, draw, readout }) => {
    const m = { top: 12, right: 14, bottom: 42, left: 54, ...margin }, call = (v) => (typeof v === "function" ? v() : v);
    const axes = s("g", { class: "axis", "aria-hidden": "true" }), plot = s("g"), grips = s("g"), clip = id();
    const svg = s("svg", { role: "group" }, s("defs", {}, s("clipPath", { id: clip }, s("rect"))), axes, plot, grips);
    const tip = h("div", { class: "tip", "aria-hidden": "true", hidden: true }), el = h("div", { class: "chart" }, svg, tip), handles = new Map();
    let p, width = 0;
    const hint = (px, py, words) => {
      tip.hidden = !words; if (!words) return;
      tip.textContent = words; tip.style.left = `${clamp(px + 12, 0, Math.max(0, width - tip.offsetWidth))}px`; tip.style.top = `${Math.max(0, py - tip.offsetHeight - 8)}px`;
    };
    const path = (points) => { let pen = "M"; return points.map(([u, v]) => { const a = p.x(u), b = p.y(v); if (!Number.isFinite(a + b)) { pen = "M"; return ""; } const d = `${pen}${a.toFixed(1)},${b.toFixed(1)}`; pen = "L"; return d; }).join(""); };
    const look = ({ color: c = "ink", width: w = 1.5, dash, opacity, fill = "none" }) => ({ stroke: color(c), "stroke-width": w, "stroke-dasharray": dash, opacity, fill: fill === "none" ? fill : color(fill), "stroke-linejoin": "round", "stroke-linecap": "round" });
    const add = (node, style, clipped = true) => { if (clipped && !style.free) node.setAttribute("clip-path", `url(#${clip})`); if (style.title) node.append(s("title", {}, style.title)); plot.append(node); return node; };
    const pen = {
      line: (points, style = {}) => add(s("path", { d: path(points), ...look(style) }), style),
      area: (points, style = {}) => add(s("path", { d: `${path(points)}Z`, ...look({ width: 0, fill: style.color, opacity: 0.2, ...style }) }), style),
      dots: (points, style = {}) => points.map(([u, v]) => add(s("circle", { cx: p.x(u), cy: p.y(v), r: style.r ?? 4, ...look({ fill: style.color ?? "ink", color: "surface", width: 1, ...style, ...(style.stroke ? { color: style.stroke } : { color: "surface" }) }) }), style)),
      text: (u, v, words, style = {}) => add(s("text", { x: p.x(u) + (style.dx ?? 0), y: p.y(v) + (style.dy ?? 0), "text-anchor": style.anchor ?? "start", class: "halo-text", style: `fill:${color(style.color ?? "ink")};font-size:${style.size ?? 12}px;font-weight:${style.weight ?? 400}` }, words), style, false),
      vline: (u, style = {}) => add(s("line", { x1: p.x(u), x2: p.x(u), y1: m.top, y2: m.top + p.height, ...look(style) }), style),
      hline: (v, style = {}) => add(s("line", { y1: p.y(v), y2: p.y(v), x1: m.left, x2: m.left + p.width, ...look(style) }), style),
      cells(matrix, { color: paint, title, gap = 0.5 }) {
        const dx = p.width / matrix[0].length, dy = p.height / matrix.length, group = s("g");
        matrix.forEach((line, i) => line.forEach((value, j) => {
          const cell = s("rect", { x: m.left + j * dx, y: m.top + i * dy, width: Math.max(0, dx - gap), height: Math.max(0, dy - gap), style: `fill:${paint(value, i, j)}` });
          if (title) { cell.addEventListener("pointerenter", () => hint(m.left + (j + 1) * dx, m.top + i * dy, title(i, j, value))); cell.addEventListener("pointerleave", () => hint()); }
          group.append(cell);
        }));
        return add(group, {}, false);
      },
      handle(key, options) {
        let grip = handles.get(key);
        if (!grip) {
          const node = s("g", { class: "handle", tabindex: 0, role: "slider" });
          grip = { node }; handles.set(key, grip); grips.append(node);
          const at = (event) => { const box = svg.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
          const moved = (event) => { const [px, py] = at(event); grip.move?.(p.x.invert(clamp(px, m.left, m.left + p.width)), p.y.invert(clamp(py, m.top, m.top + p.height))); };
          node.addEventListener("pointerdown", (event) => { event.preventDefault(); node.setPointerCapture(event.pointerId); node.focus({ preventScroll: true }); grip.held = true; });
          node.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false }); // or the page scrolls away with the drag
          node.addEventListener("pointermove", (event) => { if (grip.held) moved(event); });
          for (const end of ["pointerup", "pointercancel"]) node.addEventListener(end, () => { grip.held = false; });
          node.addEventListener("keydown", (event) => {
            const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1], PageUp: [0, 10], PageDown: [0, -10] }[event.key];
            if (step) { event.preventDefault(); grip.nudge?.(step[0], step[1], event.shiftKey); }
          });
        }
        grip.used = true; Object.assign(grip, { move: options.move, nudge: options.nudge });
        const { x: u, y: v, label: name, text: words, color: c = "ink", r = 8 } = options, px = u === undefined ? null : p.x(u), py = v === undefined ? null : p.y(v);
        const cross = px !== null && py !== null ? [s("circle", { cx: px, cy: py, r: 20, fill: "transparent" }), s("circle", { class: "halo", cx: px, cy: py, r: r + 3, fill: "var(--surface)", opacity: 0.9 }), s("circle", { cx: px, cy: py, r, fill: color(c) })]
          : px !== null ? [s("line", { x1: px, x2: px, y1: m.top, y2: m.top + p.height, stroke: "transparent", "stroke-width": 26 }), s("line", { class: "halo", x1: px, x2: px, y1: m.top, y2: m.top + p.height, stroke: color(c), "stroke-width": 2 }), s("circle", { cx: px, cy: m.top + p.height, r: r - 1, fill: color(c) })]
          : [s("line", { y1: py, y2: py, x1: m.left, x2: m.left + p.width, stroke: "transparent", "stroke-width": 26 }), s("line", { class: "halo", y1: py, y2: py, x1: m.left, x2: m.left + p.width, stroke: color(c), "stroke-width": 2 }), s("circle", { cy: py, cx: m.left, r: r - 1, fill: color(c) })];
        // The nodes stay: a finger whose target is taken out of the page loses its drag.
        const kept = grip.node.children, same = kept.length === cross.length && cross.every((part, i) => part.tagName === kept[i].tagName);
        if (same) cross.forEach((part, i) => { for (const { name: k, value } of part.attributes) kept[i].setAttribute(k, value); });
        else grip.node.replaceChildren(...cross);
        const main = u ?? v;
        for (const [k, value] of Object.entries({ "aria-label": name, "aria-valuenow": main, "aria-valuetext": words ?? si(main), "aria-valuemin": (u === undefined ? p.y : p.x).domain[0], "aria-valuemax": (u === undefined ? p.y : p.x).domain[1] })) grip.node.setAttribute(k, value);
      },
    };
    const redraw = () => {
      width = el.clientWidth || width; if (!width) return;
      const X = { ...call(x) }, Y = { ...call(y) }, H = call(height), w = Math.max(40, width - m.left - m.right), t = H - m.top - m.bottom;
      p = { ...pen, width: w, height: t, left: m.left, top: m.top, x: scale(X.domain, [m.left, m.left + w], X.log), y: scale(Y.domain, [m.top + t, m.top], Y.log), add, hint };
      svg.setAttribute("height", H); svg.setAttribute("viewBox", `0 0 ${width} ${H}`); svg.setAttribute("aria-label", call(label) ?? "");
      const frame = svg.querySelector("clipPath rect"); for (const [k, v] of Object.entries({ x: m.left, y: m.top, width: w, height: t })) frame.setAttribute(k, v);
      const name = (axis) => axis.format ?? (axis.log ? (v) => (v >= 1e-2 && v < 1e4 ? num(v) : sci(v, 1)) : (v) => num(v, 4));
      axes.replaceChildren(
        ...ticks(X, Math.max(2, w / 74)).flatMap((v) => [X.grid !== false && s("line", { x1: p.x(v), x2: p.x(v), y1: m.top, y2: m.top + t }), s("text", { x: p.x(v), y: m.top + t + 16, "text-anchor": "middle" }, name(X)(v))].filter(Boolean)),
        ...ticks(Y, Math.max(2, t / 34)).flatMap((v) => [Y.grid !== false && s("line", { y1: p.y(v), y2: p.y(v), x1: m.left, x2: m.left + w }), s("text", { x: m.left - 7, y: p.y(v) + 4, "text-anchor": "end" }, name(Y)(v))].filter(Boolean)),
        ...[X.label && s("text", { x: m.left + w / 2, y: H - 6, "text-anchor": "middle" }, X.label), Y.label && s("text", { transform: `translate(13 ${m.top + t / 2}) rotate(-90)`, "text-anchor": "middle" }, Y.label)].filter(Boolean));
      plot.replaceChildren(); for (const grip of handles.values()) grip.used = false;
      draw(p);
      for (const [key, grip] of handles) if (!grip.used) { grip.node.remove(); handles.delete(key); }
      svg.setAttribute("role", handles.size ? "group" : "img");
    };
    new ResizeObserver(() => { if (Math.abs(el.clientWidth - width) > 1) redraw(); }).observe(el);
    if (readout) {
      svg.addEventListener("pointermove", (event) => { if (!p || event.buttons) return; const box = svg.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top; const inside = px >= m.left && px <= m.left + p.width && py >= m.top && py <= m.top + p.height; hint(px, py, inside ? readout(p.x.invert(px), p.y.invert(py), p) : null); });
      svg.addEventListener("pointerleave", () => hint());
    }
    return { el, redraw, svg, hint, get plot() { return p; } };
  };

  return { palette, h, s, color, shade, clamp, range, logrange, num, sci, si, parse, put, bind, shim, live, mount, panel, row, fold, button, slider, select, segmented, toggle, text, scale, chart, isDark };
})();
