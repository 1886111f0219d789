// The prompt as elements: one span a token, in chunks that the browser lays out only where they are seen.
const CHUNK = 160; // tokens, about
const textBox = document.getElementById('text');

const PICTURES = { '\n': '↵', '\t': '⇥', '\r': '␍' };
const HIDDEN =
  /[\0-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Appends a text so that nothing in it is hidden and nothing turns its surroundings around.
function appendText(parent, text) {
  let done = 0;
  for (const match of text.matchAll(HIDDEN)) {
    const [found] = match;
    if (match.index > done) parent.append(text.slice(done, match.index));
    if (PICTURES[found]) {
      parent.append(element('span', 'm', PICTURES[found]));
      if (found !== '\r') parent.append(found);
    } else {
      parent.append(element('span', 'c', 'U+' + found.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')));
    }
    done = match.index + found.length;
  }
  if (done < text.length) parent.append(text.slice(done));
}

const nameOf = (i) => data.names[data.ids[i]] || `#${data.ids[i]}`;

// A token's text; or a box for a piece of a character, and a name for a token that has no text.
function appendToken(parent, i) {
  const text = data.texts[i];
  if (data.kinds[i] === 'p') parent.append(element('span', 'p'));
  else if (text === '') parent.append(element('span', 'c', nameOf(i)));
  // Joins what stands beside it where it stands in a text; by itself it would be invisible.
  else if (/^[\u200c\u200d]+$/.test(text)) for (const one of text) parent.append(element('span', 'c', one === '\u200d' ? 'ZWJ' : 'ZWNJ'));
  else appendText(parent, text);
}

const spans = [];
const chunks = []; // {first, end, box, painted}: tokens [first, end); painted: the version its shades show

// Where the chunk that begins with token `first` ends: after a line, or else before a word.
function endOfChunk(first) {
  if (N - first <= CHUNK * 1.5) return N;
  for (let i = first + CHUNK; i > first + CHUNK / 2; i--) if (data.texts[i - 1].endsWith('\n')) return i;
  for (let i = first + CHUNK; i > first + CHUNK / 2; i--) if (/[.!?。！？]$/.test(data.texts[i - 1])) return i;
  for (let i = first + CHUNK; i > first + CHUNK / 2; i--) if (/^\s/.test(data.texts[i])) return i;
  return first + CHUNK;
}

function buildText() {
  const all = document.createDocumentFragment();
  for (let first = 0; first < N; ) {
    const end = endOfChunk(first);
    const box = element('div', 'chunk');
    box.dataset.first = number(first);
    for (let i = first; i < end; i++) {
      const span = element('span', 't');
      span.token = i;
      appendToken(span, i);
      spans.push(span);
      box.append(span);
    }
    chunks.push({ first, end, box, painted: -1 });
    box.chunk = chunks.length - 1;
    all.append(box);
    first = end;
  }
  textBox.append(all);
}

let version = 0;
let selected = -1;

function classOf(i) {
  let name = 't';
  const kept = keptInView(i);
  if (kept) name += ' k' + levelOf(kept, cachesInView());
  else if (!seenInView(i)) name += ' u';
  else if (view.layer >= 0) name += ' k0';
  if (cuts.length && reach[i] === L) name += ' s';
  if (echoed[i]) name += ' e' + (echoed[i] & 2 ? ' first' : '') + (echoed[i] & 4 ? ' last' : '');
  if (i === selected) name += ' sel';
  return name;
}

function paintChunk(chunk) {
  if (chunk.painted === version) return;
  for (let i = chunk.first; i < chunk.end; i++) spans[i].className = classOf(i);
  chunk.painted = version;
}

// Only what is near the window is painted; the rest when it comes near, or is printed.
const near = new Set();
const watcher = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const chunk = chunks[target.chunk];
      if (isIntersecting) {
        near.add(chunk);
        paintChunk(chunk);
      } else near.delete(chunk);
    }
  },
  { rootMargin: '600px' },
);
addEventListener('beforeprint', () => chunks.forEach(paintChunk));

function repaint() {
  version++;
  near.forEach(paintChunk);
}
