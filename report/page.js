// Puts the page together: headline, figures, legend, controls, answer.
const byId = (id) => document.getElementById(id);

function writeHeadline() {
  const somewhere = inAll.reduce((sum, count) => sum + (count > 0), 0);
  const entries = inAll.reduce((sum, count) => sum + count, 0);
  let text =
    `Policy ${data.policy} kept ${percent(entries, CACHES * N)} of the KV cache of ${plural(N, 'prompt token')}. ` +
    `${number(somewhere)} of them (${percent(somewhere, N)}) stand in at least one of the ` +
    `${number(CACHES)} caches, one for each of ${plural(L, 'layer')} × ${plural(H, 'KV head')}.`;
  for (const l of cuts) text += ` Propagated after layer ${l}: ${plural(seenBy[l + 1], 'token')} (${percent(seenBy[l + 1], N)}).`;
  appendText(byId('headline'), text);
}

// One line for each place in the prompt that the answer repeats, with a button that goes there.
function writeFound() {
  for (const [first, end] of data.echoes.slice(0, 3)) {
    const line = byId('found').appendChild(element('p', '', 'The answer’s '));
    const button = line.appendChild(element('button'));
    button.type = 'button';
    appendText(button, data.texts.slice(first, end).join('').trim());
    button.addEventListener('click', () => visit(first));
    const keeps = (layer, head) => {
      for (let i = first; i < end; i++) if (!isKept(layer, head, i)) return false;
      return true;
    };
    const keepsSome = (layer, head) => data.texts.slice(first, end).some((_, i) => isKept(layer, head, first + i));
    const whole = countCaches(keeps);
    const parts = countCaches(keepsSome) - whole;
    line.append(
      ` stands in the prompt at token ${number(first)}. Kept whole in ${number(whole)} of ${number(CACHES)} caches` +
        (whole ? `: ${cachesText(keeps)}` : '') + (parts ? `; in part in ${number(parts)} more.` : '.'),
    );
  }
}

function writeFigures() {
  for (const [label, text] of data.figures) {
    const pair = byId('figures').appendChild(element('div'));
    pair.append(element('dt'), element('dd'));
    appendText(pair.firstChild, label);
    appendText(pair.lastChild, text);
  }
}

// The legend counts: how many tokens have each shade. Shades that no count can have are left out.
function writeLegend() {
  const of = cachesInView();
  const ranges = new Map();
  for (let count = 1; count <= of; count++) {
    const level = levelOf(count, of);
    ranges.set(level, [ranges.get(level)?.[0] ?? count, count]);
  }
  const tokens = new Uint32Array(LEVELS + 1);
  let unseen = 0;
  for (let i = 0; i < N; i++) {
    if (seenInView(i)) tokens[levelOf(keptInView(i), of)]++;
    else unseen++;
  }
  const most = Math.max(unseen, ...tokens);
  const list = element('ul');
  const row = (className, label, count) => {
    const item = list.appendChild(element('li'));
    const bar = element('i');
    bar.style.width = `${(100 * count) / most}%`;
    const text = element('span', 'count', plural(count, 'token'));
    text.append(bar);
    item.append(element('span', className, label), text);
  };
  for (const [level, [from, to]] of [...ranges].reverse()) row(`t k${level}`, of === 1 ? 'kept' : upTo(from, to), tokens[level]);
  row(view.layer < 0 ? 't' : 't k0', of === 1 ? 'not kept' : '0', tokens[0]);
  if (unseen) row('t u', 'not seen', unseen);
  const key = (className, label, text) => {
    const item = list.appendChild(element('li', 'key'));
    item.append(element('span', className, label), element('span', '', text));
  };
  if (cuts.length) key('t s', 'token', `propagated after layer ${cuts.join(' and ')} (TSP)`);
  if (data.echoes.length) key('t e first last', 'token', 'stands in the answer');
  const title = view.layer < 0 ? 'Caches that keep a token' : view.head < 0 ? `Heads of layer ${view.layer} that keep it` : 'This cache';
  const strip = 'In the strip above: a row for each layer. The more of its heads keep a place, the stronger the colour; grey where the layer never saw it.' +
    (cuts.length ? ' Orange: after this layer tokens were dropped.' : '') +
    (measured ? ' Bars beside it: the share of the attention mass that the layer keeps.' : '');
  byId('legend').replaceChildren(element('h2', '', title), list, element('p', 'quiet strip-note', strip));
}

function describeView() {
  const l = view.layer;
  if (l < 0) return 'All layers together. Move the slider to see one layer.';
  const share = attentionOf(l);
  const mass = share === null ? '' : ` It keeps ${percent(share, 1)} of its attention mass.`;
  return describeLayer(l) + mass;
}

function describeLayer(l) {
  const seen = `Layer ${l} saw ${number(seenBy[l])} of ${plural(N, 'token')}`;
  let any = 0;
  let all = 0;
  for (let i = 0; i < N; i++) {
    any += inLayer[l * N + i] > 0;
    all += inLayer[l * N + i] === H;
  }
  if (view.head >= 0) {
    let kept = 0;
    for (let i = 0; i < N; i++) kept += isKept(l, view.head, i);
    return `${seen}; its head ${view.head} keeps ${number(kept)}.`;
  }
  return H === 1 ? `${seen} and keeps ${number(any)}.` : `${seen}. ${number(any)} are kept by one head or more, ${number(all)} by all ${H}.`;
}

function show() {
  const layer = byId('layer');
  view.layer = Number(layer.value);
  byId('head').disabled = view.layer < 0;
  view.head = view.layer < 0 ? -1 : Number(byId('head').value);
  const name = view.layer < 0 ? 'all layers' : `layer ${view.layer}${cuts.includes(view.layer) ? ' (TSP)' : ''}`;
  byId('layer-name').textContent = name;
  layer.setAttribute('aria-valuetext', name);
  byId('view').textContent = describeView();
  writeLegend();
  markRow();
  repaint();
}

function watchControls() {
  byId('layer').max = L - 1;
  for (let h = -1; h < H; h++) byId('head').append(new Option(h < 0 ? 'all' : h, h));
  byId('layer').addEventListener('input', show);
  byId('head').addEventListener('change', show);
  const themes = ['system', 'light', 'dark'];
  let theme = 0;
  const redraw = () => (drawOverview(), describe(shown));
  byId('theme').addEventListener('click', () => {
    theme = (theme + 1) % themes.length;
    byId('theme').textContent = `Theme: ${themes[theme]}`;
    document.documentElement.style.colorScheme = theme ? themes[theme] : '';
    redraw();
  });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
}

const ENDS = {
  stop: 'Ended by itself, or at a stop string.',
  length: 'Ended at the length that was asked for.',
  interrupted: 'Interrupted: this is the text so far.',
};

writeHeadline();
writeFound();
writeFigures();
appendText(byId('answer'), data.answer);
byId('finish').textContent = ENDS[data.finish] ?? data.finish;
buildText();
watchControls();
show();
describe(-1);
markPlaces();
watchOverview();
watchTokens();
watchTools();
chunks.forEach(({ box }) => watcher.observe(box));
markWindow();
document.documentElement.dataset.ready = 'yes';

// The tools stick to the top: what is scrolled to must come to rest below them.
function watchTools() {
  const measure = () => document.documentElement.style.setProperty('--tools', `${byId('tools').offsetHeight}px`);
  if (getComputedStyle(byId('tools')).position === 'sticky') new ResizeObserver(measure).observe(byId('tools'));
}
