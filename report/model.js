// The data of the page and what can be counted in it. Knows no element but the block that holds the data.
const data = JSON.parse(document.getElementById('data').textContent);
const N = data.ids.length;
const L = data.layers;
const H = data.heads;
const CACHES = L * H;
const LEVELS = 8;
const ROW = Math.ceil(N / 8); // bytes of one mask

function bytes(base64) {
  const text = atob(base64);
  const result = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) result[i] = text.charCodeAt(i);
  return result;
}

const keptBits = bytes(data.kept);
const seenBits = bytes(data.reach);
const isSet = (bits, row, i) => (bits[row * ROW + (i >> 3)] >> (i & 7)) & 1;
const isKept = (layer, head, i) => isSet(keptBits, layer * H + head, i) === 1;
const isSeen = (layer, i) => isSet(seenBits, layer, i) === 1;

// inLayer[l * N + i]: heads of layer l that keep token i. inAll[i]: caches that do. reach[i]: layers that saw it.
const inLayer = new Uint16Array(L * N);
const inAll = new Uint32Array(N);
const reach = new Uint16Array(N);
const seenBy = new Uint32Array(L);
for (let l = 0; l < L; l++) {
  for (let b = 0; b < ROW; b++) {
    for (let h = 0; h < H; h++) {
      for (let bits = keptBits[(l * H + h) * ROW + b]; bits; bits &= bits - 1) {
        const i = 8 * b + 31 - Math.clz32(bits & -bits);
        inLayer[l * N + i]++;
        inAll[i]++;
      }
    }
    for (let bits = seenBits[l * ROW + b]; bits; bits &= bits - 1) {
      reach[8 * b + 31 - Math.clz32(bits & -bits)]++;
      seenBy[l]++;
    }
  }
}
// Layers after which tokens were dropped.
const cuts = [];
for (let l = 0; l + 1 < L; l++) if (seenBy[l + 1] < seenBy[l]) cuts.push(l);

const echoed = new Uint8Array(N); // 1: repeated in the answer; + 2: the first token of such a place; + 4: its last
for (const [first, end] of data.echoes) {
  echoed.fill(1, first, end);
  echoed[first] |= 2;
  echoed[end - 1] |= 4;
}

// The share of the attention mass that each layer keeps; null, or no list at all, where it was not measured.
const attentionOf = (layer) => data.attention[layer] ?? null;
const measured = data.attention.some((share) => share !== null);

// What is looked at: every cache (layer -1), one layer (head -1), or one head of it.
const view = { layer: -1, head: -1 };
const cachesInView = () => (view.layer < 0 ? CACHES : view.head < 0 ? H : 1);
function keptInView(i) {
  if (view.layer < 0) return inAll[i];
  return view.head < 0 ? inLayer[view.layer * N + i] : Number(isKept(view.layer, view.head, i));
}
const seenInView = (i) => view.layer < 0 || isSeen(view.layer, i);

// Shades follow the square root of the share: what few caches keep is most of what there is to see.
const levelOf = (count, of) => (count === 0 ? 0 : Math.max(1, Math.ceil(LEVELS * Math.sqrt(count / of) - 1e-9)));

const number = (n) => n.toLocaleString('en');
const plural = (n, word) => `${number(n)} ${word}${n === 1 ? '' : 's'}`;
const percent = (part, whole) => `${((100 * part) / whole).toFixed(1)} %`;
const headsOf = (list) => `${list.length === 1 ? 'head' : 'heads'} ${list.join(', ')}`;
const upTo = (from, to) => (from === to ? number(from) : `${number(from)}–${number(to)}`);
const keepingHeads = (layer, keeps) => [...Array(H).keys()].filter((head) => keeps(layer, head));

const countCaches = (keeps) => [...Array(L).keys()].reduce((sum, layer) => sum + keepingHeads(layer, keeps).length, 0);

// "layer 1 (heads 0, 1), layer 2 (head 1)": the caches for which keeps(layer, head) holds.
function cachesText(keeps) {
  const parts = [];
  for (let l = 0; l < L; l++) {
    const heads = keepingHeads(l, keeps);
    if (heads.length) parts.push(`layer ${l} (${heads.length === H && H > 1 ? 'all heads' : headsOf(heads)})`);
  }
  return parts.join(', ');
}
