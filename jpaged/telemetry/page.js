"use strict";
// Draws a record: see `jpaged.telemetry.record` for what its frames hold.
(() => {
  const record = JSON.parse(document.getElementById("data").textContent);
  const { header, frames, preemptions } = record;
  const size = header.page_size, groups = header.windows.length, last = frames.length - 1;
  const FREE = -1, CACHED = -2;
  const $ = (id) => document.getElementById(id);
  const make = (tag, text) => {
    const element = document.createElement(tag);
    element.textContent = text;
    return element;
  };
  const total = (frame, name) => frame.totals[record.totals.indexOf(name)];
  const percent = (share) => (100 * share).toFixed(1) + " %";
  const count = (number) => Math.round(number).toLocaleString("en");
  const ratio = (part, whole, otherwise) => (whole > 0 ? part / whole : otherwise);
  const seconds = (s) => (s < 100 ? s.toFixed(2) + " s" : s < 7200 ? (s / 60).toFixed(1) + " min" : (s / 3600).toFixed(1) + " h");
  const plural = (number, noun) => count(number) + " " + noun + (number === 1 ? "" : "s");

  // A request has a hue, a sample of it a shade.
  const names = new Map(), list = [], hues = new Map();
  for (const frame of frames)
    for (const [name] of frame.sequences)
      if (!names.has(name)) {
        const [, request, sample] = name.match(/^([^]*)#(\d+)$/) || [null, name, "0"];
        if (!hues.has(request)) hues.set(request, hues.size);
        names.set(name, list.length);
        list.push({ number: hues.get(request), shade: Number(sample) % 5 });
      }

  let at = 0, marked = -1, shown = null, playing = null;
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const isDark = () => document.documentElement.dataset.theme === "dark";
  function rgb(owner, dim) {
    const { number, shade } = list[owner], hue = (number * 137.508) % 360;
    const s = 0.6, l = (isDark() ? 0.6 : 0.5) + [0, -0.12, 0.13][number % 3] + [0, 0.07, -0.07, 0.12, -0.12][shade];
    const a = s * Math.min(l, 1 - l);
    const part = (n) => {
      const k = (n + hue / 30) % 12;
      return Math.round(255 * (l - a * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
    };
    const found = [part(0), part(8), part(4)];
    if (!dim) return found;
    const back = hex(style("--free"));
    return found.map((value, i) => Math.round(0.2 * value + 0.8 * back[i]));
  }
  const hex = (text) => [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
  const css = (values) => `rgb(${values.join(",")})`;

  async function ids(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const found = new Int32Array(await new Response(stream).arrayBuffer());
    for (let i = 1; i < found.length; i++) found[i] += found[i - 1];
    return found;
  }

  // Of each page the first owner, how many there are, and how many of its cells hold a token.
  async function decode(frame) {
    const pages = await ids(frame.pages), cached = await ids(frame.cached);
    const owner = new Int32Array(header.num_pages).fill(FREE);
    const owners = new Uint16Array(header.num_pages), fill = new Uint16Array(header.num_pages);
    for (const page of cached) {
      owner[page] = CACHED;
      fill[page] = size;
    }
    const of = frame.sequences.map(() => []);
    let place = 0;
    for (let group = 0; group < groups; group++)
      frame.sequences.forEach(([name, tokens, , numPages], sequence) => {
        for (let i = 0; i < numPages; i++) {
          const page = pages[place++];
          if (!page) continue;
          if (!owners[page]) {
            owner[page] = names.get(name);
            fill[page] = 0;
          }
          owners[page]++;
          fill[page] = Math.max(fill[page], Math.min(size, Math.max(0, tokens - i * size)));
          of[sequence].push(page);
        }
      });
    return { owner, owners, fill, of };
  }

  // Series, a value a frame; what steps between two frames did is the difference of their totals.
  const between = (i, name) => Math.max(0, total(frames[i], name) - (i ? total(frames[i - 1], name) : 0));
  const tokensOf = frames.map((f) => f.sequences.reduce((all, s) => all + s[1], 0));
  const limitsOf = frames.map((f) => f.sequences.reduce((all, s) => all + s[2], 0));
  const usable = header.num_pages - 1;
  const series = {
    paged: frames.map((f, i) => ratio(between(i, "live_cell_steps"), between(i, "allocated_cell_steps"), NaN)),
    limit: frames.map((f, i) => ratio(tokensOf[i], limitsOf[i], NaN)),
    whole: frames.map((f, i) => ratio(tokensOf[i], f.sequences.length * header.max_model_len, NaN)),
    used: frames.map((f, i) => ratio(between(i, "used_page_steps"), between(i, "num_steps"), NaN)),
    unshared: frames.map((f, i) => ratio(between(i, "page_reference_steps"), between(i, "num_steps"), NaN)),
    running: frames.map((f) => f.sequences.length),
    waiting: frames.map((f) => f.num_waiting),
    generated: frames.map((f, i) => (i ? ratio(between(i, "num_generated_tokens"), f.time_s - frames[i - 1].time_s, NaN) : NaN)),
    prompt: frames.map((f, i) => (i ? ratio(between(i, "num_prefill_tokens"), f.time_s - frames[i - 1].time_s, NaN) : NaN)),
  };
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const mean = (values) => {
    const known = values.filter((value) => !Number.isNaN(value));
    return known.length ? sum(known) / known.length : NaN;
  };

  const charts = [
    { id: "use", format: percent, top: 1, lines: [
      ["paged", "--one", "pages"],
      ["limit", "--two", "contiguous, reserving what each request may come to"],
      ["whole", "--three", `contiguous, reserving max_model_len (${count(header.max_model_len)})`]] },
    { id: "pool", format: count, top: usable, lines: [
      ["used", "--one", "pages in use"], ["unshared", "--two", "if none were shared"]] },
    { id: "queue", format: count, lines: [["running", "--one", "with pages"], ["waiting", "--two", "waiting"]] },
    { id: "speed", format: count, noMean: true, lines: [["generated", "--one", "generated"], ["prompt", "--two", "of prompts"]] },
  ];

  function canvasOf(id) {
    const canvas = $(id), scale = window.devicePixelRatio || 1;
    const width = canvas.parentElement.clientWidth, height = Number(canvas.dataset.height || canvas.getAttribute("height"));
    canvas.dataset.height = height;
    canvas.style.height = height + "px";
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.round(height * scale);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    return { canvas, context, width, height };
  }
  const xOf = (i, width) => ((i + 0.5) / frames.length) * width;
  const frameAt = (event, canvas) => {
    const box = canvas.getBoundingClientRect();
    const found = Math.floor(((event.clientX - box.left) / box.width) * frames.length);
    return Math.min(last, Math.max(0, found));
  };

  function cursor(context, width, height) {
    context.fillStyle = style("--text");
    context.globalAlpha = 0.75;
    context.fillRect(Math.round(xOf(at, width)) - 0.5, 0, 1, height);
    context.globalAlpha = 1;
  }

  function drawChart(chart) {
    const { context, width, height } = canvasOf(chart.id), floor = height - 4, head = 14;
    const values = chart.lines.flatMap(([key]) => series[key]).filter((value) => value === value);
    const top = Math.max(chart.top || 0, ...values.reduce((m, v) => [Math.max(m[0], v)], [0])) || 1;
    context.font = "11px system-ui, sans-serif";
    for (const share of [0, 0.5, 1]) {
      const y = floor - share * (floor - head);
      context.fillStyle = style("--line");
      context.fillRect(0, Math.round(y), width, 1);
      context.fillStyle = style("--soft");
      if (share) context.fillText(chart.format(share * top), 2, y - 3);
    }
    for (const [key, colour] of [...chart.lines].reverse()) {
      context.strokeStyle = style(colour);
      context.lineWidth = 1.6;
      context.beginPath();
      let down = false;
      series[key].forEach((value, i) => {
        if (value !== value) return;
        const point = [xOf(i, width), floor - (value / top) * (floor - head)];
        if (down) context.lineTo(...point);
        else context.moveTo(...point);
        down = true;
      });
      context.stroke();
    }
    cursor(context, width, height);
    const legend = $(chart.id + "-legend");
    legend.replaceChildren(...chart.lines.map(([key, colour, text]) => {
      const say = (v) => (v === v ? chart.format(v) : "none");
      const average = chart.noMean ? "" : ` (mean ${say(mean(series[key]))})`;
      return swatch(style(colour), `${text}: ${say(series[key][at])}${average}`);
    }));
  }
  function swatch(colour, text) {
    const item = document.createElement("span"), box = document.createElement("i");
    box.style.background = colour;
    item.append(box, text);
    return item;
  }

  // The whole run: which sequence had which page in which frame; a line may stand for many pages.
  const rows = Math.min(usable, 520);
  const pageOfRow = (row) => 1 + Math.floor((row * usable) / rows);
  const owned = new Int32Array(rows * frames.length).fill(FREE);
  const image = document.createElement("canvas");
  image.width = frames.length;
  image.height = rows;
  function paint() {
    const context = image.getContext("2d"), data = context.createImageData(frames.length, rows);
    const colours = new Map([[FREE, hex(style("--free"))], [CACHED, hex(style("--cached"))]]);
    owned.forEach((owner, place) => {
      if (!colours.has(owner)) colours.set(owner, rgb(owner, marked >= 0 && owner !== marked));
      const colour = colours.get(owner);
      data.data.set([colour[0], colour[1], colour[2], 255], 4 * place);
    });
    context.putImageData(data, 0, 0);
  }
  function drawOver() {
    const { context, width, height } = canvasOf("over");
    context.imageSmoothingEnabled = false;
    context.drawImage(image, 0, 0, width, height);
    cursor(context, width, height);
    const marks = canvasOf("marks");
    for (const note of preemptions) {
      const x = xOf(frameOf(note.time_s), marks.width);
      marks.context.fillStyle = style("--bad");
      marks.context.beginPath();
      marks.context.moveTo(x, 3);
      marks.context.lineTo(x - 4, 12);
      marks.context.lineTo(x + 4, 12);
      marks.context.fill();
    }
  }
  function frameOf(time) {
    let low = 0, high = last;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (frames[middle].time_s < time) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  let grid = { columns: 1, cell: 1 };
  function drawMap() {
    const { context, width, height } = canvasOf("map");
    let cell = Math.min(48, Math.max(1, Math.floor(Math.sqrt((width * height) / usable))));
    while (cell > 1 && Math.ceil(usable / Math.floor(width / cell)) * cell > height) cell--;
    const columns = Math.max(1, Math.floor(width / cell));
    grid = { columns, cell };
    const gap = cell > 5 ? 1 : 0, free = style("--free"), cached = style("--cached");
    context.font = `${Math.min(14, Math.max(8, cell - 9))}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    const own = marked >= 0 ? frames[at].sequences.findIndex((s) => names.get(s[0]) === marked) : -1;
    const mine = new Set(own >= 0 ? shown.of[own] : []);
    for (let page = 1; page <= usable; page++) {
      const x = ((page - 1) % columns) * cell, y = Math.floor((page - 1) / columns) * cell;
      const owner = shown.owner[page], side = cell - gap;
      context.fillStyle = owner === CACHED ? cached : free;
      context.fillRect(x, y, side, side);
      if (owner < 0) continue;
      const share = shown.fill[page] / size, tall = cell > 5 ? Math.max(1, Math.round(side * share)) : side;
      const dim = marked >= 0 && !mine.has(page);
      context.fillStyle = css(rgb(!dim && marked >= 0 ? marked : owner, dim));
      if (share) context.fillRect(x, y + side - tall, side, tall);
      else context.fillRect(x, y + side - 1, side, 1);
      if (shown.owners[page] > 1 && cell > 3) {
        context.fillStyle = isDark() ? "#000" : "#fff";
        if (cell >= 14) context.fillText(shown.owners[page], x + side / 2, y + side / 2 + 0.5);
        else context.fillRect(x + side / 2 - 1, y + side / 2 - 1, 2, 2);
      }
    }
  }

  function drawTables() {
    const frame = frames[at];
    const lines = frame.sequences.map(([name, tokens], i) => {
      const line = document.createElement("tr"), box = document.createElement("i"), first = document.createElement("td");
      const owner = names.get(name), own = shown.of[i];
      box.style.background = css(rgb(owner));
      first.append(box);
      const shared = own.filter((page) => shown.owners[page] > 1).length;
      const empty = sum(own.map((page) => (shown.owners[page] > 1 ? 0 : size - shown.fill[page])));
      line.append(first, ...[name, count(tokens), count(own.length), count(shared), count(empty)].map((text) => make("td", text)));
      line.title = name;
      if (owner === marked) line.className = "marked";
      line.addEventListener("click", () => mark(owner));
      return line;
    });
    $("sequences").tBodies[0].replaceChildren(...lines);
    let used = 0, cached = 0, shared = 0, filled = 0;
    for (let page = 1; page <= usable; page++) {
      if (shown.owner[page] === CACHED) cached++;
      if (shown.owner[page] < 0) continue;
      used++;
      filled += shown.fill[page];
      if (shown.owners[page] > 1) shared++;
    }
    $("moment").textContent = used
      ? `${count(used)} of ${count(usable)} in use, ${count(shared)} shared, ${percent(filled / used / size)} filled`
      : `none of ${count(usable)} in use`;
    $("legend").replaceChildren(
      swatch(style("--free"), "free, or not filled yet"), swatch(style("--cached"), "free, kept for its content"),
      swatch(frame.sequences.length ? css(rgb(names.get(frame.sequences[0][0]))) : style("--one"), "in use: a colour a request, a shade a sample, as high as it is filled"),
      make("span", "a number, or a dot: so many sequences share it"));
  }

  // Decoding takes a moment: where several frames were asked for meanwhile, the newest counts.
  let asked = 0;
  async function show(i) {
    at = Math.min(last, Math.max(0, i));
    const turn = ++asked, frame = frames[at], found = await decode(frame);
    if (turn !== asked) return;
    shown = found;
    $("at").value = at;
    $("when").textContent = `${seconds(frame.time_s)}, step ${count(total(frame, "num_steps"))}`;
    $("at").setAttribute("aria-valuetext", $("when").textContent);
    drawAll();
  }
  function drawAll() {
    if (!shown) return;
    drawOver();
    drawMap();
    drawTables();
    charts.forEach(drawChart);
  }
  function mark(owner) {
    marked = owner === marked ? -1 : owner;
    paint();
    drawAll();
  }

  function pageUnder(event) {
    const box = $("map").getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / grid.cell), y = Math.floor((event.clientY - box.top) / grid.cell);
    const page = y * grid.columns + x + 1;
    return x < grid.columns && page >= 1 && page <= usable ? page : 0;
  }
  function ownersOf(page) {
    return frames[at].sequences.filter((s, i) => shown.of[i].includes(page)).map((s) => s[0]);
  }
  function describe(page) {
    if (!page || !shown) return;
    const owners = ownersOf(page);
    const whose = owners.length ? `${plural(owners.length, "owner")}: ${owners.slice(0, 12).join(", ")}${owners.length > 12 ? ", ..." : ""}` : "";
    const what = owners.length ? `${shown.fill[page]} of ${size} cells filled` : shown.owner[page] === CACHED ? "free, kept for its content" : "free";
    $("hover").textContent = `page ${page}: ${what}${whose ? "; " + whose : ""}`;
  }

  function tiles() {
    const end = frames[last], mean_ = (a, b) => ratio(total(end, a), total(end, b), NaN);
    const most = series.running.reduce((a, b) => Math.max(a, b), 0);
    const perSequence = Math.ceil(header.max_model_len / size) * groups;
    const say = (share) => (share === share ? percent(share) : "none");
    const span = end.time_s - frames[0].time_s, generated = total(end, "num_generated_tokens");
    const computed = total(end, "num_prefill_tokens") + generated;
    const first = total(frames[0], "num_generated_tokens"), tokens = sum(tokensOf);
    const reserved = sum(series.running) * header.max_model_len;
    const items = [
      [say(mean_("live_cell_steps", "allocated_cell_steps")), "of the cells of used pages hold a token"],
      [say(ratio(tokens, reserved, NaN)), `would, if each sequence had reserved max_model_len in one piece; ${say(ratio(tokens, sum(limitsOf), NaN))} if what it may come to`],
      [count(most), `${most === 1 ? "sequence" : "sequences"} at once at most; reserving max_model_len, this memory has room for ${count(Math.floor(usable / perSequence))}`],
      [say(1 - mean_("used_page_steps", "page_reference_steps")), `of the pages saved by sharing; ${say(ratio(total(end, "num_hit_tokens"), total(end, "num_lookup_tokens"), 0))} of the tokens of prompts found in the prefix cache`],
      [count(total(end, "num_preemptions")), `${total(end, "num_preemptions") === 1 ? "preemption" : "preemptions"} of sequences; ${say(ratio(total(end, "num_recomputed_tokens"), computed, 0))} of the tokens computed again, ${count(total(end, "num_swapped_pages"))} pages swapped`],
      [span > 0 ? count((generated - first) / span) : "none", `tokens a second; ${count(generated)} in ${plural(total(end, "num_steps"), "step")}`],
    ];
    $("tiles").replaceChildren(...items.map(([figure, text]) => {
      const tile = document.createElement("div");
      tile.className = "tile";
      tile.append(make("b", figure), make("span", text));
      return tile;
    }));
    document.title = $("title").textContent = record.title;
    const sees = new Set(header.windows), like = (w) => header.windows.filter((own) => own === w).length;
    const each = [...sees].map((w) => `${like(w)} of layers that see ${w === null ? "all tokens" : plural(w, "token")}`);
    const kinds = groups > 1 ? ` for ${groups} groups (${each.join(", ")})` : "";
    $("about").textContent = `${count(usable)} pages of ${size} tokens${kinds}; ${plural(frames.length, "frame")} over ` +
      `${seconds(end.time_s)}${header.is_simulated ? " of simulated time" : ""}; ` +
      (record.has_ended ? "the run ended" : "the record has no end: the run was killed, or goes on");
    const all = total(end, "num_preemptions"), listed = sum(preemptions.map((note) => note.num_sequences));
    $("preempted").textContent = !all ? "none" : listed < all ? `${count(listed)} of ${count(all)} sequences are listed` : "";
    $("preemptions").tBodies[0].replaceChildren(...preemptions.map((note) => {
      const line = document.createElement("tr");
      line.tabIndex = 0;
      const cells = [seconds(note.time_s), note.request_id, note.num_sequences, note.wanted_by, count(note.num_pages), count(note.num_tokens), note.why];
      line.append(...cells.map((text) => make("td", text)));
      const go = () => show(frameOf(note.time_s));
      line.addEventListener("click", go);
      line.addEventListener("keydown", (event) => event.key === "Enter" && go());
      return line;
    }));
  }

  function play() {
    if (playing) {
      clearInterval(playing);
      playing = null;
    } else {
      if (at === last) at = 0;
      playing = setInterval(() => (at < last ? show(at + 1) : play()), Math.max(30, Math.min(250, 15000 / frames.length)));
    }
    $("play").textContent = playing ? "\u275a\u275a" : "\u25b6";
    $("play").setAttribute("aria-label", playing ? "Pause" : "Play");
  }
  function theme(name) {
    document.documentElement.dataset.theme = name;
    $("theme").textContent = name === "dark" ? "Light" : "Dark";
    paint();
    tiles();
    drawAll();
  }
  function help() {
    $("keys").hidden = !$("keys").hidden;
    $("help").setAttribute("aria-expanded", String(!$("keys").hidden));
  }
  function toPreemption(back) {
    const places = preemptions.map((note) => frameOf(note.time_s));
    const found = back ? places.reverse().find((i) => i < at) : places.find((i) => i > at);
    if (found !== undefined) show(found);
  }

  $("at").max = last;
  $("at").addEventListener("input", () => show(Number($("at").value)));
  $("play").addEventListener("click", play);
  $("help").addEventListener("click", help);
  $("theme").addEventListener("click", () => theme(isDark() ? "light" : "dark"));
  for (const id of ["over", "marks", ...charts.map((chart) => chart.id)]) {
    const canvas = $(id), go = (event) => event.buttons && show(frameAt(event, canvas));
    canvas.addEventListener("pointerdown", go);
    canvas.addEventListener("pointermove", go);
  }
  $("map").addEventListener("pointermove", (event) => describe(pageUnder(event)));
  $("map").addEventListener("click", (event) => {
    const page = pageUnder(event);
    if (page && shown) mark(shown.owner[page] >= 0 ? shown.owner[page] : marked);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const onButton = event.target instanceof HTMLButtonElement;
    const step = event.shiftKey ? 20 : 1;
    const actions = {
      ArrowLeft: () => show(at - step), ArrowRight: () => show(at + step), Home: () => show(0), End: () => show(last),
      " ": onButton ? null : play, Escape: () => marked >= 0 && mark(marked), d: () => theme(isDark() ? "light" : "dark"),
      p: () => toPreemption(event.shiftKey), "?": help,
    };
    const action = actions[event.key.length > 1 ? event.key : event.key.toLowerCase()];
    if (!action) return;
    event.preventDefault();
    action();
  });
  window.addEventListener("resize", drawAll);
  const failed = (text) => document.documentElement.setAttribute("data-error", text);
  window.addEventListener("error", (event) => failed(event.message));
  window.addEventListener("unhandledrejection", (event) => failed(String(event.reason)));

  async function start() {
    const dark = window.matchMedia("(prefers-color-scheme: dark)");
    theme(dark.matches ? "dark" : "light");
    dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
    if (typeof DecompressionStream === "undefined") {
      $("hover").textContent = "This browser cannot decompress: open the page in one of 2023 or newer.";
      return;
    }
    // As the record opens: the fullest moment.
    await show(series.used.reduce((best, value, i) => (value >= (series.used[best] || 0) ? i : best), 0));
    for (let i = 0; i <= last; i++) {
      const { owner } = await decode(frames[i]);
      for (let row = 0; row < rows; row++) owned[row * frames.length + i] = owner[pageOfRow(row)];
      if (i % 100 === 99 || i === last) {
        paint();
        drawOver();
      }
    }
    document.documentElement.dataset.ready = "true";
  }
  start();
})();
