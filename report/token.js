// What is known of one token: shown for the one pointed at, or else the one chosen by click, tap or arrow keys.
const panel = document.getElementById('token');
let shown = -1;

function describeReach(i) {
  if (!cuts.length) return `went through all ${plural(L, 'layer')}`;
  if (reach[i] === L) return `propagated after ${cuts.map((l) => `layer ${l}`).join(' and ')}, to the last layer`;
  return `stopped at layer ${reach[i] - 1}: dropped there by TSP`;
}

// "part 2 of 3 of “日”", for the pieces of a character and the token that completes it.
function describePiece(i) {
  let first = i;
  while (first > 0 && data.kinds[first - 1] === 'p') first--;
  let last = i;
  while (last < N - 1 && data.kinds[last] === 'p') last++;
  if (data.kinds[last] === 'p' || last === first) return '';
  return last - first > 3 ? 'bytes that are no character' : `part ${i - first + 1} of ${last - first + 1} of “${data.texts[last]}”`;
}

// One square a cache: layers across, heads down. Filled: kept. Empty: seen, not kept. Dot: the layer never saw it.
function drawCaches(i) {
  const size = Math.max(4, Math.min(14, Math.floor(264 / L)));
  const canvas = element('canvas');
  const scale = devicePixelRatio || 1;
  canvas.width = L * size * scale;
  canvas.height = H * size * scale;
  canvas.style.width = `${L * size}px`;
  canvas.setAttribute('aria-hidden', 'true');
  const pen = canvas.getContext('2d');
  pen.scale(scale, scale);
  const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
  const [full, edge, dot] = coloursOf(['k7', 'faded', 'faded']).map(css);
  for (let l = 0; l < L; l++) {
    for (let h = 0; h < H; h++) {
      const [x, y] = [l * size, h * size];
      pen.fillStyle = isKept(l, h, i) ? full : dot;
      pen.strokeStyle = edge;
      if (isKept(l, h, i)) pen.fillRect(x + 0.5, y + 0.5, size - 1.5, size - 1.5);
      else if (isSeen(l, i)) pen.strokeRect(x + 1, y + 1, size - 2.5, size - 2.5);
      else pen.fillRect(x + size / 2 - 1, y + size / 2 - 1, 1.5, 1.5);
    }
  }
  return canvas;
}

function describe(i) {
  shown = i;
  panel.classList.toggle('empty', i < 0);
  panel.replaceChildren();
  if (i < 0) {
    panel.append(element('p', 'quiet', 'Point at a token, tap it, or move to it with the arrow keys, to see which caches keep it.'));
    return;
  }
  appendWhat(panel.appendChild(element('div', 'what')), i);
  const meta = panel.appendChild(element('p', 'quiet', `position ${number(i)} (0 to ${number(N - 1)}) · id ${data.ids[i]}`));
  const piece = describePiece(i);
  if (piece) appendText(meta, ` · ${piece}`);
  panel.append(
    element('p', 'kept', `kept in ${number(inAll[i])} of ${number(CACHES)} layer×head caches`),
    drawCaches(i),
    element('p', 'quiet axes', `layers 0 to ${L - 1} across, KV heads 0 to ${H - 1} down`),
    element('p', '', describeReach(i)),
  );
  const where = cachesText((layer, head) => isKept(layer, head, i));
  if (where) panel.append(element('p', '', `kept in ${where}`));
}

// The token in quotes, its spaces visible: where a word begins is part of the token.
function appendWhat(parent, i) {
  parent.dir = 'auto';
  parent.append('“');
  appendToken(parent, i);
  for (const node of parent.childNodes) if (node.nodeType === Node.TEXT_NODE) node.data = node.data.replaceAll(' ', '␣');
  parent.append('”');
}

// Where the panel lies over the text, it must not open under the pointer: there it waits for a click or a tap.
const panelIsAside = () => getComputedStyle(panel).position !== 'fixed';

const repaintToken = (i) => i >= 0 && (spans[i].className = classOf(i));

function select(i) {
  const before = selected;
  selected = i;
  repaintToken(before);
  repaintToken(i);
  describe(i);
}

// Goes to a place that was asked for, and shows it.
function visit(i) {
  jumpTo(i);
  select(i);
  spans[i].classList.add('found');
}

function watchTokens() {
  const tokenOf = (event) => event.target.closest('.t')?.token ?? -1;
  // Moves, not "over": a text that scrolls beneath a pointer at rest has not been pointed at.
  let [x, y] = [NaN, NaN];
  textBox.addEventListener('pointermove', (event) => {
    if (event.pointerType !== 'mouse' || (event.screenX === x && event.screenY === y)) return;
    [x, y] = [event.screenX, event.screenY];
    const i = tokenOf(event);
    if (i >= 0 && i !== shown && panelIsAside()) describe(i);
  });
  textBox.addEventListener('pointerleave', () => shown !== selected && describe(selected));
  textBox.addEventListener('click', (event) => {
    const i = tokenOf(event);
    if (i < 0 || !getSelection().isCollapsed) return;
    select(i === selected ? -1 : i);
    spans[i].scrollIntoView({ block: 'nearest', behavior: 'instant' });
  });
  textBox.addEventListener('keydown', (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === 'Escape') select(-1);
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const start = selected < 0 ? Math.round(tokenAt(innerHeight / 3)) - step : selected;
    select(Math.max(0, Math.min(N - 1, start + step)));
    spans[selected].scrollIntoView({ block: 'nearest', behavior: 'instant' });
  });
}
