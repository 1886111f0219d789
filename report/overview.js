// The whole prompt at a glance: position across, layers down. The shade is the share of heads that keep a place, of the
// largest share there is: of a long prompt a pixel holds many tokens, and few places are dense.
const overview = document.getElementById('overview');
const strip = overview.querySelector('canvas');
const rowHeight = Math.max(1, Math.min(10, Math.floor(96 / L)));
const stripHeight = Math.min(160, Math.max(24, L * rowHeight));

// The colours of the style sheet as [r, g, b], by way of an element, which works the theme out.
function coloursOf(names) {
  const probe = document.body.appendChild(element('i'));
  const found = names.map((name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  });
  probe.remove();
  return found;
}

const blend = (a, b, share) => a.map((channel, i) => channel + (b[i] - channel) * share);

// Shade of a share of heads between the levels' colours.
function shadeOf(share, ground, shades) {
  const at = LEVELS * Math.sqrt(share);
  const low = Math.floor(at);
  const from = low === 0 ? ground : shades[low - 1];
  return low >= LEVELS ? shades[LEVELS - 1] : blend(from, shades[low], at - low);
}

function drawOverview() {
  const [ground, unseen, ...shades] = coloursOf(['page', 'void', ...[...Array(LEVELS).keys()].map((k) => `k${k + 1}`)]);
  const width = Math.max(1, Math.min(N, Math.round(overview.clientWidth * devicePixelRatio)));
  const [kept, seen] = sharesOf(width);
  const most = kept.reduce((most, share) => Math.max(most, share), 0) || 1;
  const image = new ImageData(width, L);
  for (let at = 0; at < width * L; at++) {
    const base = blend(unseen, ground, seen[at]);
    const colour = kept[at] ? shadeOf(kept[at] / most, base, shades) : base;
    image.data.set([...colour.map(Math.round), 255], 4 * at);
  }
  strip.width = width;
  strip.height = L;
  strip.style.height = `${stripHeight}px`;
  strip.style.imageRendering = 'pixelated';
  strip.getContext('2d').putImageData(image, 0, 0);
  drawShares(shades[5], unseen, ground);
  markRow();
}

// A bar for each layer, beside its row of the strip: the share of the attention mass that it keeps.
const shares = document.getElementById('shares');
function drawShares(bar, rest, nothing) {
  shares.hidden = !measured;
  if (!measured) return;
  const width = 100;
  const image = new ImageData(width, L);
  for (let at = 0; at < width * L; at++) {
    const share = attentionOf(Math.floor(at / width));
    const colour = share === null ? nothing : (at % width) + 0.5 < width * share ? bar : rest;
    image.data.set([...colour.map(Math.round), 255], 4 * at);
  }
  shares.width = width;
  shares.height = L;
  shares.style.height = `${stripHeight}px`;
  shares.getContext('2d').putImageData(image, 0, 0);
  const texts = data.attention.map((share, l) => `layer ${l}: ${share === null ? 'not measured' : percent(share, 1)}`);
  shares.setAttribute('aria-label', `Attention mass kept. ${texts.join(', ')}`);
  shares.title = 'Attention mass kept, layer by layer';
}

// For each of `width` places of each layer: the share of its entries that are kept, and of its tokens that were seen.
function sharesOf(width) {
  const kept = new Float32Array(width * L);
  const seen = new Float32Array(width * L);
  for (let x = 0; x < width; x++) {
    const first = Math.floor((x * N) / width);
    const end = Math.max(first + 1, Math.floor(((x + 1) * N) / width));
    for (let l = 0; l < L; l++) {
      for (let i = first; i < end; i++) {
        kept[l * width + x] += inLayer[l * N + i] / (H * (end - first));
        seen[l * width + x] += isSeen(l, i) / (end - first);
      }
    }
  }
  return [kept, seen];
}

function markRow() {
  const row = document.getElementById('row');
  const height = strip.clientHeight / L;
  row.hidden = view.layer < 0;
  row.style.top = `${view.layer * height - 1}px`;
  row.style.height = `${height + 4}px`;
}

function markPlaces() {
  for (const l of cuts) document.getElementById('cuts').appendChild(element('i')).style.top = `${(100 * (l + 1)) / L}%`;
  for (const [first, end] of data.echoes) {
    const mark = document.getElementById('marks').appendChild(element('i'));
    mark.style.left = `${(50 * (first + end)) / N}%`;
  }
}

// The chunk at a height of the window: the first whose lower edge lies below it.
function chunkAt(height) {
  let low = 0;
  let high = chunks.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (chunks[middle].box.getBoundingClientRect().bottom > height) high = middle;
    else low = middle + 1;
  }
  return chunks[low];
}

// The part of the prompt in the window, to a share of a chunk.
function tokenAt(height) {
  const { first, end, box } = chunkAt(height);
  const { top, height: tall } = box.getBoundingClientRect();
  return first + (end - first) * Math.min(1, Math.max(0, (height - top) / tall));
}

function markWindow() {
  const tools = document.getElementById('tools').getBoundingClientRect();
  const first = tokenAt(Math.max(0, tools.bottom));
  const end = tokenAt(innerHeight);
  const box = document.getElementById('window');
  box.style.left = `${(100 * first) / N}%`;
  box.style.width = `max(5px, ${(100 * (end - first)) / N}%)`;
  overview.setAttribute('aria-valuenow', Math.round(first));
  overview.setAttribute('aria-valuetext', `token ${number(Math.round(first))} of ${number(N)}`);
}

// Chunks around the place find their height only when they are seen, and push it away: so it is gone to again.
let jumps = 0;
function jumpTo(token) {
  const span = spans[Math.max(0, Math.min(N - 1, Math.floor(token)))];
  const jump = ++jumps;
  let frames = 3;
  const go = () => {
    if (jump !== jumps) return;
    span.scrollIntoView({ block: 'center', behavior: 'instant' });
    if (frames-- > 0) requestAnimationFrame(go);
  };
  go();
}

function watchOverview() {
  overview.setAttribute('aria-valuemax', N - 1);
  document.getElementById('deepest').textContent = `layer ${L - 1}`;
  const jump = (event) => {
    const box = strip.getBoundingClientRect();
    jumpTo((N * (event.clientX - box.left)) / box.width);
  };
  overview.addEventListener('pointerdown', (event) => {
    overview.setPointerCapture(event.pointerId);
    jump(event);
  });
  overview.addEventListener('pointermove', (event) => event.buttons && jump(event));
  const pages = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
  overview.addEventListener('keydown', (event) => {
    const here = Number(overview.getAttribute('aria-valuenow'));
    if (event.key in pages) jumpTo(here + (pages[event.key] * N) / 50);
    else if (event.key === 'Home') jumpTo(0);
    else if (event.key === 'End') jumpTo(N - 1);
    else return;
    event.preventDefault();
  });
  let waiting = false;
  const later = () => {
    if (!waiting) requestAnimationFrame(() => ((waiting = false), markWindow()));
    waiting = true;
  };
  addEventListener('scroll', later, { passive: true });
  addEventListener('resize', later);
  new ResizeObserver(drawOverview).observe(overview);
  new ResizeObserver(later).observe(textBox); // chunks find their height when they are first seen
}
