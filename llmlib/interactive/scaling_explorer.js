/* The scaling-law explorer. First the formulas, each the twin of the function of that name in llmlib.scaling (a test holds
   them together to 1e-9); then the fit; then the view. N parameters, D tokens, L nats per token, C = 6ND FLOPs. */
export const formulas = (() => {
  const PF_DAY = 8.64e19;

  // L = E + A/N^alpha + B/D^beta
  const parametric = ({ E, A, B, alpha, beta }) => {
    const a = beta / (alpha + beta), b = alpha / (alpha + beta), G = ((alpha * A) / (beta * B)) ** (1 / (alpha + beta));
    const law = {
      E, A, B, alpha, beta, a, b, G,
      loss: (N, D) => E + A * N ** -alpha + B * D ** -beta,
      optimal: (C) => [G * (C / 6) ** a, (C / 6) ** b / G],
      tokens_per_parameter(C) { const [N, D] = law.optimal(C); return D / N; },
      best_loss: (C) => law.loss(...law.optimal(C)),
      compute_for: (L) => 6 * ((A * G ** -alpha + B * G ** beta) / (L - E)) ** ((alpha + beta) / (alpha * beta)),
      wasted: (N, D) => 1 - law.compute_for(law.loss(N, D)) / (6 * N * D),
      tokens_for(N, L) { const room = L - E - A * N ** -alpha; return room > 0 ? (B / room) ** (1 / beta) : Infinity; },
      matching_parameters: (D) => G * (G * D) ** (beta / alpha),
    };
    return law;
  };
  const kaplan = ({ alpha_N, alpha_D, N_c, D_c, a, b }) => {
    const law = {
      alpha_N, alpha_D, N_c, D_c, a, b,
      loss: (N, D) => ((N_c / N) ** (alpha_N / alpha_D) + D_c / D) ** alpha_D,
      optimal: (C) => [1.3e9 * (C / PF_DAY) ** a, 2e10 * (C / PF_DAY) ** b],
      joint_optimal(C) { const r = alpha_N / alpha_D, N = ((r * N_c ** r * C) / (6 * D_c)) ** (1 / (1 + r)); return [N, C / (6 * N)]; },
      tokens_per_parameter(C) { const [N, D] = law.optimal(C); return D / N; },
    };
    return law;
  };
  // halves [low, high]; below(x): the sought point lies below x
  const bisect = (low, high, below, times = 200) => {
    for (let i = 0; i < times; i++) { const middle = (low + high) / 2; if (below(middle)) high = middle; else low = middle; }
    return (low + high) / 2;
  };

  // less data than wished (Muennighoff et al., 2305.16264)
  const effective_amount = (amount, unique, reach) => Math.min(amount, unique) - unique * reach * Math.expm1(-Math.max(amount / unique - 1, 0) / reach);
  const data_constrained = (N, D, unique, law, reach) =>
    law.loss(effective_amount(N, law.matching_parameters(Math.min(D, unique)), reach.parameters), effective_amount(D, unique, reach.data));
  const data_constrained_optimal = (C, unique, law, reach) => {
    const N = Math.exp(bisect(0, Math.log(C / 6), (x) => {
      const n = Math.exp(x), D = C / (6 * n), base = law.matching_parameters(Math.min(D, unique));
      const n_worth = effective_amount(n, base, reach.parameters), d_worth = effective_amount(D, unique, reach.data);
      const s_n = (n / n_worth) * Math.exp(-Math.max(n / base - 1, 0) / reach.parameters), s_d = (D / d_worth) * Math.exp(-Math.max(D / unique - 1, 0) / reach.data);
      return law.beta * law.B * d_worth ** -law.beta * s_d > law.alpha * law.A * n_worth ** -law.alpha * s_n;
    }));
    return [N, C / (6 * N)];
  };

  // a model that serves (Sardana et al., 2401.00448)
  const lifetime_flops = (N, D, served) => 6 * N * D + 2 * N * served;
  const inference_aware = (law, L, served) => {
    const room = L - law.E, low = Math.log(law.A / room) / law.alpha;
    const N = Math.exp(bisect(low, low + 60, (x) => {
      const u = law.A * Math.exp(-law.alpha * x), v = room - u, D = v > 0 ? (law.B / v) ** (1 / law.beta) : Infinity;
      return v > 0 && law.alpha * u < law.beta * v * (1 + served / (3 * D));
    }));
    return [N, law.tokens_for(N, L)];
  };
  // the same when data repeats: least lifetime FLOPs on the curve of equal loss, by golden section in log N
  const served_and_constrained = (law, L, served, unique, reach, start) => {
    const tokens = (N) => {
      if (data_constrained(N, 1e30, unique, law, reach) > L) return Infinity;
      return Math.exp(bisect(Math.log(1), Math.log(1e30), (x) => data_constrained(N, Math.exp(x), unique, law, reach) < L, 64));
    };
    const cost = (x) => { const N = Math.exp(x), D = tokens(N); return D === Infinity ? 1e99 * (1 + Math.exp(-x / 50)) : lifetime_flops(N, D, served); };
    let low = Math.log(start) - 7, high = Math.log(start) + 0.5;
    const g = (Math.sqrt(5) - 1) / 2;
    let p = high - g * (high - low), q = low + g * (high - low), fp = cost(p), fq = cost(q);
    for (let i = 0; i < 60; i++) {
      if (fp < fq) { high = q; q = p; fq = fp; p = high - g * (high - low); fp = cost(p); } else { low = p; p = q; fp = fq; q = low + g * (high - low); fq = cost(q); }
    }
    const N = Math.exp((low + high) / 2);
    return [N, tokens(N)];
  };

  // experts (Ludziejewski et al., 2502.05172): the table comes with the page
  const effective_experts = (experts, { start, limit }) => 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / limit)) + 1 / limit);
  const moe = (experts, table) => {
    const at = Math.log(effective_experts(experts, table)), knots = table.rows.map((row) => Math.log(effective_experts(row[0], table)));
    const i = Math.min(knots.length - 2, Math.max(0, knots.findLastIndex((knot) => knot <= at))), t = (at - knots[i]) / (knots[i + 1] - knots[i]);
    const mix = (f) => f(table.rows[i]) * (1 - t) + f(table.rows[i + 1]) * t;
    return parametric({ E: table.floor, A: Math.exp(mix((r) => Math.log(r[1]))), alpha: mix((r) => r[2]), B: Math.exp(mix((r) => Math.log(r[3]))), beta: mix((r) => r[4]) });
  };
  const moe_total_parameters = (active, experts, share = 2 / 3) => active * (1 - share + share * experts);

  // precision (Kumar et al., 2411.04330): the share of N that counts
  const precision = (N, bits, reach) => Object.keys(reach).reduce((kept, name) => kept * -Math.expm1(-bits[name] / reach[name]), N);

  const learning_rate_and_batch = (N, D, name) => (name === "steplaw" ? [1.79 * N ** -0.713 * D ** 0.307, 0.58 * D ** 0.571] : [0.3118 * (6 * N * D) ** -0.125, 0.292 * (6 * N * D) ** 0.3271]);
  const training_cost = (flops, chip, count, mfu, price, overhead = 1.2) => {
    const hours = flops / (chip.peak * mfu * 3600);
    return { days: hours / count / 24, chip_hours: hours, dollars: hours * price, energy_kwh: ((hours * chip.watts) / 1000) * overhead };
  };

  // which parameters are counted (Pearce & Song, 2406.12907)
  const total_parameters = (N, omega = 47491) => N + omega * N ** (1 / 3);
  const without_embeddings = (total, omega = 47491) => Math.exp(bisect(-60, Math.log(total), (x) => total_parameters(Math.exp(x), omega) > total));
  const kaplan_budget = (law, N, omega = 47491) => {
    const T = total_parameters(N, omega), slope = 1 + (omega / 3) * N ** (-2 / 3);
    return 6 * N * ((law.beta * law.B * T ** (law.alpha + 1)) / (law.alpha * law.A * N * slope)) ** (1 / law.beta);
  };
  const fit_power_law = (C, y) => {
    const u = C.map(Math.log), v = y.map(Math.log), mean = (z) => z.reduce((s, x) => s + x, 0) / z.length, um = mean(u), vm = mean(v);
    const exponent = u.reduce((s, x, i) => s + (x - um) * (v[i] - vm), 0) / u.reduce((s, x) => s + (x - um) ** 2, 0);
    return { exponent, factor: Math.exp(vm - exponent * um) };
  };
  const kaplan_exponent = (law, low = 768, high = 1.5e9, omega = 47491, points = 20) => {
    const N = lm.logrange(low, high, points);
    return fit_power_law(N.map((n) => kaplan_budget(law, n, omega)), N).exponent;
  };

  // the parabola through an isoFLOP curve (2603.22339)
  const solve = (M, y) => {
    const n = y.length, A = M.map((row, i) => [...row, y[i]]);
    for (let i = 0; i < n; i++) {
      let p = i; for (let j = i + 1; j < n; j++) if (Math.abs(A[j][i]) > Math.abs(A[p][i])) p = j;
      [A[i], A[p]] = [A[p], A[i]];
      for (let j = i + 1; j < n; j++) { const f = A[j][i] / A[i][i]; for (let k = i; k <= n; k++) A[j][k] -= f * A[i][k]; }
    }
    const x = Array(n).fill(0);
    for (let i = n - 1; i >= 0; i--) x[i] = (A[i][n] - x.reduce((s, v, k) => s + (k > i ? A[i][k] * v : 0), 0)) / A[i][i];
    return x;
  };
  const parabola_vertex = (N, loss) => {
    const x = N.map(Math.log), mean = x.reduce((s, v) => s + v, 0) / x.length, z = x.map((v) => v - mean), half = Math.max(...z.map(Math.abs)), u = z.map((v) => v / half);
    const power = (k) => u.reduce((s, v) => s + v ** k, 0), moment = (k) => u.reduce((s, v, i) => s + v ** k * loss[i], 0);
    const [k0, k1, k2] = solve([0, 1, 2].map((i) => [0, 1, 2].map((j) => power(i + j))), [0, 1, 2].map(moment));
    const c0 = k0, c1 = k1 / half, c2 = k2 / (half * half);
    return { N: Math.exp(mean - c1 / (2 * c2)), loss: c0 - (c1 * c1) / (4 * c2), curvature: c2, at: (n) => { const v = Math.log(n) - mean; return c0 + c1 * v + c2 * v * v; } };
  };
  const parabola_points = (law, C, width = 10, shift = 1, points = 9) => lm.logrange(1 / width, width, points).map((k) => law.optimal(C)[0] * shift * k);
  const parabola_bias = (law, C, width = 10, shift = 1, points = 9) => {
    const N = parabola_points(law, C, width, shift, points);
    return parabola_vertex(N, N.map((n) => law.loss(n, C / (6 * n)))).N / law.optimal(C)[0] - 1;
  };

  // fitting: runs are [N, D, loss] rows; the algorithm is llmlib.scaling's
  const EXPONENTS = lm.logrange(0.03, 1.5, 18);
  const sum = (list) => list.reduce((total, v) => total + v, 0);
  const eigen = (matrix) => {
    const n = matrix.length, A = matrix.map((row) => [...row]), V = A.map((_, i) => A.map((__, j) => +(i === j)));
    for (let sweep = 0; sweep < 60; sweep++) {
      let off = 0; for (let i = 0; i < n; i++) for (let j = 0; j < i; j++) off += A[i][j] ** 2;
      if (off < 1e-300) break;
      for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) {
        if (A[p][q] === 0) continue;
        const theta = (A[q][q] - A[p][p]) / (2 * A[p][q]), t = (Math.sign(theta) || 1) / (Math.abs(theta) + Math.sqrt(theta * theta + 1)), c = 1 / Math.sqrt(t * t + 1), s = t * c;
        for (let k = 0; k < n; k++) { const x = A[k][p], y = A[k][q]; A[k][p] = c * x - s * y; A[k][q] = s * x + c * y; }
        for (let k = 0; k < n; k++) { const x = A[p][k], y = A[q][k]; A[p][k] = c * x - s * y; A[q][k] = s * x + c * y; }
        for (let k = 0; k < n; k++) { const x = V[k][p], y = V[k][q]; V[k][p] = c * x - s * y; V[k][q] = s * x + c * y; }
      }
    }
    return { values: A.map((row, i) => row[i]), vectors: V };
  };
  // log of the fitted loss, and the three terms' shares of it
  const shares = ([a, b, e, alpha, beta], x, y) => {
    const u = a - alpha * x, v = b - beta * y, top = Math.max(u, v, e), p = Math.exp(u - top), q = Math.exp(v - top), s = Math.exp(e - top), total = p + q + s;
    return [top + Math.log(total), p / total, q / total, s / total];
  };
  const huber = (r, delta) => { const m = Math.abs(r); return m <= delta ? (m * m) / 2 : delta * (m - delta / 2); };
  const objective = (theta, P, delta) => { let total = 0; for (let i = 0; i < P.n; i++) total += P.w[i] * huber(P.t[i] - shares(theta, P.x[i], P.y[i])[0], delta); return total; };
  const grid = (P, keep = 3) => {
    const found = [], least = 1e-3 * Math.min(...P.loss), u = EXPONENTS.map((k) => P.x.map((x, i) => Math.exp(-k * x) / P.loss[i])), v = EXPONENTS.map((k) => P.y.map((y, i) => Math.exp(-k * y) / P.loss[i])), one = P.loss.map((l) => 1 / l);
    const dot = (f, g) => { let total = 0; for (let i = 0; i < P.n; i++) total += P.w[i] * f[i] * g[i]; return total; }, ones = P.loss.map(() => 1);
    for (let j = 0; j < EXPONENTS.length; j++) for (let i = 0; i < EXPONENTS.length; i++) {
      const basis = [u[i], v[j], one], gram = basis.map((f) => basis.map((g) => dot(f, g))), moment = basis.map((f) => dot(f, ones)), ridge = 1e-9 * (gram[0][0] + gram[1][1] + gram[2][2]);
      const x = solve(gram.map((row, k) => row.map((value, l) => value + (k === l ? ridge : 0))), moment).map((value) => Math.max(value, least));
      const squares = sum(x.map((value, k) => value * sum(gram[k].map((g, l) => g * x[l])))) - 2 * sum(x.map((value, k) => value * moment[k]));
      found.push([squares, [...x.map(Math.log), EXPONENTS[i], EXPONENTS[j]]]);
    }
    return found.sort((f, g) => f[0] - g[0]).slice(0, keep).map(([, theta]) => theta);
  };
  const newton = (theta, P, delta, damping) => {
    const g = [0, 0, 0, 0, 0], H = g.map(() => [0, 0, 0, 0, 0]), gauss = [1e-300, 1e-300, 1e-300, 1e-300, 1e-300];
    for (let i = 0; i < P.n; i++) {
      const x = P.x[i], y = P.y[i], [fitted, p, q, s] = shares(theta, x, y), r = P.t[i] - fitted, pull = P.w[i] * Math.min(delta, Math.max(-delta, r)), both = P.w[i] * +(Math.abs(r) <= delta) + pull, soft = (P.w[i] * delta) / Math.max(Math.abs(r), delta), J = [p, q, s, -p * x, -q * y];
      for (let k = 0; k < 5; k++) { g[k] -= pull * J[k]; gauss[k] += soft * J[k] * J[k]; for (let l = 0; l < 5; l++) H[k][l] += both * J[k] * J[l]; }
      H[0][0] -= pull * p; H[1][1] -= pull * q; H[2][2] -= pull * s; H[3][3] -= pull * p * x * x; H[4][4] -= pull * q * y * y;
      H[0][3] += pull * p * x; H[3][0] += pull * p * x; H[1][4] += pull * q * y; H[4][1] += pull * q * y;
    }
    const unit = gauss.map((v) => 1 / Math.sqrt(v)), { values, vectors } = eigen(H.map((row, k) => row.map((v, l) => v * unit[k] * unit[l])));
    const turned = values.map((value, j) => sum(vectors.map((row, i) => row[j] * g[i] * unit[i])) / (Math.abs(value) + damping));
    return unit.map((scale, i) => -scale * sum(vectors[i].map((v, j) => v * turned[j])));
  };
  const polish = (start, P, delta) => {
    let theta = start, value = objective(theta, P, delta), damping = 1e-3, stalled = 0;
    const floor = Math.min(...P.t) + Math.log(1e-9);
    for (let step = 0; step < 300 && stalled < 8; step++) {
      const move = newton(theta, P, delta, damping), trial = theta.map((v, i) => v + lm.clamp(move[i], -1.5, 1.5));
      trial[2] = Math.max(trial[2], floor); trial[3] = lm.clamp(trial[3], 1e-3, 10); trial[4] = lm.clamp(trial[4], 1e-3, 10);
      const now = objective(trial, P, delta), gain = value - now;
      stalled = gain > 1e-13 * value ? 0 : stalled + 1;
      damping = lm.clamp(gain > 0 ? damping / 4 : damping * 6, 1e-12, 1e9);
      if (gain > 0) { theta = trial; value = now; }
    }
    return { theta, value };
  };
  const problem = (runs, weights) => {
    const x = runs.map((r) => Math.log(r[0])), y = runs.map((r) => Math.log(r[1])), x0 = sum(x) / x.length, y0 = sum(y) / y.length;
    return { n: runs.length, x: x.map((v) => v - x0), y: y.map((v) => v - y0), t: runs.map((r) => Math.log(r[2])), loss: runs.map((r) => r[2]), w: weights || runs.map(() => 1), x0, y0 };
  };
  const constants = (theta, P) => ({ E: Math.exp(theta[2]), A: Math.exp(theta[0] + theta[3] * P.x0), B: Math.exp(theta[1] + theta[4] * P.y0), alpha: theta[3], beta: theta[4] });
  // null, or what is wrong with the runs
  const complaint = (runs) => {
    const bad = runs.findIndex((r) => !r.every((v) => Number.isFinite(v) && v > 0));
    if (bad >= 0) return `run ${bad + 1} has a value that is not a positive number: leave out runs that diverged`;
    if (runs.length < 6) return `${runs.length} runs can't determine 5 constants: give at least 6, better 20 or more`;
    const P = problem(runs), xx = sum(P.x.map((v) => v * v)), yy = sum(P.y.map((v) => v * v)), xy = sum(P.x.map((v, i) => v * P.y[i])), { values } = eigen([[xx, xy], [xy, yy]]), [low, high] = values.map((v) => Math.sqrt(Math.max(v, 0))).sort((u, v) => u - v);
    return low < 1e-3 * Math.max(high, 1e-3) ? "all runs lie on one line, such as one ratio of tokens to parameters: add runs of other ratios" : null;
  };
  const fit_parametric = (runs, delta = 1e-3, weights = null) => {
    const P = problem(runs, weights), best = grid(P).map((start) => polish(start, P, delta)).reduce((f, g) => (g.value < f.value ? g : f));
    return { ...constants(best.theta, P), objective: best.value };
  };
  const residuals = (law, runs) => runs.map(([N, D, L]) => Math.log(L / law.loss(N, D)));
  const huber_objective = (law, runs, delta = 1e-3) => sum(residuals(law, runs).map((r) => huber(r, delta)));
  const drop_worst = (runs, k, delta) => {
    if (!k) return runs;
    const size = residuals(parametric(fit_parametric(runs, delta)), runs).map(Math.abs), order = size.map((_, i) => i).sort((i, j) => size[j] - size[i]), out = new Set(order.slice(0, k));
    return runs.filter((_, i) => !out.has(i));
  };
  /* What a stock quasi-Newton routine makes of the *mean*: BFGS in the raw constants from a grid of starts, with SciPy's
     default tolerances for L-BFGS-B, which are absolute (|gradient| < 1e-5, gain < 2.2e-9·max(|f|, 1)). */
  const fit_stock = (runs, delta = 1e-3) => {
    const n = runs.length, P = { ...problem(runs), x0: 0, y0: 0 }; P.x = runs.map((r) => Math.log(r[0])); P.y = runs.map((r) => Math.log(r[1])); P.w = runs.map(() => 1 / n);
    const slope = (theta) => { const g = [0, 0, 0, 0, 0]; for (let i = 0; i < n; i++) { const [f, p, q, s] = shares(theta, P.x[i], P.y[i]), pull = lm.clamp(P.t[i] - f, -delta, delta) / n; g[0] -= pull * p; g[1] -= pull * q; g[2] -= pull * s; g[3] += pull * p * P.x[i]; g[4] += pull * q * P.y[i]; } return g; };
    let best = null;
    for (const e of [-1, 0, 1]) for (const a of [0, 10, 20]) for (const b of [0, 10, 20]) for (const alpha of [0, 0.5, 1]) for (const beta of [0, 0.5, 1]) {
      let theta = [a, b, e, alpha, beta], f = objective(theta, P, delta), g = slope(theta), H = g.map((_, i) => g.map((__, j) => +(i === j)));
      for (let step = 0; step < 60 && Math.max(...g.map(Math.abs)) > 1e-5; step++) {
        const d = H.map((row) => -sum(row.map((v, j) => v * g[j]))), down = sum(d.map((v, i) => v * g[i]));
        if (!(down < 0)) break;
        let t = step ? 1 : Math.min(1, 1 / Math.hypot(...g)), next, value;
        for (let k = 0; k < 20; k++, t /= 2) { next = theta.map((v, i) => v + t * d[i]); value = objective(next, P, delta); if (value <= f + 1e-4 * t * down) break; }
        if (!(value < f)) break;
        const h = slope(next), s = next.map((v, i) => v - theta[i]), y = h.map((v, i) => v - g[i]), sy = sum(s.map((v, i) => v * y[i])), gain = f - value;
        if (sy > 1e-14) { const Hy = H.map((row) => sum(row.map((v, j) => v * y[j]))), yHy = sum(y.map((v, i) => v * Hy[i])); H = H.map((row, i) => row.map((v, j) => v + ((1 + yHy / sy) * s[i] * s[j] - s[i] * Hy[j] - Hy[i] * s[j]) / sy)); }
        theta = next; f = value; g = h;
        if (gain <= 2.2e-9 * Math.max(Math.abs(f), 1)) break;
      }
      if (Number.isFinite(f) && (!best || f < best.f)) best = { f, theta };
    }
    return { ...constants(best.theta, P), objective: best.f * n };
  };
  const random = (seed) => () => { seed = (seed + 0x6d2b79f5) | 0; let t = Math.imul(seed ^ (seed >>> 15), 1 | seed); t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t; return ((t ^ (t >>> 14)) >>> 0) / 4294967296; };
  const resample = (runs, delta, next) => {
    const weights = runs.map(() => 0); runs.forEach(() => { weights[Math.floor(next() * runs.length)] += 1; });
    return fit_parametric(runs, delta, weights);
  };
  const approach1 = (runs, bins = 30) => {
    const C = runs.map(([N, D]) => 6 * N * D), low = Math.log(Math.min(...C)), high = Math.log(Math.max(...C)), best = [];
    runs.forEach((run, i) => { const k = Math.min(bins - 1, Math.floor(((Math.log(C[i]) - low) / (high - low)) * bins)); if (best[k] === undefined || run[2] < runs[best[k]][2]) best[k] = i; });
    let lowest = Infinity; const envelope = best.filter((i) => i !== undefined).filter((i) => { const keep = runs[i][2] < lowest; lowest = Math.min(lowest, runs[i][2]); return keep; });
    if (envelope.length < 2) return null;
    return { N: fit_power_law(envelope.map((i) => C[i]), envelope.map((i) => runs[i][0])), D: fit_power_law(envelope.map((i) => C[i]), envelope.map((i) => runs[i][1])) };
  };
  const approach2 = (runs, tolerance = 0.1) => {
    const sorted = runs.map(([N, D, L]) => [Math.log(6 * N * D), N, L]).sort((u, v) => u[0] - v[0]), groups = [];
    sorted.forEach((run, i) => { if (i && run[0] - sorted[i - 1][0] <= tolerance) groups.at(-1).push(run); else groups.push([run]); });
    const found = groups.filter((g) => new Set(g.map((r) => r[1])).size >= 3).map((g) => ({ C: Math.exp(sum(g.map((r) => r[0])) / g.length), ...parabola_vertex(g.map((r) => r[1]), g.map((r) => r[2])) })).filter((v) => v.curvature > 0);
    if (found.length < 2) return null;
    return { N: fit_power_law(found.map((v) => v.C), found.map((v) => v.N)), D: fit_power_law(found.map((v) => v.C), found.map((v) => v.C / (6 * v.N))) };
  };
  // rows of text → runs; columns N, D, loss, or any of N, D, C, loss under a header
  const read_runs = (text) => {
    const lines = text.split(/\r?\n/).map((line) => line.trim()).filter((line) => line && !line.startsWith("#"));
    if (!lines.length) return { runs: [], problems: [] };
    const split = (line) => line.split(line.includes("\t") ? "\t" : line.includes(";") ? ";" : line.includes(",") ? "," : /\s+/).map((cell) => cell.trim().replace(/^"|"$/g, ""));
    const names = { n: 0, params: 0, parameters: 0, size: 0, d: 1, tokens: 1, loss: 2, l: 2, c: 3, flops: 3, flop: 3, compute: 3 };
    const head = split(lines[0]).map((cell) => names[cell.toLowerCase()]), titled = split(lines[0]).some((cell) => !Number.isFinite(lm.parse(cell))), problems = [];
    if (titled && (!head.includes(2) || [0, 1, 3].filter((k) => head.includes(k)).length < 2)) return { runs: [], problems: ["the first line must name the columns: N, D (or C) and loss"] };
    const order = titled ? head : [0, 1, 2], runs = [];
    lines.slice(+titled).forEach((line, i) => {
      const cells = split(line), row = []; order.forEach((k, j) => { if (k !== undefined) row[k] = lm.parse(cells[j] ?? ""); });
      row[0] ??= row[3] / (6 * row[1]); row[1] ??= row[3] / (6 * row[0]);
      if ([0, 1, 2].every((k) => row[k] > 0 && Number.isFinite(row[k]))) runs.push(row.slice(0, 3)); else problems.push(`line ${i + 1 + titled} was left out: “${line.slice(0, 40)}”`);
    });
    return { runs, problems };
  };
  const quantile = (sorted, q) => { const at = q * (sorted.length - 1), i = Math.floor(at); return sorted[i] + (at - i) * ((sorted[i + 1] ?? sorted[i]) - sorted[i]); };
  const round_constants = (law, digits) => Object.fromEntries(["E", "A", "B", "alpha", "beta"].map((key) => [key, digits ? +law[key].toPrecision(digits) : law[key]]));

  return { parametric, kaplan, effective_amount, data_constrained, data_constrained_optimal, lifetime_flops, inference_aware, served_and_constrained, moe, moe_total_parameters, precision, learning_rate_and_batch, training_cost, total_parameters, without_embeddings, kaplan_budget, kaplan_exponent, fit_power_law, parabola_vertex, parabola_points, parabola_bias, fit_parametric, fit_stock, huber_objective, residuals, drop_worst, complaint, random, resample, approach1, approach2, read_runs, quantile, round_constants };
})();

const LIMITS = {
  compute: [1e9, 1e29], N: [1e3, 1e14], D: [1e3, 1e16], served: [0, 1e18], unique: [0, 1e16], experts: [1, 32], memory: [0, 1e14], weights: [1, 16], activations: [1, 16], kv: [1, 16],
  chips: [1, 1e6], mfu: [0.01, 1], price: [0.01, 100], drop: [0, 20], delta: [1e-5, 1], digits: [0, 8], width: [1.5, 100], shift: [0.1, 10], low: [100, 1e8], high: [1e4, 1e12],
};
const CHOICES = { counting: ["law", "total", "without"], runs: ["book", "simulated", "pasted"], objective: ["sum", "mean"] };
const TABS = [["mine", "My model"], ["certainty", "How sure?"], ["constants", "Constants"], ["serving", "Serving & data"], ["hardware", "Hardware"], ["experts", "Experts & bits"], ["recipe", "Recipe"], ["refit", "Refit"], ["biases", "Biases"]];
const SHARED = [...Object.keys(LIMITS), ...Object.keys(CHOICES), "law", "chip", "constants", "tab"];
const GREEK = { E: "E", A: "A", B: "B", alpha: "α", beta: "β" };

/* The law in force, and what llmlib.interactive.scaling_explorer.answer works out from the same inputs. */
export const situation = (get) => {
  const F = formulas, laws = get("laws"), name = get("law"), reach = get("reach"), bits = get("bits"), unique = get("unique"), served = get("served"), C = get("compute"), N = get("N"), D = get("D");
  if (name === "kaplan") {
    const law = F.kaplan(laws.kaplan), [N_opt, D_opt] = law.optimal(C), joint = law.joint_optimal(6 * N * D), mine = law.loss(N, D);
    const tokens = (n, L) => { const room = L ** (1 / law.alpha_D) - (law.N_c / n) ** (law.alpha_N / law.alpha_D); return room > 0 ? law.D_c / room : Infinity; };
    return { law, kaplan: true, floor: 0, loss: law.loss, best: law.joint_optimal, tokens, answers: { N_opt, D_opt, loss: law.loss(N_opt, D_opt), ratio: D_opt / N_opt, N_serve: null, D_serve: null, saved: null, loss_mine: mine, excess: mine - law.loss(...joint), wasted: null } };
  }
  const experts = name === "moe" ? get("experts") : 1, [E, A, B, alpha, beta] = get("constants");
  const plain = name === "custom" ? F.parametric({ E, A, B, alpha, beta }) : name === "moe" ? F.moe(experts, get("moe")) : F.parametric(laws[name]);
  const full = { weights: 16, activations: 16, kv: 16 }, kept = F.precision(1, { weights: get("weights"), activations: get("activations"), kv: get("kv") }, bits) / F.precision(1, full, bits);
  const law = F.parametric({ ...plain, A: plain.A * kept ** -plain.alpha });
  const loss = unique ? (n, d) => F.data_constrained(n, d, unique, law, reach) : law.loss, best = unique ? (c) => F.data_constrained_optimal(c, unique, law, reach) : law.optimal;
  const search = (n, L) => { if (loss(n, 1e30) > L) return Infinity; let low = 0, high = Math.log(1e30); for (let i = 0; i < 44; i++) { const x = (low + high) / 2; if (loss(n, Math.exp(x)) < L) high = x; else low = x; } return Math.exp((low + high) / 2); };
  let [N_opt, D_opt] = best(C);
  const capped = get("memory") && N_opt > get("memory") / F.moe_total_parameters(1, experts);
  if (capped) { N_opt = get("memory") / F.moe_total_parameters(1, experts); D_opt = C / (6 * N_opt); }
  const answers = { N_opt, D_opt, loss: loss(N_opt, D_opt), ratio: D_opt / N_opt, N_serve: null, D_serve: null, saved: null, loss_mine: loss(N, D), excess: loss(N, D) - loss(...best(6 * N * D)), wasted: unique ? null : law.wasted(N, D) };
  if (served) {
    const [n, d] = unique ? F.served_and_constrained(law, answers.loss, served, unique, reach, N_opt) : F.inference_aware(law, answers.loss, served);
    Object.assign(answers, { N_serve: n, D_serve: d, saved: 1 - F.lifetime_flops(n, d, served) / F.lifetime_flops(N_opt, D_opt, served) });
  }
  return { law, kept, experts, capped, floor: law.E, loss, best, tokens: unique ? search : law.tokens_for, answers };
};

export default {
  render({ model, el }) {
    const F = formulas, h = lm.h, get = (key) => model.get(key), put = (values) => lm.put(model, values);
    const flops = (C) => lm.sci(C), typed = (C) => C.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e"), percent = (x) => `${lm.num(100 * x, Math.abs(x) < 0.1 ? 2 : 3)}\u00a0%`, nats = (L) => L.toFixed(3), ratio = (x) => lm.num(x);
    const models = get("models"), labels = get("labels"), laws = get("laws"), draws = { ...get("draws") }, names = { ...labels };
    const reach = get("data_reach"), largest = get("data").reduce((f, g) => (g[0] * g[1] > f[0] * f[1] ? g : f));
    const start = Object.fromEntries(SHARED.map((key) => [key, get(key)]));
    const ui = lm.panel(el, { title: "Scaling-law explorer", note: "How large a model, on how many tokens, for a budget of compute? Move the budget, or drag the points in the map." });
    ui.root.append(h("style", {}, `
      .tiles { display:grid; grid-template-columns:repeat(4,minmax(0,1fr)); gap:8px; margin:.8em 0 .4em; } .tiles div { background:var(--raise); border-radius:10px; padding:8px 12px; min-width:0; }
      .tiles b { display:block; font-size:clamp(1.15em,4.4vw,1.7em); font-weight:680; line-height:1.2; font-variant-numeric:tabular-nums; white-space:nowrap; } .tiles span { color:var(--soft); font-size:.86em; display:block; line-height:1.25; }
      .chips { display:flex; flex-wrap:wrap; gap:6px; align-items:center; margin:.9em 0 .2em; } .chips button { border-radius:99px; font-size:.88em; padding:2px 11px; min-height:26px; }
      .budget { font-size:1.06em; grid-column:1/-1; } .budget input[type=text] { width:7.2em; font-weight:650; }
      .tabs { display:flex; flex-wrap:wrap; gap:3px; margin:14px 0 0; border-bottom:2px solid var(--line); } .tabs button { border:0; border-radius:8px 8px 0 0; background:none; padding:6px 11px; color:var(--soft); margin-bottom:-2px; border-bottom:3px solid transparent; }
      .tabs button[aria-selected=true] { color:var(--ink); font-weight:650; border-bottom-color:var(--accent); background:var(--raise); } .tab { padding:12px 2px 4px; min-height:150px; } .tab p { max-width:80ch; }
      .map { flex:1.35 1 330px !important; } .grow { flex:1 1 260px !important; min-width:0; } .figure { font-weight:600; margin:.2em 0 0 !important; font-size:.95em; } .bad { color:var(--ink); border-left:4px solid var(--red); padding-left:8px; } .quiet { color:var(--soft); font-size:.9em; } .you { font-weight:650; } .legend span { margin-right:14px; white-space:nowrap; display:inline-block; } .legend span:last-child { white-space:normal; } .legend i { display:inline-block; width:10px; height:10px; border-radius:50%; margin-right:5px; forced-color-adjust:none; } @media print { .chips, .tabs { display:none; } }
      .model { cursor:pointer; } .model:focus { outline:none; } .model:focus-visible circle { stroke:var(--accent); stroke-width:3.5; } .foot .row { justify-content:space-between; margin-top:14px; align-items:center; }
      @media (max-width:560px) { .chips { flex-wrap:nowrap; overflow-x:auto; padding-bottom:5px; } .chips button { white-space:nowrap; flex:none; } .tiles { grid-template-columns:repeat(2,minmax(0,1fr)); } .tabs { flex-wrap:nowrap; overflow-x:auto; } .tabs button { white-space:nowrap; } }`));

    // ------------------------------------------------------------------ the budget, the law, the answer in words
    const slider = (key, options) => lm.bind(model, key, lm.slider({ min: LIMITS[key][0] || 1, max: LIMITS[key][1], ...options }));
    const budget = slider("compute", { label: "Training budget", hint: "in FLOPs", log: true, step: 0.02, format: typed });
    budget.el.classList.add("budget");
    const law = lm.bind(model, "law", lm.select({ label: "Law", options: Object.entries(labels) }));
    const famous = lm.select({ label: "Set budget and “my model” to", options: [["", "a published model …"], ["ours", `this book’s largest run (${flops(reach[1])} FLOPs)`], ...models.map((m, i) => [String(i), `${m[0]} (${m[1]})`])] });
    const adopt = (m) => put({ compute: 6 * m[3] * m[4], N: m[3], D: m[4] });
    famous.oninput = (i) => { if (i === "ours") put({ law: "ours", compute: reach[1], N: largest[0], D: largest[1] }); else if (i) adopt(models[+i]); famous.value = ""; };
    const one = (name) => { const m = models.find((row) => row[0] === name); return { compute: 6 * m[3] * m[4], N: m[3], D: m[4], tab: "mine" }; };
    const views = [
      ["GPT-3, short of data", one("GPT-3")], ["Llama 3.1 8B, far past optimal", one("Llama 3.1 8B")], ["Two digits too few", { law: "hoffmann-rounded", tab: "certainty" }], ["To serve 10T tokens", { compute: 5.88e21, served: 1e13, tab: "serving" }],
      ["When data runs out", { compute: 1e25, unique: 1e12, tab: "serving" }], ["Kaplan’s advice", { law: "kaplan", tab: "biases" }], ["A fit that stops early", { objective: "mean", runs: "simulated", tab: "refit" }], ["This book’s own runs", { law: "ours", compute: reach[1], N: largest[0], D: largest[1], tab: "refit" }]];
    const chips = h("div", { class: "chips", role: "group", "aria-label": "Views to try" }, h("span", { class: "quiet" }, "Try:"), views.map(([text, values]) => lm.button(text, () => put({ ...start, ...values }))));
    ui.controls.style.gridTemplateColumns = "repeat(auto-fit,minmax(min(100%,250px),1fr))";
    ui.controls.append(budget.el, law.el, famous.el);
    const tile = (word) => { const number = h("b"), under = h("span", {}, word); return { el: h("div", {}, number, under), set(value, text) { number.textContent = value; if (text) under.textContent = text; } }; };
    const tiles = { N: tile("parameters"), D: tile("tokens"), ratio: tile("tokens per parameter"), loss: tile("nats per token") };
    const tileRow = h("div", { class: "tiles" }, Object.values(tiles).map((t) => t.el));

    let now = situation(get);
    const counted = (N) => { // how the reader counts; Kaplan's law counts without embeddings, the others with
      const how = get("counting");
      return how === "total" && now.kaplan ? F.total_parameters(N) : how === "without" && !now.kaplan ? F.without_embeddings(N) : N;
    };
    const band = (f, level = 0.8) => { // quantiles over the resampled laws
      const rows = draws[get("law")]; if (!rows || rows.length < 20) return null;
      const values = rows.map(([E, A, B, alpha, beta]) => f(F.parametric({ E, A, B, alpha, beta }))).filter(Number.isFinite).sort((u, v) => u - v);
      return { low: F.quantile(values, (1 - level) / 2), middle: F.quantile(values, 0.5), high: F.quantile(values, (1 + level) / 2), values };
    };
    let along = {};
    const bandAlong = (budgets) => { // changes only with the law and the window, not with the budget
      if (along.rows !== draws[get("law")] || along.from !== budgets[0]) along = { rows: draws[get("law")], from: budgets[0], edges: budgets.map((c) => [c, band((l) => l.optimal(c)[0])]) };
      return along.edges;
    };
    const plainBand = () => !get("unique") && !now.capped && Math.abs(now.kept - 1) < 1e-12;
    const what = () => (get("law") === "moe" ? "active parameters" : get("counting") === "without" || (now.kaplan && get("counting") === "law") ? "parameters without embeddings" : "parameters");
    const sentence = () => {
      const a = now.answers, sure = plainBand() ? band((l) => l.tokens_per_parameter(get("compute"))) : null;
      const parts = [`With ${flops(get("compute"))} FLOPs, train ${lm.si(counted(a.N_opt))} ${what()} on ${lm.si(a.D_opt)} tokens: ${ratio(a.D_opt / counted(a.N_opt))} per parameter${sure ? ` (80\u00a0% of resampled laws: ${ratio(sure.low)} to ${ratio(sure.high)})` : ""}. Predicted loss ${nats(a.loss)} nats per token.`];
      if (get("unique") && a.D_opt > get("unique")) parts.push(`That is ${lm.num(a.D_opt / get("unique"), 2)} epochs over ${lm.si(get("unique"))} unique tokens.`);
      if (now.capped) parts.push("The memory cap decides the size.");
      if (get("law") === "ours" && get("compute") > 10 * reach[1]) parts.push(`The runs behind this law end at ${flops(reach[1])} FLOPs: so far beyond them it is a guess.`);
      if (a.N_serve) parts.push(`To serve ${lm.si(get("served"))} tokens at that loss, train ${lm.si(a.N_serve)} on ${lm.si(a.D_serve)} instead: ${percent(a.saved)} less compute over its life.`);
      return parts.join(" ");
    };

    // ------------------------------------------------------------------ the two charts
    const decades = (x) => Math.floor(Math.log10(x));
    const frame = () => { // the window moves in whole decades, so it holds still while a point is dragged
      const [n, d] = [now.answers.N_opt, now.answers.D_opt].map(decades);
      return n >= 8 && n <= 12 && d >= 10 && d <= 14 ? { N: [1e8, 1e13], D: [1e10, 1e15] } : { N: [10 ** (n - 2), 10 ** (n + 3)], D: [10 ** (d - 2), 10 ** (d + 3)] };
    };
    let view = frame();
    const iso = lm.chart({
      label: () => `Loss against parameters at ${flops(get("compute"))} FLOPs: least at ${lm.si(now.answers.N_opt)} parameters, ${nats(now.answers.loss)} nats.`, height: () => (el.clientWidth < 600 ? 300 : 370), margin: { left: 50, top: 14 },
      x: () => ({ domain: view.N, log: true, label: "parameters N", format: (v) => lm.si(v) }),
      y: () => { const low = now.loss(...now.best(get("compute") * 1e3)), high = now.loss(...now.best(get("compute") / 1e3)), room = high - low; return { domain: [Math.max(now.floor, low - 0.05 * room), high + 0.15 * room], label: "loss, nats per token" }; },
      readout: (N) => { const D = get("compute") / (6 * N); return `${lm.si(N)} parameters, ${lm.si(D)} tokens\n${lm.num(D / N)} per parameter · loss ${nats(now.loss(N, D))}`; },
      draw(p) {
        const C = get("compute"), a = now.answers, sizes = lm.logrange(view.N[0], view.N[1], 121);
        if (now.floor > p.y.domain[0]) p.hline(now.floor, { color: "soft", dash: "2 4", width: 1 });
        for (const k of [-2, -1, 1, 2]) { const c = C * 10 ** k; p.line(sizes.map((N) => [N, now.loss(N, c / (6 * N))]), { color: "grey", width: 1, opacity: 0.75 }); const [n] = now.best(c), L = now.loss(...now.best(c)); p.text(n, L, k < 0 ? `÷${10 ** -k}` : `×${10 ** k}`, { color: "soft", size: 11, dx: 5, dy: k < 0 ? -5 : 14 }); }
        const path = lm.logrange(C / 1e3, C * 1e3, 25).map((c) => now.best(c)); p.line(path.map(([N, D]) => [N, now.loss(N, D)]), { color: "green", width: 2, dash: "1 5" });
        p.line(sizes.map((N) => [N, now.loss(N, C / (6 * N))]), { color: "orange", width: 3 });
        const sure = plainBand() && band((l) => l.optimal(C)[0]);
        if (sure) { const y = p.y.domain[0] + 0.025 * (p.y.domain[1] - p.y.domain[0]); p.line([[sure.low, y], [sure.high, y]], { color: "green", width: 7, opacity: 0.45, title: "80 % of resampled optima" }); }
        p.vline(a.N_opt, { color: "green", width: 1.5 }); p.dots([[a.N_opt, a.loss]], { color: "green", r: 7 });
        const late = p.x(a.N_opt) > p.left + p.width - 130; p.text(a.N_opt, p.y.domain[1], `${now.capped ? "largest that fits" : "best"}: ${lm.si(a.N_opt)} on ${lm.si(a.D_opt)}`, { anchor: late ? "end" : "start", dx: late ? -7 : 7, dy: 11, weight: 650 });
        if (a.N_serve) { p.dots([[a.N_serve, now.loss(a.N_serve, a.D_serve)]], { color: "pink", r: 6 }); p.text(a.N_serve, now.loss(a.N_serve, a.D_serve), "to serve", { anchor: "end", dx: -9, dy: 18, color: "ink" }); }
        const N = get("N"), move = (n) => { const size = lm.clamp(n, ...LIMITS.N); put({ N: size, D: lm.clamp(get("compute") / (6 * size), ...LIMITS.D) }); };
        if (N >= view.N[0] && N <= view.N[1]) {
          const y = Math.min(p.y.domain[1], a.loss_mine);
          p.handle("mine", { x: N, y, r: 7, color: "violet", label: "My model along this budget: parameters", text: `${lm.si(N)} parameters on ${lm.si(get("D"))} tokens, loss ${nats(a.loss_mine)}`, move, nudge: (dx, dy, big) => move(N * 10 ** ((dx || dy) * (big ? 0.2 : 0.02))) });
          p.text(N, y, "my model", { dx: 0, dy: -13, anchor: "middle", color: "ink" });
        }
      },
    });

    let dot = 0; // which published model has the keyboard
    const label = (m) => `${m[0]} (${m[1]}): ${lm.si(m[3])}${m[2] > m[3] ? ` active of ${lm.si(m[2])}` : ""} parameters, ${lm.si(m[4])} tokens, ${lm.num(m[4] / m[3])} per parameter${m[5] === "certain" ? "" : ` (${m[5]})`}`;
    const first = ["Chinchilla", "GPT-3", "Llama 3.1 405B", "DeepSeek-V3", "Llama 3.1 8B", "Gopher", "PaLM 540B", "Qwen3 0.6B", "LLaMA 65B", "TinyLlama", "Kimi K2", "Falcon 180B", "Pythia 12B", "Gemma 3 27B", "Cerebras-GPT 13B"];
    const map = lm.chart({
      label: () => `Map of parameters and tokens. The best split of ${flops(get("compute"))} FLOPs is ${lm.si(now.answers.N_opt)} parameters on ${lm.si(now.answers.D_opt)} tokens; my model is ${lm.si(get("N"))} on ${lm.si(get("D"))}.`, height: () => (el.clientWidth < 600 ? 300 : 370), margin: { left: 50, top: 14 },
      x: () => ({ domain: view.N, log: true, label: "parameters N", format: (v) => lm.si(v), grid: false }), y: () => ({ domain: view.D, log: true, label: "tokens D", format: (v) => lm.si(v), grid: false }),
      readout: (N, D) => `${lm.si(N)} parameters, ${lm.si(D)} tokens\nloss ${nats(now.loss(N, D))} · ${flops(6 * N * D)} FLOPs`,
      draw(p) {
        const C = get("compute"), a = now.answers, [n0, n1] = view.N, [d0, d1] = view.D, sizes = lm.logrange(n0, n1, 61), top = now.loss(n0, d0), bottom = now.loss(n1, d1), floor = now.floor * 0.9999;
        lm.logrange(top - floor, bottom - floor, 12).slice(1, -1).forEach((excess) => {
          const L = floor + excess, curve = sizes.map((N) => [N, now.tokens(N, L)]).filter(([, D]) => D < d1 * 30).map(([N, D]) => [N, lm.clamp(D, d0 / 30, d1 * 30)]);
          if (curve.length < 2) return;
          p.area([[curve[0][0], d1 * 30], ...curve, [n1, d1 * 30]], { color: "blue", opacity: 0.07 }); p.line(curve, { color: "blue", width: 1, opacity: 0.65 });
          const at = curve.find(([N, D]) => D < d1 / 1.6); if (at && at[1] > d0 * 2) p.text(at[0], at[1], L.toFixed(2), { size: 10, color: "soft", dx: 2, dy: -2 });
        });
        for (let k = Math.ceil(Math.log10(6 * n0 * d0)); k < Math.log10(6 * n1 * d1); k++) if (k % 2 === 0) p.line([[n0, 10 ** k / (6 * n0)], [n1, 10 ** k / (6 * n1)]], { color: "soft", width: 0.7, dash: "1 4" });
        const budgets = lm.logrange(6 * n0 * d0, 6 * n1 * d1, 49), path = budgets.map((c) => (now.kaplan ? now.law.optimal(c) : now.best(c)));
        if (plainBand() && draws[get("law")]?.length >= 20) { const edges = bandAlong(budgets); p.area([...edges.map(([c, b]) => [b.low, c / (6 * b.low)]), ...[...edges].reverse().map(([c, b]) => [b.high, c / (6 * b.high)])], { color: "green", opacity: 0.22 }); }
        p.line(path, { color: "green", width: 2 });
        if (get("unique")) { p.hline(get("unique"), { color: "red", width: 1.5 }); p.text(n0, get("unique"), "unique data", { dx: 5, dy: 13, size: 11 }); p.hline(4 * get("unique"), { color: "red", width: 1, dash: "4 4" }); p.text(n0, 4 * get("unique"), "4 epochs", { dx: 5, dy: -4, size: 11 }); }
        if (get("memory") && !now.kaplan) { const cap = get("memory") / F.moe_total_parameters(1, now.experts); p.vline(cap, { color: "red", width: 1.5 }); if (cap > n0 && cap < n1) p.text(cap, d0, "memory cap", { dx: 5, dy: -6, size: 11 }); }
        p.line([[n0, C / (6 * n0)], [n1, C / (6 * n1)]], { color: "orange", width: 3 });
        if (get("law") === "ours") get("data").forEach(([N, D, L]) => p.dots([[N, D]], { color: "blue", r: 3.5, title: `${lm.si(N)} on ${lm.si(D)}: ${nats(L)}` }));
        // published models: one tab stop, arrow keys go from one to the next, Enter takes it as "my model"
        const shown = models.map((m, i) => [m, i]).filter(([m]) => m[3] > n0 && m[3] < n1 && m[4] > d0 && m[4] < d1);
        if (shown.length && !shown.some(([, i]) => i === dot)) dot = shown[0][1];
        const order = [...shown].sort((u, v) => u[0][3] - v[0][3]).map(([, i]) => i);
        for (const [m, i] of shown) {
          const x = p.x(m[3]), y = p.y(m[4]), sparse = m[2] > m[3] * 1.01;
          const node = lm.s("g", { class: "model", role: "button", tabindex: i === dot ? 0 : -1, "aria-label": label(m), "data-i": i, onclick: () => adopt(m), onpointerenter: () => p.hint(x, y, label(m)), onpointerleave: () => p.hint(), onfocus: () => { if (node.matches(":focus-visible")) p.hint(x, y, label(m)); }, onblur: () => p.hint(),
            onkeydown: (event) => {
              if (event.key === "Enter" || event.key === " ") { event.preventDefault(); adopt(m); refocus = true; }
              const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key]; if (!step) return;
              event.preventDefault(); dot = order[(order.indexOf(i) + step + order.length) % order.length];
              const next = map.svg.querySelector(`[data-i="${dot}"]`); node.setAttribute("tabindex", -1); next.setAttribute("tabindex", 0); next.focus();
            } },
          lm.s("circle", { cx: x, cy: y, r: 12, fill: "transparent" }), lm.s("circle", { cx: x, cy: y, r: 3.6, fill: sparse ? "var(--surface)" : "var(--ink)", stroke: "var(--ink)", "stroke-width": 1.4 }));
          p.add(node, { free: true });
        }
        const boxes = [[p.x(a.N_opt) - 14, p.y(a.D_opt) - 14, 28, 28], [p.x(get("N")) - 12, p.y(get("D")) - 12, 24, 24], ...shown.map(([m]) => [p.x(m[3]) - 4, p.y(m[4]) - 4, 8, 8])];
        const free = (x, y, w) => x >= p.left && x + w <= p.left + p.width && !boxes.some(([u, v, du, dv]) => x < u + du && u < x + w && y < v + dv && v < y + 13);
        const place = (N, D, words, style = {}, gap = 7, must = false) => { // right, left, above or below: the first side with room
          const x = p.x(N), y = p.y(D), w = 6.1 * words.length * ((style.size ?? 12) / 11) * (style.weight ? 1.08 : 1), sides = [gap, gap + 10].flatMap((g) => [[g, -6, "start", x + g], [-g, -6, "end", x - g - w], [0, -g - 11, "middle", x - w / 2], [0, g, "middle", x - w / 2]]);
          const side = sides.find(([, dy, , left]) => free(left, y + dy, w)) ?? (must && sides[0]); if (!side) return;
          boxes.push([side[3], y + side[1], w, 13]); p.text(N, D, words, { ...style, dx: side[0], dy: side[1] + 10, anchor: side[2] });
        };
        const N = get("N"), D = get("D"), within = N >= n0 && N <= n1 && D >= d0 && D <= d1;
        if (within) place(N, D, "my model", { weight: 650 }, 13, true);
        for (const name of first) { const m = shown.find(([one]) => one[0] === name)?.[0]; if (m) place(m[3], m[4], name, { size: 11 }); }
        if (a.N_serve) { p.line([[a.N_opt, a.D_opt], [a.N_serve, a.D_serve]], { color: "pink", width: 2.5 }); p.dots([[a.N_serve, a.D_serve]], { color: "pink", r: 6 }); p.text(a.N_serve, a.D_serve, "to serve", { anchor: "end", dx: -9, dy: -4 }); }
        const budgetTo = (C) => put({ compute: lm.clamp(C, ...LIMITS.compute) });
        p.handle("compute", { x: a.N_opt, y: a.D_opt, color: "green", label: "Training budget: moves the compute line", text: `${flops(C)} FLOPs: ${lm.si(a.N_opt)} parameters on ${lm.si(a.D_opt)} tokens`, move: (N, D) => budgetTo(6 * N * D), nudge: (dx, dy, big) => budgetTo(C * 10 ** ((dx || dy) * (big ? 0.5 : 0.05))) });
        const mine = (N, D) => put({ N: lm.clamp(N, ...LIMITS.N), D: lm.clamp(D, ...LIMITS.D) });
        if (within) { p.handle("mine", { x: N, y: D, color: "violet", label: "My model: parameters and tokens", text: `${lm.si(N)} parameters on ${lm.si(D)} tokens, loss ${nats(a.loss_mine)}`, move: mine, nudge: (dx, dy, big) => mine(N * 10 ** (dx * (big ? 0.2 : 0.02)), D * 10 ** (dy * (big ? 0.2 : 0.02))) }); }
        if (refocus) { refocus = false; map.svg.querySelector(`[data-i="${dot}"]`)?.focus(); }
      },
    });
    let refocus = false;
    const titled = (chart, words) => { chart.el.prepend(h("p", { class: "figure" }, words)); return chart.el; };
    const legend = h("p", { class: "legend quiet" });
    const showLegend = () => legend.replaceChildren(...[["orange", "this budget"], ["green", plainBand() && draws[get("law")] ? "best split, with 80\u00a0% of resampled laws" : "best split"], ["violet", "my model"], now.answers.N_serve && ["pink", "best to serve"], get("law") === "ours" && ["blue", "runs of this law"], ["ink", "published models (hollow: only a part of the parameters is active)"]].filter(Boolean).map(([c, text]) => h("span", {}, h("i", { style: `background:${lm.color(c)}` }), text)));
    const mapBox = titled(map, "Every size and every amount of data"); mapBox.classList.add("map");
    ui.body.append(tileRow, lm.row(titled(iso, "One budget, every size"), mapBox),
      legend, chips);

    // ------------------------------------------------------------------ the tabs
    const table = (head, rows, caption) => h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, h("table", {}, h("thead", {}, h("tr", {}, head.map((cell) => h("th", { scope: "col" }, cell)))), h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, i) => h(i ? "td" : "th", i ? {} : { scope: "row" }, cell)))))));
    const optional = (key, { label: words, first: value, ...options }) => { // a slider that can be switched off; 0 is off
      const knob = lm.slider({ label: "how many", hint: `(${words.toLowerCase()})`, log: true, ...options, value: get(key) || value }), on = lm.toggle({ label: words, value: get(key) > 0 }), el = h("div", {}, on.el, knob.el);
      on.oninput = (yes) => put({ [key]: yes ? knob.value : 0 }); knob.oninput = (v) => put({ [key]: v });
      const show = () => { const v = get(key); on.value = v > 0; knob.el.hidden = !(v > 0); if (v > 0 && knob.value !== v) knob.value = v; };
      model.on(`change:${key}`, show); show(); return el;
    };
    const pages = {};
    const page = (name, build) => { const node = h("div", { class: "tab", role: "tabpanel", id: `panel-${name}`, "aria-labelledby": `tab-${name}`, tabindex: 0, hidden: true }); pages[name] = { node, update: build(node) }; };

    page("mine", (node) => {
      const out = h("div"), said = h("p");
      node.append(h("div", { class: "controls" }, slider("N", { label: "Parameters of my model", log: true }).el, slider("D", { label: "Tokens it is trained on", log: true }).el), said, out);
      return () => {
        const a = now.answers, N = get("N"), D = get("D"), C = 6 * N * D, [n, d] = now.best(C), off = D / N / (d / n);
        said.textContent = `${lm.si(N)} parameters on ${lm.si(D)} tokens cost ${flops(C)} FLOPs and reach ${nats(a.loss_mine)} nats. The same compute spent on ${lm.si(n)} and ${lm.si(d)} would reach ${nats(now.loss(n, d))}${a.wasted === null ? "" : `, or this loss with ${percent(Math.max(0, a.wasted))} less compute`}. Its ${ratio(D / N)} tokens per parameter are ${Math.abs(Math.log10(off)) < 0.12 ? "close to the best split" : off > 1 ? `${lm.num(off, 2)} times the best split’s: a small model trained long, cheap to serve` : `${lm.num(1 / off, 2)} times fewer than the best split’s: a large model short of data`}.`;
        out.replaceChildren(table(["quantity", "my model", "best split of its compute"], [
          ["parameters", lm.si(N), lm.si(n)], ["tokens", lm.si(D), lm.si(d)], ["tokens per parameter", ratio(D / N), ratio(d / n)], ["loss (nats)", nats(a.loss_mine), nats(now.loss(n, d))], ["excess loss (nats)", a.excess.toFixed(4), "0"],
          ["compute wasted", a.wasted === null ? "–" : percent(Math.max(0, a.wasted)), "0\u00a0%"]], "My model and the best split"));
      };
    });

    page("certainty", (node) => {
      const said = h("p"), chart = lm.chart({
        label: () => said.textContent, height: 240, margin: { left: 20 }, x: () => ({ domain: spread(), log: true, label: "optimal tokens per parameter at this budget" }), y: { domain: [0, 1], ticks: [], label: "share of resampled laws" },
        draw(p) {
          const b = band((l) => l.tokens_per_parameter(get("compute")), 0.8), [low, high] = spread(), bins = 40, counts = Array(bins).fill(0), edge = (i) => low * (high / low) ** (i / bins);
          if (b) {
            b.values.forEach((v) => { const i = Math.floor((Math.log(v / low) / Math.log(high / low)) * bins); if (i >= 0 && i < bins) counts[i] += 1; });
            const most = Math.max(...counts) * 1.75; counts.forEach((count, i) => { if (count) { const inside = edge(i + 0.5) >= b.low && edge(i + 0.5) <= b.high; p.area([[edge(i), 0], [edge(i), count / most], [edge(i + 1), count / most], [edge(i + 1), 0]], { color: "green", opacity: inside ? 0.75 : 0.3 }); } });
          }
          let row = 0;
          for (const [name, text] of Object.entries(names)) { if (["kaplan", "moe", "custom"].includes(name) || (name === "ours" && get("law") !== name)) continue; const v = F.parametric(laws[name]).tokens_per_parameter(get("compute")); if (v < low || v > high) continue; p.vline(v, { color: name === get("law") ? "ink" : "orange", width: name === get("law") ? 2 : 1.5 }); p.text(v, 1, text, { size: 11, dx: p.x(v) > p.left + p.width / 2 ? -4 : 4, anchor: p.x(v) > p.left + p.width / 2 ? "end" : "start", dy: 10 + 14 * row++ }); }
        } });
      const spread = () => { const all = Object.entries(laws).filter(([name]) => name !== "kaplan" && (name !== "ours" || get("law") === name)).map(([, l]) => F.parametric(l).tokens_per_parameter(get("compute"))), b = band((l) => l.tokens_per_parameter(get("compute")), 0.98); return [Math.min(...all, b?.low ?? Infinity) / 1.5, Math.max(...all, b?.high ?? 0) * 1.5]; };
      const source = h("p", { class: "quiet" });
      node.append(said, chart.el, source);
      return () => {
        const C = get("compute"), f = (l) => l.tokens_per_parameter(C), b = band(f), wide = band(f, 0.95), size = band((l) => l.optimal(C)[0]);
        said.textContent = b ? `At ${flops(C)} FLOPs, 80 % of the resampled laws put the optimum between ${ratio(b.low)} and ${ratio(b.high)} tokens per parameter (95 %: ${ratio(wide.low)} to ${ratio(wide.high)}), that is ${lm.si(size.low)} to ${lm.si(size.high)} parameters.` : "Nobody published what would be needed for an interval around these constants. Orange lines: what each set says.";
        const count = draws[get("law")]?.length;
        source.textContent = !count ? "" : get("law") === "refit" ? `${count} resamples of the 240 runs that Besiroglu et al. (arXiv 2404.10102) read off Chinchilla’s figure 4, each fitted again by llmlib.scaling. An interval of this kind knows the noise between runs; it doesn’t know whether the formula holds beyond them (largest run about 10²² FLOPs).` : `${count} resamples of the runs, each fitted again.`;
        chart.redraw();
      };
    });

    page("constants", (node) => {
      const out = h("div"), note = h("p", { class: "quiet" }), boxes = {}, row = h("div", { class: "controls" });
      const limits = { E: [0.001, 20], A: [1e-3, 1e6], B: [1e-3, 1e6], alpha: [0.01, 2], beta: [0.01, 2] };
      Object.keys(GREEK).forEach((key, i) => { const box = lm.slider({ label: GREEK[key], min: limits[key][0], max: limits[key][1], log: true, step: 0.002, format: (v) => lm.num(v, 5) }); boxes[key] = box; box.oninput = (v) => { const c = [...get("constants")]; c[i] = v; put({ constants: c, law: "custom" }); }; row.append(box.el); });
      node.append(out, note, lm.fold("Constants of your own", h("p", {}, "L = E + A/N^α + B/D^β. Moving one makes “your own constants” the law."), row));
      return () => {
        const C = get("compute"), line = (name) => { const now2 = situation((key) => (key === "law" ? name : ["unique", "served", "memory"].includes(key) ? 0 : ["weights", "activations", "kv"].includes(key) ? 16 : get(key))), a = now2.answers, l = now2.law; return [h("span", { class: name === get("law") ? "you" : "" }, names[name]), now2.kaplan ? "–" : lm.num(l.E, 4), now2.kaplan ? "–" : lm.num(l.A, 4), now2.kaplan ? "–" : lm.num(l.B, 4), lm.num(now2.kaplan ? l.alpha_N : l.alpha, 4), lm.num(now2.kaplan ? l.alpha_D : l.beta, 4), lm.num(l.a, 3), lm.si(a.N_opt), lm.si(a.D_opt), ratio(a.ratio), nats(a.loss)]; };
        out.replaceChildren(table(["law", "E", "A", "B", "α", "β", "N ∝ Cᵃ", "N", "D", "D/N", "loss"], Object.keys(names).map(line), `Every law at ${flops(C)} FLOPs`));
        note.textContent = laws[get("law")] ? `${laws[get("law")].source}. ${laws[get("law")].note}.` : get("law") === "moe" ? "Ludziejewski et al. (2025), arXiv 2502.05172, table 4; N counts the active parameters." : "Losses of different laws belong to different data and tokenizers: compare their optima, not their losses.";
        if (get("law") !== "kaplan") Object.entries(boxes).forEach(([key, box], i) => { const v = get("law") === "custom" ? get("constants")[i] : situation(get).law[key]; if (box.value !== v) box.value = v; });
      };
    });

    page("serving", (node) => {
      const out = h("p");
      node.append(h("div", { class: "controls", style: "align-items:start" }, optional("served", { label: "Tokens it will serve", first: 1e13, min: 1e8, max: 1e18 }), optional("unique", { label: "Unique tokens there are", first: 1e12, min: 1e6, max: 1e16 })), out);
      return () => {
        const a = now.answers, parts = [];
        if (now.kaplan) parts.push("Kaplan’s law comes without these: choose another.");
        if (!get("served") && !get("unique")) parts.push("Serving costs 2N FLOPs for each token read or written, so a model that will be used much should be smaller and trained longer (Sardana et al., arXiv 2401.00448). Data that repeats is worth less each time: about four epochs are nearly as good as new (Muennighoff et al., arXiv 2305.16264). Switch either on, or both.");
        if (a.N_serve) parts.push(`Same loss, ${nats(a.loss)} nats: ${lm.si(a.N_serve)} parameters on ${lm.si(a.D_serve)} tokens (${ratio(a.D_serve / a.N_serve)} per parameter) need ${flops(6 * a.N_serve * a.D_serve)} FLOPs to train and ${flops(2 * a.N_serve * get("served"))} to serve, ${percent(a.saved)} less in all than the compute-optimal model.`);
        if (get("unique") && !now.kaplan) { const epochs = a.D_opt / get("unique"), worth = F.effective_amount(a.D_opt, get("unique"), get("reach").data); parts.push(`The best split makes ${lm.num(epochs, 2)} epochs; its ${lm.si(a.D_opt)} tokens are worth ${lm.si(worth)} fresh ones. Without the limit it would be ${now.law.optimal(get("compute")).map((v) => lm.si(v)).join(" on ")} and ${nats(now.law.best_loss(get("compute")))} nats.`); }
        out.textContent = parts.join(" ");
      };
    });

    page("hardware", (node) => {
      const chips = get("hardware"), out = h("div");
      node.append(h("div", { class: "controls" }, lm.bind(model, "chip", lm.select({ label: "Chip", options: Object.entries(chips).map(([k, c]) => [k, `${k} (${lm.num(c.peak / 1e12)} TFLOP/s, ${c.watts} W)`]) })).el, slider("chips", { label: "How many", log: true, format: (v) => Math.round(v).toLocaleString("en") }).el, slider("mfu", { label: "Share of peak reached (MFU)", step: 0.01, format: (v) => `${lm.num(100 * v)}%` }).el, slider("price", { label: "Dollars per chip-hour", log: true, step: 0.01, hint: "(an assumption)" }).el), out);
      return () => {
        const cost = (C) => F.training_cost(C, chips[get("chip")], get("chips"), get("mfu"), get("price")), one = cost(get("compute")), two = cost(6 * get("N") * get("D"));
        const days = (d) => (d < 2 ? `${lm.num(d * 24)} hours` : d > 730 ? `${lm.num(d / 365.25)} years` : `${lm.num(d)} days`), energy = (k) => (k >= 1e6 ? `${lm.num(k / 1e6)} GWh` : k >= 1e3 ? `${lm.num(k / 1e3)} MWh` : `${lm.num(k)} kWh`);
        out.replaceChildren(table(["quantity", "this budget", "my model"], [["FLOPs", flops(get("compute")), flops(6 * get("N") * get("D"))], ["time", days(one.days), days(two.days)], ["chip-hours", lm.si(one.chip_hours), lm.si(two.chip_hours)], ["cost", `$${lm.si(one.dollars)}`, `$${lm.si(two.dollars)}`], ["energy (board power × 1.2)", energy(one.energy_kwh), energy(two.energy_kwh)]], "Time, cost and energy"));
      };
    });

    page("experts", (node) => {
      const out = h("p"), bits = (key, label) => slider(key, { label, step: 1 }).el;
      const experts = slider("experts", { label: "Experts (one active per token)", log: true, step: 0.01, format: (v) => lm.num(v) });
      const plain = experts.oninput; experts.oninput = (v) => { plain(v); if (get("law") !== "moe") put({ law: "moe" }); };
      node.append(h("div", { class: "controls", style: "align-items:start" }, experts.el, optional("memory", { label: "Most parameters that fit in memory", first: 7e10, min: 1e6, max: 1e14 }), bits("weights", "Bits of weights in training"), bits("activations", "Bits of activations"), bits("kv", "Bits of keys and values")), out);
      return () => {
        const a = now.answers, parts = [];
        if (get("law") === "moe") { const total = F.moe_total_parameters(a.N_opt, get("experts")), dense = F.moe(1, get("moe")); parts.push(`${lm.num(get("experts"))} experts: ${lm.si(a.N_opt)} active of ${lm.si(total)} parameters (${lm.si(2 * total)} bytes in 16 bits). A dense model of this law would take ${dense.optimal(get("compute")).map((v) => lm.si(v)).join(" on ")} and reach ${nats(dense.best_loss(get("compute")))} instead of ${nats(a.loss)}.`); }
        else parts.push("Moving the number of experts switches to the law of Ludziejewski et al. (arXiv 2502.05172), whose N are active parameters.");
        if (now.capped) parts.push("The memory cap binds: the model is smaller than the best split and sees more tokens.");
        if (!now.kaplan) parts.push(now.kept < 1 ? `Trained in these bits a parameter counts as ${percent(now.kept)} of one in 16 bits (Kumar et al., arXiv 2411.04330).` : "With fewer than 16 bits a parameter counts for less (Kumar et al., arXiv 2411.04330).");
        out.textContent = parts.join(" ");
      };
    });

    page("recipe", (node) => {
      const out = h("div"), count = h("p");
      node.append(out, lm.bind(model, "counting", lm.segmented({ label: "Which parameters are counted", options: [["law", "as the law does"], ["total", "all of them"], ["without", "without embeddings"]] })).el, count);
      return () => {
        const a = now.answers, pairs = [["this budget", a.N_opt, a.D_opt], ["my model", get("N"), get("D")]];
        out.replaceChildren(h("p", {}, "Where published fits would start: the peak learning rate and the batch in tokens."), table(["run", "StepLaw: learning rate", "batch", "DeepSeek: learning rate", "batch"], pairs.map(([name, N, D]) => [name, ...["steplaw", "deepseek"].flatMap((law2) => { const [lr, batch] = F.learning_rate_and_batch(N, D, law2); return [lm.sci(lr, 2), lm.si(batch, 2)]; })]), "Learning rate and batch size"),
          h("p", { class: "quiet" }, "StepLaw (arXiv 2503.04715): 1.79·N^−0.713·D^0.307 and 0.58·D^0.571. DeepSeek (arXiv 2401.02954): 0.3118·C^−0.125 and 0.292·C^0.3271. Each holds for its own optimiser, schedule and data."));
        const total = now.kaplan ? F.total_parameters(a.N_opt) : a.N_opt, less = now.kaplan ? a.N_opt : F.without_embeddings(a.N_opt);
        count.textContent = `The best split has ${lm.si(total)} parameters in all, ${lm.si(less)} without embeddings (${percent(less / total)}): ${ratio(a.D_opt / total)} or ${ratio(a.D_opt / less)} tokens per parameter. N + 47491·N^⅓ after Pearce and Song (arXiv 2406.12907); small models are mostly embedding.`;
      };
    });

    let fitted = null, source = [], trouble = [];
    page("refit", (node) => {
      const out = h("div"), problems = h("p", { class: "bad", role: "status" }), pasted = lm.bind(model, "csv", lm.text({ label: "Runs as CSV: N, D, loss (or C in place of one of the first two, under a header)", rows: 5, placeholder: "N,D,loss\n70M,1.4B,3.42\n…" }));
      const use = lm.button("Use these constants", () => adoptFit()), save = lm.button("Copy the runs as CSV", () => copy(`N,D,loss\n${source.map((r) => r.map((v) => +v.toPrecision(8)).join(",")).join("\n")}\n`, "The runs are copied."));
      const options = [["book", "this book’s"], ["simulated", "simulated"], ["pasted", "paste your own"]];
      const chart = lm.chart({ label: () => `Residuals of the fit, run by run, from ${source.length} runs`, height: 220, margin: { left: 58 }, x: () => ({ domain: source.length ? [Math.min(...source.map((r) => 6 * r[0] * r[1])) / 2, Math.max(...source.map((r) => 6 * r[0] * r[1])) * 2] : [1, 10], log: true, label: "compute of the run (FLOPs)" }),
        y: () => { const top = fitted ? Math.max(0.002, ...F.residuals(fitted.law, source).map(Math.abs)) * 1.15 : 1; return { domain: [-top, top], label: "log residual" }; },
        draw(p) { p.hline(0, { color: "soft" }); if (!fitted) return; const kept = new Set(fitted.kept); F.residuals(fitted.law, source).forEach((r, i) => p.dots([[6 * source[i][0] * source[i][1], r]], { color: kept.has(source[i]) ? "blue" : "red", r: 4, title: `${lm.si(source[i][0])} on ${lm.si(source[i][1])}: ${nats(source[i][2])}${kept.has(source[i]) ? "" : " (dropped)"}` })); } });
      node.append(h("div", { class: "controls" }, lm.bind(model, "runs", lm.segmented({ label: "Runs", options })).el, slider("drop", { label: "Leave out the worst", min: 0, step: 1, hint: "by residual" }).el, slider("delta", { label: "Huber’s δ", log: true, step: 0.05 }).el,
        lm.bind(model, "objective", lm.segmented({ label: "Minimise the", options: [["sum", "sum"], ["mean", "mean (stock stop)"]] })).el, slider("digits", { label: "Round the constants to", min: 0, step: 1, hint: "digits, 0 = not" }).el), pasted.el, problems, out, chart.el, lm.row(use, save));
      let done = "", timer;
      const fit = () => {
        fitted = null; trouble = [];
        if (get("runs") === "pasted") { const read = F.read_runs(get("csv")); source = read.runs; trouble = read.problems.slice(0, 3); } else source = get("runs") === "book" ? get("data") : simulate();
        const wrong = F.complaint(source) || (source.length - get("drop") < 6 ? "too few runs are left: leave out fewer" : null);
        if (wrong) { if (get("runs") !== "pasted" || get("csv").trim()) trouble.push(wrong); return; }
        const kept = F.drop_worst(source, get("drop"), get("delta")), raw = get("objective") === "sum" ? F.fit_parametric(kept, get("delta")) : F.fit_stock(kept, get("delta")), best = get("objective") === "sum" ? raw.objective : F.fit_parametric(kept, get("delta")).objective;
        const law2 = F.parametric(F.round_constants(raw, get("digits"))); fitted = { kept, law: law2, best, reached: F.huber_objective(law2, kept, get("delta")), one: F.approach1(kept), two: F.approach2(kept) };
      };
      const show = () => {
        problems.textContent = trouble.join(" · "); problems.hidden = !trouble.length; use.disabled = save.disabled = !fitted; chart.redraw();
        if (!fitted) { out.replaceChildren(); return; }
        const C = get("compute"), l = fitted.law, exponents = [["1 envelope of the runs", fitted.one], ["2 parabola per budget", fitted.two]].map(([name, found]) => [name, found ? lm.num(found.N.exponent) : "–", found ? lm.si(found.N.factor * C ** found.N.exponent) : "–", found ? lm.si(found.D.factor * C ** found.D.exponent) : "–", found ? ratio((found.D.factor * C ** found.D.exponent) / (found.N.factor * C ** found.N.exponent)) : "–"]);
        const [n, d] = l.optimal(C);
        out.replaceChildren(h("p", {}, `${fitted.kept.length} of ${source.length} runs: L = ${lm.num(l.E, 4)} + ${lm.num(l.A, 4)}/N^${lm.num(l.alpha, 4)} + ${lm.num(l.B, 4)}/D^${lm.num(l.beta, 4)}. Objective ${lm.sci(fitted.reached)}${fitted.reached > fitted.best * 1.0001 ? `, ${lm.num(fitted.reached / fitted.best, 3)} times the least that is possible (${lm.sci(fitted.best)})` : ", the least that is possible"}.`),
          table(["approach", "N ∝ Cᵃ", "N at this budget", "D", "D/N"], [...exponents, ["3 parametric fit", lm.num(l.a), lm.si(n), lm.si(d), ratio(d / n)]], "The three approaches on these runs"));
      };
      return () => {
        const key = JSON.stringify([get("runs"), get("drop"), get("delta"), get("objective"), get("digits"), get("csv"), get("runs") === "simulated" && [get("law"), get("constants"), get("experts")]]);
        pasted.el.hidden = get("runs") !== "pasted";
        if (key === done) { show(); return; }
        done = key; clearTimeout(timer); timer = setTimeout(() => { fit(); show(); }, 30);
      };
    });
    const simulate = () => { // 9 sizes at each of 5 budgets, drawn from the law in force with 0.5 % noise
      const next = F.random(7), normal = () => Math.sqrt(-2 * Math.log(next() + 1e-12)) * Math.cos(2 * Math.PI * next());
      const truth = situation((key) => (["unique", "served", "memory"].includes(key) ? 0 : key === "law" && get("law") === "kaplan" ? "refit" : get(key))).law;
      return [1e18, 1e19, 1e20, 1e21, 1e22].flatMap((C) => lm.logrange(0.1, 10, 9).map((k) => { const N = truth.optimal(C)[0] * k, D = C / (6 * N); return [N, D, truth.loss(N, D) * Math.exp(0.005 * normal())]; }));
    };
    const adoptFit = () => {
      const l = fitted.law, runs = fitted.kept, delta = get("delta"), next = F.random(1), found = []; delete draws.custom;
      put({ constants: ["E", "A", "B", "alpha", "beta"].map((key) => l[key]), law: "custom" });
      const more = () => { const until = performance.now() + 30; while (found.length < 100 && performance.now() < until) { const r = F.resample(runs, delta, next); found.push([r.E, r.A, r.B, r.alpha, r.beta]); } if (found.length < 100) setTimeout(more, 0); else { draws.custom = found; update(); tell("These constants are now the law; its bands come from 100 resamples of the runs."); } };
      setTimeout(more, 0);
    };

    page("biases", (node) => {
      const one = h("p"), two = h("p");
      const target = () => (now.kaplan ? F.parametric(laws.refit) : now.law);
      const bowl = lm.chart({ label: () => one.textContent, height: 230, x: () => { const N = F.parabola_points(target(), get("compute"), get("width"), get("shift")); return { domain: [N[0] / 1.5, N.at(-1) * 1.5], log: true, label: "parameters", format: (v) => lm.si(v) }; }, y: () => { const C = get("compute"), l = target(), N = F.parabola_points(l, C, get("width"), get("shift")), L = N.map((n) => l.loss(n, C / (6 * n))), low = Math.min(...L), high = Math.max(...L); return { domain: [low - 0.15 * (high - low), high + 0.1 * (high - low)], label: "loss" }; },
        draw(p) { const C = get("compute"), l = target(), N = F.parabola_points(l, C, get("width"), get("shift")), L = N.map((n) => l.loss(n, C / (6 * n))), fit = F.parabola_vertex(N, L), sizes = lm.logrange(N[0] / 1.5, N.at(-1) * 1.5, 80); p.line(sizes.map((n) => [n, l.loss(n, C / (6 * n))]), { color: "blue", width: 2 }); p.line(sizes.map((n) => [n, fit.at(n)]), { color: "orange", width: 2, dash: "5 4" }); p.dots(N.map((n, i) => [n, L[i]]), { color: "blue", r: 4 }); p.vline(l.optimal(C)[0], { color: "blue", dash: "2 3" }); p.vline(fit.N, { color: "orange", dash: "2 3" }); } });
      const slope = lm.chart({ label: () => two.textContent, height: 230, x: () => ({ domain: [F.kaplan_budget(target(), get("low")), F.kaplan_budget(target(), Math.max(get("high"), get("low") * 10))], log: true, label: "compute without embeddings (FLOPs)" }), y: () => ({ domain: [get("low") / 2, Math.max(get("high"), get("low") * 10) * 2], log: true, label: "best N without embeddings", format: (v) => lm.si(v) }),
        draw(p) { const l = target(), N = lm.logrange(get("low"), Math.max(get("high"), get("low") * 10), 20), C = N.map((n) => F.kaplan_budget(l, n)), fit = F.fit_power_law(C, N), middle = Math.sqrt(C[0] * C.at(-1)), at = fit.factor * middle ** fit.exponent; p.line(N.map((n, i) => [C[i], n]), { color: "blue", width: 2.5 }); p.line([C[0], C.at(-1)].map((c) => [c, fit.factor * c ** fit.exponent]), { color: "orange", width: 2, dash: "5 4" }); p.line([C[0], C.at(-1)].map((c) => [c, at * (c / middle) ** l.a]), { color: "grey", width: 1.5 }); } });
      node.append(lm.row(h("div", { class: "grow" }, h("p", { class: "figure" }, "A parabola through an isoFLOP curve"), slider("width", { label: "Sizes from optimum ÷ and × this", log: true, step: 0.01 }).el, slider("shift", { label: "Centre of the sizes, in optima", log: true, step: 0.01 }).el, bowl.el, one), h("div", { class: "grow" }, h("p", { class: "figure" }, "Leaving embeddings out of N and C"), slider("low", { label: "Smallest N without embeddings", log: true }).el, slider("high", { label: "Largest N without embeddings", log: true }).el, slope.el, two)));
      return () => {
        const l = target(), bias = F.parabola_bias(l, get("compute"), get("width"), get("shift")), seen = F.kaplan_exponent(l, get("low"), Math.max(get("high"), get("low") * 10));
        one.textContent = `Nine exact points, no noise, and the parabola’s lowest point (orange) lies ${percent(Math.abs(bias))} ${bias < 0 ? "below" : "above"} the true optimum (arXiv 2603.22339).`;
        two.textContent = `The law says N ∝ C^${lm.num(l.a)} (grey); leaving embeddings out, the optimum (blue) looks like C^${lm.num(seen)} (orange). Kaplan reported 0.73 (explained by arXiv 2406.12907).`;
        bowl.redraw(); slope.redraw();
      };
    });

    const tabs = Object.fromEntries(TABS.map(([name, text]) => [name, h("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `panel-${name}`, onclick: () => put({ tab: name }), onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key], i = TABS.findIndex(([key]) => key === name); if (!step) return;
      event.preventDefault(); const next = TABS[(i + step + TABS.length) % TABS.length][0]; put({ tab: next }); tabs[next].focus();
    } }, text)]));
    const list = h("div", { class: "tabs", role: "tablist", "aria-label": "More questions" }, Object.values(tabs));
    let opened = null;
    ui.body.append(list, ...Object.values(pages).map(({ node }) => node));

    // ------------------------------------------------------------------ the address: a view can be sent
    const message = h("p", { class: "quiet", role: "status" }), tell = (text) => { message.textContent = text; };
    const copy = async (text, done) => { try { await navigator.clipboard.writeText(text); tell(done); } catch { tell(""); message.append("Copy this: ", h("textarea", { readonly: true, "aria-label": "text to copy", rows: 2 }, text)); message.querySelector("textarea").select(); } };
    const mayWrite = Boolean(el.lmModel) && !document.body.dataset.jpThemeLight && window.top === window && document.querySelector('.lm-interactive[data-lm="scaling_explorer"]') === el;
    const link = () => {
      const changed = SHARED.filter((key) => JSON.stringify(get(key)) !== JSON.stringify(start[key])), short = (v) => (Array.isArray(v) ? v.map(short).join(",") : typeof v === "number" ? String(+v.toPrecision(8)).replace("e+", "e") : v);
      return changed.length ? `#scaling?${changed.map((key) => `${key}=${encodeURIComponent(short(get(key)))}`).join("&").replaceAll("%2C", ",")}` : "";
    };
    const readLink = () => {
      const match = /^#scaling\?(.*)$/.exec(location.hash); if (!match) return;
      const values = { ...start }, ignored = [];
      for (const part of match[1].split("&").filter(Boolean)) {
        let [key, text = ""] = part.split("="); try { text = decodeURIComponent(text.replaceAll("+", " ")); } catch { text = ""; }
        const list = key === "law" ? Object.keys(labels) : key === "chip" ? Object.keys(get("hardware")) : key === "tab" ? TABS.map(([name]) => name) : CHOICES[key], v = key === "constants" ? text.split(",").map(lm.parse) : lm.parse(text);
        if (list ? list.includes(text) : key === "constants" ? v.length === 5 && v.every((c) => c > 0 && c < 1e9) : LIMITS[key] && v >= LIMITS[key][0] && v <= LIMITS[key][1]) values[key] = list ? text : v; else ignored.push(part.slice(0, 40));
      }
      put(values); tell(ignored.length ? `Part of the link could not be read and was left out: ${ignored.join(", ")}.` : "");
    };
    let writing;
    const writeLink = () => { clearTimeout(writing); writing = setTimeout(() => { const hash = link(); if (hash !== location.hash && (hash || /^#scaling\?/.test(location.hash))) try { history.replaceState(null, "", hash || location.pathname + location.search); } catch { /* some frames have no address */ } }, 250); };
    ui.foot.append(lm.row(message, lm.row(lm.button("Start again", () => { put(start); tell(""); }), lm.button("Copy a link to this view", () => copy(`${location.href.split("#")[0]}${link()}`, "The link is copied. Whoever opens it sees this view.")))));

    // ------------------------------------------------------------------ everything follows the model
    const update = () => {
      now = situation(get);
      const a = now.answers, outputs = Object.fromEntries(Object.entries(a).filter(([key, v]) => { const old = get(key); return v === null || old == null ? old !== v && !(old === undefined && v === null) : Math.abs(v - old) > 1e-9 * Math.abs(v); }));
      if (Object.keys(outputs).length) put(outputs);
      view = frame();
      const sure = plainBand() && band((l) => l.tokens_per_parameter(get("compute")));
      tiles.N.set(lm.si(counted(a.N_opt)), what()); tiles.D.set(lm.si(a.D_opt)); tiles.loss.set(nats(a.loss));
      tiles.ratio.set(ratio(a.D_opt / counted(a.N_opt)), sure ? `tokens per parameter (80\u00a0%: ${ratio(sure.low)}–${ratio(sure.high)})` : "tokens per parameter");
      ui.say(sentence()); iso.redraw(); map.redraw(); showLegend();
      const open = pages[get("tab")] ? get("tab") : "mine";
      for (const [name, { node, update: refresh }] of Object.entries(pages)) { const yes = name === open; node.hidden = !yes; tabs[name].setAttribute("aria-selected", yes); tabs[name].tabIndex = yes ? 0 : -1; if (yes) refresh(); }
      if (open !== opened) { opened = open; list.scrollLeft = tabs[open].offsetLeft - list.offsetLeft - 30; }
      if (mayWrite) writeLink();
    };
    if (mayWrite) { readLink(); addEventListener("hashchange", readLink); }
    const stop = lm.live(model, ui, update);
    return () => { removeEventListener("hashchange", readLink); stop(); };
  },
};
