/* A causal language model that runs here: embedding, blocks of attention and SwiGLU, head; then sampling. */
const LM = (() => {
  const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
  const read = (text, Type) => new Type(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const load = (packed) => {
    const w = Object.fromEntries(Object.entries(packed.weights).map(([name, part]) => {
      if (part.values) return [name, read(part.values, Float32Array)];
      const scale = read(part.scale, Float32Array), columns = part.letters.length / scale.length;
      return [name, Float32Array.from(part.letters, (letter, i) => (LETTERS.indexOf(letter) - 31) * scale[Math.floor(i / columns)])];
    }));
    const pairs = packed.d / packed.heads / 2, turns = Array.from({ length: pairs }, (_, i) => packed.theta ** (-i / pairs));
    return { ...packed, w, turns, head: w["head.weight"] || w["embedding.weight"], memory: { start: 0, bytes: [], keys: [], values: [], logits: null, surprise: [] } };
  };
  const times = (matrix, x) => {                                   // matrix (rows × x.length) · x
    const n = x.length, out = new Float64Array(matrix.length / n);
    for (let i = 0, k = 0; i < out.length; i++) { let sum = 0; for (let j = 0; j < n; j++) sum += matrix[k++] * x[j]; out[i] = sum; }
    return out;
  };
  const norm = (x, gain, eps) => { let sum = 0; for (const v of x) sum += v * v; const scale = 1 / Math.sqrt(sum / x.length + eps); return x.map((v, i) => v * scale * gain[i]); };
  const rope = (x, m, position) => {
    const half = m.turns.length;
    for (let head = 0; head < x.length; head += 2 * half) for (let i = 0; i < half; i++) {
      const c = Math.cos(position * m.turns[i]), s = Math.sin(position * m.turns[i]), a = x[head + i], b = x[head + half + i];
      x[head + i] = a * c - b * s; x[head + half + i] = b * c + a * s;
    }
    return x;
  };
  const softmax = (x) => { let top = -Infinity, sum = 0; for (const v of x) top = Math.max(top, v); const e = Float64Array.from(x, (v) => Math.exp(v - top)); for (const v of e) sum += v; return e.map((v) => v / sum); };
  const attend = (m, q, keys, values) => {
    const width = m.d / m.heads, out = new Float64Array(m.d);
    for (let head = 0; head < m.d; head += width) {
      const weights = softmax(keys.map((k) => { let sum = 0; for (let i = head; i < head + width; i++) sum += q[i] * k[i]; return sum / Math.sqrt(width); }));
      values.forEach((v, t) => { for (let i = head; i < head + width; i++) out[i] += weights[t] * v[i]; });
    }
    return out;
  };
  const step = (m, memory, byte) => {                              // one byte in, the logits of the next one out
    const position = memory.bytes.length - memory.start, at = (n, part) => m.w[`layers.${n}.${part}.weight`];
    let x = Float64Array.from(m.w["embedding.weight"].subarray(byte * m.d, (byte + 1) * m.d));
    for (let n = 0; n < m.layers; n++) {
      const h = norm(x, at(n, "mixer_norm"), m.eps);
      (memory.keys[n] ||= []).push(rope(times(at(n, "mixer.k_proj"), h), m, position));
      (memory.values[n] ||= []).push(times(at(n, "mixer.v_proj"), h));
      const y = times(at(n, "mixer.o_proj"), attend(m, rope(times(at(n, "mixer.q_proj"), h), m, position), memory.keys[n], memory.values[n]));
      x = x.map((v, i) => v + y[i]);
      const g = norm(x, at(n, "ffn_norm"), m.eps), up = times(at(n, "ffn.up_proj"), g);
      const z = times(at(n, "ffn.down_proj"), times(at(n, "ffn.gate_proj"), g).map((v, i) => (v / (1 + Math.exp(-v))) * up[i]));
      x = x.map((v, i) => v + z[i]);
    }
    memory.bytes.push(byte);
    memory.logits = times(m.head, norm(x, m.w["final_norm.weight"], m.eps));
  };
  /* Logits after `bytes`. What was read before is not read again; beyond the context the window moves on in jumps. */
  const follow = (m, bytes) => {
    const start = Math.max(0, Math.ceil((bytes.length - m.context) / 64) * 64);
    let memory = m.memory;
    const same = memory.bytes.length <= bytes.length && memory.start === start && memory.bytes.every((b, i) => b === bytes[i]);
    if (!same) {
      let kept = 0; while (kept < bytes.length && memory.bytes[kept] === bytes[kept]) kept++;
      memory = m.memory = { start, bytes: bytes.slice(0, start), keys: [], values: [], logits: null, surprise: memory.surprise.slice(0, Math.min(kept, start)) };
    }
    while (memory.bytes.length < bytes.length) {
      const byte = bytes[memory.bytes.length];
      if (memory.logits) memory.surprise[memory.bytes.length] = -Math.log(softmax(memory.logits)[byte]);
      step(m, memory, byte);
    }
    return memory;
  };
  /* softmax(logits / temperature), cut to the top_k, then to the smallest set that reaches top_p, as llmlib.generate.sample */
  const distribution = (logits, temperature, top_k, top_p) => {
    if (temperature === 0) { const best = logits.indexOf(Math.max(...logits)); return Float64Array.from(logits, (_, i) => +(i === best)); }
    const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a]), least = logits[order[Math.min(top_k, logits.length) - 1]];
    const p = softmax(logits.map((v) => (v < least ? -Infinity : v / temperature)));
    let before = 0;
    for (const i of order) { const mine = p[i]; if (before >= top_p) p[i] = 0; before += mine; }
    const sum = p.reduce((a, b) => a + b, 0);
    return p.map((v) => v / sum);
  };
  const uniform = (seed, n) => {                                   // the n-th draw of a seed: the same text each time
    let t = (Math.imul(seed + 1, 0x9e3779b1) ^ Math.imul(n + 1, 0x85ebca6b)) >>> 0;
    t = Math.imul(t ^ (t >>> 15), t | 1); t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  const draw = (p, u) => { let i = 0, sum = p[0]; while (sum <= u && i < p.length - 1) sum += p[++i]; return p[i] > 0 ? i : p.indexOf(Math.max(...p)); };
  return { load, follow, softmax, distribution, uniform, draw };
})();

export default {
  LM,
  render({ model, el }) {
    const { h } = lm, net = LM.load(model.get("model"));
    const weights = Object.values(net.w).reduce((sum, w) => sum + w.length, 0);
    const encode = (text) => Array.from(new TextEncoder().encode(text)), start = model.get("text");
    const char = (b) => (b === 32 ? "space" : b === 10 ? "newline" : b === 9 ? "tab" : b > 32 && b < 127 ? String.fromCharCode(b) : `byte ${b}`);
    const percent = (p) => (p > 0 && p < 0.0005 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`);
    const ui = lm.panel(el, { title: "A language model in this page", note: `${weights.toLocaleString("en").replace(/,/g, "\u202f")} weights of 6 bits, in your browser and nowhere else. Edit the text, click a byte to add it, or let the model write.` });
    const text = lm.bind(model, "text", lm.text({ label: "text", rows: 3 }));
    const temperature = lm.slider({ label: "temperature", min: 0, max: 2, step: 0.05 });
    const top_k = lm.slider({ label: "top-k", min: 1, max: 256, log: true, format: (v) => String(Math.round(v)) });
    const top_p = lm.slider({ label: "top-p", min: 0.05, max: 1, step: 0.01 });
    for (const [key, control] of Object.entries({ temperature, top_k, top_p })) lm.bind(model, key, control);
    let left = 0, frame = 0;
    const next = () => {
      const bytes = encode(model.get("text")), { logits } = LM.follow(net, bytes);
      const p = LM.distribution(logits, model.get("temperature"), Math.round(model.get("top_k")), model.get("top_p"));
      const shown = p.map((v, i) => (i < 128 ? v : 0)), sum = shown.reduce((a, b) => a + b, 0);   // half a letter can't stand in the text
      return LM.draw(shown.map((v) => v / sum), LM.uniform(model.get("seed"), bytes.length));
    };
    const add = (byte) => lm.put(model, { text: model.get("text") + String.fromCharCode(byte) });
    const write = () => { if (left > 0) { left--; add(next()); frame = requestAnimationFrame(write); } label(); };
    const run = lm.button("Write 100 bytes", () => { cancelAnimationFrame(frame); left = left ? 0 : 100; write(); });
    const label = () => { run.textContent = left ? "Stop" : "Write 100 bytes"; };
    const one = lm.button("Write one byte", () => add(next()));
    const other = lm.button("Other luck", () => lm.put(model, { seed: model.get("seed") + 1 }), { title: "another seed: other draws from the same probabilities" });
    const again = lm.button("Start again", () => { left = 0; label(); lm.put(model, { text: start }); });
    const bars = h("ol", { class: "bars", "aria-label": "The likeliest next bytes" });
    const shaded = h("div", { class: "shaded", tabindex: 0, role: "group", "aria-label": "The text, each byte shaded by the model's surprise" });
    ui.root.append(h("style", {}, `
      .two { display:grid; grid-template-columns:minmax(0,1fr) minmax(0,1fr); gap:6px 26px; margin-top:10px; } @media (max-width:640px) { .two { grid-template-columns:minmax(0,1fr); } }
      .lm h4 { font-size:.93em; font-weight:600; margin:.2em 0 .4em; } .bars { list-style:none; margin:0; padding:0; }
      .lm .bars button { display:grid; grid-template-columns:5.2em 1fr 4.4em; gap:8px; align-items:center; width:100%; border:0; background:none; padding:2px 4px; min-height:26px; text-align:left; font-variant-numeric:tabular-nums; }
      .lm .bars button:hover { background:var(--raise); } .bars code { font:13px/1.3 ui-monospace,Menlo,Consolas,monospace; }
      .bars .bar { height:13px; border-radius:3px; background:var(--line); position:relative; overflow:hidden; } .bars .bar i { position:absolute; inset:0 auto 0 0; background:var(--blue); border-radius:3px; } .bars .odds { text-align:right; }
      .shaded { font:13px/1.75 ui-monospace,Menlo,Consolas,monospace; white-space:pre-wrap; overflow-wrap:anywhere; max-height:290px; overflow-y:auto; border:1px solid var(--line); border-radius:8px; padding:8px 10px; } .shaded span { border-radius:2px; }
      .lm .key { color:var(--soft); font-size:.86em; display:flex; gap:8px; align-items:center; margin-top:6px; } .key i { flex:0 0 120px; height:10px; border-radius:3px; background:linear-gradient(90deg, transparent, color-mix(in srgb, var(--orange) 60%, transparent)); border:1px solid var(--line); }`));
    ui.controls.append(temperature.el, top_k.el, top_p.el);
    ui.root.insertBefore(h("div", {}, text.el, h("div", { class: "row", style: "margin-top:8px" }, run, one, other, again)), ui.controls);
    ui.body.append(h("div", { class: "two" },
      h("div", {}, h("h4", {}, "What comes next"), bars),
      h("div", {}, h("h4", {}, "What each byte cost"), shaded, h("div", { class: "key" }, "expected", h("i"), "5 nats or more"))));
    const update = () => {
      const bytes = encode(model.get("text"));
      if (!bytes.length) { bars.replaceChildren(); shaded.replaceChildren(); ui.say("Type at least one byte: a causal model starts from something."); return; }
      const { logits, surprise } = LM.follow(net, bytes);
      const p = LM.distribution(logits, model.get("temperature"), Math.round(model.get("top_k")), model.get("top_p"));
      const order = Array.from(p.keys()).sort((a, b) => logits[b] - logits[a]).slice(0, 10), held = bars.getRootNode().activeElement;
      const place = held ? Array.from(bars.querySelectorAll("button")).indexOf(held) : -1;
      bars.replaceChildren(...order.map((b) => h("li", {}, h("button", { type: "button", onclick: () => add(b), disabled: b > 127 || undefined, "aria-label": `add ${char(b)}, ${percent(p[b])}` },
        h("code", {}, char(b)), h("span", { class: "bar" }, h("i", { style: `width:${100 * p[b]}%` })), h("span", { class: "odds" }, percent(p[b]))))));
      if (place >= 0) bars.querySelectorAll("button")[place]?.focus();
      const from = Math.max(0, bytes.length - 600), parts = new TextDecoder();
      const pieces = [];
      for (let i = from; i < bytes.length; i++) {
        const piece = parts.decode(Uint8Array.of(bytes[i]), { stream: true }), nats = surprise[i];
        if (piece) pieces.push(h("span", { style: nats === undefined ? "" : `background:color-mix(in srgb, var(--orange) ${Math.round(60 * lm.clamp(nats / 5, 0, 1))}%, transparent)`, title: nats === undefined ? "" : `${char(bytes[i])}: ${lm.num(nats, 3)} nats, probability ${percent(Math.exp(-nats))}` }, piece));
      }
      shaded.replaceChildren(...pieces); shaded.scrollTop = shaded.scrollHeight;
      const known = surprise.filter((v) => v !== undefined), mean = known.reduce((a, b) => a + b, 0) / known.length;
      const alive = p.reduce((n, v) => n + (v > 0), 0), entropy = p.reduce((sum, v) => sum - (v > 0 ? v * Math.log(v) : 0), 0);
      if (!left) ui.say(`Next: “${char(order[0])}” with ${percent(p[order[0]])}. ${alive} of 256 bytes can be drawn, with an entropy of ${lm.num(entropy, 2)} nats.${known.length ? ` So far this text cost the model ${lm.num(mean, 3)} nats per byte.` : ""}`);
    };
    return lm.live(model, ui, update);
  },
};
