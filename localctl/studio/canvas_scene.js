// The scene that the canvas edits: its regions, their masks, undo and redo. One scope with the other canvas_*.js.
const LIMITS = { regions: 16, undo: 100, maskSide: 512, text: 300 };
const NEW_REGION = {
  phrase: '', box: null, mask: null, strength: 1, outside_strength: 1, start: 0, end: 1, prompt: '', negative_prompt: '',
  occurrence: 0,
};
const options = setup; // from canvas.py
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const copyOf = (value) => JSON.parse(JSON.stringify(value));

function sceneOf(value) {
  const given = value && typeof value === 'object' ? value : {};
  return {
    width: Number(given.width) || 512,
    height: Number(given.height) || 512,
    regions: (Array.isArray(given.regions) ? given.regions : []).map((region) => ({ ...NEW_REGION, ...region })),
  };
}

let scene = sceneOf(props.value);
let selected = null; // id of a region
let tool = options.tools[0] === 'select' ? options.tools[1] : options.tools[0];
let brush = 0.06; // share of the longer side
let draft = null; // a region as it would be if the pointer were released now
const past = [];
const future = [];

const regionOf = (id) => scene.regions.find((region) => region.id === id);
const shownRegions = () => {
  const regions = scene.regions.map((region) => (draft && region.id === draft.id ? draft : region));
  return draft && !regionOf(draft.id) ? [...regions, draft] : regions;
};
const colorOf = (region) => options.colors[region.color % options.colors.length];
const numberOf = (region) => shownRegions().findIndex((other) => other.id === region.id) + 1;

function newRegion(place) {
  const taken = new Set(scene.regions.map((region) => region.color));
  let color = 0;
  while (taken.has(color) && color < options.colors.length - 1) color += 1;
  const ids = new Set(scene.regions.map((region) => region.id));
  let count = scene.regions.length + 1;
  while (ids.has(`r${count}`)) count += 1;
  return { ...NEW_REGION, id: `r${count}`, color, ...place };
}

// Make `next` the scene; what was before can be undone. `quiet`: a step of typing, which is undone with the first one.
function commit(next, quiet = false) {
  if (!quiet || !past.length || !past[past.length - 1].quiet) past.push({ scene, quiet });
  if (past.length > LIMITS.undo) past.shift();
  future.length = 0;
  scene = next;
  publish();
}

function publish() {
  draft = null;
  if (selected && !regionOf(selected)) selected = null;
  props.value = copyOf(scene);
  trigger('input');
  refresh();
}

function step(from, to) {
  const entry = from.pop();
  if (!entry) return;
  to.push({ scene, quiet: false });
  scene = entry.scene;
  publish();
}
const undo = () => step(past, future);
const redo = () => step(future, past);

function setRegion(region, quiet = false) {
  const exists = Boolean(regionOf(region.id));
  if (!exists && scene.regions.length >= LIMITS.regions) {
    say(`A scene has at most ${LIMITS.regions} regions.`);
    draft = null;
    refresh();
    return;
  }
  const regions = exists
    ? scene.regions.map((other) => (other.id === region.id ? region : other))
    : [...scene.regions, region];
  selected = region.id;
  commit({ ...scene, regions }, quiet);
}

function removeRegion(id) {
  if (!regionOf(id) || options.fixed) return;
  const at = scene.regions.findIndex((region) => region.id === id);
  const regions = scene.regions.filter((region) => region.id !== id);
  selected = regions.length ? regions[Math.min(at, regions.length - 1)].id : null;
  commit({ ...scene, regions });
}

function clearRegion(id) {
  const region = regionOf(id);
  if (region) setRegion({ ...region, box: null, mask: null });
}

// ---- masks: a canvas with the mask as its alpha channel, from and to a PNG that is white on black
const masks = new Map(); // data URL -> { canvas, box } once it is decoded

function maskSize() {
  const scale = Math.min(1, LIMITS.maskSide / Math.max(scene.width, scene.height));
  return [Math.max(1, Math.round(scene.width * scale)), Math.max(1, Math.round(scene.height * scale))];
}

function blankMask() {
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = maskSize();
  canvas.getContext('2d', { willReadFrequently: true });
  return canvas;
}

function maskOf(url) {
  if (masks.has(url)) return masks.get(url);
  masks.set(url, null);
  const image = new Image();
  image.onload = () => {
    const canvas = blankMask();
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      pixels.data[i + 3] = Math.round((pixels.data[i] * pixels.data[i + 3]) / 255);
      pixels.data[i] = pixels.data[i + 1] = pixels.data[i + 2] = 255;
    }
    context.putImageData(pixels, 0, 0);
    masks.set(url, { canvas, box: boxAround(canvas) });
    refresh();
  };
  image.src = url;
  return null;
}

function urlOf(canvas) {
  const flat = document.createElement('canvas');
  [flat.width, flat.height] = [canvas.width, canvas.height];
  const context = flat.getContext('2d');
  context.fillStyle = '#000';
  context.fillRect(0, 0, flat.width, flat.height);
  context.drawImage(canvas, 0, 0);
  const url = flat.toDataURL('image/png');
  masks.set(url, { canvas, box: boxAround(canvas) });
  return url;
}

// The box around what is painted, xyxy in [0, 1]; null where nothing is.
function boxAround(canvas) {
  const { width, height } = canvas;
  const data = canvas.getContext('2d').getImageData(0, 0, width, height).data;
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      if (data[4 * (y * width + x) + 3] > 32) {
        if (x < left) left = x;
        if (x > right) right = x;
        if (y < top) top = y;
        bottom = y;
      }
    }
  }
  return right < 0 ? null : [left / width, top / height, (right + 1) / width, (bottom + 1) / height];
}

function boxOf(region) {
  if (region.box) return region.box;
  const mask = region.mask && maskOf(region.mask);
  return mask ? mask.box : null;
}

// A canvas to paint a region's mask on: its mask, or its box filled.
function paintable(region) {
  const canvas = blankMask();
  const context = canvas.getContext('2d');
  const mask = region.mask && maskOf(region.mask);
  if (mask) context.drawImage(mask.canvas, 0, 0, canvas.width, canvas.height);
  if (region.box) {
    const [left, top, right, bottom] = region.box;
    context.fillStyle = '#fff';
    context.fillRect(left * canvas.width, top * canvas.height, (right - left) * canvas.width, (bottom - top) * canvas.height);
  }
  return canvas;
}

// The region with its place moved and scaled from one box into another.
function placed(region, from, to) {
  if (region.box) return { ...region, box: to };
  const mask = maskOf(region.mask);
  if (!mask) return region;
  const canvas = blankMask();
  const scale = (box) => [
    box[0] * canvas.width, box[1] * canvas.height,
    Math.max(1, (box[2] - box[0]) * canvas.width), Math.max(1, (box[3] - box[1]) * canvas.height),
  ];
  canvas.getContext('2d').drawImage(mask.canvas, ...scale(from), ...scale(to));
  return { ...region, mask: urlOf(canvas) };
}
